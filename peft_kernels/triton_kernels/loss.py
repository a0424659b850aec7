"""The loss of a head, as in csrc/cuda/loss.

torch's GEMMs compute the logits, those of some rows at a time. A kernel replaces them by their gradients, and
a second GEMM multiplies these by the head. The gradients of a trained head go by pieces of the vocabulary
instead, so that each is complete in one GEMM.

The label's logit is left out of the sums and added at the end: near certainty p - 1 must not be a difference
of rounded values.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.loss.cross_entropy import check_dx
from .core.common import check, check_dtype, check_float, check_shape
from .core.launch import VARYING, config, launch
from .gated import exact_exp, sigmoid
from .linear.linear import checked_bias
from .loss_head import Adapter, Head, chosen, logit_pieces, rows_with_label, spread
from .nf4.nf4_weight import nf4

ROW = config(8, 1, BLOCK=2048)

LOWEST = tl.constexpr(-1e30)  # finite: differences and products are computed


@triton.jit
def exponential(x, EXACT: tl.constexpr):
    """e^x for x <= 0. EXACT: for logits in fp32."""
    if EXACT:
        return exact_exp(x)
    return tl.exp(x)


@triton.jit
def log_plus_one(x):
    """log(1 + x) for x from 0 to 1: the second term is what the sum has lost."""
    total = 1.0 + x
    return tl.log(total) + (x - (total - 1.0)) / total


@triton.jit
def quotient(a, b, EXACT: tl.constexpr):
    if EXACT:
        return tl.div_rn(a, b)
    return a / b


@triton.jit
def shaped(logit, scale, cap, CAPPED: tl.constexpr, EXACT: tl.constexpr):
    """z = softcap(scale * logit), and its derivative."""
    z = logit * scale
    if CAPPED:
        e = exponential(-2.0 * tl.abs(quotient(z, cap, EXACT)), EXACT)
        t = quotient(1.0 - e, 1.0 + e, EXACT)
        z = tl.where(z < 0.0, -cap * t, cap * t)
        derivative = (1.0 - t * t) * scale
    else:
        derivative = scale
    return z, derivative


@triton.jit(do_not_specialize=VARYING)
def cross_entropy_kernel(
    logits_ptr,
    labels_ptr,
    loss_ptr,
    entropy_ptr,
    lse_ptr,
    top_ptr,
    mean_ptr,
    squares_ptr,
    first_row,
    cols,
    ignored,
    scale,
    cap,
    smoothing,
    z_loss,
    CAPPED: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The loss of one row of logits; GRADIENT: overwrites them by its gradient. Row `first_row` of labels and
    results belongs to the first row of logits; pointers of results that are not needed are None."""
    row = tl.program_id(0).to(tl.int64)
    EXACT: tl.constexpr = logits_ptr.dtype.element_ty == tl.float32
    logits_ptr += row * cols
    label = tl.load(labels_ptr + first_row + row)
    is_scored = label != ignored
    is_valid = (label >= 0) & (label < cols)
    of_label = tl.load(logits_ptr + label, mask=is_valid, other=float("nan")).to(tl.float32)
    of_label, steep = shaped(of_label, scale, cap, CAPPED, EXACT)

    # Of each lane: the maximum, and the sum of all; without the label's, the sums of e = e^(z - maximum), of
    # e (z - maximum) and of e^2.
    most = tl.full((BLOCK,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    others = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, cols, BLOCK):
        col = begin + tl.arange(0, BLOCK)
        inside = col < cols
        logit = tl.load(logits_ptr + col, mask=inside, other=0.0).to(tl.float32)
        z, _ = shaped(logit, scale, cap, CAPPED, EXACT)
        total += tl.where(inside, z, 0.0)
        z = tl.where(inside, z, LOWEST)
        higher = tl.maximum(most, z)
        step = most - higher
        z -= higher
        e = tl.where(inside & (col != label), exponential(z, EXACT), 0.0)
        factor = exponential(step, EXACT)
        if entropy_ptr is not None:
            weighted = (weighted + others * step) * factor + e * z
        if squares_ptr is not None:
            squares = squares * (factor * factor) + e * e
        others = others * factor + e
        most = higher
    peak = tl.max(most, axis=0)
    step = most - peak
    factor = exponential(step, EXACT)
    weighted = tl.sum((weighted + others * step) * factor, axis=0)
    rest = tl.sum(others * factor, axis=0)
    mean = tl.div_rn(tl.sum(total, axis=0), tl.cast(cols, tl.float32))

    # The others against the label: logarithm of their odds, and probabilities.
    below = of_label - peak
    odds = tl.log(rest) - below
    p_others, p_label = sigmoid(odds, EXACT)
    surprise = tl.maximum(odds, 0.0) + log_plus_one(tl.exp(-tl.abs(odds)))
    above = tl.where(below < 0.0, tl.log(rest + tl.exp(below)), surprise)  # lse - peak
    lse = peak + above
    loss = (1.0 - smoothing) * surprise + z_loss * lse * lse
    loss += tl.where(smoothing > 0.0, smoothing * (lse - mean), 0.0)
    out = first_row + row
    tl.store(loss_ptr + out, tl.where(is_scored, loss, 0.0))
    tl.store(lse_ptr + out, tl.where(is_scored, lse, 0.0))
    if entropy_ptr is not None:
        entropy = above - tl.exp(-above) * weighted - p_label * below
        tl.store(entropy_ptr + out, tl.where(is_scored, entropy, 0.0))
        tl.store(top_ptr + out, is_scored & (peak <= of_label))
    if mean_ptr is not None:
        tl.store(mean_ptr + out, tl.where(is_scored, mean, 0.0))
    if squares_ptr is not None:
        p_peak = tl.exp(-above)
        square = tl.sum(squares * (factor * factor), axis=0) * (p_peak * p_peak) + p_label * p_label
        tl.store(squares_ptr + out, tl.where(is_scored, tl.log(square), 0.0))

    if GRADIENT:
        of_square, even = 2.0 * z_loss * lse, smoothing / cols
        at_label = (of_square * p_label + (smoothing - even) - p_others) * steep
        for begin in range(0, cols, BLOCK):
            col = begin + tl.arange(0, BLOCK)
            inside = col < cols
            logit = tl.load(logits_ptr + col, mask=inside, other=0.0).to(tl.float32)
            z, derivative = shaped(logit, scale, cap, CAPPED, EXACT)
            d = (exponential(z - lse, EXACT) * (1.0 + of_square) - even) * derivative
            d = tl.where(is_scored, tl.where(col == label, at_label, d), 0.0)
            tl.store(logits_ptr + col, d.to(logits_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=VARYING)
def cross_entropy_backward_kernel(
    logits_ptr,
    labels_ptr,
    lse_ptr,
    of_label_ptr,
    of_p_ptr,
    of_pz_ptr,
    first_col,
    cols,
    vocabulary,
    ignored,
    scale,
    cap,
    smoothing,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Overwrites columns from `first_col` on of one row of logits z by their gradients, p (of_p + of_pz z),
    with -of_label added to the label's."""
    row = tl.program_id(0).to(tl.int64)
    EXACT: tl.constexpr = logits_ptr.dtype.element_ty == tl.float32
    logits_ptr += row * cols
    label = tl.load(labels_ptr + row)
    lse, of_label, of_p = tl.load(lse_ptr + row), tl.load(of_label_ptr + row), tl.load(of_p_ptr + row)
    of_pz = 0.0 if of_pz_ptr is None else tl.load(of_pz_ptr + row)
    for begin in range(0, cols, BLOCK):
        col = begin + tl.arange(0, BLOCK)
        inside = col < cols
        logit = tl.load(logits_ptr + col, mask=inside, other=0.0).to(tl.float32)
        z, derivative = shaped(logit, scale, cap, CAPPED, EXACT)
        term = tl.where(first_col + col == label, smoothing - 1.0, 0.0) - smoothing / vocabulary
        factor = of_p + of_pz * tl.maximum(z, LOWEST)  # a masked logit has probability 0
        d = (exponential(z - lse, EXACT) * factor + of_label * term) * derivative
        d = tl.where(label != ignored, d, 0.0)
        tl.store(logits_ptr + col, d.to(logits_ptr.dtype.element_ty), mask=inside)


ALL = slice(None)


def linear_cross_entropy(args: Any) -> tuple[Tensor, ...]:
    check_dx(args)
    return _losses(args, None, None, args.need_dx)


def linear_cross_entropy_trained(args: Any) -> tuple[Tensor, ...]:
    return _losses(args, args.h, args.lora_b, False)[:-1]


def _losses(args: Any, h: Tensor | None, lora_b: Tensor | None, need_dx: bool) -> tuple[Tensor, ...]:
    head = _checked(args)
    rows = rows_with_label(args)
    x, labels = chosen(args.x, rows), chosen(args.labels, rows)
    adapter = _adapter(args, h, lora_b, rows)
    m, itemsize = len(x), x.element_size() if adapter is None else 4

    needs = True, args.need_entropy, True, args.need_entropy, args.need_mean, args.need_squares, need_dx
    counts = [m if needed else 0 for needed in needs]
    loss, entropy, lse, mean, squares = (x.new_empty(counts[i], dtype=torch.float32) for i in (0, 1, 2, 4, 5))
    top, dx = x.new_empty(counts[3], dtype=torch.bool), x.new_empty(counts[6], head.features)
    results = loss, entropy, lse, top, mean, squares
    pointers = [t if needed else None for t, needed in zip(results, needs[:-1], strict=True)]
    for part in logit_pieces(m, head.vocabulary, itemsize):
        some = slice(part.start, part.stop)
        logits = head.logits(x[some])
        if adapter is not None:
            logits = adapter.added(logits, some, ALL)
        sizes = part.start, head.vocabulary, *_numbers(args), args.z_loss
        constants = {"CAPPED": args.softcap > 0, "GRADIENT": need_dx, "enable_fp_fusion": False}
        launch(cross_entropy_kernel, (len(part),), logits, labels, *pointers, *sizes, config=ROW, **constants)
        if need_dx:
            head.write_dx(logits, dx[some])
    found = zip((*results, dx), needs, strict=True)
    return tuple(spread(t, rows, args.x) if needed else t for t, needed in found)


def linear_cross_entropy_backward(args: Any) -> tuple[Tensor, ...]:
    head = _checked(args)
    _check_backward(args)
    rows = rows_with_label(args)
    x, labels = chosen(args.x, rows), chosen(args.labels, rows)
    given = args.lse, args.of_label, args.of_p, args.of_pz
    factors = [None if t is None else chosen(t, rows) for t in given]
    adapter = _adapter(args, args.h, args.lora_b, rows)
    weight, bias, lora_b = args.base.weight, args.bias, args.lora_b
    dx = x.new_zeros(x.shape, dtype=torch.float32) if args.need_dx else None
    dh = None if adapter is None or not args.need_dh else torch.zeros_like(adapter.h)
    dw = torch.empty_like(weight) if args.need_dw else None
    dbias = torch.empty_like(bias) if args.need_dbias else None
    db = torch.empty_like(lora_b) if args.need_db else None
    for part, of_part, d in head.by_pieces(x, x.element_size() if adapter is None else 4):
        if adapter is not None:
            d = adapter.added(d, ALL, part)
        sizes = part.start, d.shape[1], head.vocabulary, *_numbers(args)
        constants = {"CAPPED": args.softcap > 0, "enable_fp_fusion": False}
        tensors = d, labels, *factors
        launch(cross_entropy_backward_kernel, (len(x),), *tensors, *sizes, config=ROW, **constants)
        rounded = d.to(x.dtype)
        if dx is not None:
            _add_product(dx, rounded, of_part)
        if dw is not None:
            dw[part] = torch.mm(rounded.t(), x)
        if dbias is not None:
            dbias[part] = d.sum(0, dtype=torch.float32)
        if adapter is not None:
            adapter.add_gradients(d, part, dh, db)
    dx, dh = (t if t is None else spread(t.to(u.dtype), rows, u) for t, u in ((dx, args.x), (dh, args.h)))
    return tuple(x.new_empty(0) if t is None else t for t in (dx, dw, dbias, dh, db))


def _add_product(sums: Tensor, a: Tensor, b: Tensor) -> None:
    """In fp32."""
    if a.dtype == torch.float32:
        sums.addmm_(a, b)
    else:
        sums += torch.mm(a, b)


def _numbers(args: Any) -> tuple[Any, ...]:
    return args.ignore_index, args.logit_scale, args.softcap, args.label_smoothing


def _adapter(args: Any, h: Tensor | None, lora_b: Tensor | None, rows: Tensor | None) -> Adapter | None:
    check((h is None) == (lora_b is None), "h, lora_b", "both or neither", "one")
    if h is None or lora_b is None:
        return None
    for t, name, count in ((h, "h", len(args.x)), (lora_b, "lora_b", args.vocabulary)):
        check_float(t, name)
        check_shape(t, (count, h.shape[-1]), name)
    return Adapter(chosen(h.float(), rows), lora_b.float())


def _checked(args: Any) -> Head:
    x, base = args.x, args.base
    check_float(x, "x")
    check(x.dim() == 2, "x", "2 dimensions", x.dim())
    check_dtype(args.labels, torch.int64, "labels")
    check_shape(args.labels, x.shape[:1], "labels")
    check(args.vocabulary > 0, "vocabulary", "1 or more", args.vocabulary)
    check(args.softcap >= 0, "softcap", "0 or more", args.softcap)
    check(0 <= args.label_smoothing <= 1, "label_smoothing", "0 to 1", args.label_smoothing)
    shape = args.vocabulary, x.shape[1]
    bias = None if args.bias is None else checked_bias(args.bias, shape[:1], x.dtype)
    if base.absmax is not None:
        return Head(nf4(base, *shape), bias, *shape)
    if base.weight.dtype != torch.float32:  # that is rounded
        check_dtype(base.weight, x.dtype, "weight")
    check_shape(base.weight, shape, "weight")
    return Head(base.weight.to(x.dtype), bias, *shape)


def _check_backward(args: Any) -> None:
    for name in ("of_label", "of_p", "of_pz", "lse"):
        t = getattr(args, name)
        if t is not None:
            check_dtype(t, torch.float32, name)
            check_shape(t, args.x.shape[:1], name)
    packed = args.base.absmax is not None
    check(not (args.need_dw and packed), "need_dw", "False with a packed weight", True)
    check(not args.need_dbias or args.bias is not None, "need_dbias", "False without a bias", True)
    adapted = args.h is not None
    check(adapted or not (args.need_dh or args.need_db), "need_dh, need_db", "False without h", True)

"""The loss of a frozen head without materialised logits, one piece of the vocabulary after another.

An online softmax as in FlashAttention (Dao et al. 2022), with the head as keys and values: earlier sums are
rescaled when a greater logit comes up. GEMMs are torch's; a packed head is dequantised piece by piece. The
label's own logit is added at the end: near certainty p - 1 must not be a difference of rounded values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.op import OPS
from ..ops.loss.cross_entropy import check_dx, narrow_base, row_alignment
from .core.common import check, check_dtype, check_float, check_shape
from .core.launch import VARYING, cdiv, config, launch, power_of_2
from .gated import exact_exp
from .nf4.nf4 import dequantize_nf4

PIECES = 50
"""About this many pieces of the vocabulary."""
LEAST, MOST = 512, 4096  # columns of a piece
SOFTMAX = config(8, 1)
COMBINE = config(4, 3, BLOCK_M=4, BLOCK_K=256)

MAX, SUM, WEIGHTED, LABEL, TOTAL, FACTOR = (tl.constexpr(i) for i in range(6))
"""Rows of the running statistics of each row's logits, [STATES, m]: the maximum without the label's logit;
sums over the same of e = e^(z - max) and of e z; the label's logit; the sum of all logits; the factor that
rescales sums of earlier pieces."""
STATES = 6
LOWEST = tl.constexpr(-3e38)


@triton.jit
def exponential(x, EXACT: tl.constexpr):
    """e^x for x <= 0. EXACT: for fp32 results."""
    if EXACT:
        return exact_exp(x)
    return tl.exp(x)


@triton.jit(do_not_specialize=VARYING)
def softmax_kernel(
    logits_ptr,
    bias_ptr,
    labels_ptr,
    states_ptr,
    weight_ptr,
    label_rows_ptr,
    m,
    first_row,
    cols,
    features,
    scale,
    cap,
    CAPPED: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row of a piece, which begins at row `first_row` of the head. Overwrites logits by e^(z - max) times
    the derivative of the cap, 0 for the label, and copies the label's row of the head."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    inside = col < cols
    at = logits_ptr + row * cols + col
    z = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + first_row + col, mask=inside, other=0.0).to(tl.float32)
    z *= scale
    derivative = tl.full((BLOCK,), 1.0, tl.float32)
    if CAPPED:
        e = tl.exp(-2.0 * tl.abs(z / cap))
        t = (1.0 - e) / (1.0 + e)
        derivative = 1.0 - t * t
        z = tl.where(z < 0.0, -cap * t, cap * t)
    label = tl.load(labels_ptr + row) - first_row
    mine = col == label
    others = inside & (col != label)
    state = states_ptr + row
    before = tl.load(state + MAX * m)
    top = tl.maximum(tl.max(tl.where(others, z, LOWEST), axis=0), before)
    EXACT: tl.constexpr = logits_ptr.dtype.element_ty == tl.float32
    e = tl.where(others, exponential(z - top, EXACT), 0.0)
    factor = tl.exp(before - top)
    tl.store(state + MAX * m, top)
    tl.store(state + FACTOR * m, factor)
    tl.store(state + SUM * m, tl.load(state + SUM * m) * factor + tl.sum(e, axis=0))
    weighted = tl.sum(tl.where(others, e * z, 0.0), axis=0)
    tl.store(state + WEIGHTED * m, tl.load(state + WEIGHTED * m) * factor + weighted)
    total = tl.sum(tl.where(inside, z, 0.0), axis=0)
    tl.store(state + TOTAL * m, tl.load(state + TOTAL * m) + total)
    here = (label >= 0) & (label < cols)
    of_label = tl.sum(tl.where(mine, z, 0.0), axis=0)
    tl.store(state + LABEL * m, tl.where(here, of_label, tl.load(state + LABEL * m)))
    if WEIGHTS:
        tl.store(at, (e * derivative).to(logits_ptr.dtype.element_ty), mask=inside)
        if here:
            for begin in range(0, features, BLOCK):
                k = begin + col
                kept = tl.load(weight_ptr + label * features + k, mask=k < features, other=0.0)
                tl.store(label_rows_ptr + row * features + k, kept, mask=k < features)


@triton.jit(do_not_specialize=VARYING)
def combine_kernel(
    dx_ptr,
    sums_ptr,
    mean_ptr,
    factors_ptr,
    m,
    features,
    of_mean,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dx = factors[0] * sums + factors[1] * dx + of_mean * mean; 0 in rows whose factors are 0."""
    strips = tl.cdiv(features, BLOCK_K)
    row = (tl.program_id(0) // strips).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) % strips * BLOCK_K + tl.arange(0, BLOCK_K)
    first = tl.load(factors_ptr + row, mask=row < m, other=0.0)[:, None]
    second = tl.load(factors_ptr + m + row, mask=row < m, other=0.0)[:, None]
    at = row[:, None] * features + k[None, :]
    inside = (row < m)[:, None] & (k < features)[None, :]
    value = first * tl.load(sums_ptr + at, mask=inside, other=0.0)
    value += second * tl.load(dx_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if mean_ptr is not None:
        value += of_mean * tl.load(mean_ptr + k, mask=k < features, other=0.0)[None, :]
    value = tl.where((first == 0.0) & (second == 0.0), 0.0, value)
    tl.store(dx_ptr + at, value.to(dx_ptr.dtype.element_ty), mask=inside)


def linear_cross_entropy(args: Any) -> tuple[Tensor, ...]:
    _check(args)
    x, labels = args.x.contiguous(), args.labels.contiguous()
    m, features = x.shape
    states = x.new_zeros((STATES, m), dtype=torch.float32)
    states[MAX.value].fill_(LOWEST.value)
    states[LABEL.value].fill_(float("nan"))  # stays so for a label outside the vocabulary
    dx = torch.zeros_like(x) if args.need_dx else x.new_empty(0, features)
    sums = x.new_zeros((m if args.need_dx else 0, features), dtype=torch.float32)
    smooths = args.need_dx and args.label_smoothing > 0
    mean = x.new_zeros(features, dtype=torch.float32) if smooths else None
    for begin, weight in _pieces(args):
        logits = torch.mm(x, weight.t())
        if mean is not None:
            mean += weight.sum(0, dtype=torch.float32)
        tensors = logits, args.bias, labels, states, weight, dx
        sizes = m, begin, len(weight), features, args.logit_scale, args.softcap
        launch(
            softmax_kernel,
            (m,),
            *tensors,
            *sizes,
            config=SOFTMAX,
            CAPPED=args.softcap > 0,
            WEIGHTS=args.need_dx,
            BLOCK=power_of_2(len(weight)),
        )
        if args.need_dx:
            sums *= states[FACTOR.value][:, None]
            if x.dtype == torch.float32:
                sums.addmm_(logits, weight)
            else:
                sums += torch.mm(logits, weight)
    *scores, factors = _scores(args, states)
    if args.need_dx:
        grid = (cdiv(m, COMBINE["BLOCK_M"]) * cdiv(features, COMBINE["BLOCK_K"]),)
        of_mean = -args.label_smoothing * args.logit_scale / args.vocabulary
        launch(combine_kernel, grid, dx, sums, mean, factors, m, features, of_mean, config=COMBINE)
    return *scores, dx


def _check(args: Any) -> None:
    check_dx(args)
    check_float(args.x, "x")
    check(args.x.dim() == 2, "x", "2 dimensions", args.x.dim())
    check_dtype(args.labels, torch.int64, "labels")
    check_shape(args.labels, args.x.shape[:1], "labels")
    check(args.vocabulary > 0, "vocabulary", "1 or more", args.vocabulary)
    if args.base.absmax is None:
        if args.base.weight.dtype != torch.float32:  # that is rounded
            check_dtype(args.base.weight, args.x.dtype, "weight")
        check_shape(args.base.weight, (args.vocabulary, args.x.shape[1]), "weight")
    if args.bias is not None:
        check_float(args.bias, "bias")
        check_shape(args.bias, (args.vocabulary,), "bias")


def _pieces(args: Any) -> Iterator[tuple[int, Tensor]]:
    """Pieces of the head, dense and contiguous, each with its first row."""
    n, k, base = args.vocabulary, args.x.shape[1], args.base
    unit = row_alignment(base, max(k, 1))
    whole = base.weight.contiguous() if base.absmax is None else None
    if unit > MOST:  # too few rows begin at a block
        whole, unit = _dequantized(base, n, k, args.x.dtype), 1
    step = max(min(max(power_of_2(cdiv(n, PIECES)), LEAST), MOST) // unit, 1) * unit
    for begin in range(0, n, step):
        end = min(begin + step, n)
        if whole is not None:
            yield begin, whole[begin:end].to(args.x.dtype)
        else:
            yield begin, _dequantized(narrow_base(base, begin, end, k), end - begin, k, args.x.dtype)


def _dequantized(base: Any, n: int, k: int, dtype: torch.dtype) -> Tensor:
    return dequantize_nf4(OPS["dequantize_nf4"].named((*base, [n, k], dtype)))


def _scores(args: Any, states: Tensor) -> tuple[Tensor, ...]:
    """loss, lse, entropy, top, mean, and the factors of `combine_kernel`. In fp64, which is cheap for a few
    values per row."""
    most, rest, weighted, of_label, total, _ = states.double()
    valid = args.labels != args.ignore_index
    smoothing = args.label_smoothing
    # log(1 + rest / label's).
    surprise = torch.logaddexp(most - of_label + rest.log(), torch.zeros_like(rest))
    lse = of_label + surprise
    loss = (1 - smoothing) * surprise + args.z_loss * lse * lse
    loss += smoothing * (lse - total / args.vocabulary)
    each = (most - lse).exp()
    p_label, z_weight = (-surprise).exp(), 2 * args.z_loss * lse
    entropy = lse - each * weighted - p_label * of_label if args.need_entropy else lse[:0]
    steep = args.logit_scale * (1 - (of_label / args.softcap) ** 2 if args.softcap else 1)
    of_sums = (1 + z_weight) * each * args.logit_scale
    of_label_row = (z_weight * p_label + smoothing - each * rest) * steep
    factors = torch.stack((of_sums, of_label_row)).where(valid, 0.0).float()
    scored = valid if args.need_entropy else valid[:0]
    mean = (total / args.vocabulary).where(valid, 0.0).float()
    return (
        loss.where(valid, 0.0).float(), lse.where(valid, 0.0).float(), entropy.where(scored, 0.0).float(),
        (most <= of_label)[: len(scored)] & scored, mean if args.need_mean else mean[:0], factors,
    )  # fmt: skip

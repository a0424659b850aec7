"""Cross-entropy of a language model's head, computing its logits piece by piece.

With z = softcap(logit_scale * (x W^T + bias + h B^T)) and lse = log sum_j e^(z_j), the loss of a token is

    (1 - label_smoothing) (lse - z_label) + label_smoothing (lse - mean_j z_j) + z_loss lse^2

Cap as in Gemma 2 (2024), z-loss as in PaLM (2022, section 5), smoothing as in torch's cross_entropy. For a
frozen head the forward, which has the logits, also computes the gradient of each token's loss with respect to
x; backward multiplies it by the incoming gradient of each token. The gradients of a trained head are sums
over tokens weighted by the incoming gradients, so its backward recomputes the logits piece by piece.

A dense fp32 head with bf16 or fp16 x is rounded to x's dtype, as under autocast.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.code_tables import NESTED_BLOCKSIZE
from ...core.formats import blocksize_of, byte_format
from ...core.op import Base, Op
from ..common import accumulator_dtype

PIECE = 1 << 22
"""Logits per piece, at least SHARE of all."""
SHARE = 1 / 64


class LinearCrossEntropy(Op):
    """Loss of a frozen head. In rows whose label is ignore_index all results are 0; softcap 0 means none.
    top, bool, computed with the entropy: no logit exceeds the label's. mean: mean of all logits. squares:
    log of the sum of squared probabilities. dx: gradient of a row's loss with respect to x, unavailable with
    both softcap and smoothing. Results not needed have no elements.

    Loss, entropy and lse have gradients. Those of the last two recompute the logits, for which x is saved
    where the entropy is needed. On a CPU a gradient of lse that is zero, as of a logit minus lse, costs
    nothing; elsewhere looking at it would be to wait."""

    name = "linear_cross_entropy"
    schema = (
        "(Tensor x, $base, SymInt vocabulary, Tensor? bias, Tensor labels, int ignore_index, "
        "float logit_scale, float softcap, float label_smoothing, float z_loss, bool need_dx, "
        "bool need_entropy, bool need_mean, bool need_squares) -> (Tensor loss, Tensor entropy, Tensor lse, "
        "Tensor top, Tensor mean, Tensor squares, Tensor dx)"
    )
    composite = True

    @staticmethod
    def reference(ops: Any, args: Any) -> tuple[Tensor, ...]:
        check_dx(args)
        args = _rounded(args)
        rows = max(PIECE, int(SHARE * args.x.shape[0] * args.vocabulary)) // max(args.vocabulary, 1)
        pieces = zip(args.x.split(max(rows, 1)), args.labels.split(max(rows, 1)), strict=True)
        found = [_piece(ops, args, x, labels, None, None) for x, labels in pieces]
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))

    @staticmethod
    def fake(args: Any) -> tuple[Tensor, ...]:
        x = args.x
        return *_scores(args), x.new_empty(x.shape if args.need_dx else (0, x.shape[1]))

    differentiable = ("x",)
    num_outputs = 3
    saved_meta = ("x", "weight", "absmax", "absmax2", "offset", "bias", "loss")
    saves_all_with = "need_entropy"
    saved_outputs = ("entropy", "lse", "top", "mean", "squares", "dx")

    @staticmethod
    def backward(
        ops: Any, args: Any, results: Any, need: Any, dy: tuple[Tensor | None, ...]
    ) -> dict[str, Any]:
        dloss, dentropy, dlse = dy
        has_lse = dlse is not None and not _is_zero(dlse)
        if args.need_entropy and (dentropy is not None or has_lse):
            head = *args.base, args.vocabulary, args.bias, None, None
            needs = True, False, False, False, False
            return {"x": _backward(ops, args, results, dy, head, needs)[0]}
        if has_lse:
            raise RuntimeError("need_entropy: expected True where lse is differentiated, got False")
        if dloss is None:
            return {"x": None}
        if results.dx.shape != args.x.shape:
            raise RuntimeError("need_dx: expected True where x is differentiated, got False")
        return {"x": (results.dx * _scored(args, dloss)[:, None]).to(args.x.dtype)}

    @staticmethod
    def flops(args: Any) -> int:
        return 2 * prod(args.x) * args.vocabulary * (1 + args.need_dx)


class LinearCrossEntropyTrained(Op):
    """`LinearCrossEntropy` of a trained head, with h = scaling x A^T of its adapter."""

    name = "linear_cross_entropy_trained"
    schema = (
        "(Tensor x, $base, SymInt vocabulary, Tensor? bias, Tensor? h, Tensor? lora_b, Tensor labels, "
        "int ignore_index, float logit_scale, float softcap, float label_smoothing, float z_loss, "
        "bool need_entropy, bool need_mean, bool need_squares) -> (Tensor loss, Tensor entropy, Tensor lse, "
        "Tensor top, Tensor mean, Tensor squares)"
    )
    composite = True

    @staticmethod
    def reference(ops: Any, args: Any) -> tuple[Tensor, ...]:
        if args.h is None:
            options, needs = args[args._fields.index("labels") : -3], args[-3:]
            head = args.x, *args.base, args.vocabulary, args.bias
            return tuple(ops.linear_cross_entropy(*head, *options, False, *needs)[:-1])
        args = _rounded(args)
        rows = max(PIECE, int(SHARE * args.x.shape[0] * args.vocabulary)) // max(args.vocabulary, 1)
        parts = (t.split(max(rows, 1)) for t in (args.x, args.labels, args.h))
        pieces = [
            _piece(ops, args, x, labels, h, args.lora_b)[:-1] for x, labels, h in zip(*parts, strict=True)
        ]
        return tuple(torch.cat(parts) for parts in zip(*pieces, strict=True))

    @staticmethod
    def fake(args: Any) -> tuple[Tensor, ...]:
        return _scores(args)

    differentiable = ("x", "weight", "bias", "h", "lora_b")
    num_outputs = 3
    saved_meta = ("loss",)
    saved_outputs = ("entropy", "lse", "top", "mean", "squares")

    @staticmethod
    def backward(
        ops: Any, args: Any, results: Any, need: Any, dy: tuple[Tensor | None, ...]
    ) -> dict[str, Any]:
        head = *args.base, args.vocabulary, args.bias, args.h, args.lora_b
        found = _backward(ops, args, results, dy, head, need)
        return dict(zip(LinearCrossEntropyTrained.differentiable, found, strict=True))

    @staticmethod
    def flops(args: Any) -> int:
        rank = args.h[-1] if args.h is not None else 0
        return 2 * args.x[0] * args.vocabulary * (args.x[1] + rank)


class LinearCrossEntropyBackward(Op):
    """Gradients, given each row's lse and those with respect to its logits z: p (of_p + of_pz z), where p are
    their probabilities, and -of_label for the label, with smoothing spread over all. Without of_pz it is 0.
    Gradients not needed have no elements."""

    name = "linear_cross_entropy_backward"
    schema = (
        "(Tensor of_label, Tensor of_p, Tensor? of_pz, Tensor lse, Tensor x, $base, SymInt vocabulary, "
        "Tensor? bias, Tensor? h, Tensor? lora_b, Tensor labels, int ignore_index, float logit_scale, "
        "float softcap, float label_smoothing, bool need_dx, bool need_dw, bool need_dbias, bool need_dh, "
        "bool need_db) -> (Tensor dx, Tensor dw, Tensor dbias, Tensor dh, Tensor db)"
    )
    composite = True

    @staticmethod
    def reference(ops: Any, args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        x, h, k = args.x, args.h, args.x.shape[1]
        acc = accumulator_dtype(x.dtype)
        fakes, args = LinearCrossEntropyBackward.fake(args), _rounded(args)
        found: list[list[Any]] = [[] for _ in range(5)]  # one entry per piece; dx and dh are summed
        dx, dh, dw, dbias, db = found
        for begin, end in _columns(args):
            base = narrow_base(args.base, begin, end, k)
            parts: list[Any] = [None if t is None else t[begin:end] for t in (args.bias, args.lora_b)]
            bias, b = parts
            logits = _logits(ops, args, x, base, end - begin, bias, h, b)
            factors = args.of_label, args.of_p, args.of_pz
            d = _logit_gradients(args, *logits, args.lse, args.labels, begin, *factors)
            rounded = d.to(x.dtype)
            if args.need_dx:
                dx = [sum(dx, _input_gradient(ops, rounded, base, k).to(acc))]
            if args.need_dh:
                dh = [sum(dh, d @ b.to(acc))]
            if args.need_dw:
                dw.append(rounded.t() @ x)
            if args.need_dbias:
                dbias.append(d.sum(0).to(bias.dtype))
            if args.need_db:
                db.append((d.t() @ h.to(acc)).to(b.dtype))
        both = zip((dx, dw, dbias, dh, db), fakes, strict=True)
        return tuple(torch.cat(part).to(like.dtype) if part else like for part, like in both)  # type: ignore[return-value]

    @staticmethod
    def fake(args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        def gradient(needed: bool, like: Tensor | None) -> Tensor:
            return args.x.new_empty(0) if like is None or not needed else like.new_empty(like.shape)

        likes = args.x, args.base.weight, args.bias, args.h, args.lora_b
        needs = args.need_dx, args.need_dw, args.need_dbias, args.need_dh, args.need_db
        dx, dw, dbias, dh, db = map(gradient, needs, likes)
        return dx, dw, dbias, dh, db

    @staticmethod
    def flops(args: Any) -> int:
        per_column = args.x[1] * (1 + args.need_dx + args.need_dw)
        if args.h is not None:
            per_column += args.h[1] * (1 + args.need_dh + args.need_db)
        return 2 * args.x[0] * args.vocabulary * per_column


def check_dx(args: Any) -> None:
    if args.need_dx and args.softcap and args.label_smoothing:
        # The gradient of smoothing is then no multiple of one row of the head.
        raise RuntimeError("need_dx: expected False with both softcap and label_smoothing, got True")


def _backward(
    ops: Any, args: Any, results: Any, dy: tuple[Tensor | None, ...], head: Any, needs: Any
) -> tuple[Tensor, ...]:
    """Gradients of a head, given those of each row's loss, entropy and lse.

    Of a logit z, dloss = p (1 + 2 z_loss lse) - onehot, dlse = p, and dentropy = p (lse - entropy - z), whose
    error is that of the logits: small only compared with the largest of them."""
    dloss, dentropy, dlse = dy
    lse, entropy = results.lse, results.entropy
    of_label = torch.zeros_like(lse) if dloss is None else dloss
    of_p, of_pz = of_label, None
    if args.z_loss:
        of_p = of_p * (1 + 2 * args.z_loss * lse)
    if dlse is not None:
        of_p = of_p + dlse
    if dentropy is not None and args.need_entropy:
        of_p, of_pz = torch.addcmul(of_p, dentropy, lse - entropy), -dentropy
    options = args.labels, args.ignore_index, args.logit_scale, args.softcap, args.label_smoothing
    found: tuple[Tensor, ...] = ops.linear_cross_entropy_backward(
        of_label, of_p, of_pz, lse, args.x, *head, *options, *needs
    )
    return found


def _is_zero(dlse: Tensor) -> bool:
    """Whether a gradient is known to be zero. Compilers pass subclasses without values."""
    return type(dlse) is Tensor and dlse.device.type == "cpu" and not dlse.any()


def _rounded(args: Any) -> Any:
    """The arguments with a dense head cast to x's dtype."""
    if args.base.absmax is not None:
        return args
    return args._replace(base=Base(args.base.weight.to(args.x.dtype)))


def _scored(args: Any, dloss: Tensor) -> Tensor:
    """dloss with zeros in rows without a label: a mean over no token sends them inf, and inf * 0 is NaN."""
    return dloss.where(args.labels != args.ignore_index, 0.0)


def _piece(
    ops: Any, args: Any, x: Tensor, labels: Tensor, h: Tensor | None, lora_b: Tensor | None
) -> tuple[Tensor, ...]:
    """loss, lse, entropy, top, mean, squares and dx of some rows."""
    z, steep = _logits(ops, args, x, args.base, args.vocabulary, args.bias, h, lora_b)
    valid = labels != args.ignore_index
    lse = z.logsumexp(-1)
    of_label = z.gather(-1, labels.where(valid, 0)[:, None]).squeeze(-1)
    smoothing = args.label_smoothing
    loss = (1 - smoothing) * (lse - of_label) + args.z_loss * lse * lse
    if smoothing:
        loss = loss + smoothing * (lse - z.mean(-1))
    entropy, dx = z.new_empty(0), x.new_empty(0, x.shape[1])
    top, mean, squares = z.new_empty(0, dtype=torch.bool), z.new_empty(0), z.new_empty(0)
    if args.need_entropy:
        entropy = (lse - ((z - lse[:, None]).exp() * z).sum(-1)).where(valid, 0.0)
        top = (z.amax(-1) == of_label) & valid
    if args.need_mean:
        mean = z.mean(-1).where(valid, 0.0)
    if args.need_squares:
        squares = ((2 * z).logsumexp(-1) - 2 * lse).where(valid, 0.0)
    if getattr(args, "need_dx", False):
        of_p = 1 + 2 * args.z_loss * lse
        d = _logit_gradients(args, z, steep, lse, labels, 0, torch.ones_like(lse), of_p, None).to(x.dtype)
        dx = _input_gradient(ops, d, args.base, x.shape[1])
    return loss.where(valid, 0.0), entropy, lse.where(valid, 0.0), top, mean, squares, dx


def _scores(args: Any) -> tuple[Tensor, ...]:
    """Uninitialised results per row."""
    x, rows, acc = args.x, args.x.shape[0], accumulator_dtype(args.x.dtype)
    loss, lse = (x.new_empty(rows, dtype=acc) for _ in range(2))
    scored = rows if args.need_entropy else 0
    entropy, top = x.new_empty(scored, dtype=acc), x.new_empty(scored, dtype=torch.bool)
    needs = args.need_mean, args.need_squares
    mean, squares = (x.new_empty(rows if need else 0, dtype=acc) for need in needs)
    return loss, entropy, lse, top, mean, squares


def _logits(
    ops: Any,
    args: Any,
    x: Tensor,
    base: Base,
    n: int,
    bias: Tensor | None,
    h: Tensor | None,
    b: Tensor | None,
) -> tuple[Tensor, Tensor | float]:
    """Logits of some columns, and their derivative with respect to the head's output."""
    acc = accumulator_dtype(x.dtype)
    if base.absmax is None:
        u = F.linear(x, base.weight, None if bias is None else bias.to(x.dtype)).to(acc)
    else:
        u = ops.nf4_linear(x, *base, n, bias).to(acc)
    if h is not None and b is not None:
        u = u + h.to(acc) @ b.to(acc).t()
    u = u * args.logit_scale
    if not args.softcap:
        return u, args.logit_scale
    capped = torch.tanh(u / args.softcap)
    return args.softcap * capped, args.logit_scale * (1 - capped * capped)


def _logit_gradients(
    args: Any,
    z: Tensor,
    steep: Tensor | float,
    lse: Tensor,
    labels: Tensor,
    begin: int,
    of_label: Tensor,
    of_p: Tensor,
    of_pz: Tensor | None,
) -> Tensor:
    """Gradients with respect to the head's output, in columns from `begin` on."""
    smoothing, n = args.label_smoothing, z.shape[1]
    of_label, of_p, column = of_label[:, None], of_p[:, None], labels[:, None] - begin
    here = (labels[:, None] != args.ignore_index) & (column >= 0) & (column < n)
    weights = of_p if of_pz is None else of_p + of_pz[:, None] * z
    d = (z - lse[:, None]).exp() * weights - of_label * (smoothing / args.vocabulary)
    d = d.scatter_add(1, column.where(here, 0), of_label.where(here, 0.0) * (smoothing - 1))
    return (d * steep).where(labels[:, None] != args.ignore_index, 0.0)


def _input_gradient(ops: Any, d: Tensor, base: Base, k: int) -> Tensor:
    if base.absmax is None:
        return d @ base.weight
    dx: Tensor = ops.nf4_linear_dx(d, *base, k)
    return dx


def _columns(args: Any) -> Iterator[tuple[int, int]]:
    """Pieces of the vocabulary."""
    m, n, unit = max(args.x.shape[0], 1), args.vocabulary, row_alignment(args.base, args.x.shape[1])
    step = max(max(PIECE, int(SHARE * m * n)) // m // unit, 1) * unit
    for begin in range(0, n, step):
        yield begin, min(begin + step, n)


def row_alignment(base: Base, k: int) -> int:
    """Number of rows of a packed head at whose multiples a block of scales begins."""
    if base.absmax is None:
        return 1
    size = blocksize_of(base.layout)
    if (form := byte_format(base.layout)) is not None:
        return form.cell(k, size)[0]
    block = size * NESTED_BLOCKSIZE
    return block // gcd(block, k)


def narrow_base(base: Base, begin: int, end: int, k: int) -> Base:
    """Rows of a weight; `begin` is a multiple of `row_alignment`."""
    if base.absmax is None:
        return Base(base.weight[begin:end])
    first, last, size = begin * k, end * k, blocksize_of(base.layout)
    flat, absmax2, offset = base.weight.reshape(-1), base.absmax2, base.offset
    if (form := byte_format(base.layout)) is not None:
        height, per_row = form.cell(k, size)[0], form.scales((1, k), size)
        absmax = base.absmax[begin // height * per_row : -(-end // height) * per_row]
        return Base(flat[first:last], absmax, None, None, base.layout)
    blocks = slice(first // size, -(-last // size))
    if absmax2 is not None and offset is not None:
        absmax2 = absmax2[blocks.start // NESTED_BLOCKSIZE : -(-blocks.stop // NESTED_BLOCKSIZE)]
    elif offset is not None:
        offset = offset[blocks]
    packed = flat[first // 2 : -(-last // 2)]
    return Base(packed, base.absmax[blocks], absmax2, offset, base.layout)

"""Attention, softmax(scale q k^T) v, without stored scores: backward recomputes the weights from each query's
maximum and sum of exponentials (Dao et al. 2022). Several query heads may share a key head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core import dispatch
from ...core.op import Op
from ...core.wrong_types import names_wrong_types
from ..common import accumulator_dtype
from ..lora.dropout import dropout_mask, dropout_scale, new_seed

_STRIP = 64
"""Rows of a strip of the dropout mask."""


class Attention(Op):
    """Attention of (batch, rows, heads, features). A query attends to the keys in its span [first, end) or in
    its two spans; if causal, only up to its own key, where the last query's own key is the last one. A query
    without keys gives 0. Dropout of the weights is applied after the softmax, by words of ops/lora/dropout.py
    in the order (batch, head, row // 64, key, row % 64), with rows padded to 64.

    `softmax`, (batch, heads, 2, rows): the maximum unscaled score, and 1 / sum of exponentials."""

    name = "attention"
    schema = (
        "(Tensor q, Tensor k, Tensor v, Tensor? spans, bool is_causal, float scale, float dropout_p, "
        "Tensor? seed) -> (Tensor y, Tensor softmax)"
    )
    composite = True

    @staticmethod
    def reference(ops: Any, args: Any) -> tuple[Tensor, Tensor]:
        weights, softmax = _weights(args)
        y = torch.einsum("bhrs,bshf->brhf", _dropped(args, weights), _per_query_head(args, args.v))
        return y.to(args.q.dtype).contiguous(), softmax

    @staticmethod
    def fake(args: Any) -> tuple[Tensor, Tensor]:
        batch, rows, heads, _ = args.q.shape
        softmax = args.q.new_empty((batch, heads, 2, rows), dtype=accumulator_dtype(args.q.dtype))
        return args.q.new_empty(args.q.shape), softmax

    differentiable = ("q", "k", "v")
    saved_outputs = ("y", "softmax")

    @staticmethod
    def backward(ops: Any, args: Any, results: Any, need: Any, dy: Tensor) -> dict[str, Any]:
        dq, dk, dv = ops.attention_backward(dy, *args, results.y, results.softmax)
        return {"q": dq, "k": dk, "v": dv}

    @staticmethod
    def flops(args: Any) -> int:
        batch, rows, heads, features = args.q
        return int(4 * batch * heads * rows * args.k[1] * features)


class AttentionBackward(Op):
    """Gradients of `Attention`, given its results and the gradient dy of y."""

    name = "attention_backward"
    schema = (
        "(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor? spans, bool is_causal, float scale, "
        "float dropout_p, Tensor? seed, Tensor y, Tensor softmax) -> (Tensor dq, Tensor dk, Tensor dv)"
    )
    composite = True

    @staticmethod
    def reference(ops: Any, args: Any) -> tuple[Tensor, Tensor, Tensor]:
        acc = accumulator_dtype(args.q.dtype)
        q, dy = args.q.to(acc), args.dy.to(acc)
        k, v = _per_query_head(args, args.k), _per_query_head(args, args.v)
        weights, _ = _weights(args)
        dv = torch.einsum("bhrs,brhf->bshf", _dropped(args, weights), dy)
        d_weights = _dropped(args, torch.einsum("brhf,bshf->bhrs", dy, v))
        # The row sums of weights * d_weights, computed over features, which are fewer than keys.
        row_sums = (dy * args.y.to(acc)).sum(-1).transpose(1, 2)[..., None]
        d_scores = weights * (d_weights - row_sums) * args.scale
        dq = torch.einsum("bhrs,bshf->brhf", d_scores, k)
        dk = torch.einsum("bhrs,brhf->bshf", d_scores, q)

        def per_key_head(gradient: Tensor) -> Tensor:
            return gradient.unflatten(2, (args.k.shape[2], -1)).sum(3).to(args.k.dtype)

        return dq.to(args.q.dtype).contiguous(), per_key_head(dk), per_key_head(dv)

    @staticmethod
    def fake(args: Any) -> tuple[Tensor, Tensor, Tensor]:
        k = args.k
        return args.q.new_empty(args.q.shape), k.new_empty(k.shape), k.new_empty(k.shape)

    @staticmethod
    def flops(args: Any) -> int:
        batch, rows, heads, features = args.q
        return int(10 * batch * heads * rows * args.k[1] * features)


def _per_query_head(args: Any, keys: Tensor) -> Tensor:
    """Keys or values repeated for each query head."""
    return keys.to(accumulator_dtype(keys.dtype)).repeat_interleave(args.q.shape[2] // keys.shape[2], 2)


def _weights(args: Any) -> tuple[Tensor, Tensor]:
    """The weights (batch, heads, rows, keys), and `softmax` of `Attention`."""
    q = args.q.to(accumulator_dtype(args.q.dtype))
    scores = torch.einsum("brhf,bshf->bhrs", q, _per_query_head(args, args.k))
    attends = _attends(args)[:, None].expand(scores.shape)
    if not scores.numel():
        return scores, scores.new_zeros((*scores.shape[:2], 2, scores.shape[2]))
    has_keys = attends.any(-1)
    most = scores.masked_fill(~attends, float("-inf")).amax(-1).masked_fill(~has_keys, 0.0)
    exponentials = ((scores - most[..., None]) * args.scale).exp().masked_fill(~attends, 0.0)
    inverse = (1 / exponentials.sum(-1)).masked_fill(~has_keys, 0.0)
    return exponentials * inverse[..., None], torch.stack([most, inverse], 2)


def _dropped(args: Any, weights: Tensor) -> Tensor:
    """Weights, or their gradients, (batch, heads, rows, keys), with dropout."""
    if not args.dropout_p or not weights.numel():
        return weights
    batch, heads, rows, keys = weights.shape
    shape = torch.Size((batch, heads, -(-rows // _STRIP), keys, _STRIP))
    kept = dropout_mask(shape, args.dropout_p, args.seed, 0)
    return weights * kept.mT.flatten(2, 3)[:, :, :rows] * dropout_scale(args.dropout_p)


def _attends(args: Any) -> Tensor:
    """Which keys each query attends to: bool (batch, rows, keys)."""
    (batch, rows), keys = args.q.shape[:2], args.k.shape[1]
    key = torch.arange(keys, device=args.q.device)
    attends = key.new_ones((batch, rows, keys), dtype=torch.bool)
    if args.spans is not None:
        spans = args.spans if args.spans.dim() == 4 else args.spans[:, :, None]
        first, end = spans[..., None].unbind(3)
        attends = ((key >= first) & (key < end)).any(2)
    if args.is_causal:
        attends = attends & (key <= torch.arange(keys - rows, keys, device=key.device)[:, None])
    return attends


@names_wrong_types
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """`softmax(scale * q k^T) v` per head, without scores in memory.

    Scores, softmax and sums are fp32; operands of GEMMs have the arguments' dtype.

    Parameters
    ----------
    q : Tensor, (batch, rows, heads, features)
        fp32, bf16 or fp16, contiguous in features: a transposed view of (batch, heads, rows, features) is
        read without a copy.
    k, v : Tensor, (batch, keys, key_heads, features)
        Of q's dtype. key_heads divides heads; heads / key_heads consecutive query heads share a key head.
    spans : Tensor, (batch, rows, 2) or (batch, rows, 2, 2), int32, optional
        The keys [first, end) that each query attends to: for padding on either side, sequences packed into
        one row, sliding windows. With two spans it attends to the keys of both: say, a prompt shared by
        several completions in one row, and its own completion. A query without keys gives 0.
    is_causal : bool
        No query attends to keys after its own; the last query's own key is the last one.
    scale : float, optional
        Positive. By default features ** -0.5.
    dropout_p : float
        Probability with which a weight is dropped after the softmax, 0 to 1; the others are scaled by
        1 / (1 - dropout_p). The mask is not stored: it is a function of a seed drawn from torch's generator.

    Returns
    -------
    Tensor, (batch, rows, heads, features), contiguous, of q's dtype. Differentiable in q, k and v. Saved for
    backward: the arguments, the result, and two fp32 numbers for each row and head.

    Raises
    ------
    ValueError
        Shapes, dtypes or devices that do not fit; a scale that is not positive; dropout_p not in 0 to 1.
    """
    _check(q, k, v, spans)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale: expected a finite number above 0, got {scale}")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p: expected 0 to 1, got {dropout_p}")
    seed = new_seed(q) if dropout_p else None
    args = (q, k, v, spans, bool(is_causal), scale, float(dropout_p), seed)
    y: Tensor = dispatch.call("attention", *args)[0]
    return y


def _check(q: Tensor, k: Tensor, v: Tensor, spans: Tensor | None) -> None:
    if q.dim() != 4 or not q.dtype.is_floating_point or not q.shape[3]:
        expected = "a floating dtype of shape (batch, rows, heads, features)"
        raise ValueError(f"q: expected {expected}, got {q.dtype} of shape {tuple(q.shape)}")
    batch, rows, heads, features = q.shape
    for name, t in (("k", k), ("v", v)):
        if t.dim() != 4 or (t.shape[0], t.shape[3]) != (batch, features) or t.shape != k.shape:
            shape = f"({batch}, keys, key_heads, {features})" if t is k else f"{tuple(k.shape)} like k"
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(t.shape)}")
        if t.dtype != q.dtype or t.device != q.device:
            raise ValueError(f"{name}: expected {q.dtype} on {q.device} like q, got {t.dtype} on {t.device}")
    if not k.shape[2] or heads % k.shape[2]:
        raise ValueError(f"k: expected a divisor of q's {heads} heads, got {k.shape[2]}")
    if spans is None:
        return
    one, two = (batch, rows, 2), (batch, rows, 2, 2)
    if spans.shape not in (one, two) or spans.dtype != torch.int32 or spans.device != q.device:
        got = f"{spans.dtype} of shape {tuple(spans.shape)} on {spans.device}"
        raise ValueError(f"spans: expected torch.int32 of shape {one} or {two} on {q.device}, got {got}")

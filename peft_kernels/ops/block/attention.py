"""Attention, softmax(scale q k^T) v, of which no scores are kept: each query's greatest score and the sum of
its exponentials are enough to compute its weights again (Dao et al. 2022). Several heads of queries may share
one of keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core import dispatch
from ...core.op import Op
from ...core.wrong_types import names_wrong_types
from ..common import accumulator_dtype


class Attention(Op):
    """Of rows (batch, rows, heads, features). A query attends to the keys of its span [first, end), or of
    its two spans, a causal one to none behind its own, the last query's being the last key; without keys it
    gives 0.
    `softmax`, (batch, heads, 2, rows): the greatest score before it is scaled, 1 / sum of exponentials."""

    name = "attention"
    schema = (
        "(Tensor q, Tensor k, Tensor v, Tensor? spans, bool is_causal, float scale) "
        "-> (Tensor y, Tensor softmax)"
    )
    composite = True

    @staticmethod
    def reference(ops: Any, args: Any) -> tuple[Tensor, Tensor]:
        weights, softmax = _weights(args)
        y = torch.einsum("bhrs,bshf->brhf", weights, _of_each_head(args, args.v))
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
    """Given what the forward gave, and the gradient of its first result."""

    name = "attention_backward"
    schema = (
        "(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor? spans, bool is_causal, float scale, Tensor y, "
        "Tensor softmax) -> (Tensor dq, Tensor dk, Tensor dv)"
    )
    composite = True

    @staticmethod
    def reference(ops: Any, args: Any) -> tuple[Tensor, Tensor, Tensor]:
        acc = accumulator_dtype(args.q.dtype)
        q, dy = args.q.to(acc), args.dy.to(acc)
        k, v = _of_each_head(args, args.k), _of_each_head(args, args.v)
        weights, _ = _weights(args)
        dv = torch.einsum("bhrs,brhf->bshf", weights, dy)
        d_weights = torch.einsum("brhf,bshf->bhrs", dy, v)
        # What a row's d_weights come to, weighted: its sum over features is shorter than that over keys.
        of_rows = (dy * args.y.to(acc)).sum(-1).transpose(1, 2)[..., None]
        slopes = weights * (d_weights - of_rows) * args.scale
        dq = torch.einsum("bhrs,bshf->brhf", slopes, k)
        dk = torch.einsum("bhrs,brhf->bshf", slopes, q)

        def of_keys(gradient: Tensor) -> Tensor:
            return gradient.unflatten(2, (args.k.shape[2], -1)).sum(3).to(args.k.dtype)

        return dq.to(args.q.dtype).contiguous(), of_keys(dk), of_keys(dv)

    @staticmethod
    def fake(args: Any) -> tuple[Tensor, Tensor, Tensor]:
        k = args.k
        return args.q.new_empty(args.q.shape), k.new_empty(k.shape), k.new_empty(k.shape)

    @staticmethod
    def flops(args: Any) -> int:
        batch, rows, heads, features = args.q
        return int(10 * batch * heads * rows * args.k[1] * features)


def _of_each_head(args: Any, keys: Tensor) -> Tensor:
    """Keys or values, for each head of queries."""
    return keys.to(accumulator_dtype(keys.dtype)).repeat_interleave(args.q.shape[2] // keys.shape[2], 2)


def _weights(args: Any) -> tuple[Tensor, Tensor]:
    """(batch, heads, rows, keys), and what is kept of them."""
    q = args.q.to(accumulator_dtype(args.q.dtype))
    scores = torch.einsum("brhf,bshf->bhrs", q, _of_each_head(args, args.k))
    attends = _attends(args)[:, None].expand(scores.shape)
    if not scores.numel():
        return scores, scores.new_zeros((*scores.shape[:2], 2, scores.shape[2]))
    has_keys = attends.any(-1)
    most = scores.masked_fill(~attends, float("-inf")).amax(-1).masked_fill(~has_keys, 0.0)
    exponentials = ((scores - most[..., None]) * args.scale).exp().masked_fill(~attends, 0.0)
    inverse = (1 / exponentials.sum(-1)).masked_fill(~has_keys, 0.0)
    return exponentials * inverse[..., None], torch.stack([most, inverse], 2)


def _attends(args: Any) -> Tensor:
    """(batch, rows, keys), bool."""
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
) -> Tensor:
    """`softmax(scale * q k^T) v` of each head, without scores in memory.

    Scores, their softmax and all sums are in fp32; what is multiplied is in the type of the arguments.

    Parameters
    ----------
    q : Tensor, (batch, rows, heads, features)
        fp32, bf16 or fp16. Need not be contiguous but in its features: a transposed view of (batch, heads,
        rows, features) is read as it lies.
    k, v : Tensor, (batch, keys, key_heads, features)
        Of q's dtype. key_heads divides heads; that many queries' heads side by side share one.
    spans : Tensor, (batch, rows, 2) or (batch, rows, 2, 2), int32, optional
        The keys that a query attends to, from the first to before the second: padding on either side,
        sequences packed into one row, sliding windows. With two such spans it attends to the keys of either:
        a prompt that several completions of one row share, and its own completion. A query without keys
        gives 0.
    is_causal : bool
        No query attends to keys behind its own, where the last query's own key is the last.
    scale : float, optional
        More than 0. By default features ** -0.5.

    Returns
    -------
    Tensor, (batch, rows, heads, features), contiguous, of q's dtype. Differentiable in q, k and v. Saved for
    backward: the arguments, the result, and two fp32 numbers for each row and head.

    Raises
    ------
    ValueError
        Shapes, dtypes or devices that do not fit; a scale that is not positive.
    """
    _check(q, k, v, spans)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale: expected a finite number above 0, got {scale}")
    y: Tensor = dispatch.call("attention", q, k, v, spans, bool(is_causal), scale)[0]
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

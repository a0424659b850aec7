"""Rotary position embedding (Su et al. 2021) in the GPT-NeoX form: pairs of features half a head apart are
rotated by an angle that depends on the position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core import dispatch
from ...core.op import Op
from ...core.wrong_types import names_wrong_types


class Rotary(Op):
    """Rotates tensors (batch, rows, heads, features), each with its own number of heads. Products and sums
    are rounded to the promoted dtype of x and cos, as in torch, and results to `dtype`. `inverse`: rotates
    back, which is the gradient."""

    name = "rotary"
    schema = "(Tensor[] x, Tensor cos, Tensor sin, bool inverse, ScalarType dtype) -> Tensor[]"
    composite = True

    @staticmethod
    def reference(ops: Any, args: Any) -> list[Tensor]:
        cos, sin = args.cos[:, :, None], args.sin[:, :, None]

        def rotated(x: Tensor) -> Tensor:
            if args.inverse:
                a, b = (x * sin).chunk(2, -1)
                return x * cos + torch.cat([b, -a], -1)
            a, b = x.chunk(2, -1)
            return x * cos + torch.cat([-b, a], -1) * sin

        return [rotated(x).to(args.dtype).contiguous() for x in args.x]

    @staticmethod
    def fake(args: Any) -> list[Tensor]:
        return [x.new_empty(x.shape, dtype=args.dtype) for x in args.x]

    differentiable = ("x",)
    saved_meta = ("x", "y")
    twice_differentiable = True

    @staticmethod
    def backward(ops: Any, args: Any, results: Any, need: Any, dy: Any) -> dict[str, Any]:
        given = [d for d in dy if d is not None]
        rotated = iter(ops.rotary(given, args.cos, args.sin, not args.inverse, args.x[0].dtype))
        return {"x": [None if d is None else next(rotated) for d in dy]}


@names_wrong_types
def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """`x * cos + rotate_half(x) * sin` of queries and keys in one pass, bit-equal to transformers'
    `apply_rotary_pos_emb`.

    Parameters
    ----------
    q : Tensor, (batch, rows, heads, features)
        fp32, bf16 or fp16, contiguous in features.
    k : Tensor, (batch, rows, key_heads, features)
        Of q's dtype.
    cos, sin : Tensor, (batch or 1, rows, features)
        Of one dtype, maybe another than q's. They have no gradient.
    dtype : torch.dtype, optional
        Dtype of the results. By default the promoted dtype of q and cos.

    Returns
    -------
    q, k : Tensor
        Shaped as they were, contiguous. Differentiable in q and k. Saved for backward: cos and sin.

    Raises
    ------
    ValueError
        Shapes, dtypes or devices that do not fit; an odd number of features; a cos or sin that requires
        gradients.
    """
    _check(q, k, cos, sin)
    dtype = torch.promote_types(q.dtype, cos.dtype) if dtype is None else dtype
    if not dtype.is_floating_point:
        raise ValueError(f"dtype: expected a floating dtype, got {dtype}")
    rotated = dispatch.call("rotary", [q, k], cos, sin, False, dtype, like=q)
    return rotated[0], rotated[1]


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    if q.dim() != 4 or not q.dtype.is_floating_point or q.shape[3] % 2:
        expected = "a floating dtype of shape (batch, rows, heads, features), features even"
        raise ValueError(f"q: expected {expected}, got {q.dtype} of shape {tuple(q.shape)}")
    batch, rows, _, features = q.shape
    if k.dim() != 4 or (*k.shape[:2], k.shape[3]) != (batch, rows, features):
        expected = f"({batch}, {rows}, key_heads, {features})"
        raise ValueError(f"k: expected shape {expected}, got {tuple(k.shape)}")
    if k.dtype != q.dtype or k.device != q.device:
        raise ValueError(f"k: expected {q.dtype} on {q.device} like q, got {k.dtype} on {k.device}")
    for name, t in (("cos", cos), ("sin", sin)):
        if t.dim() != 3 or t.shape[0] not in (1, batch) or t.shape[1:] != (rows, features):
            expected = f"({batch} or 1, {rows}, {features})"
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(t.shape)}")
        if not t.dtype.is_floating_point or t.device != q.device:
            got = f"{t.dtype} on {t.device}"
            raise ValueError(f"{name}: expected a floating dtype on {q.device} like q, got {got}")
        if t.requires_grad:
            raise ValueError(f"{name}: expected requires_grad=False, got True")
    if sin.dtype != cos.dtype or sin.shape != cos.shape:
        got = f"{sin.dtype} of shape {tuple(sin.shape)}"
        raise ValueError(f"sin: expected {cos.dtype} of shape {tuple(cos.shape)} like cos, got {got}")

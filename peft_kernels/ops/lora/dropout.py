"""Dropout whose mask is a function of a seed, so that it need not be stored.

Element e of the flattened activations is kept when word e % 4 of block e // 4 of Philox4x32-10 (Salmon et
al. 2011) is at least p * 2^32. The seed is the key; the counter holds the block in its first two words and a
stream in the third, so that several masks can be drawn from one seed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.op import Op

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


class Dropout(Op):
    name = "dropout"
    schema = "(Tensor x, float p, Tensor seed) -> Tensor"

    @staticmethod
    def reference(ops: Any, args: Any) -> Tensor:
        return args.x.clone() if args.p == 0 else apply_dropout(args.x, args.p, args.seed)

    @staticmethod
    def fake(args: Any) -> Tensor:
        return args.x.new_empty(args.x.shape)

    differentiable = ("x",)
    saved_meta = ("x",)
    twice_differentiable = True

    @staticmethod
    def backward(ops: Any, args: Any, results: Any, need: Any, dy: Tensor) -> dict[str, Any]:
        return {"x": ops.dropout(dy, args.p, args.seed)}


def new_seed(x: Tensor) -> Tensor:
    """A seed from torch's generator for x's device."""
    return torch.randint(0, 2**63 - 1, (), device=x.device)


def dropout_threshold(p: float) -> int:
    """Words below it drop their element. With p = 1 one word in 2^32 is not below, but the scale is 0."""
    return min(round(p * 2**32), _LOW)


def dropout_scale(p: float) -> float:
    """Factor of kept elements."""
    return 1 / (1 - p) if p < 1 else 0.0


def apply_dropout(x: Tensor, p: float, seed: Tensor | None, stream: int = 0) -> Tensor:
    """`x` with elements dropped and the others scaled; `x` itself for p = 0."""
    if p == 0:
        return x
    assert seed is not None
    return x * dropout_mask(x.shape, p, seed, stream) * dropout_scale(p)


def dropout_mask(shape: torch.Size, p: float, seed: Tensor, stream: int) -> Tensor:
    """Which elements are kept: bool, of `shape`."""
    numel = shape.numel()
    block = torch.arange((numel + 3) // 4, device=seed.device)
    words = torch.stack(philox(block, seed, stream), 1).reshape(-1)[:numel]
    return (words >= dropout_threshold(p)).view(shape)


def philox(block: Tensor, seed: Tensor, stream: int, last: Tensor | int = 0) -> tuple[Tensor, ...]:
    """The four words (int64) of Philox4x32-10 for each block (int64), with key `seed` and counter (block,
    stream, last)."""
    # int64 products wrap modulo 2^64, so both halves of the unsigned product are right.
    c = (block & _LOW, block >> 32, torch.full_like(block, stream), torch.zeros_like(block) + last)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(_ROUNDS):
        p0, p1 = c[0] * _MULTIPLIERS[0], c[2] * _MULTIPLIERS[1]
        c = (
            ((p1 >> 32) & _LOW) ^ c[1] ^ k0,
            p1 & _LOW,
            ((p0 >> 32) & _LOW) ^ c[3] ^ k1,
            p0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c

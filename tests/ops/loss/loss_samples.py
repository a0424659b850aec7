"""Arguments of the ops of a head's loss."""

from __future__ import annotations

from typing import Any

import torch
from small_tensors import K, N, R, group, leaf
from torch import Tensor

import testing


def loss_args(
    base: str, dtype: torch.dtype = torch.float32, bias: bool = False,
    options: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0),
) -> tuple[Any, ...]:  # fmt: skip
    """Six rows, two of them without a label, and a frozen head."""
    dense = testing.tensor(N, K, dtype=dtype, seed=1), None, None, None, 0
    head = dense if base == "dense" else group(base == "nested")
    vector = testing.tensor(N, dtype=dtype, seed=2) if bias else None
    x, labels = leaf(6, K, dtype=dtype).detach(), torch.tensor([0, 19, -100, 7, 7, -100])
    return (x.requires_grad_(), *head, N, vector, labels, -100, *options, True, True, True, True)


def trained_loss_args(
    base: str, dtype: torch.dtype = torch.float32, adapter: bool = False,
    options: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0),
) -> tuple[Any, ...]:  # fmt: skip
    """The same with a trained head, or one with an adapter."""
    x, weight, *rest = loss_args(base, dtype, True, options)
    trained = weight.requires_grad_() if base == "dense" else weight
    h, b = (leaf(6, R, seed=3), leaf(N, R, dtype=dtype, seed=4)) if adapter else (None, None)
    bias = rest[5].requires_grad_()
    return (x, trained, *rest[:5], bias, h, b, *rest[6:-4], adapter, True, adapter)


def loss_backward_args(*needs: bool, base: str = "dense", **options: Any) -> tuple[Any, ...]:
    given = trained_loss_args(base, adapter=True, **options)
    args = [t.detach() if isinstance(t, Tensor) else t for t in given]
    factors = [testing.tensor(6, dtype=torch.float32, seed=seed) for seed in (8, 9, 10)]
    if base == "plain":
        factors[2] = None
    lse = testing.tensor(6, dtype=torch.float32, seed=11) + 40
    return (*factors, lse, *args[:-4], *needs)


def loss_samples() -> dict[str, dict[str, tuple[Any, ...]]]:
    return {
        "linear_cross_entropy": {
            "dense": loss_args("dense"),
            "nested-bf16-bias": loss_args("nested", torch.bfloat16, True),
            "plain": loss_args("plain"),
            "capped": loss_args("nested", options=(0.5, 3.0, 0.0, 1e-2)),
            "smoothed-bf16": loss_args("dense", torch.bfloat16, options=(2.0, 0.0, 0.1, 0.0)),
        },
        "linear_cross_entropy_trained": {
            "dense": trained_loss_args("dense"),
            "nested-adapter": trained_loss_args("nested", adapter=True),
            "dense-bf16-all": trained_loss_args("dense", torch.bfloat16, True, (0.5, 3.0, 0.1, 1e-2)),
        },
        "linear_cross_entropy_backward": {
            "all": loss_backward_args(*[True] * 5, options=(0.5, 3.0, 0.1, 1e-2)),
            "adapter": loss_backward_args(False, False, False, True, True, base="nested"),
            "dx": loss_backward_args(True, *[False] * 4, base="plain"),
        },
    }

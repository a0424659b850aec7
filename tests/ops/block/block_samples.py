"""Inputs of the block ops: RMS norms and rotary embedding."""

from __future__ import annotations

from typing import Any

import torch
from small_tensors import K, leaf

import testing


def rms_norm_args(
    dtype: torch.dtype = torch.float32, weight: torch.dtype = torch.float32, frozen: bool = False,
    offset: float = 0.0, rounds: bool = True, result: torch.dtype | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    return (
        leaf(2, 3, K, dtype=dtype),
        leaf(K, dtype=weight, seed=1).detach().requires_grad_(not frozen),
        1e-5,
        offset,
        rounds,
        result or torch.promote_types(dtype, weight),
    )


def add_rms_norm_args(residual: torch.dtype = torch.float32, **options: Any) -> tuple[Any, ...]:
    x, *rest = rms_norm_args(**options)
    return (x, leaf(2, 3, K, dtype=residual, seed=3), *rest)


def rms_norm_backward_args(*needs: bool, adds: bool = False, **options: Any) -> tuple[Any, ...]:
    args = [t.detach() if isinstance(t, torch.Tensor) else t for t in rms_norm_args(**options)]
    y, rstd = torch.ops.peft_kernels_reference.rms_norm(*args)
    x, weight, _, offset, rounds, _ = args
    add = testing.tensor(*x.shape, dtype=x.dtype, seed=4) if adds else None
    dy = testing.tensor(*y.shape, dtype=y.dtype, seed=2)
    return (dy, x, weight, rstd, add, offset, rounds, *needs)


def angles(
    batch: int, rows: int, features: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, ...]:
    """Cosines and sines whose two halves differ, unlike those of models."""
    of_rows = testing.tensor(batch, rows, features, seed=7, scale=3.0)
    return of_rows.cos().to(dtype), of_rows.sin().to(dtype)


def rotary_args(
    dtype: torch.dtype = torch.float32, of_angles: torch.dtype = torch.float32, batch: int = 1,
    inverse: bool = False, result: torch.dtype | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    heads = [leaf(2, 5, count, 6, dtype=dtype, seed=count) for count in (4, 2)]
    return (heads, *angles(batch, 5, 6, of_angles), inverse, result or torch.promote_types(dtype, of_angles))


def block_samples() -> dict[str, dict[str, tuple[Any, ...]]]:
    half = torch.bfloat16
    return {
        "rms_norm": {
            "fp32": rms_norm_args(),
            "frozen": rms_norm_args(frozen=True),
            "bf16": rms_norm_args(half, half),
            "bf16-by-fp32": rms_norm_args(half),
            "to-bf16": rms_norm_args(result=half),
            "gemma": rms_norm_args(half, offset=1.0, rounds=False, result=half),
        },
        "add_rms_norm": {
            "fp32": add_rms_norm_args(),
            "bf16": add_rms_norm_args(half, dtype=half, weight=half),
            "bf16-to-fp32": add_rms_norm_args(dtype=half, frozen=True, result=half),
            "fp32-to-bf16": add_rms_norm_args(half),
        },
        "rms_norm_backward": {
            "fp32": rms_norm_backward_args(True, True),
            "dx": rms_norm_backward_args(True, False, dtype=half),
            "dweight": rms_norm_backward_args(False, True, dtype=half, weight=half),
            "added-to": rms_norm_backward_args(True, True, adds=True, offset=1.0, result=half),
        },
        "cast": {
            "fp32-to-bf16": ([leaf(2, 3), leaf(7, 5, seed=1, transposed=True), leaf(3, 0)], half),
            "bf16-to-fp32": ([leaf(2, 3, dtype=half), leaf(70, seed=1, dtype=half)], torch.float32),
            "of-several": ([leaf(2, 3, dtype=half), leaf(4, seed=1)], torch.float16),
        },
        "add_residual": {
            "fp32": (leaf(2, 3), leaf(2, 3, seed=1)),
            "bf16-to-fp32": (leaf(5, 7, dtype=half), leaf(7, 5, seed=1, transposed=True)),
            "fp32-to-bf16": (leaf(70), leaf(70, dtype=half, seed=1)),
        },
        "rotary": {
            "fp32": rotary_args(),
            "bf16": rotary_args(half, half, batch=2),
            "bf16-by-fp32": rotary_args(half, inverse=True),
            "to-bf16": rotary_args(result=half),
        },
    }

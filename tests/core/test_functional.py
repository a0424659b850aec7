"""Errors of wrong arguments name the argument, the expected and the given value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import peft_kernels as pk
import testing


def lora_arguments(**changes: Any) -> Callable[[], Tensor]:
    arguments: dict[str, Any] = {
        "x": testing.tensor(3, 64),
        "weight": testing.nf4_weight(12, 64),
        "lora_a": testing.tensor(4, 64),
        "lora_b": testing.tensor(12, 4),
        "scaling": 1.0,
    } | changes
    return lambda: pk.lora_linear(**arguments)


def nf4_arguments(**changes: Any) -> Callable[[], Tensor]:
    arguments: dict[str, Any] = {"x": testing.tensor(3, 64), "weight": testing.nf4_weight(12, 64)} | changes
    return lambda: pk.nf4_linear(**arguments)


SHARED = {
    "x-features": ({"x": testing.tensor(3, 63)}, r"^x: expected shape \(\.\.\., 64\), got \(3, 63\)$"),
    "x-scalar": ({"x": torch.ones(())}, r"^x: expected shape \(\.\.\., 64\), got \(\)$"),
    "x-dtype": (
        {"x": torch.ones(3, 64, dtype=torch.int64)},
        r"^x: expected a floating dtype, got torch\.int64$",
    ),
    "x-device": ({"x": torch.ones(3, 64, device="meta")}, r"^weight: expected device meta like x, got cpu$"),
    "bias-shape": ({"bias": torch.ones(11)}, r"^bias: expected shape \(12,\), got \(11,\)$"),
    "bias-2d": ({"bias": torch.ones(1, 12)}, r"^bias: expected shape \(12,\), got \(1, 12\)$"),
    "bias-dtype": (
        {"bias": torch.ones(12, dtype=torch.float16)},
        r"^bias: expected torch\.float32 like x or float32, got torch\.float16$",
    ),
    "bias-device": ({"bias": torch.ones(12, device="meta")}, r"^bias: expected device cpu like x, got meta$"),
}
NF4_ONLY = {
    "weight-dense": ({"weight": torch.ones(12, 64)}, r"^weight: expected a PackedWeight, got Tensor$")
}
LORA_ONLY = {
    "dense-dtype": (
        {"weight": torch.ones(12, 64, dtype=torch.bfloat16)},
        r"^weight: expected torch\.float32 like x, got torch\.bfloat16$",
    ),
    "dense-1d": (
        {"weight": torch.ones(64)},
        r"^weight: expected shape \(out_features, in_features\), got \(64,\)$",
    ),
    "dense-features": ({"weight": torch.ones(12, 63)}, r"^x: expected shape \(\.\.\., 63\), got \(3, 64\)$"),
    "lora_a-shape": ({"lora_a": torch.ones(4, 63)}, r"^lora_a: expected shape \(r, 64\), got \(4, 63\)$"),
    "lora_a-1d": ({"lora_a": torch.ones(64)}, r"^lora_a: expected shape \(r, 64\), got \(64,\)$"),
    "lora_b-rank": ({"lora_b": torch.ones(12, 5)}, r"^lora_b: expected shape \(12, 4\), got \(12, 5\)$"),
    "lora_b-out": ({"lora_b": torch.ones(11, 4)}, r"^lora_b: expected shape \(12, 4\), got \(11, 4\)$"),
    "lora_a-dtype": (
        {"lora_a": torch.ones(4, 64, dtype=torch.bfloat16)},
        r"^lora_a: expected torch\.float32 like x or float32, got torch\.bfloat16$",
    ),
    "lora_b-dtype": (
        {"x": torch.ones(3, 64, dtype=torch.bfloat16), "lora_b": torch.ones(12, 4, dtype=torch.float16)},
        r"^lora_b: expected torch\.bfloat16 like x or float32, got torch\.float16$",
    ),
    "lora_a-device": (
        {"lora_a": torch.ones(4, 64, device="meta")},
        r"^lora_a: expected device cpu like x, got meta$",
    ),
    "lora_b-device": (
        {"lora_b": torch.ones(12, 4, device="meta")},
        r"^lora_b: expected device cpu like x, got meta$",
    ),
    "dropout": ({"dropout_p": 1.5}, r"^dropout_p: expected 0 to 1, got 1\.5$"),
}


@pytest.mark.parametrize("case", SHARED | NF4_ONLY)
def test_nf4_linear_refuses(case: str) -> None:
    changes, message = (SHARED | NF4_ONLY)[case]
    with pytest.raises(ValueError, match=message):
        nf4_arguments(**changes)()


@pytest.mark.parametrize("case", SHARED | LORA_ONLY)
def test_lora_linear_refuses(case: str) -> None:
    changes, message = (SHARED | LORA_ONLY)[case]
    with pytest.raises(ValueError, match=message):
        lora_arguments(**changes)()


@pytest.mark.parametrize("case", SHARED)
def test_lora_linear_on_a_dense_base_refuses(case: str) -> None:
    changes, message = SHARED[case]
    with pytest.raises(ValueError, match=message):
        lora_arguments(weight=torch.ones(12, 64), **changes)()


@pytest.mark.parametrize("case", SHARED)
def test_a_weight_made_dense_is_checked_too(case: str) -> None:
    changes, message = SHARED[case]
    merged = testing.nf4_weight(12, 64)
    merged.add_(1.0)
    for call in (nf4_arguments(weight=merged, **changes), lora_arguments(weight=merged, **changes)):
        with pytest.raises(ValueError, match=message):
            call()

"""Errors of wrong arguments of linear_cross_entropy name the argument, the expected and the given value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import peft_kernels as pk
import testing


def arguments(**changes: Any) -> Callable[[], Any]:
    given: dict[str, Any] = {
        "hidden": testing.tensor(3, 64),
        "weight": testing.nf4_weight(12, 64),
        "labels": torch.tensor([1, 2, 3]),
    } | changes
    return lambda: pk.linear_cross_entropy(**given)


LORA = {"lora_a": torch.ones(4, 64), "lora_b": torch.ones(12, 4)}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "reduction": ({"reduction": "max"}, r"^reduction: expected one of mean, sum, none, got 'max'$"),
    "items": (
        {"reduction": "sum", "num_items_in_batch": 3},
        r"^num_items_in_batch: expected None with reduction 'sum', got a number$",
    ),
    "smoothing": ({"label_smoothing": 1.5}, r"^label_smoothing: expected 0 to 1, got 1\.5$"),
    "z-loss": ({"z_loss": -1.0}, r"^z_loss: expected 0 or more, got -1\.0$"),
    "softcap": ({"softcap": 0.0}, r"^softcap: expected more than 0, or None, got 0\.0$"),
    "scale": ({"logit_scale": float("nan")}, r"^logit_scale: expected a finite number, got nan$"),
    "labels-shape": (
        {"labels": torch.tensor([1, 2])},
        r"^labels: expected shape \(3,\) like hidden's rows, got \(2,\)$",
    ),
    "labels-dtype": ({"labels": torch.ones(3)}, r"^labels: expected torch\.int64, got torch\.float32$"),
    "labels-device": (
        {"labels": torch.ones(3, dtype=torch.int64, device="meta")},
        r"^labels: expected device cpu like hidden, got meta$",
    ),
    "label": ({"labels": torch.tensor([1, 12, 3])}, r"^labels: expected 0 to 11, or -100 to ignore, got 12$"),
    "negative-label": (
        {"labels": torch.tensor([1, -1, 3])},
        r"^labels: expected 0 to 11, or -100 to ignore, got -1$",
    ),
    "features": ({"hidden": torch.ones(3, 63)}, r"^hidden: expected shape \(\.\.\., 64\), got \(3, 63\)$"),
    "hidden-dtype": (
        {"hidden": torch.ones(3, 64, dtype=torch.int64)},
        r"^hidden: expected a floating dtype, got torch\.int64$",
    ),
    "weight-dtype": (
        {"weight": torch.ones(12, 64, dtype=torch.bfloat16)},
        r"^weight: expected torch\.float32 like hidden, got torch\.bfloat16$",
    ),
    "bias-shape": ({"bias": torch.ones(11)}, r"^bias: expected shape \(12,\), got \(11,\)$"),
    "half-an-adapter": (
        {"lora_a": torch.ones(4, 64)},
        r"^lora_b: expected a Tensor with lora_a, got None$",
    ),
    "lora_b": ({**LORA, "lora_b": torch.ones(12, 5)}, r"^lora_b: expected shape \(12, 4\), got \(12, 5\)$"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    changes, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        arguments(**changes)()

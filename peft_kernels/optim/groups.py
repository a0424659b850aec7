"""Hyperparameters of groups of parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

UNSUPPORTED = ("amsgrad", "maximize", "differentiable")
"""Options of torch's optimizers that are not supported in groups."""


def check_number(name: str, value: Any) -> None:
    """Raises TypeError unless `value` is a number."""
    if isinstance(value, str):
        hint = "; YAML reads a number as text that has an exponent and no point: write 2.0e-4, not 2e-4"
        hint = hint if _is_number(value) else ""
        raise TypeError(f"{name}: expected a number, got the text {value!r}{hint}")
    if not (hasattr(type(value), "__float__") or hasattr(type(value), "__index__")):
        raise TypeError(f"{name}: expected a number, got {value!r}")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def check_numbers(values: Mapping[str, Any]) -> None:
    """Raises ValueError for a hyperparameter that is out of range or unsupported, TypeError for one that is
    not a number."""
    for name in UNSUPPORTED:
        if values.get(name, False):
            raise ValueError(f"{name}: is not supported, expected False in a group, got {values[name]}")
    for name in ("lr", "eps", "weight_decay"):
        value = values.get(name, 0.0)
        check_number(name, value)
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"{name}: expected one number, got a tensor of shape {tuple(value.shape)}")
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")
    betas = values.get("betas", (0.0, 0.0))
    if isinstance(betas, str) or not hasattr(type(betas), "__len__"):
        raise TypeError(f"betas: expected two numbers, got {betas!r}")
    for i, beta in enumerate(betas):
        check_number(f"betas[{i}]", beta)
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas: expected two numbers from 0 to below 1, got {betas}")

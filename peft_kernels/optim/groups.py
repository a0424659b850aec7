"""Hyperparameters of groups of parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def check_numbers(values: Mapping[str, Any]) -> None:
    """ValueError for a hyperparameter out of range."""
    for name in ("lr", "eps", "weight_decay"):
        value = values.get(name, 0.0)
        if not isinstance(value, Tensor) and not 0 <= value < math.inf:
            raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")
    betas = values.get("betas", (0.0, 0.0))
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas: expected two numbers from 0 to below 1, got {betas}")

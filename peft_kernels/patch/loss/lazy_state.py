"""The state of lazy logits: their recipe, values and autograd node."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .recipe import Recipe


@dataclass
class State:
    """How to compute logits, and their values once they are computed."""

    recipe: Recipe
    reads: Counter[str]
    """How often the logits were materialised, by the function that did it."""
    base: Any = None
    """The lazy logits these are a view of, by `recipe.steps[-1]`."""
    value: Tensor | None = None
    saved: list[tuple[Tensor, int]] | None = None
    """For a gradient that needs them: the values, once they are computed, and their version."""
    node: Any = None
    """The autograd node, if the recipe describes all of the gradient's path."""


def is_lazy(logits: Any) -> bool:
    """Whether neither these nor the logits they are a view of have values, which may have been written to."""
    if logits._state.recipe.call.is_plain:
        return False
    at = logits
    while at is not None:
        if at._state.value is not None:
            return False
        at = at._state.base
    return True


def follows_recipe(logits: Any) -> bool:
    """Whether the recipe describes all of the gradient's path."""
    with torch._C.DisableTorchFunctionSubclass():
        return logits.grad_fn is logits._state.node


def known_recipe(logits: Any) -> Recipe | None:
    """The recipe of lazy logits if it describes all of their gradient's path, else None."""
    state: State | None = getattr(logits, "_state", None) if isinstance(logits, Tensor) else None
    return state.recipe if state is not None and is_lazy(logits) and follows_recipe(logits) else None

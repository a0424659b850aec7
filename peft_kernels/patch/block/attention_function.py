"""Attention modules of transformers that run our attention function where their configuration says "sdpa".

The configuration stays as it is: what is saved, copied or loaded elsewhere names nothing of ours. Instead
transformers' registry calls `attend.sdpa_or_ours` for "sdpa", which asks the module.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..fused import Fused, plain_class, record_of
from ..rules.calls import device_reason

NAME = "peft_kernels"
"""The name of our function in transformers' registry."""
REPLACED = "sdpa"
"""The attention function that ours replaces."""


@dataclass
class AttentionFacts:
    """What is installed in an attention module."""

    attends: bool
    """Whether its attention function is ours while the configuration says "sdpa"."""
    projection_reason: str = ""
    """Why a module with Llama's projections computes them by its own forward."""

    def change_reason(self, module: Any) -> str:
        return ""


class FusedAttentionFunction(Fused):
    """An attention module with its own forward and perhaps our attention function."""


def runs_ours(module: nn.Module) -> bool:
    """Whether a module that selects "sdpa" runs our attention function."""
    record = record_of(module)
    return record is not None and isinstance(record.facts, AttentionFacts) and record.facts.attends


def is_named(module: nn.Module) -> bool:
    """Whether the configuration of a module names our function."""
    return getattr(getattr(module, "config", None), "_attn_implementation", NAME) == NAME


def has_choice(module: nn.Module) -> bool:
    """Whether the forward of a module calls the attention function that its configuration names."""
    if getattr(module.__dict__.get("config"), "_attn_implementation", None) is None:
        return False
    code = getattr(_forward(module), "__code__", None)
    return code is not None and {"ALL_ATTENTION_FUNCTIONS", "_attn_implementation"} <= set(code.co_names)


def function_reason(module: Any) -> str:
    """Why an attention module that has a choice does not run our attention function, or ""."""
    name = module.config._attn_implementation
    if name not in (REPLACED, NAME):
        return f"its attention function is {name!r}; use {REPLACED!r} to fuse it"
    functions = _forward(module).__globals__["ALL_ATTENTION_FUNCTIONS"]
    function = functions.get(name)
    if not (function.__module__ or "").startswith(("transformers.", __package__)):
        return f"{name!r} is {function.__module__}.{function.__qualname__}; nothing to do"
    weight = next(module.parameters(), None)
    return "" if weight is None else device_reason(weight, "attention")


def _forward(module: nn.Module) -> Any:
    """The function of a module's class without its decorators."""
    forward: Any = plain_class(module).forward
    return inspect.unwrap(forward)

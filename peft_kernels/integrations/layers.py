"""Which layers of other libraries have a fused forward here, without importing those libraries."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from ..nf4 import NF4Weight
from . import gated_mlp, linear4bit, lora, shared_input

FORWARDS: frozenset[Callable[..., Any]] = frozenset({lora.forward, linear4bit.forward, gated_mlp.forward})
"""Every function that `patch` may install."""


def examine(module: nn.Module) -> tuple[str | None, Callable[..., Any] | None, str]:
    """What `patch` is to do with a module.

    Returns
    -------
    (kind, forward, reason)
        kind None: not a layer of ours. forward None: nothing to install, with the reason when it is not fused
        already. Otherwise `reason` says when the installed forward will step aside, as far as can be told
        now.
    """
    if isinstance(module, nn.Linear) and isinstance(module._parameters.get("weight"), NF4Weight):
        return "NF4Linear", None, ""
    # A library that was never imported has no layers in the model.
    if "peft" in sys.modules:
        kind, forward, reason = lora.examine(module)
        if kind is not None:
            return kind, forward, reason
    if "bitsandbytes" in sys.modules:
        return linear4bit.examine(module)
    return None, None, ""


def examine_block(module: nn.Module) -> tuple[str | None, Callable[..., Any] | None, str]:
    """As `examine`, for modules that hold several layers which one op can serve."""
    return gated_mlp.examine(module) if "peft" in sys.modules else (None, None, "")


def sharing(model: nn.Module) -> Iterator[tuple[str, list[nn.Module]]]:
    """Groups of LoRA layers that may be given the same x."""
    return shared_input.find(model) if "peft" in sys.modules else iter(())

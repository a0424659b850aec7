"""Which layers of other libraries have a fused forward here, without importing those libraries."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from ..nf4 import NF4Weight
from . import linear4bit, peft

FORWARDS: frozenset[Callable[..., Any]] = frozenset({peft.lora_forward, linear4bit.forward})
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
        kind, forward, reason = peft.examine(module)
        if kind is not None:
            return kind, forward, reason
    if "bitsandbytes" in sys.modules:
        return linear4bit.examine(module)
    return None, None, ""

"""bitsandbytes' Linear4bit on our kernels, reading its Params4bit in place.

Unlike its own forward, this one never repacks the weight in evaluation mode, so that state_dict and gradients
after an evaluation stay right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import nf4_linear
from ..nf4 import NF4State
from .bitsandbytes import reason_unusable, state_of


def examine(module: nn.Module) -> tuple[str | None, Callable[..., Any] | None, str]:
    """See `layers.examine`."""
    from bitsandbytes.nn.modules import Linear4bit

    if not isinstance(module, Linear4bit):
        return None, None, ""
    kind = f"bitsandbytes {type(module).__name__}"
    if type(module).forward is not Linear4bit.forward:
        return kind, None, "a subclass with a forward of its own"
    reason = reason_unusable(module.weight)
    if reason is not None:
        return kind, None, reason
    return kind, forward, ""


def forward(module: Any, x: Tensor, *, fallbacks: Counter[str]) -> Tensor:
    """`Linear4bit.forward`, fused."""
    reason = reason_unusable(module.weight) or _reason_shape(module, x)
    if reason is not None:
        fallbacks[reason] += 1
        return type(module).forward(module, x)
    dtype, bias = x.dtype, module.bias
    x = x.to(compute_dtype(module, x))
    return nf4_linear(x, state(module), None if bias is None else bias.to(x.dtype)).to(dtype)


def compute_dtype(module: Any, x: Tensor) -> torch.dtype:
    """The type that bitsandbytes would compute in: the layer's if it was given one, else that of x."""
    if module.compute_dtype is not None and (module.compute_type_is_set or x.dtype == torch.float16):
        return module.compute_dtype
    return x.dtype


def state(module: Any) -> NF4State:
    """The layer's weight as ops take it, sharing memory. Made anew in each call, so it is never stale."""
    return state_of(module.weight)


def _reason_shape(module: Any, x: Tensor) -> str | None:
    expected = module.weight.quant_state.shape[1]
    if x.shape[-1] != expected:
        return f"x has {x.shape[-1]} features, the weight was quantised with {expected}"
    return None

"""bitsandbytes' Linear4bit: its operands, and whether its forward is the one that ours replaces."""

from __future__ import annotations

import copy
import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...nf4 import bitsandbytes_format
from ...nf4.weight import PackedState
from ...ops.linear import nf4_linear
from ..fused import Fallback
from ..input_spec import InputSpec
from .trial import compare, random_rows, results
from .verdict import CannotTry


def is_linear4bit(module: nn.Module) -> bool:
    """Whether a module is bitsandbytes' Linear4bit."""
    if "bitsandbytes" not in sys.modules:
        return False
    from bitsandbytes.nn.modules import Linear4bit

    return isinstance(module, Linear4bit)


def reason(weight: Any) -> str | None:
    """Why the weight of such a layer cannot be used, or None."""
    return bitsandbytes_format.reason_unusable(weight) or bitsandbytes_format.reason_other_table(weight)


def operands(layer: Any, weight: Any, spec: InputSpec) -> Any:
    """What ops take of the weight: it, and the dtypes of `linear.Base`."""
    if (unusable := reason(weight)) is not None:
        return Fallback(unusable)
    compute = _compute_dtype(layer, spec.dtype)
    # The delta is computed from x in the wider dtype, unless autocast rounds x for it.
    rounds = spec.dtype == compute or spec.autocast == compute
    dtype = compute if rounds else torch.promote_types(spec.dtype, compute)
    return _state_of(weight), dtype, compute, spec.dtype


def _compute_dtype(layer: Any, x_dtype: torch.dtype) -> torch.dtype:
    """The dtype bitsandbytes would compute in: the layer's if it was set, else that of x."""
    own: torch.dtype | None = layer.compute_dtype
    return own if own is not None and (layer.compute_type_is_set or x_dtype == torch.float16) else x_dtype


def _state_of(weight: Any) -> PackedState:
    """`bitsandbytes.state_of` without its checks, for a weight in bitsandbytes' layout; back ends check
    sizes."""
    quant_state = weight.quant_state
    if weight.dtype is not torch.uint8 or quant_state.absmax.dtype not in (torch.uint8, torch.float32):
        return bitsandbytes_format.state_of(weight)
    shape, absmax = tuple(quant_state.shape), quant_state.absmax
    # The torch function of Params4bit takes several times as long as the rest.
    with torch._C.DisableTorchFunctionSubclass():
        packed = weight.view(shape[0], shape[1] // 2) if shape[1] % 2 == 0 else weight.view(-1)
    second, offset = (quant_state.state2.absmax, quant_state.offset) if quant_state.nested else (None, None)
    format = quant_state.quant_type
    return PackedState(shape, quant_state.blocksize, packed, absmax, second, offset, format=format)


def expect_same(layer: Any, forward: Any) -> None:
    """Raises Differs unless this forward of the layer's class gives what our kernels do."""
    weight, bias = layer.weight, layer.bias
    if weight.device.type == "meta":
        raise CannotTry("its weight is on the meta device; load it")
    if (unusable := reason(weight)) is not None:
        raise CannotTry(unusable)
    twin = copy.copy(layer)  # the forward sets attributes, and before 0.50 casts the bias in place
    twin._parameters = layer._parameters | {"bias": copy.deepcopy(bias)}

    def ours(x: Tensor) -> Tensor:
        state, dtype, compute, out_dtype = operands(layer, weight, InputSpec(x.dtype, x.device, None))
        rounded = None if bias is None else bias.to(dtype)
        return nf4_linear(x.to(dtype), state, rounded, compute_dtype=compute).to(out_dtype)

    for dtype in (torch.float32, torch.bfloat16):
        inputs = (random_rows(3, layer.in_features, weight.device, dtype),)
        compare(results(ours, inputs), results(partial(forward, twin), inputs), dtype)

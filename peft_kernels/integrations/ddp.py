"""NF4 weights under DistributedDataParallel, which broadcasts frozen parameters too, as flat numbers.

Packed weights need no broadcast: every process has quantised the same checkpoint. DDP leaves out what the
module that it wraps names in `_ddp_params_and_buffers_to_ignore`. Where the names do not fit, because
something lies between, DDP writes the first process's dequantised values into every process: values that a
packed weight has already, which leaves it packed.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..nf4 import NF4Weight

_ATTRIBUTE = "_ddp_params_and_buffers_to_ignore"


def ignore_packed(model: nn.Module) -> set[str]:
    """Have DDP leave out the packed weights of a model, as it is now. Returns their names.

    Dense ones (PiSSA, a merge) may differ from process to process, and are broadcast like any weight.
    """
    weights = {name: p for name, p in model.named_parameters() if isinstance(p, NF4Weight)}
    forget(model, set(weights))
    packed = {name for name, weight in weights.items() if not weight.is_dense}
    if packed:
        attributes: dict[str, Any] = vars(model)
        attributes[_ATTRIBUTE] = sorted({*attributes.get(_ATTRIBUTE, ()), *packed})
    return packed


def forget(model: nn.Module, names: set[str]) -> None:
    """Have DDP broadcast these again."""
    attributes: dict[str, Any] = vars(model)
    others = set(attributes.get(_ATTRIBUTE, ())) - names
    if others:
        attributes[_ATTRIBUTE] = sorted(others)
    else:
        attributes.pop(_ATTRIBUTE, None)

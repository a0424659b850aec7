"""NF4 weights under DistributedDataParallel, which broadcasts frozen parameters too, as flat numbers.

Packed weights have no flat numbers to broadcast, and need none: every process has quantised the same
checkpoint. DDP leaves out what a model names in `_ddp_params_and_buffers_to_ignore`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..nf4 import NF4Weight

_ATTRIBUTE = "_ddp_params_and_buffers_to_ignore"


def ignore_packed(model: nn.Module, undo: bool = False) -> None:
    """Have DDP leave out the NF4 weights of a model, as it is now; or no longer."""
    packed = {name for name, p in model.named_parameters() if isinstance(p, NF4Weight)}
    attributes: dict[str, Any] = vars(model)
    others = set(attributes.get(_ATTRIBUTE, ())) - packed
    ignored = others if undo else others | packed
    if ignored:
        attributes[_ATTRIBUTE] = sorted(ignored)
    else:
        attributes.pop(_ATTRIBUTE, None)

"""The properties of an input that decide how a layer computes."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..ops.arguments import autocast_dtype


class InputSpec(NamedTuple):
    dtype: torch.dtype
    device: torch.device | None
    """None: not known yet."""
    autocast: torch.dtype | None
    """The dtype of autocast on the device; None while it is off."""


def input_spec(dtype: torch.dtype, device: torch.device) -> InputSpec:
    """The spec of an input of that dtype on that device, under the present autocast."""
    return InputSpec(dtype, device, autocast_dtype(device.type))

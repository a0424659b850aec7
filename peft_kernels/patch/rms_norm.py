"""The root mean square norms of transformers' models in one op, which keeps x and a number for each row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..backends.base import DTYPES
from ..ops.rms_norm import rms_norm
from . import judge_block
from .fused import RECORD, Fused


class FusedRmsNorm(Fused):
    """weight * (x / root mean square of x)."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        record = self.__dict__.get(RECORD)
        if record is not None:
            y = _run(self, args, kwargs)
            if isinstance(y, Tensor):
                return y
            if y:
                record.fallbacks[y] += 1
        return super().forward(*args, **kwargs)  # type: ignore[misc]


def _run(module: Any, args: Any, kwargs: dict[str, Any]) -> Tensor | str:
    """A str is the reason why the original forward must run, empty when that is nothing to count."""
    if torch.compiler.is_compiling():  # a compiler fuses it with what is around it
        return ""
    if len(args) != 1 or kwargs:
        return f"extra arguments ({', '.join(kwargs) or 'positional'})"
    (x,) = args
    if judge_block.elsewhere(x.device):
        return ""
    d = module.__dict__
    weight = d["_parameters"].get("weight")
    if weight is None:  # of a replica, or FSDP's view
        weight = d.get("weight")
    reason = judge_block.norm(module) or judge_block.vector(weight, x.device)
    if reason:
        return reason
    if x.dtype not in DTYPES or type(x) not in judge_block.ORDINARY:
        return f"x is a {type(x).__name__} of {x.dtype}"
    return rms_norm(x, weight, module.variance_epsilon)


def examine(module: nn.Module) -> str | None:
    """Why a norm would not run fused, or ""; None for a module that is none."""
    if not judge_block.is_norm(module):
        return None
    return judge_block.norm(module) or judge_block.vector(module._parameters["weight"])

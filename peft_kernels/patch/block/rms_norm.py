"""The root mean square norms of transformers' models in one op, which keeps x and a number for each row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...core.backends.base import DTYPES
from ...nf4.sharded.checks import is_dtensor
from ...ops.block.rms_norm import rms_norm
from ..fused import RECORD, Fused
from . import eligibility as judge_block


class FusedRmsNorm(Fused):
    """Weight, or 1 + weight, times x / root mean square of x."""

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
    found = operands(module, x)
    if isinstance(found, str):
        return found
    weight, eps, how = found
    return rms_norm(x, weight, eps, **how)


def operands(module: Any, x: Tensor) -> tuple[Tensor, float, dict[str, Any]] | str:
    """What a norm computes with besides x, as `rms_norm` takes it, or why it cannot."""
    kind = judge_block.norm(module)
    if isinstance(kind, str):
        return kind
    d = module.__dict__
    weight = d["_parameters"].get("weight")
    if weight is None:  # of a replica, or FSDP's view
        weight = d.get("weight")
    reason = judge_block.vector(weight, x.device)
    if reason:
        return reason
    if x.dtype not in DTYPES or type(x) not in judge_block.ORDINARY:
        return f"x is a {type(x).__name__} of {x.dtype}"
    return weight, getattr(module, kind.eps), {"offset": kind.offset, "casting": kind.casting}


def examine(module: nn.Module) -> str | None:
    """Why a norm would not run fused, or ""; None for a module that is none."""
    if not judge_block.is_norm(module):
        return None
    kind = judge_block.norm(module)
    weight: Any = module._parameters["weight"]
    if isinstance(kind, str):
        return kind
    if is_dtensor(weight):  # whole in a call, as `fully_shard` makes it; else the call tells
        return judge_block.elsewhere(weight.device)
    return judge_block.vector(weight)

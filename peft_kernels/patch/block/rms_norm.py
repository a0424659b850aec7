"""The RMS norms of transformers' models in one op, which saves x and one value per row for backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...core.backends.base import DTYPES
from ...core.wrong_types import an
from ...nf4.sharded.checks import is_dtensor
from ...ops.arguments import is_traced
from ...ops.block.rms_norm import rms_norm
from ..fused import Fallback, Fused, computed_by
from ..rules import norm as rule
from ..rules.calls import ORDINARY, device_reason
from ..rules.examination import Examination, Layers


def _run(module: Any, *args: Any, **kwargs: Any) -> Tensor | Fallback:
    if torch.compiler.is_compiling() or is_traced():  # a compiler fuses the norm with its neighbours
        return Fallback()
    if len(args) != 1 or kwargs:
        return Fallback(f"extra arguments ({', '.join(kwargs) or 'positional'}); call it without them")
    (x,) = args
    if device_reason(x, "rms_norm"):
        return Fallback()
    found = operands(module, x)
    if isinstance(found, Fallback):
        return found
    weight, eps, options = found
    return rms_norm(x, weight, eps, **options)


@computed_by(_run)
class FusedRmsNorm(Fused):
    """weight * x / rms(x), or (1 + weight) * x / rms(x)."""


def operands(module: Any, x: Tensor) -> tuple[Tensor, float, dict[str, Any]] | Fallback:
    """The arguments of `rms_norm` after x."""
    kind, unknown, _ = rule.norm(module)
    if unknown:
        return Fallback(unknown)
    d = module.__dict__
    weight = d["_parameters"].get("weight")
    if weight is None:  # a replica, or a view of FSDP
        weight = d.get("weight")
    reason = rule.weight_reason(weight, x.device)
    if reason:
        return Fallback(reason)
    if x.dtype not in DTYPES or type(x) not in ORDINARY:
        return Fallback(f"x is {an(x)} of {x.dtype}; pass a tensor in fp32, bf16 or fp16")
    return weight, getattr(module, kind.eps), {"offset": kind.offset, "casting": kind.casting}


def examine(module: nn.Module, layers: Layers) -> Examination | None:
    if not rule.is_norm(module):
        return None
    weight: Any = module._parameters["weight"]
    reason = rule.norm(module).reason
    if not reason:  # `fully_shard` gathers a DTensor for the call
        reason = device_reason(weight, "rms_norm") if is_dtensor(weight) else rule.weight_reason(weight)
    return Examination.of("norm", module, FusedRmsNorm, reason)

"""PEFT's adapters on the weights of experts (`target_parameters`) on our kernels.

PEFT's `ParamWrapper` adds B A to the weights of all experts in each call and runs the experts with the sum.
Here each token is multiplied only by the weights and adapters of its own experts, and packed weights stay
packed.

Each parameter has a wrapper; they are nested around one module, and the outermost, which the model calls,
computes for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...nf4.experts_forward import Lora, experts_forward
from ..fused import Fallback, Fused, computed_by
from ..rules import experts as rule
from ..rules.lora import active_adapters


def _run(module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor | Fallback:
    wrappers = list(rule.nest(module))
    if any(wrapper.merged_adapters for wrapper in wrappers):
        return Fallback()
    active = {wrapper.parameter_name: _active(wrapper) for wrapper in wrappers}
    if not any(active.values()):
        return Fallback()
    given = [name for name, value in kwargs.items() if value is not None]
    if given or len(args) != 2:
        return Fallback(f"extra arguments ({', '.join(given) or 'positional'}); call it without them")
    reason = rule.wrappers_reason(wrappers, x.device, FusedParameters)
    if reason:
        return Fallback(reason)
    experts = rule.wrapped(wrappers)
    lora = {
        wrapper.parameter_name: summed(wrapper, names, rule.transposed(experts))
        for wrapper in wrappers
        if (names := active[wrapper.parameter_name])
    }
    index, weights = args
    return experts_forward(experts, x, index, weights, lora)


@computed_by(_run)
class FusedParameters(Fused):
    """The experts that the router selects, and the deltas of all adapters on them."""


def _active(wrapper: Any) -> list[str]:
    return [] if wrapper.disable_adapters else active_adapters(wrapper)


def summed(wrapper: Any, names: Sequence[str], transposed: bool) -> Lora:
    """The adapters of one parameter as a single one, whose rank is the sum of theirs."""
    found = [_adapter(wrapper, name, transposed) for name in names]
    if len(found) == 1:
        a, b, scaling = found[0]
        if not isinstance(scaling, Tensor):
            return a, b, float(scaling)
    a = torch.cat([a for a, _, _ in found], dim=1)
    return a, torch.cat([b * scaling for _, b, scaling in found], dim=2), 1.0


def _adapter(wrapper: Any, name: str, transposed: bool) -> tuple[Tensor, Tensor, Any]:
    """A (experts, r, in_features), B (experts, out_features, r) and scaling of an adapter.

    PEFT stores A as (experts * r, in) and B as (out, r * experts). "in" is the second dimension of the weight
    where PEFT has swapped it with the first.
    """
    experts = wrapper.num_experts
    a, b = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
    a = a.unflatten(0, (experts, -1))
    b = b.unflatten(1, (-1, experts)).permute(2, 0, 1)
    # The delta is b a where PEFT has swapped in and out (never before 0.19), else a^T b^T.
    if getattr(wrapper, "_did_swap_in_out_features", False) == transposed:
        a, b = b.transpose(1, 2), a.transpose(1, 2)
    return a, b, wrapper.scaling[name]

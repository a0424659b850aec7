"""PEFT's adapters on the weights of experts (`target_parameters`) on our kernels.

PEFT's `ParamWrapper` adds the product of A and B to the weights of all experts in each call, and lets the
experts multiply by what comes of it. Here tokens meet the weights and adapters of their own experts alone,
and packed weights stay packed.

There is a wrapper for each parameter, one around the other, all around one module: the outermost, which
models call, computes for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...nf4.experts_forward import Lora, experts_forward
from .. import eligibility as judge
from ..fused import RECORD, Fused
from . import eligibility as judge_experts


class FusedParameters(Fused):
    """The experts that are called, and the deltas of all adapters on them."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        record = self.__dict__.get(RECORD)
        if record is not None:
            y = _run(self, x, args, kwargs)
            if isinstance(y, Tensor):
                return y
            if y:
                record.fallbacks[y] += 1
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]


def _run(module: Any, x: Tensor, args: Any, kwargs: dict[str, Any]) -> Tensor | str:
    """A str is the reason why the original forward must run, empty when that is nothing to count."""
    wrappers = list(judge_experts.nest(module))
    if any(wrapper.merged_adapters for wrapper in wrappers):
        return ""
    active = {wrapper.parameter_name: _active(wrapper) for wrapper in wrappers}
    if not any(active.values()):
        return ""
    given = [name for name, value in kwargs.items() if value is not None]
    if given or len(args) != 2:
        return f"extra arguments ({', '.join(given) or 'positional'})"
    reason = judge_experts.parameters(wrappers, x.device, FusedParameters)
    if reason:
        return reason
    experts = judge_experts.wrapped(wrappers)
    lora = {
        wrapper.parameter_name: summed(wrapper, names, judge_experts.transposed(experts))
        for wrapper in wrappers
        if (names := active[wrapper.parameter_name])
    }
    index, weights = args
    return experts_forward(experts, x, index, weights, lora)


def _active(wrapper: Any) -> list[str]:
    return [] if wrapper.disable_adapters else judge.active(wrapper)


def summed(wrapper: Any, names: Sequence[str], transposed: bool) -> Lora:
    """Adapters of one parameter as one, of the sum of their ranks."""
    found = [_adapter(wrapper, name, transposed) for name in names]
    if len(found) == 1:
        a, b, scaling = found[0]
        if not isinstance(scaling, Tensor):
            return a, b, float(scaling)
    a = torch.cat([a for a, _, _ in found], dim=1)
    return a, torch.cat([b * scaling for _, b, scaling in found], dim=2), 1.0


def _adapter(wrapper: Any, name: str, transposed: bool) -> tuple[Tensor, Tensor, Any]:
    """PEFT has A as (experts * r, in) and B as (out, r * experts), where r comes first.

    Which side of the weight is "in" to PEFT depends on its version and on the layout of the weight: up to
    0.18, and later for transposed weights, it is the first.
    """
    experts = wrapper.num_experts
    a, b = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
    a = a.unflatten(0, (experts, -1))
    b = b.unflatten(1, (-1, experts)).permute(2, 0, 1)
    # The delta is b a where PEFT has swapped the sides, and a^T b^T else.
    if getattr(wrapper, "_did_swap_in_out_features", False) == transposed:
        a, b = b.transpose(1, 2), a.transpose(1, 2)
    return a, b, wrapper.scaling[name]

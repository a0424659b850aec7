"""PEFT's LoRA layers on our kernels: `LoraLayer.forward` over every kind of base that `rules` knows.

A call is prepared from the state of the layer at that moment (active adapters, dropout, merged or not), and
prepared again when any of it has changed since, so everything that PEFT can do to a layer takes effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...core import dispatch
from ...nf4.weight import PackedWeight
from ...ops.arguments import is_traced
from ...ops.lora.dora import dora_linear, dora_norm
from ...ops.lora.lora import lora_linear_args
from ...ops.lora.multi_lora import AdaptedLinear, Adapter, multi_lora_linear
from ..call_cache import Call, cached_call, store
from ..fused import RECORD, Fallback, Fused
from ..input_spec import InputSpec, input_spec
from ..rules import lora as rule
from ..rules.calls import hook_reason
from ..rules.examination import Layers
from ..rules.linear import Base, fused_operands
from ..rules.lora import active_adapters, is_lora

Operands = tuple[Base, list[Adapter]]


class FusedLora(Fused):
    """Base GEMM and the deltas of the adapters in one op."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        record = self.__dict__.get(RECORD)
        if record is not None:
            prepared: Any = cached_call(self, record, (x, *args), kwargs)
            if prepared is None:
                prepared = _prepare(self, input_spec(x.dtype, x.device), args, kwargs)
            if not isinstance(prepared, Fallback):
                return prepared(x)
            record.count(prepared)
        original = super().forward  # type: ignore[misc]
        return original(x, *args, **kwargs)

    # DoRA's merge assigns a weight where LoRA's adds to it: an NF4 weight must know that this is a
    # merge, so that unmerging restores its packed bytes.

    def merge(self: Any, *args: Any, **kwargs: Any) -> None:
        weight = self.get_base_layer().weight
        assigned = self.lora_variant and isinstance(weight, PackedWeight)
        with weight.merging() if assigned else nullcontext():
            super().merge(*args, **kwargs)  # type: ignore[misc]

    def unmerge(self: Any) -> None:
        weight = self.get_base_layer().weight
        assigned = self.lora_variant and isinstance(weight, PackedWeight)
        with weight.unmerging() if assigned else nullcontext():
            super().unmerge()  # type: ignore[misc]


def lora_reason(module: Any) -> str:
    """Why a LoRA layer with its active adapters cannot run fused, for any x, or ""."""
    return rule.lora_reason(module, FusedLora)


def sum_reason(module: Any, layers: Layers) -> str:
    """Why a LoRA layer, examined in `layers`, cannot be part of an op over several layers, or ""."""
    found = layers[module]
    assert found is not None
    return found.reason or rule.sum_reason(module, active_adapters(module))


def adapted_operands(module: Any, spec: InputSpec) -> Operands | Fallback:
    """The operands of a layer and of its active adapters, whose deltas are summed, for an op over several
    layers. The Fallback has no reason where PEFT's forward is that of the base layer."""
    if not is_lora(module):
        base = fused_operands(module, spec, called=False)
        return base if isinstance(base, Fallback) else (base, [])
    reason = hook_reason(module) or rule.of_class(module, FusedLora).reason
    if reason or module.disable_adapters or module.merged_adapters:
        return Fallback(reason)
    names = active_adapters(module)
    if reason := rule.sum_reason(module, names):
        return Fallback(reason)
    return _operands(module, spec, names)


def _operands(module: Any, spec: InputSpec, names: Sequence[str], mixed: bool = False) -> Operands | Fallback:
    """`mixed`: each row takes one of the adapters, so the caller adds their biases (`lora_bias=True`)."""
    reason = rule.of_class(module, FusedLora).reason or rule.variant_reason(module, names, FusedLora)
    if reason:
        return Fallback(reason)
    base = fused_operands(module.__dict__["_modules"]["base_layer"], spec, called=False)
    if isinstance(base, Fallback):
        return base
    adapters = []
    bias: Any = base.bias
    for group, name in enumerate(names):
        adapter = rule.adapter_operands(module, name, base.dtype, spec, group)
        if isinstance(adapter, Fallback):
            return adapter
        adapters.append(adapter)
        if module.lora_bias[name] and not mixed:
            delta = adapter.scaling * module.lora_B[name].bias.float()
            bias = delta if bias is None else bias.float() + delta
    return (base if bias is base.bias else base._replace(bias=bias)), adapters


def rounded(adapter: Adapter, dtype: torch.dtype) -> Adapter:
    """Casts A and B to dtype, for callers that do not cast."""
    if not adapter.rounds:
        return adapter
    return replace(adapter, lora_a=adapter.lora_a.to(dtype), lora_b=adapter.lora_b.to(dtype), rounds=False)


def _prepare(module: Any, spec: InputSpec, args: Any, kwargs: dict[str, Any]) -> Call | Fallback:
    """The call of a LoRA layer for x of such a spec. The only other argument supported is `adapter_names`."""
    if module.disable_adapters:
        return Fallback()
    given = {name: value for name, value in kwargs.items() if value is not None}
    adapter_names = given.pop("adapter_names", None)
    if args or given:
        return Fallback(f"extra arguments ({', '.join(given) or 'positional'}); call it without them")
    if adapter_names is not None:
        return _prepare_mixed(module, spec, adapter_names)
    if module.merged_adapters:
        return Fallback()
    names = active_adapters(module)
    if not names or (len(names) > 1 and is_traced()):
        return Fallback()
    operands = _operands(module, spec, names)
    if isinstance(operands, Fallback):
        return operands
    base, adapters = operands
    if len(adapters) > 1:
        layers = [AdaptedLinear(base.weight, base.bias, adapters)]
        return _cast(base, lambda x: multi_lora_linear(x, layers, compute_dtype=base.compute_dtype)[0])
    if module.lora_variant and names[0] in module.lora_variant:
        return _cast(base, _dora_call(module, names[0], base, adapters[0]))
    if base.dtype is base.compute_dtype is base.out_dtype is spec.dtype:
        return _lora_call(base, adapters[0], module, names)
    return _cast(base, _lora_call(base, adapters[0]))


def _cast(base: Base, run: Call) -> Call:
    """`run` for an x of any dtype, with the layer's output dtype."""
    dtype, out_dtype = base.dtype, base.out_dtype

    def cast(x: Tensor) -> Tensor:
        y = run(x if x.dtype is dtype else x.to(dtype))
        return y if y.dtype is out_dtype else y.to(out_dtype)

    return cast


def _lora_call(base: Base, one: Adapter, module: Any = None, names: Sequence[str] = ()) -> Call:
    """`lora_linear` of a base and one adapter, cached in `module`, if given, for its adapters `names`."""

    def run(x: Tensor) -> Tensor:
        op_args = lora_linear_args(
            x, base.weight, one.lora_a, one.lora_b, one.scaling, base.bias, one.dropout_p, base.compute_dtype
        )
        rounds = base.dtype if one.rounds else None
        y: Tensor = dispatch.call("lora_linear", x, *op_args, rounds=rounds)[0]
        if module is not None and not one.dropout_p:
            again: Call = lambda x: dispatch.call("lora_linear", x, *op_args)[0]  # noqa: E731
            store(module, x, again, op_args, lambda guards: guards.expect_lora(module, names))
        return y

    return run


def _dora_call(module: Any, name: str, base: Base, one: Adapter) -> Call:
    vector, one = module.lora_magnitude_vector[name], rounded(one, base.dtype)

    def run(x: Tensor) -> Tensor:
        norm = _cached_norm(vector, name, x, base, one)
        return dora_linear(
            x, base.weight, one.lora_a, one.lora_b, vector.weight, one.scaling, base.bias, one.dropout_p,
            base.compute_dtype, norm,
        )  # fmt: skip

    return run


def _cached_norm(vector: Any, name: str, x: Tensor, base: Base, one: Adapter) -> Tensor | None:
    """The norm of an earlier call under PEFT's `DoraCaching`, by which the user states that no weight
    changes. As in PEFT, cached in eval mode only, and dropped by `train()` and by a call outside of the
    context."""
    from peft.tuners.lora import dora

    cache = getattr(vector, "_dora_cache", None)
    if cache is None:  # PEFT before 0.19
        return None
    if not dora.ENABLE_DORA_CACHING or vector.training:
        cache.clear()
        return None
    key = f"peft_kernels-norm-{name}-{x.dtype}-{base.compute_dtype}"
    if key not in cache:
        with torch.no_grad():
            cache[key] = dora_norm(x, base.weight, one.lora_a, one.lora_b, one.scaling, base.compute_dtype)
    norm: Tensor = cache[key]
    return norm


def _prepare_mixed(module: Any, spec: InputSpec, adapter_names: Sequence[str]) -> Call | Fallback:
    """The call of PEFT's mixed batches, which name the adapter of each sample."""
    known = module._modules["lora_A"]
    names = [name for name in dict.fromkeys(adapter_names) if name in known]
    if not names or is_traced():
        return Fallback()
    operands = _operands(module, spec, names, mixed=True)
    if isinstance(operands, Fallback):
        return operands
    base, adapters = operands
    layer = AdaptedLinear(base.weight, base.bias, adapters)
    group_of = {name: group for group, name in enumerate(names)}
    groups = torch.tensor([group_of.get(name, -1) for name in adapter_names], device=spec.device)
    biases = [(group_of[n], module.scaling[n] * b) for n in names if (b := module.lora_B[n].bias) is not None]

    def run(x: Tensor) -> Tensor:
        module._check_forward_args(x, adapter_names=adapter_names)
        rows = x[..., 0].numel() // len(adapter_names) if adapter_names else 0
        y = multi_lora_linear(x, [layer], groups.repeat_interleave(rows), compute_dtype=base.compute_dtype)[0]
        if biases:
            table = y.new_zeros(len(names) + 1, y.shape[-1], dtype=torch.float32)  # the last row: no adapter
            for group, bias in biases:
                table[group] = bias
            y = y + table[groups].view(-1, *[1] * (y.dim() - 2), y.shape[-1])
        return y

    return _cast(base, run)

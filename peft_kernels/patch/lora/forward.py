"""PEFT's LoRA layers on our kernels: `LoraLayer.forward` over every kind of base that `judge` knows.

A forward looks at the layer as it is at that moment (active adapters, dropout, merged or not), so everything
that PEFT can do to a layer between two calls is seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...core import dispatch
from ...nf4.weight import NF4Weight
from ...ops.arguments import autocast_dtype, is_traced
from ...ops.lora.dora import dora_linear, dora_norm
from ...ops.lora.lora import lora_linear_args
from ...ops.lora.multi_lora import AdaptedLinear, Adapter, multi_lora_linear
from .. import call_cache as repeated
from .. import eligibility as judge
from ..fused import RECORD, Fused

Prepared = tuple[judge.Base, list[Adapter]]


class FusedLora(Fused):
    """Base product and the deltas of the adapters in one op."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        record = self.__dict__.get(RECORD)
        if record is not None:
            y: Any = repeated.again(self, record, (x, *args), kwargs)
            if y is not None:
                return y
        if record is None or self.disable_adapters:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        y = _run(self, x) if not args and not kwargs else _run_with(self, x, args, kwargs)
        if isinstance(y, Tensor):
            return y
        if y:
            record.fallbacks[y] += 1
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]

    # DoRA's merge assigns a weight where LoRA's adds to it: an NF4 weight has to be told that this is a
    # merge, so that it is its packed bytes again afterwards.

    def merge(self: Any, *args: Any, **kwargs: Any) -> None:
        weight = self.get_base_layer().weight
        assigned = self.lora_variant and isinstance(weight, NF4Weight)
        with weight.merging() if assigned else nullcontext():
            super().merge(*args, **kwargs)  # type: ignore[misc]

    def unmerge(self: Any) -> None:
        weight = self.get_base_layer().weight
        assigned = self.lora_variant and isinstance(weight, NF4Weight)
        with weight.unmerging() if assigned else nullcontext():
            super().unmerge()  # type: ignore[misc]


def prepare(module: Any, dtype: torch.dtype, device: torch.device) -> Prepared | str:
    """A layer and its active adapters, whose deltas are summed, as `gated_mlp` takes them, or why that cannot
    be. The reason is empty where PEFT's forward is the base layer's alone."""
    if not judge.is_lora(module):
        base = judge.base(module, dtype, device)
        return base if isinstance(base, str) else (base, [])
    reason = judge.call_of(module) or judge.lora_class(module, FusedLora)
    if reason or module.disable_adapters or module.merged_adapters:
        return reason
    names = judge.active(module)
    return judge.summed(module, names) or _prepare(module, dtype, device, names)


def _prepare(
    module: Any, dtype: torch.dtype, device: torch.device, names: Sequence[str], mixed: bool = False
) -> Prepared | str:
    """`mixed`: each row takes one of the adapters, so their biases (`lora_bias=True`) are left to the
    caller."""
    reason = judge.lora_class(module, FusedLora) or judge.variants(module, names, FusedLora)
    if reason:
        return reason
    layer = module.__dict__["_modules"]["base_layer"]
    base = judge.base(layer, dtype, device)
    if isinstance(base, str):
        return base
    adapters = []
    bias: Any = base.bias
    rounds = autocast_dtype(device.type) == base.dtype
    for group, name in enumerate(names):
        adapter = judge.adapter(module, name, base.dtype, device, group, rounds)
        if isinstance(adapter, str):
            return adapter
        adapters.append(adapter)
        if module.lora_bias[name] and not mixed:
            own = module.lora_B[name].bias
            delta = adapter.scaling * own.float()
            bias = delta if bias is None else bias.float() + delta
    return (base if bias is base.bias else base._replace(bias=bias)), adapters


def rounded(one: Adapter, dtype: torch.dtype) -> Adapter:
    """An adapter for who computes with its matrices as they are: rounded to `dtype` by torch, if at all."""
    if not one.rounds:
        return one
    return replace(one, lora_a=one.lora_a.to(dtype), lora_b=one.lora_b.to(dtype), rounds=False)


def _run(module: Any, x: Tensor) -> Tensor | str:
    """All active adapters on all rows. A str is the reason why the original forward must run, empty when that
    is nothing to count."""
    if module.merged_adapters:
        return ""
    names = judge.active(module)
    if not names or (len(names) > 1 and is_traced()):
        return ""
    prepared = _prepare(module, x.dtype, x.device, names)
    if isinstance(prepared, str):
        return prepared
    base, adapters = prepared
    weight, bias, dtype, compute, out_dtype = base
    given = x
    if x.dtype is not dtype:  # quicker than `to`, which would find out the same
        x = x.to(dtype)
    if len(adapters) > 1:
        y = multi_lora_linear(x, [AdaptedLinear(weight, bias, adapters)], compute_dtype=compute)[0]
    else:
        (one,) = adapters
        a, b, p = one.lora_a, one.lora_b, one.dropout_p
        if module.lora_variant and names[0] in module.lora_variant:
            vector = module.lora_magnitude_vector[names[0]]
            one = rounded(one, dtype)
            a, b = one.lora_a, one.lora_b
            norm = _kept_norm(vector, names[0], x, weight, one, compute)
            y = dora_linear(x, weight, a, b, vector.weight, one.scaling, bias, p, compute, norm)
        else:
            op_args = lora_linear_args(x, weight, a, b, one.scaling, bias, p, compute)
            y = dispatch.call("lora_linear", x, *op_args, rounds=dtype if one.rounds else None)[0]
            if x is given and compute == y.dtype == out_dtype and not p:
                repeated.note(module, x, "lora_linear", op_args, lambda seen: seen.lora(module, names))
    return y if y.dtype is out_dtype else y.to(out_dtype)


def _kept_norm(
    vector: Any, name: str, x: Tensor, weight: Any, one: Adapter, compute: torch.dtype | None
) -> Tensor | None:
    """The norm of an earlier call, where the user has said by PEFT's `DoraCaching` that nothing changes
    meanwhile. By PEFT's rules: in eval mode only, forgotten by `train()` and by a call outside of it."""
    from peft.tuners.lora import dora

    cache = getattr(vector, "_dora_cache", None)  # PEFT has it since 0.19
    if cache is None:
        return None
    if not dora.ENABLE_DORA_CACHING or vector.training:
        cache.clear()
        return None
    key = f"peft_kernels-norm-{name}-{x.dtype}-{compute}"
    if key not in cache:
        with torch.no_grad():
            cache[key] = dora_norm(x, weight, one.lora_a, one.lora_b, one.scaling, compute)
    norm: Tensor = cache[key]
    return norm


def _run_with(module: Any, x: Tensor, args: Any, kwargs: dict[str, Any]) -> Tensor | str:
    """With arguments: those of PEFT's mixed batches are known, and None for any other."""
    given = {name: value for name, value in kwargs.items() if value is not None}
    adapter_names = given.pop("adapter_names", None)
    if args or given:
        return f"extra arguments ({', '.join(given) or 'positional'})"
    if adapter_names is None:
        return _run(module, x)
    module._check_forward_args(x, adapter_names=adapter_names)
    there = module._modules["lora_A"]
    names = [name for name in dict.fromkeys(adapter_names) if name in there]
    if not names or is_traced():
        return ""
    prepared = _prepare(module, x.dtype, x.device, names, mixed=True)
    if isinstance(prepared, str):
        return prepared
    base, adapters = prepared
    x = x.to(base.dtype)
    group_of = {name: group for group, name in enumerate(names)}
    groups = torch.tensor([group_of.get(name, -1) for name in adapter_names], device=x.device)
    rows = x[..., 0].numel() // len(adapter_names) if adapter_names else 0
    layer = AdaptedLinear(base.weight, base.bias, adapters)
    y = multi_lora_linear(x, [layer], groups.repeat_interleave(rows), compute_dtype=base.compute_dtype)[0]
    biases = [(group_of[n], module.scaling[n] * b) for n in names if (b := module.lora_B[n].bias) is not None]
    if biases:
        table = y.new_zeros(len(names) + 1, y.shape[-1], dtype=torch.float32)  # the last row: no adapter
        for group, bias in biases:
            table[group] = bias
        y = y + table[groups].view(-1, *[1] * (y.dim() - 2), y.shape[-1])
    return y.to(base.out_dtype)

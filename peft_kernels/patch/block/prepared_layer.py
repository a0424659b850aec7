"""Decoder layers like Llama's without a gradient, as in generation: operands are collected once, and used as
long as nothing that they were taken from has changed (`call_cache`). The ops of each half are called in C++
(csrc/cpu/block/decoder_layer.cpp). Where all layers have adapters, results have the bits of calling module by
module; where none is active (merged, disabled), modules would run torch's functions.

In Python a decoded token of a small model takes several times as long as its kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...core import dispatch
from ...core.backends import cpu
from ...core.backends.base import DTYPES
from ...core.gradient import is_plain_call
from ...ops.block.rms_norm import CASTING
from ...ops.lora.multi_lora import AdaptedLinear, flatten
from ..call_cache import Guards, cached_call, store
from ..fused import RECORD, Fallback, Record, has, plain_class
from ..input_spec import InputSpec
from ..lora.forward import adapted_operands
from ..rules import attention as rule
from ..rules import norm as norm_rule
from ..rules.attention import PROJECTIONS, Attention
from ..rules.calls import hook_reason
from ..rules.decoder_layer import NORM_NAMES
from ..rules.linear import fused_operands
from ..rules.lora import active_adapters, is_lora
from . import attention, gated_mlp
from . import rms_norm as norms

_PARTS = {"layers", "mlp", "norms"}
"""Parts of `patch` that a prepared layer computes in addition to those that it is installed with."""
_MAX_ATTEMPTS = 16
"""How often a layer is prepared at most; then it always calls its modules."""


def run(layer: Any, record: Record, x: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """The output of a decoder layer, or None if its modules must be called. `kwargs` are all its arguments
    after x."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not is_plain_call():
        return None
    if x.device.type != "cpu" or dispatch.forced() not in (None, "cpu"):
        return None
    attn = layer.__dict__["_modules"]["self_attn"]
    if not has(attn, attention.FusedAttention):
        return None
    if not attention.supports(attn, x, kwargs.get("position_embeddings")):
        return None
    prepared: Any = cached_call(layer, record, (x,), None)
    if prepared is None:
        prepared = _prepare(layer, record, x)
        if prepared is None:
            return None
    known, halves = prepared
    rest = dict(kwargs)
    positions = rest.pop("position_embeddings")
    mask, cache = rest.pop("attention_mask", None), rest.pop(known.cache, None)
    heads = halves.project(x, *positions)
    y, _ = attention.attend(attn, known, heads, positions, mask, cache, rest)
    out: Tensor = halves.finish(y, x)
    return out


def _prepare(layer: Any, record: Record, x: Tensor) -> tuple[Attention, Any] | None:
    """What is known of the attention module, and the library's DecoderLayer for inputs like x."""
    if record.attempts >= _MAX_ATTEMPTS or record.without & _PARTS:
        return None
    if dispatch.select("multi_lora_linear", (x,)) is not cpu.BACKEND:
        return None
    record.attempts += 1
    children = layer.__dict__["_modules"]
    attn, mlp = children["self_attn"], children["mlp"]
    known = rule.attention(attn).computes
    if known is None or x.dtype not in DTYPES:
        return None
    facts = gated_mlp.facts_of(mlp)
    if isinstance(facts, Fallback) or facts.change_reason(mlp) or any(map(hook_reason, (attn, mlp))):
        return None
    own_norms = [children[name] for name in NORM_NAMES]
    if known.normed:
        own_norms += [attn.q_norm, attn.k_norm]
    normed = [_norm(one, x) for one in own_norms]
    groups = [
        [attn._modules[name] for name in PROJECTIONS],
        [attn._modules["o_proj"]],
        [mlp._modules[name] for name in facts.names[:2]],
        [mlp._modules[facts.names[2]]],
    ]
    spec = InputSpec(x.dtype, x.device, None)
    layers = [found for group in groups if (found := _layers(group, spec, x)) is not None]
    if None in normed or len(layers) < len(groups):
        return None
    weights, eps, offsets, roundings = zip(*normed, strict=True)
    library = cpu.BACKEND.extension
    held = [library.AdaptedLayers(*one) for one in layers]
    rotates = not known.rotates or bool(getattr(attn, known.rotates))
    of_norms = map(list, (weights, eps, offsets, roundings))
    halves = library.DecoderLayer(*of_norms, *held, attn.head_dim, rotates, facts.activation)
    prepared = known, halves
    guard = partial(_watch, layer, known, facts, own_norms)
    store(layer, x, prepared, [*weights, *layers], guard)
    return prepared


def _watch(layer: Any, known: Attention, facts: Any, own_norms: Sequence[Any], guards: Guards) -> None:
    """Names all that the operands of a decoder layer were taken from."""
    children = layer.__dict__["_modules"]
    attn, mlp = children["self_attn"], children["mlp"]
    guards.expect_forward(plain_class(layer))
    guards.expect_same(layer.__dict__, "_modules")
    for name in (*NORM_NAMES, "self_attn", "mlp"):
        guards.expect_same(children, name)
    for one in own_norms:
        guards.expect_untouched(one)
        guards.expect_forward(plain_class(one))
        guards.expect_dtype_and_device(guards.expect_same(one.__dict__["_parameters"], "weight"))
        guards.expect_same(one.__dict__, norm_rule.norm(one).computes.eps)
    for module in (attn, mlp):
        guards.expect_untouched(module)
        guards.expect_same(module.__dict__, "_modules")
        guards.expect_same(module.__dict__, RECORD)
    for name in ("head_dim", known.rotates or "head_dim"):
        guards.expect_same(attn.__dict__, name)
    guards.expect_forward(plain_class(attn))
    for name in ("q_norm", "k_norm") if known.normed else ():
        guards.expect_same(attn._modules, name)
    rotary = guards.expect_same(known.names, "apply_rotary_pos_emb")
    guards.expect_same(getattr(rotary, "__globals__", known.names), "rotate_half")
    if isinstance(rotary, nn.Module):  # with `kernels`
        guards.expect_untouched(rotary)
    for module, names in ((attn, (*PROJECTIONS, "o_proj")), (mlp, facts.names)):
        for name in names:
            child = guards.expect_same(module._modules, name)
            if not is_lora(child):
                guards.expect_linear(child)
                continue
            guards.expect_untouched(child)
            if _runs_base_alone(child):
                guards.expect_base_of_lora(child)
            else:
                guards.expect_lora(child, active_adapters(child))
    guards.unchanged = lambda layer: not facts.change_reason(layer.__dict__["_modules"]["mlp"])


def _norm(module: Any, x: Tensor) -> tuple[Tensor, float, float, bool] | None:
    """Weight, eps, offset and rounding of a norm whose result has x's dtype."""
    found = norms.operands(module, x)
    if isinstance(found, Fallback) or hook_reason(module):
        return None
    weight, eps, options = found
    if weight.dtype != x.dtype and CASTING[options["casting"]]:
        return None
    return weight, eps, options["offset"], CASTING[options["casting"]]


def _runs_base_alone(child: Any) -> bool:
    """Whether a LoRA layer calls its base layer alone. Disabled and merged, it unmerges first."""
    return bool(child.disable_adapters) != bool(child.merged_adapters)


def _layers(group: Sequence[Any], spec: InputSpec, x: Tensor) -> tuple[Any, ...] | None:
    """The arguments of AdaptedLayers for layers that share their input."""
    layers, features = [], []
    for child in group:
        operands: Any = adapted_operands(child, spec)
        if operands == Fallback() and is_lora(child) and _runs_base_alone(child):
            base = fused_operands(child.get_base_layer(), spec, called=False)
            operands = base if isinstance(base, Fallback) else (base, [])
        if isinstance(operands, Fallback):
            return None
        base, adapters = operands
        if {base.dtype, base.compute_dtype, base.out_dtype} != {x.dtype}:
            return None
        if any(one.dropout_p or one.rounds for one in adapters):
            return None
        layers.append(AdaptedLinear(base.weight, base.bias, adapters))
        features.append(base.weight.shape[1])
    bases, adapters_, _, _ = flatten(x, layers, features, x.dtype, x.dtype)
    a, b, layer, scaling, _ = adapters_
    return (*bases, a, b, layer, scaling)

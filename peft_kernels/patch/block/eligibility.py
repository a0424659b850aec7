"""Decides whether norms, attention modules and decoder layers of transformers can be fused.

Models copy each other's code, so classes are recognised by the source of their forward (`sources.like`) and
not by name. Functions that return only a reason return "" if there is none.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ...core.backends.base import DTYPES
from ...core.module_calls import class_forward
from ...core.wrong_types import an
from .. import sources
from ..eligibility import device_reason as device_reason
from ..fused import Fallback, plain_class

Function = Callable[..., Any]

_MODELS = "transformers.models"
_GEMMA = f"{_MODELS}.gemma.modeling_gemma.GemmaRMSNorm"
_LAYERS = (
    f"{_MODELS}.llama.modeling_llama.LlamaDecoderLayer.forward",
    f"{_MODELS}.mixtral.modeling_mixtral.MixtralDecoderLayer.forward",
)
"""They compute the same; the order of their arguments differs."""
_ROTARY = f"{_MODELS}.llama.modeling_llama.apply_rotary_pos_emb"
_ROTATED = f"{_MODELS}.llama.modeling_llama.rotate_half"

NORM_NAMES = ("input_layernorm", "post_attention_layernorm")
"""The norms of a decoder layer, as Llama names them."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
ORDINARY = (nn.Parameter, Tensor, FakeTensor)

_norms: dict[tuple[Function, Function | None], Norm | Fallback] = {}
_attentions: dict[tuple[Any, ...], Attention | Fallback] = {}
_layers: dict[Function, tuple[tuple[str, Any], ...] | None] = {}


class Norm(NamedTuple):
    """The arguments of `rms_norm` that compute a norm's forward."""

    eps: str
    """The name of the module's attribute."""
    offset: float
    casting: str


_NORMS = {
    f"{_MODELS}.llama.modeling_llama.LlamaRMSNorm.forward": Norm("variance_epsilon", 0.0, "llama"),
    f"{_GEMMA}.forward": Norm("eps", 1.0, "gemma"),
    f"{_MODELS}.olmo2.modeling_olmo2.Olmo2RMSNorm.forward": Norm("variance_epsilon", 0.0, "gemma"),
}


class AttentionKind(NamedTuple):
    """How the forward of an attention module differs from Llama's."""

    normed: bool = False
    """The heads of queries and keys are normed."""
    passed: tuple[tuple[str, str, str], ...] = ()
    """Further arguments of the attention function: keyword, holder (the module's attribute, "" for itself)
    and attribute name."""
    rotates: str = ""
    """The attribute of the module that says whether it applies rotary embeddings; "" where all do."""


_WINDOW = ("sliding_window", "", "sliding_window")
_ATTENTION = {
    f"{_MODELS}.llama.modeling_llama.LlamaAttention.forward": AttentionKind(),
    f"{_MODELS}.mistral.modeling_mistral.MistralAttention.forward": AttentionKind(
        passed=(("sliding_window", "config", "sliding_window"),)
    ),
    f"{_MODELS}.qwen2.modeling_qwen2.Qwen2Attention.forward": AttentionKind(passed=(_WINDOW,)),
    f"{_MODELS}.qwen3.modeling_qwen3.Qwen3Attention.forward": AttentionKind(normed=True, passed=(_WINDOW,)),
    f"{_MODELS}.gemma2.modeling_gemma2.Gemma2Attention.forward": AttentionKind(
        passed=(_WINDOW, ("softcap", "", "attn_logit_softcapping"))
    ),
    f"{_MODELS}.gemma3.modeling_gemma3.Gemma3Attention.forward": AttentionKind(
        normed=True, passed=(_WINDOW,)
    ),
    f"{_MODELS}.smollm3.modeling_smollm3.SmolLM3Attention.forward": AttentionKind(
        passed=(_WINDOW,), rotates="use_rope"
    ),
}


class Attention(NamedTuple):
    """A known forward of an attention module."""

    kind: AttentionKind
    cache: str
    """The name of its argument for the KV cache."""
    names: dict[str, Any]
    """The globals of its file."""


def is_norm(module: nn.Module) -> bool:
    """Whether a module looks like a root mean square norm of transformers."""
    named = any(cls.__name__.endswith("RMSNorm") for cls in plain_class(module).__mro__)
    return named and not module._modules and module._parameters.get("weight") is not None


def norm(module: nn.Module) -> Norm | Fallback:
    """What the class of a norm computes, if it is known."""
    cls: Any = plain_class(module)
    key = class_forward(cls), getattr(cls, "_norm", None)
    found = _norms.get(key)
    if found is None:
        found = _norms[key] = _norm(*key)
    return found


def _norm(forward: Function, helper: Function | None) -> Norm | Fallback:
    name = sources.like(forward, *_NORMS)
    if name == f"{_GEMMA}.forward" and (helper is None or sources.like(helper, f"{_GEMMA}._norm") is None):
        name = None
    return (
        Fallback("its forward is none of the norms known here; nothing to do")
        if name is None
        else _NORMS[name]
    )


def weight_reason(weight: Any, device: torch.device | None = None) -> str:
    """Why the weight of a norm cannot be used on an x on `device` (None: the device of the weight)."""
    if type(weight) not in ORDINARY:
        return f"the weight is {an(weight)}; use a plain parameter"
    if weight.dtype not in DTYPES or weight.dim() != 1:
        got = f"{weight.dtype} and shape {tuple(weight.shape)}"
        return f"the weight is of {got}; use a vector in fp32, bf16 or fp16"
    if device is not None and device != weight.device:
        return f"x is on {device}; move the weight there"
    return device_reason(weight, "rms_norm")


def layer(module: nn.Module) -> tuple[tuple[str, Any], ...] | None:
    """The arguments after x, with their defaults, of a decoder layer with Llama's forward; None for any other
    module."""
    if not all(module._modules.get(name) is not None for name in (*NORM_NAMES, "self_attn", "mlp")):
        return None
    forward: Any = plain_class(module).forward
    if forward not in _layers:
        _layers[forward] = None if sources.like(forward, *_LAYERS) is None else _defaults(forward)
    return _layers[forward]


def layer_of_subclass(module: nn.Module) -> str:
    """The class with Llama's forward that the class of a decoder layer replaces the forward of, or ""."""
    above = plain_class(module).__mro__[1:]
    forwards: Iterator[tuple[str, Any]] = ((cls.__name__, class_forward(cls)) for cls in above)
    return next((name for name, forward in forwards if sources.like(forward, *_LAYERS) is not None), "")


def _defaults(forward: Function) -> tuple[tuple[str, Any], ...]:
    _, _, *others = inspect.signature(forward).parameters.values()
    return tuple((one.name, one.default) for one in others if one.kind is one.POSITIONAL_OR_KEYWORD)


def is_attention(module: nn.Module) -> bool:
    """Whether a module has projections of queries, keys and values with Llama's names."""
    return all(module._modules.get(name) is not None for name in PROJECTIONS)


def attention(module: nn.Module) -> Attention | Fallback:
    """What the forward of an attention module computes, if it is known."""
    forward: Any = plain_class(module).forward
    names = getattr(forward, "__globals__", {})
    if hasattr(forward, "__wrapped__"):
        names = getattr(inspect.unwrap(forward), "__globals__", {})
    # Other libraries replace functions in the modules of transformers.
    rotary: Any = names.get("apply_rotary_pos_emb")
    key = forward, rotary, getattr(rotary, "__globals__", {}).get("rotate_half")
    found = _attentions.get(key)
    if found is None:
        found = _attentions[key] = _attention(*key, names)
    return found


def _attention(forward: Function, rotary: Any, half: Any, names: dict[str, Any]) -> Attention | Fallback:
    name = sources.like(forward, *_ATTENTION)
    if name is None:
        return Fallback("its forward is none of those known here; nothing to do")
    if sources.like(rotary, _ROTARY) is None or half is None or sources.like(half, _ROTATED) is None:
        return Fallback("its rotary embedding is none of those known here; nothing to do")
    cache = next(n for n in ("cache", "past_key_values") if n in inspect.signature(forward).parameters)
    return Attention(_ATTENTION[name], cache, names)

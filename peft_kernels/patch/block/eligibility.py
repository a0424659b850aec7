"""May what lies between the products of a block be fused, and if not, why: as `judge`, for the norms and the
attention modules of transformers.

Models repeat each other's code word by word. So they are told by the words of their functions, of which
`sources` has those that were read, and not by the names of their classes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ...core.backends.base import DTYPES
from .. import fused, sources

Function = Callable[..., Any]

_MODELS = "transformers.models"
_GEMMA = f"{_MODELS}.gemma.modeling_gemma.GemmaRMSNorm"
LAYERS = (
    f"{_MODELS}.llama.modeling_llama.LlamaDecoderLayer.forward",
    f"{_MODELS}.mixtral.modeling_mixtral.MixtralDecoderLayer.forward",
)
"""One and the same, but for the order of their arguments."""
ROTARY = f"{_MODELS}.llama.modeling_llama.apply_rotary_pos_emb"
ROTATED = f"{_MODELS}.llama.modeling_llama.rotate_half"

NORM_NAMES = ("input_layernorm", "post_attention_layernorm")
"""Of a decoder layer's norms, as Llama names them."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
ORDINARY = (nn.Parameter, Tensor, FakeTensor)

_norms: dict[tuple[Function, Function | None], Norm | str] = {}
_attentions: dict[tuple[Any, ...], Attention | str] = {}
_layers: dict[Function, tuple[tuple[str, Any], ...] | None] = {}


class Norm(NamedTuple):
    """What the forward of a norm gives `rms_norm`, beside x and weight."""

    eps: str
    """The attribute of the module that holds it."""
    offset: float
    casting: str


NORMS = {
    f"{_MODELS}.llama.modeling_llama.LlamaRMSNorm.forward": Norm("variance_epsilon", 0.0, "llama"),
    f"{_GEMMA}.forward": Norm("eps", 1.0, "gemma"),
    f"{_MODELS}.olmo2.modeling_olmo2.Olmo2RMSNorm.forward": Norm("variance_epsilon", 0.0, "gemma"),
}
"""Forwards that were read."""


class Words(NamedTuple):
    """What the forward of an attention module does that others do not."""

    normed: bool = False
    """Heads of queries and keys are."""
    passed: tuple[tuple[str, str, str], ...] = ()
    """What the attention function is told besides: its keyword, and the attribute of the module, or of its
    `config`, that has it."""
    rotates: str = ""
    """The attribute of the module that tells whether queries and keys are turned; "" where all are."""


_WINDOW = ("sliding_window", "", "sliding_window")
ATTENTION = {
    f"{_MODELS}.llama.modeling_llama.LlamaAttention.forward": Words(),
    f"{_MODELS}.mistral.modeling_mistral.MistralAttention.forward": Words(
        passed=(("sliding_window", "config", "sliding_window"),)
    ),
    f"{_MODELS}.qwen2.modeling_qwen2.Qwen2Attention.forward": Words(passed=(_WINDOW,)),
    f"{_MODELS}.qwen3.modeling_qwen3.Qwen3Attention.forward": Words(normed=True, passed=(_WINDOW,)),
    f"{_MODELS}.gemma2.modeling_gemma2.Gemma2Attention.forward": Words(
        passed=(_WINDOW, ("softcap", "", "attn_logit_softcapping"))
    ),
    f"{_MODELS}.gemma3.modeling_gemma3.Gemma3Attention.forward": Words(normed=True, passed=(_WINDOW,)),
    f"{_MODELS}.smollm3.modeling_smollm3.SmolLM3Attention.forward": Words(
        passed=(_WINDOW,), rotates="use_rope"
    ),
}
"""Forwards that were read."""


class Attention(NamedTuple):
    """What the forward of an attention module does, and with what."""

    words: Words
    cache: str
    """Its name for the cache of keys and values."""
    names: dict[str, Any]
    """Those of the forward's file."""


def is_norm(module: nn.Module) -> bool:
    """Whether a module looks like a root mean square norm of transformers."""
    name = fused.plain_class(module).__name__
    return name.endswith("RMSNorm") and not module._modules and module._parameters.get("weight") is not None


def norm(module: nn.Module) -> Norm | str:
    """What the class of a norm computes, or why that is not known."""
    cls: Any = fused.plain_class(module)
    key = cls.forward, getattr(cls, "_norm", None)
    found = _norms.get(key)
    if found is None:
        found = _norms[key] = _norm(*key)
    return found


def _norm(forward: Function, helper: Function | None) -> Norm | str:
    name = sources.like(forward, *NORMS)
    if name == f"{_GEMMA}.forward" and (helper is None or sources.like(helper, f"{_GEMMA}._norm") is None):
        name = None
    return "its forward is none of the norms known here" if name is None else NORMS[name]


def vector(weight: Any, device: torch.device | None = None) -> str:
    """Why the weight of a norm cannot be used on an x on `device` (None: where the weight is), or ""."""
    if type(weight) not in ORDINARY:
        return f"the weight is a {type(weight).__name__}"
    if weight.dtype not in DTYPES or weight.dim() != 1:
        return f"the weight is of {weight.dtype} and shape {tuple(weight.shape)}"
    return elsewhere(weight.device) if device is None or device == weight.device else f"x is on {device}"


def elsewhere(device: torch.device) -> str:
    """Why nothing is gained on such a device, or ""."""
    return "" if device.type in ("cpu", "meta") else f"{device.type} has no kernel for it here"


def layer(module: nn.Module) -> tuple[tuple[str, Any], ...] | None:
    """The arguments behind x of the forward of a decoder layer in Llama's words, with their defaults; None of
    any other module."""
    if not all(module._modules.get(name) is not None for name in (*NORM_NAMES, "self_attn", "mlp")):
        return None
    forward: Any = fused.plain_class(module).forward
    if forward not in _layers:
        known = sources.like(forward, *LAYERS) is not None
        _layers[forward] = _defaults(forward) if known else None
    return _layers[forward]


def _defaults(forward: Function) -> tuple[tuple[str, Any], ...]:
    _, _, *others = inspect.signature(forward).parameters.values()
    return tuple((one.name, one.default) for one in others if one.kind is one.POSITIONAL_OR_KEYWORD)


def is_attention(module: nn.Module) -> bool:
    """Whether a module has projections of queries, keys and values as Llama names them."""
    return all(module._modules.get(name) is not None for name in PROJECTIONS)


def attention(module: nn.Module) -> Attention | str:
    """What the forward of an attention module does, or why that is not known."""
    forward: Any = fused.plain_class(module).forward
    names = getattr(forward, "__globals__", {})
    if hasattr(forward, "__wrapped__"):
        names = getattr(inspect.unwrap(forward), "__globals__", {})
    # Others put functions of their own into the files of transformers.
    rotary: Any = names.get("apply_rotary_pos_emb")
    key = forward, rotary, getattr(rotary, "__globals__", {}).get("rotate_half")
    found = _attentions.get(key)
    if found is None:
        found = _attentions[key] = _attention(*key, names)
    return found


def _attention(forward: Function, rotary: Any, half: Any, names: dict[str, Any]) -> Attention | str:
    name = sources.like(forward, *ATTENTION)
    if name is None:
        return "its forward is none of those known here"
    if sources.like(rotary, ROTARY) is None or half is None or sources.like(half, ROTATED) is None:
        return "its rotary embedding is none of those known here"
    cache = next(n for n in ("cache", "past_key_values") if n in inspect.signature(forward).parameters)
    return Attention(ATTENTION[name], cache, names)

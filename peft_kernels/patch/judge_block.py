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

from ..backends.base import DTYPES
from . import fused, sources

Function = Callable[..., Any]

_MODELS = "transformers.models"
NORM = f"{_MODELS}.llama.modeling_llama.LlamaRMSNorm.forward"
ROTARY = f"{_MODELS}.llama.modeling_llama.apply_rotary_pos_emb"
ROTATED = f"{_MODELS}.llama.modeling_llama.rotate_half"
ATTENTION = {
    f"{_MODELS}.llama.modeling_llama.LlamaAttention.forward": (False, ""),
    f"{_MODELS}.mistral.modeling_mistral.MistralAttention.forward": (False, "config"),
    f"{_MODELS}.qwen2.modeling_qwen2.Qwen2Attention.forward": (False, "module"),
    f"{_MODELS}.qwen3.modeling_qwen3.Qwen3Attention.forward": (True, "module"),
}
"""Forwards that were read: whether heads of queries and keys are normed, and where the width of a sliding
window is told."""

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
ORDINARY = (nn.Parameter, Tensor, FakeTensor)

_norms: dict[Function, str] = {}
_attentions: dict[tuple[Any, ...], Attention | str] = {}


class Attention(NamedTuple):
    """What the forward of an attention module does, and with what."""

    normed: bool
    window: str
    cache: str
    """Its name for the cache of keys and values."""
    names: dict[str, Any]
    """Those of the forward's file."""


def is_norm(module: nn.Module) -> bool:
    """Whether a module looks like a root mean square norm of transformers."""
    name = fused.plain_class(module).__name__
    return name.endswith("RMSNorm") and not module._modules and module._parameters.get("weight") is not None


def norm(module: nn.Module) -> str:
    """Why `rms_norm` does not compute what the class of a norm does, or ""."""
    forward: Any = fused.plain_class(module).forward
    found = _norms.get(forward)
    if found is None:
        known = sources.like(forward, NORM) is not None
        found = _norms[forward] = "" if known else "its forward is none of the norms known here"
    return found


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
    return Attention(*ATTENTION[name], cache, names)

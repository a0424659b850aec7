"""Our attention in transformers models by name, for models that are not patched.

use(model)                             # model.set_attn_implementation("sdpa") undoes it

register()                             # or by name
AutoModelForCausalLM.from_pretrained(..., attn_implementation="peft_kernels")

`pk.patch` does it without a name in the configuration. Sinks and softcaps raise, because "sdpa", which serves
what ours does not cover, would ignore them silently."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from ..core.wrong_types import an
from ..patch.block.attend import attention_forward, register
from ..patch.block.attention_function import NAME

__all__ = ["NAME", "attention_forward", "register", "use"]


def use(model: nn.Module) -> None:
    """Makes a transformers model, or all models that a module wraps (PEFT), use our attention.

    Raises
    ------
    TypeError
        It contains no transformers model.
    ValueError
        Its class does not use transformers' registry, or computes something else than "sdpa" (sinks of
        GPT-OSS, softcap of Gemma 2). Nothing is changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a model of transformers, got {an(model)}")
    found = _models(model)
    if not found:
        raise TypeError(f"model: expected a model of transformers, got {an(model)} without one")
    for one in found:
        if not one._can_set_attn_implementation():
            raise ValueError(f"model: {an(one)} does not let its attention be chosen")
        for part in one.modules():
            if isinstance(part, PreTrainedModel) and not _is_sdpas(part):
                raise ValueError(
                    'model: expected one that supports "sdpa", which ours replaces, '
                    f"got {an(part)}, which does not"
                )
    register()
    for one in found:
        one.set_attn_implementation(NAME)


def _models(module: nn.Module) -> list[PreTrainedModel]:
    """The outermost transformers models in a module."""
    if isinstance(module, PreTrainedModel):
        return [module]
    return [one for child in module.children() for one in _models(child)]


def _is_sdpas(model: PreTrainedModel) -> bool:
    """Whether a model supports "sdpa", if its attention can be selected at all."""
    return bool(model._supports_sdpa) or not model._can_set_attn_implementation()

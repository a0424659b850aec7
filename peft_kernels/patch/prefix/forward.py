"""PEFT's prefix tuning: one prefix for the batch, also under gradient checkpointing and in generate.

PEFT computes the prefix once per sample and puts it into a cache that layers append to. A layer recomputed in
the backward pass would append twice, so transformers removes the cache from such layers, and PEFT refuses.
Here they get a read-only cache, and its tensors as inputs of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from torch import nn

from ...core.wrong_types import an
from ..fused import RECORD, Fused, plain_class
from ..rules import prefix as rule
from ..rules.examination import Examination, Layers

_UNCAST = "_peft_kernels_uncast"
"""The attribute a PeftModel has while it computes a prefix in the dtype of its parameters."""


class FusedPrefix(Fused):
    """A PeftModel whose prefix is computed once for the whole batch."""

    methods: ClassVar[tuple[str, ...]] = ("get_prompt", "_setup_prompt_encoder")

    def get_prompt(self: Any, batch_size: int, *args: Any, **kwargs: Any) -> Any:
        stock = super().get_prompt  # type: ignore[misc]
        record = self.__dict__.get(RECORD)
        if record is None or not rule.is_active(self):
            return stock(batch_size, *args, **kwargs)
        from . import cache as prefix_cache

        recomputed = rule.checkpointing(self, CheckpointedLayer)
        dtype = self.base_model_torch_dtype
        if batch_size > 1:
            self.__dict__[_UNCAST] = True
        try:
            prompt = stock(1, *args, **kwargs)
        finally:
            self.__dict__.pop(_UNCAST, None)
        if recomputed:
            return prefix_cache.read_only(prompt, dtype)
        if prefix_cache.share(prompt, batch_size, dtype):
            setattr(prompt, prefix_cache.MARK, self.active_peft_config.num_virtual_tokens)
            return prompt
        record.fallbacks[f"a prefix in {an(prompt)}"] += 1
        return stock(batch_size, *args, **kwargs)

    @property
    def base_model_torch_dtype(self: Any) -> Any:
        """The dtype PEFT casts a prefix to. None while gradients must be summed over the batch uncast."""
        return None if _UNCAST in self.__dict__ else super().base_model_torch_dtype  # type: ignore[misc]

    def _setup_prompt_encoder(self: Any, adapter_name: str) -> None:
        """As PEFT's, which refuses a further adapter while gradient checkpointing is on."""
        stock = super()._setup_prompt_encoder  # type: ignore[misc]
        if RECORD not in self.__dict__:
            return stock(adapter_name)
        with ExitStack() as unchecked:
            for module in self.get_base_model().modules():
                if getattr(module, "gradient_checkpointing", False):
                    unchecked.enter_context(_unchecked(module))
            stock(adapter_name)


class GeneratingPrefix(FusedPrefix):
    """A PeftModel that generates: the prefix goes into the cache that generate created, of any kind."""

    methods = (*FusedPrefix.methods, "prepare_inputs_for_generation")

    def prepare_inputs_for_generation(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        ours = RECORD in self.__dict__ and rule.is_active(self) and rule.takes_cache()
        if not ours:
            return super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]
        return _prepare(self, *args, **kwargs)


def _prepare(model: Any, input_ids: Any, **kwargs: Any) -> dict[str, Any]:
    from . import cache as prefix_cache

    config, cache = model.active_peft_config, kwargs.get("cache")
    tokens, first = config.num_virtual_tokens, kwargs.get("is_first_iteration", False)
    embeds = kwargs.get("inputs_embeds")
    rows = len(embeds) if first and embeds is not None else len(input_ids)
    if cache is None or kwargs.get("use_cache") is False:
        kwargs["cache"] = model.get_prompt(rows)  # for this step only
    elif not int(cache.get_seq_length()):
        prefix_cache.fill(cache, model.get_prompt(rows), tokens)
    elif first:
        if getattr(cache, prefix_cache.MARK, None) != tokens:
            raise ValueError(
                f"cache: expected an empty one or one from this model, which begins with {tokens} virtual "
                f"tokens; got one with {int(cache.get_seq_length())} tokens of another"
            )
        if kwargs.get("next_sequence_length") is not None:  # counted without the prefix
            kwargs["next_sequence_length"] += tokens
    decoder = "decoder_" if model.base_model.config.is_encoder_decoder else ""
    if (mask := kwargs.get(f"{decoder}attention_mask")) is not None:
        if mask.dim() != 2:
            raise ValueError(
                f"{decoder}attention_mask: expected shape (batch, length), to be extended by the prefix, got "
                f"{tuple(mask.shape)}"
            )
        ones = mask.new_ones(len(mask), tokens)
        kwargs[f"{decoder}attention_mask"] = torch.cat([ones, mask], dim=1)
    if (positions := kwargs.get(f"{decoder}position_ids")) is not None:
        kwargs[f"{decoder}position_ids"] = positions + tokens
    prepared: dict[str, Any] = model.base_model_prepare_inputs_for_generation(input_ids, **kwargs)
    return prepared


class CheckpointedStack(Fused):
    """A stack of such layers: some, like GPT-2's, remove the cache before calling them."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        stock = super().__call__  # type: ignore[misc]
        if _recomputed_prefix(self, args, kwargs) is None:
            return stock(*args, **kwargs)
        with _unchecked(self):
            return stock(*args, **kwargs | {"use_cache": False})


class CheckpointedLayer(Fused):
    """A layer of transformers that keeps the prefix when it is recomputed."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        stock = super().__call__  # type: ignore[misc]
        cache = _recomputed_prefix(self, args, kwargs)
        if cache is None:
            return stock(*args, **kwargs)
        from . import cache as prefix_cache

        index = rule.index_in_cache(self)
        assert index is not None  # see `rule.not_recomputable`
        layer = prefix_cache.of_self_attention(cache).layers[index]

        def run(keys: Any, values: Any, *args: Any) -> Any:
            own = prefix_cache.for_layer(cache, index, keys, values)
            args = tuple(own if each is cache else each for each in args)
            named = {name: own if each is cache else each for name, each in kwargs.items()}
            with _unchecked(self):
                return stock(*args, **named)

        # Passed as inputs, since a reentrant checkpoint gives gradients to its inputs only.
        return self._gradient_checkpointing_func(run, layer.keys, layer.values, *args)


def _recomputed_prefix(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The prefix among the arguments of a checkpointed call, or None."""
    if RECORD not in module.__dict__ or not rule.recomputes(module):
        return None
    from . import cache as prefix_cache

    return next((each for each in (*args, *kwargs.values()) if prefix_cache.is_read_only(each)), None)


@contextmanager
def _unchecked(module: Any) -> Iterator[None]:
    """Inside, transformers regards a module as not checkpointed, and does not remove its cache."""
    module.gradient_checkpointing = False
    try:
        yield
    finally:
        module.gradient_checkpointing = True


def checkpointed(model: Any) -> Iterator[tuple[nn.Module, type[Fused]]]:
    """The modules of a PeftModel that must keep its prefix, and the class to install in each."""
    yield from ((layer, CheckpointedLayer) for _, layer in rule.layers(model))
    yield from ((stack, CheckpointedStack) for stack in rule.stacks(model))


def examine(module: nn.Module, layers: Layers) -> Examination | None:
    """Examines a model of PEFT with prefix tuning."""
    if not rule.is_prefix(module):
        return None
    generates = hasattr(plain_class(module), "prepare_inputs_for_generation")
    mixin = GeneratingPrefix if generates else FusedPrefix
    reason = "" if rule.is_active(module) else "the active adapter is of another kind; activate the prefix"
    return Examination(f"PEFT prefix tuning {type(module).__name__}", mixin, reason)

"""The forward passes of serving: prefill of one prompt, and one token for each of several requests."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from .. import adapters
from . import row_attention
from .layers import Rows, Switch, reason_unserved

_owned: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models owned by engines."""
_TOLERANCE = 0.05
"""Tolerance of `_check`, relative to the largest logit: far above rounding of bf16, far below the effect of a
wrong cache or mask."""


class Decoder:
    """A causal language model of transformers. Raises TypeError for one that cannot be decoded per row."""

    def __init__(self, model: Any) -> None:
        _check_kind(model)
        self.model = model
        self.config = self.model.config.get_text_config(decoder=True)
        self.longest = _longest(self.config)
        self.switch = Switch()
        taken = inspect.signature(model.forward).parameters
        if "position_ids" not in taken:
            raise TypeError(f"model: expected one whose forward takes position_ids, got {_kind(model)}")
        self._cache = "cache" if "cache" in taken else "past_key_values"
        self._options: dict[str, Any] = {"use_cache": True}
        if "logits_to_keep" in taken:
            self._options["logits_to_keep"] = 1
        embeddings = self.model.get_input_embeddings().weight
        self.device, self.dtype, self.vocabulary = embeddings.device, embeddings.dtype, len(embeddings)
        self._configs = row_attention.configs_of(model)
        row_attention.register()
        self._check()

    def own(self) -> None:
        """Takes the model for this engine until `release`."""
        _owned.add(self.model)
        # All layers, with or without adapters: bits of a row must not depend on earlier requests.
        self.switch.attach([one for one in self.model.modules() if not reason_unserved(one)])

    def release(self) -> None:
        """Restores the model's layers."""
        self.switch.detach()
        _owned.discard(self.model)

    def start(self, prompt: Sequence[int], rows: Rows) -> tuple[Tensor, Any]:
        """Prefills a prompt. Returns the logits (vocabulary,) after it, and its cache."""
        cache = DynamicCache(config=self.model.config)
        logits = self._run([list(prompt)], [list(range(len(prompt)))], cache, rows)
        return logits[0], cache

    def step(
        self, tokens: Sequence[int], lengths: Sequence[int], caches: Sequence[Any], rows: Rows
    ) -> Tensor:
        """The logits (rows, vocabulary) after one more token per row.

        Parameters
        ----------
        lengths : sequence of int
            Length of each row before this token.
        caches : sequence
            Cache of each row, None for an empty slot; each grows by the token.
        """
        cache = row_attention.RowCaches(caches, self._configs[0]._attn_implementation_internal)
        with row_attention.by_rows(self._configs):
            return self._run([[token] for token in tokens], [[length] for length in lengths], cache, rows)

    def _run(self, ids: list[list[int]], positions: list[list[int]], cache: Any, rows: Rows) -> Tensor:
        given = {
            "input_ids": torch.tensor(ids, device=self.device),
            "position_ids": torch.tensor(positions, device=self.device),
            self._cache: cache,
        }
        with torch.no_grad(), self.switch.on(rows):
            logits: Tensor = self.model(**given, **self._options).logits
        return logits[:, -1]

    def _check(self) -> None:
        """Compares two rows of different lengths, with an empty slot between them, to each row alone."""
        prompts, token = ([0, 1, 2, 3, 0], [2, 0]), 1
        none = Rows([None])
        try:
            caches = [self.start(prompt, none)[1] for prompt in prompts]
            together = self.step([token] * 3, [5, 0, 2], [caches[0], None, caches[1]], Rows([None] * 3))
            alone = [self.start([*prompt, token], none)[0] for prompt in prompts]
        except Exception as error:
            raise TypeError(
                "model: expected one whose attention uses transformers' AttentionInterface and Cache, got "
                f"{_kind(self.model)}: {type(error).__name__}: {error}"
            ) from error
        expected = torch.stack(alone).float()
        off = (together[[0, 2]].float() - expected).abs().max() / expected.abs().max()
        if not off <= _TOLERANCE:
            raise TypeError(
                f"model: expected the same logits by rows as alone, got a difference of {float(off):.2g} of "
                f"the largest: the attention or cache of {_kind(self.model)} is not supported"
            )


def _longest(config: Any) -> int | None:
    """Maximum tokens of a prompt with its answer. "longrope" (Phi-3) changes frequencies for the whole batch
    if one row exceeds the original length, so no row may."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    limits = [getattr(config, "max_position_embeddings", None)]
    for one in (rope, *rope.values()):  # of the model, or by layer type
        if isinstance(one, dict) and "longrope" in (one.get("rope_type"), one.get("type")):
            name = "original_max_position_embeddings"
            limits.append(one.get(name) or getattr(config, name, None))
    return min((limit for limit in limits if limit is not None), default=None)


def _kind(model: Any) -> str:
    return type(model).__name__


def _check_kind(model: Any) -> None:
    if not isinstance(model, nn.Module) or not hasattr(model, "get_input_embeddings"):
        raise TypeError(f"model: expected a causal language model of transformers, got {_kind(model)}")
    if hasattr(model, "peft_config") or any(hasattr(m, "base_layer") for m in model.modules()):
        raise TypeError(
            "model: expected the base without adapters of PEFT, which the engine loads by itself, got a "
            f"{_kind(model)} with some: model.unload() takes them out"
        )
    if model in _owned:
        raise TypeError("model: expected one that no other engine serves: close() that one first")
    if names := adapters.names(model):
        raise TypeError(
            "model: expected the base without bottleneck adapters, which the engine loads by itself, got "
            f"{', '.join(names)}: pk.adapters.delete takes them out"
        )
    config: Any = model.config
    if "chunked_attention" in (getattr(config.get_text_config(), "layer_types", None) or ()):
        raise TypeError(
            f"model: expected attention over the whole cache, got chunked attention: {_kind(model)}"
        )
    if model.training:
        raise TypeError("model: expected evaluation mode, got training mode: model.eval() first")

"""Attention for a batch of requests in which each row has its own cache of its own length.

A decoding step adds one token per row. Keys and values are not padded: each row runs alone through the
model's attention, with the shapes that it has without the others, so results cannot depend on other rows."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from ..core.wrong_types import an

NAME = "peft_kernels_rows"


class RowTensors(list[Tensor | None]):
    """Keys or values of each row, (1, heads, length, features); None for an empty slot."""

    implementation: str


class RowCaches(Cache):
    """The caches of the rows, with the interface of one cache. None is an empty slot, whose keys and values
    are dropped. At least one row has a cache."""

    def __init__(self, caches: Sequence[Any], implementation: str) -> None:
        super().__init__(layers=[])
        self.caches = caches
        self.implementation = implementation

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        keys, values = RowTensors(), RowTensors()
        keys.implementation = values.implementation = self.implementation
        for i, cache in enumerate(self.caches):
            if cache is None:
                pair = None, None
            else:
                pair = cache.update(
                    key_states[i : i + 1], value_states[i : i + 1], layer_idx, *args, **kwargs
                )
            keys.append(pair[0])
            values.append(pair[1])
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(cache.get_seq_length(layer_idx) for cache in self.caches if cache is not None)


def attention(
    module: nn.Module, query: Tensor, key: Any, value: Any, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """`query` is (rows, heads, 1, features). A token attends to its row's whole cache, so there is no
    mask."""
    if not isinstance(key, RowTensors):
        raise RuntimeError(f"cache: expected the caches of rows, got keys of {an(key)}")
    inner: Any = AttentionInterface._global_mapping.get(key.implementation)
    if inner is None:  # "eager" is defined by each model
        inner = sys.modules[type(module).__module__].eager_attention_forward
    packs = key.implementation == "sdpa" and query.device.type == "cpu" and not options.get("position_bias")
    one = _packed if packs else _alone
    found = [
        None if k is None else one(inner, module, query[i : i + 1], k, value[i], options)
        for i, k in enumerate(key)
    ]
    empty = torch.zeros_like(next(part for part in found if part is not None))
    return torch.cat([empty if part is None else part for part in found]), None


def _alone(inner: Any, module: Any, query: Tensor, key: Tensor, value: Any, options: Any) -> Tensor:
    return inner(module, query, key, value, None, **options)[0]


def _packed(inner: Any, module: Any, query: Tensor, key: Tensor, value: Any, options: Any) -> Tensor:
    """Treats heads that share keys as tokens: torch's CPU kernel then reads the keys once for all of them,
    which takes a fraction of the time."""
    _, heads, _, features = query.shape
    shared = key.shape[1]
    y = inner(
        module, query.view(1, shared, heads // shared, features), key, value, None, **options, is_causal=False
    )[0]
    return y.transpose(1, 2).reshape(1, 1, heads, value.shape[-1])


def configs_of(model: nn.Module) -> list[Any]:
    """Configs from which attention layers read their implementation."""
    found = {
        id(config): config for m in model.modules() if (config := getattr(m, "config", None)) is not None
    }
    return [config for config in found.values() if hasattr(config, "_attn_implementation_internal")]


@contextmanager
def by_rows(configs: Sequence[Any]) -> Iterator[None]:
    """A context in which layers attend per row."""
    before = [config._attn_implementation_internal for config in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = NAME
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name


def register() -> None:
    """Registers the attention with transformers; models that do not select it are unaffected."""
    AttentionInterface.register(NAME, attention)

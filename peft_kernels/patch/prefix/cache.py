"""Prefixes in KV caches of transformers: shared by the batch and read-only, or copied into another cache."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache

from ...core.gradient import AutogradFunction

MARK = "_peft_kernels_prefix"
"""The attribute of a cache that holds the number of virtual tokens at its start."""


class PrefixCache(DynamicCache):
    """Keys and values of a prefix, (1, heads, tokens, head_dim) for each layer, read in `dtype` and never
    written.

    Where layers are recomputed, a cache that appends would get new tokens twice.
    """

    layers: list[Any]

    def __init__(self, prefix: Cache, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.layer_class_to_replicate = None
        self.layers, self.dtype = list(prefix.layers), dtype

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Returns [prefix; new] of a layer, for new keys and values (batch, heads, length, head_dim)."""
        layer = self.layers[layer_idx]
        pairs = (layer.keys, key_states), (layer.values, value_states)
        return [torch.cat([shared(old, len(new), self.dtype), new], dim=-2) for old, new in pairs]

    def with_layer(self, layer_idx: int, keys: Tensor, values: Tensor) -> PrefixCache:
        """A copy with other tensors in one layer."""
        twin = PrefixCache(self, self.dtype)
        layer = twin.layers[layer_idx] = copy.copy(self.layers[layer_idx])
        layer.keys, layer.values = keys, values
        return twin


class _Shared(AutogradFunction):
    """A prefix cast and expanded over a batch; gradients are summed over the batch in the prefix's dtype."""

    @staticmethod
    def forward(ctx: Any, prefix: Tensor, batch_size: int, dtype: torch.dtype) -> Tensor:
        ctx.dtype = prefix.dtype
        return prefix.to(dtype).expand(batch_size, -1, -1, -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.sum(0, keepdim=True, dtype=ctx.dtype), None, None


def shared(prefix: Tensor, batch_size: int, dtype: torch.dtype | None) -> Tensor:
    """A prefix (1, heads, tokens, head_dim) expanded over a batch."""
    if dtype is None or prefix.dtype == dtype:
        return prefix.expand(batch_size, -1, -1, -1)
    found: Tensor = _Shared.apply(prefix, batch_size, dtype)
    return found


def of_self_attention(cache: Any) -> Any:
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def is_read_only(cache: Any) -> bool:
    return isinstance(of_self_attention(cache), PrefixCache)


def read_only(prompt: Any, dtype: torch.dtype | None) -> Any:
    """The result of PEFT's get_prompt for a batch of one, as PrefixCache."""
    return _like(prompt, PrefixCache(of_self_attention(prompt), dtype))


def for_layer(cache: Any, layer_idx: int, keys: Tensor, values: Tensor) -> Any:
    """A read-only cache for one call of one layer, which recomputes the keys and values of
    cross-attention."""
    return _like(cache, of_self_attention(cache).with_layer(layer_idx, keys, values))


def _like(cache: Any, prefix: PrefixCache) -> Any:
    return EncoderDecoderCache(prefix, DynamicCache()) if isinstance(cache, EncoderDecoderCache) else prefix


def share(prompt: Any, batch_size: int, dtype: torch.dtype | None) -> bool:
    """Expands a prefix for a batch of one over the batch, without copies. Returns False, and changes nothing,
    if the kind of cache is not supported."""
    layers = getattr(of_self_attention(prompt), "layers", None)
    if not layers or any(layer.is_initialized and layer.keys.dim() != 4 for layer in layers):
        return False
    for layer in layers:
        if layer.is_initialized:
            layer.keys = shared(layer.keys, batch_size, dtype)
            layer.values = shared(layer.values, batch_size, dtype)
    return True


def fill(cache: Any, prompt: Any, tokens: int) -> None:
    """Puts a prefix into an empty cache that generate created, of any kind.

    Raises ValueError if the prefix is longer than a sliding window, which would drop its first tokens.
    """
    target, source = of_self_attention(cache), of_self_attention(prompt)
    for layer in source.layers:
        if layer.is_initialized and layer.keys.shape[-2] < tokens:
            raise ValueError(
                f"num_virtual_tokens: {tokens} do not fit into a sliding window of {layer.sliding_window}"
            )
    _enlarge(target, tokens)
    for index, layer in enumerate(source.layers):
        if layer.is_initialized:
            target.update(layer.keys, layer.values, index)
    setattr(cache, MARK, tokens)


def _enlarge(cache: Any, tokens: int) -> None:
    """Enlarges a static cache, which was sized without the prefix, unless it is allocated already."""
    for layer in cache.layers:
        length = getattr(layer, "max_cache_len", None)
        if length is not None and not layer.is_initialized:
            # A window shorter than the longest text does not grow.
            window = getattr(layer, "sliding_window", None)
            layer.max_cache_len = length + tokens if window is None else min(window, length + tokens)

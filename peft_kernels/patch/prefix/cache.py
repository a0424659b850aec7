"""Prefixes in caches of transformers: one for the whole batch, read only, or put into another cache."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache

MARK = "_peft_kernels_prefix"
"""The attribute of a cache that says how many virtual tokens it begins with."""


class PrefixCache(DynamicCache):
    """Keys and values of a prefix that calls read, in `dtype`, and never write: (1, heads, tokens, head_dim)
    of each layer.

    Where layers are computed twice, a cache that keeps what it is given would see new tokens twice.
    """

    layers: list[Any]

    def __init__(self, prefix: Cache, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.layer_class_to_replicate = None
        self.layers, self.dtype = list(prefix.layers), dtype

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        """[prefix; new] of a layer, for new keys and values of shape (batch, heads, length, head_dim)."""
        layer = self.layers[layer_idx]
        pairs = (layer.keys, key_states), (layer.values, value_states)
        return [torch.cat([shared(old, len(new), self.dtype), new], dim=-2) for old, new in pairs]

    def with_layer(self, layer_idx: int, keys: Tensor, values: Tensor) -> PrefixCache:
        """The same with other tensors in one layer."""
        twin = PrefixCache(self, self.dtype)
        layer = twin.layers[layer_idx] = copy.copy(self.layers[layer_idx])
        layer.keys, layer.values = keys, values
        return twin


class _Shared(torch.autograd.Function):
    """A prefix in another dtype, for every row of a batch; the rows' gradients are summed in its own."""

    @staticmethod
    def forward(ctx: Any, prefix: Tensor, batch_size: int, dtype: torch.dtype) -> Tensor:
        ctx.dtype = prefix.dtype
        return prefix.to(dtype).expand(batch_size, -1, -1, -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.sum(0, keepdim=True, dtype=ctx.dtype), None, None


def shared(prefix: Tensor, batch_size: int, dtype: torch.dtype | None) -> Tensor:
    """A prefix of (1, heads, tokens, head_dim) as each row of a batch sees it."""
    if dtype is None or prefix.dtype == dtype:
        return prefix.expand(batch_size, -1, -1, -1)
    found: Tensor = _Shared.apply(prefix, batch_size, dtype)
    return found


def of_self_attention(cache: Any) -> Any:
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def is_read_only(cache: Any) -> bool:
    return isinstance(of_self_attention(cache), PrefixCache)


def read_only(prompt: Any, dtype: torch.dtype | None) -> Any:
    """What PEFT's get_prompt gives for a batch of one, as PrefixCache."""
    return _like(prompt, PrefixCache(of_self_attention(prompt), dtype))


def for_layer(cache: Any, layer_idx: int, keys: Tensor, values: Tensor) -> Any:
    """A read-only cache for one call of one layer. It computes cross-attention's keys and values anew."""
    return _like(cache, of_self_attention(cache).with_layer(layer_idx, keys, values))


def _like(cache: Any, prefix: PrefixCache) -> Any:
    return EncoderDecoderCache(prefix, DynamicCache()) if isinstance(cache, EncoderDecoderCache) else prefix


def share(prompt: Any, batch_size: int, dtype: torch.dtype | None) -> bool:
    """Make of a prefix for a batch of one what each row of a batch sees, without a copy for each. False: it
    is of a kind that is not known here, and unchanged."""
    layers = getattr(of_self_attention(prompt), "layers", None)
    if not layers or any(layer.is_initialized and layer.keys.dim() != 4 for layer in layers):
        return False
    for layer in layers:
        if layer.is_initialized:
            layer.keys = shared(layer.keys, batch_size, dtype)
            layer.values = shared(layer.values, batch_size, dtype)
    return True


def fill(cache: Any, prompt: Any, tokens: int) -> None:
    """Put a prefix into an empty cache that generate has made, of whatever kind it is.

    Raises ValueError when the prefix is longer than a sliding window: what slid out of it is gone.
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
    """A static cache was sized without the prefix. One that holds tensors already is left as it is."""
    for layer in cache.layers:
        length = getattr(layer, "max_cache_len", None)
        if length is not None and not layer.is_initialized:
            # A window that covers less than the longest text does not grow.
            window = getattr(layer, "sliding_window", None)
            layer.max_cache_len = length + tokens if window is None else min(window, length + tokens)

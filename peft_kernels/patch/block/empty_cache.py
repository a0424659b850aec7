"""KV caches in training: transformers creates one in every call of a model, and nothing reads it later."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from ..rules.stand_in import alike, plain_mode
from ..rules.verdict import recognise


def fill(cache: Any, keys: Tensor, values: Tensor, layer_idx: int) -> bool:
    """Store keys and values in an empty layer of a cache if its `update` would do nothing but store copies,
    which in training cost as much again in backward. Returns whether it did."""
    transformers: Any = sys.modules.get("transformers.cache_utils")
    if transformers is None or type(cache) is not transformers.DynamicCache:
        return False
    if not (torch.is_grad_enabled() and keys.requires_grad and values.requires_grad):
        return False
    layers = cache.layers
    if cache.offloading or not layer_idx < len(layers) or "update" in cache.__dict__:
        return False
    layer = layers[layer_idx]
    if type(layer) is not transformers.DynamicLayer or layer.is_initialized or "update" in layer.__dict__:
        return False
    key = type(cache).update, type(layer).update
    if recognise(key, lambda: _stores(type(cache), type(layer)), "its update does more").reason:
        return False
    _fill(layer, keys, values)
    return True


def _fill(layer: Any, keys: Tensor, values: Tensor) -> None:
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values


def _stores(cache_class: Any, layer_class: Any) -> bool | None:
    """True if `update` of an empty layer, and of a cache with such a layer, stores and returns keys and
    values. Else None."""
    with plain_mode(has_gradient=False):
        keys, values = torch.randn(2, 1, 2, 3, 4, device="cpu")
        cache, theirs, ours = cache_class(), layer_class(), layer_class()
        cache.layers = [layer_class()]
        try:
            returned = [theirs.update(keys, values), cache.update(keys, values, 0)]
            _fill(ours, keys, values)
        except Exception:  # of another version
            return None
        stored = [vars(layer) for layer in (theirs, cache.layers[0])]
        same = alike([list(one) for one in returned], [[keys, values]] * 2, 0.0)
        return True if same and alike(stored, [vars(ours)] * 2, 0.0) else None

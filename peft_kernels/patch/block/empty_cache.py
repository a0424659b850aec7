"""KV caches in training: transformers creates one in every call of a model, and nothing reads it later."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from .. import sources


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
    if not (sources.known(type(cache).update) and sources.known(type(layer).update)):
        return False
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return True

"""KV caches created in a training step store keys and values without a copy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flow_blocks import family, patched
from flow_checks import assert_near
from flow_models import adapted, ids
from peft_models import gradients
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from peft_kernels.patch.block import empty_cache


def keys_and_values(requires_grad: bool = True) -> tuple[Tensor, Tensor]:
    """Keys or values as in attention: (batch, heads, length, head_dim), transposed."""
    return tuple(  # type: ignore[return-value]
        torch.randn(1, 3, 2, 4, requires_grad=requires_grad).transpose(1, 2) for _ in range(2)
    )


def cache_of(layer: Any = None, **attributes: Any) -> Any:
    cache = DynamicCache()
    cache.layers = [DynamicLayer() if layer is None else layer]
    cache.__dict__.update(attributes)
    return cache


@pytest.mark.parametrize("name", ["Llama", "Gemma3"])
def test_cache_equals_stock_s(name: str) -> None:
    """Like stock's, it can be appended to, with gradients. Sliding-window layers have another cache."""
    mixed = {"layer_types": ["sliding_attention", "full_attention"]} if name == "Gemma3" else {}
    stock = adapted(family(name, **mixed)).train()
    model, _ = patched(stock)
    results = []
    for one in (model, stock):
        first = one(input_ids=ids()[:, :6], use_cache=True)
        layers = [layer for layer in first.past_key_values.layers if type(layer) is DynamicLayer]
        copied = {t._base is None for layer in layers for t in (layer.keys, layer.values)}
        assert copied == {one is stock} and first.past_key_values.get_seq_length() == 6
        seen = {f"{i}": t for i, layer in enumerate(layers) for t in (layer.keys.detach(),)}
        seen |= {f"v{i}": layer.values.detach() for i, layer in enumerate(layers)}
        assert all(isinstance(layer.device, torch.device) for layer in layers)
        second = one(input_ids=ids()[:, 6:], past_key_values=first.past_key_values)
        (first.logits.square().mean() + second.logits.square().mean()).backward()
        results.append({"y": second.logits.detach()} | seen | gradients(one))
        one.zero_grad()
    assert results[0].keys() == results[1].keys() and len(results[0]) > 10
    assert_near(*results)


def test_only_empty_stock_caches_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    class OtherCache(DynamicCache):
        pass

    class OtherLayer(DynamicLayer):
        pass

    k, v = keys_and_values()
    cache = cache_of()
    assert empty_cache.fill(cache, k, v, 0)
    assert cache.layers[0].keys is k and cache.layers[0].values is v
    assert not empty_cache.fill(cache, k, v, 0), "it is not empty any more"
    other_cache, own, own_layer = OtherCache(), cache_of(update=None), DynamicLayer()
    other_cache.layers, own_layer.update = [DynamicLayer()], None  # type: ignore[method-assign,assignment]
    others = [
        other_cache, own, cache_of(offloading=True), cache_of(DynamicSlidingWindowLayer(sliding_window=8)),
        cache_of(OtherLayer()), cache_of(own_layer), DynamicCache(), None,
    ]  # fmt: skip
    assert not any(empty_cache.fill(other, k, v, 0) for other in others)
    assert not empty_cache.fill(cache_of(), *keys_and_values(requires_grad=False), 0)
    with torch.no_grad():
        assert not empty_cache.fill(cache_of(), k, v, 0)
    theirs = DynamicLayer.update
    monkeypatch.setattr(DynamicLayer, "update", lambda *args, **kwargs: theirs(*args, **kwargs))
    assert empty_cache.fill(cache_of(), k, v, 0), "it does the same"
    monkeypatch.setattr(DynamicLayer, "update", lambda self, k, v, *rest: theirs(self, 2 * k, v))
    assert not empty_cache.fill(cache_of(), k, v, 0)

"""Global hooks and replaced module calls run as often as in stock."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import loss_models
import prefix_models
import pytest
import torch
from flow_models import adapted, llama
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

import peft_kernels as pk
from peft_kernels.core.module_calls import HOOKED_ALL

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Full backward hook is firing")

MODELS: dict[str, Callable[[], Any]] = {
    "lora": lambda: adapted(llama()),
    "lora-nf4": lambda: adapted(llama("nf4")),
    "lora-bnb": lambda: adapted(llama("bnb")),
    "bnb": lambda: llama("bnb").train(),
    "dora": lambda: adapted(llama(), use_dora=True),
    "plain": lambda: llama().train(),
    "head-lora": loss_models.MODELS["head-lora"],
    "gemma2": loss_models.MODELS["gemma2"],
    "prefix": lambda: prefix_models.prefixed(prefix_models.bare("llama")),
}
HOOKS = {
    "forward": torch_module.register_module_forward_hook,
    "forward_pre": torch_module.register_module_forward_pre_hook,
    "full_backward": torch_module.register_module_full_backward_hook,
    "full_backward_pre": torch_module.register_module_full_backward_pre_hook,
}


def batch() -> dict[str, Tensor]:
    return loss_models.batch()


def calls(model: Any, kind: str) -> Counter[str]:
    """How often hooks run, by module name."""
    names = {module: name for name, module in model.named_modules()}
    seen: Counter[str] = Counter()
    handle = HOOKS[kind](lambda module, *_: seen.update([names[module]] if module in names else []))
    try:
        model(**batch()).loss.backward()
    finally:
        handle.remove()
    return seen


def patched(stock: nn.Module) -> tuple[Any, Any]:
    model = copy.deepcopy(stock)
    return model, pk.patch(model)


@pytest.mark.parametrize("name", MODELS)
def test_hooks_on_all_modules_run(name: str) -> None:
    stock = MODELS[name]()
    if name == "gemma2" and stock._supports_sdpa:
        pytest.skip("in this transformers sdpa leaves out Gemma 2's soft cap, and attention falls back")
    stock.config.use_cache = False
    model, report = patched(stock)
    for kind in HOOKS:
        expected = calls(stock, kind)
        assert expected and calls(model, kind) == expected, kind
    everything = [*report.layers, *report.blocks, *report.losses]
    before = [Counter(entry.fallbacks) for entry in everything]
    if "lora" in name or name == "dora":
        assert HOOKED_ALL in str(report)
    model(**batch()).loss.backward()
    assert [Counter(entry.fallbacks) for entry in everything] == before, "without hooks all runs fused again"


def test_patching_while_there_are_hooks() -> None:
    stock = adapted(llama())
    handle = torch_module.register_module_forward_hook(lambda *_: None)
    try:
        model, report = patched(stock)
        assert all(layer.reason == HOOKED_ALL for layer in report.layers) and report.layers
    finally:
        handle.remove()
    model(**batch())
    assert all(layer.fused and not layer.fallbacks for layer in report.layers)


def test_hooks_added_between_decoded_tokens() -> None:
    model, _ = patched(adapted(llama()).eval())
    seen: list[nn.Module] = []
    inside = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    with torch.no_grad():
        for _ in range(3):
            model(batch()["input_ids"][:1, :1])
        handle = torch_module.register_module_forward_hook(lambda module, *_: seen.append(module))
        try:
            model(batch()["input_ids"][:1, :1])
        finally:
            handle.remove()
    assert seen.count(inside) == 1


@pytest.mark.parametrize("where", ["class", "all"])
@pytest.mark.parametrize("part", ["base_layer", "lora_dropout.default", "mlp.act_fn"])
def test_replaced_calls_run(part: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaced on one class, or on nn.Module as by tracers."""
    model, report = patched(adapted(llama()))
    module = next(m for n, m in model.named_modules() if n.endswith(part))
    stock, made = nn.Module.__call__, []

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        made.append(self)
        return stock(self, *args, **kwargs)

    for _ in range(2):
        model(**batch())
    assert module not in made
    with monkeypatch.context() as patch:
        patch.setattr(type(module) if where == "class" else nn.Module, "__call__", call)
        model(**batch())
    assert made.count(module) == 1
    assert "replaces __call__, which a fused forward would skip" in str(report)

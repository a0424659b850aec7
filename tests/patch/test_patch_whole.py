"""A model is patched as a whole or not at all, even if its class was created by patching another model."""

from __future__ import annotations

import pickle
import sys
from typing import Any

import models
import pytest
import torch
from skips import require_pickles
from torch import nn

import peft_kernels as pk
from peft_kernels.patch import fused
from peft_kernels.patch.loss.forward import LossModel

pytest.importorskip("transformers", reason="transformers is not installed")
peft = pytest.importorskip("peft", reason="PEFT is not installed")


def adapted(model: Any) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "lm_head"]))


def state(model: nn.Module) -> list[Any]:
    return [(type(module), set(vars(module))) for module in model.modules()]


def ids() -> torch.Tensor:
    return torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(0))


LATER_PARTS = ("qkv", "attention", "norms", "residuals")


@pytest.mark.parametrize("without", [LATER_PARTS, ()], ids=["loss", "all"])
def test_a_model_of_the_class_of_a_patched_one(without: tuple[str, ...]) -> None:
    first = models.tiny_llama()
    pk.patch(first, without)
    model = type(first)(first.config)
    model.load_state_dict(first.state_dict())
    for layer, like in zip(model.model.layers, first.model.layers, strict=True):  # likewise its layers
        layer.input_layernorm = type(like.input_layernorm)(64)
    model.lm_head = type(first.lm_head)(64, first.config.vocab_size, bias=False)
    model.load_state_dict(first.state_dict())
    plain = pk.patch(model, {*LATER_PARTS, "loss"})
    assert not plain.losses and not plain.blocks, "they were left out"
    pk.unpatch(model)
    report = pk.patch(model, without)
    assert report.losses[0].fused and len(report.blocks) == (0 if without else 9), report.details()
    want = first(input_ids=ids(), labels=ids())
    assert torch.equal(model(input_ids=ids(), labels=ids()).loss, want.loss)
    assert pk.unpatch(model) > 0 and not isinstance(model, LossModel)
    torch.testing.assert_close(model(input_ids=ids(), labels=ids()).loss, want.loss)


@pytest.mark.parametrize("lost", ["", "gated MLP (1 of 2)", "norm (1 of 5)", "attention (2 of 2)", "loss"])
def test_the_first_line_names_what_is_lost(lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = models.tiny_llama()
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear"))
    first, norm = base.model.layers[0], base.model.norm
    if lost.startswith("attention"):  # its projections and rotary embedding only
        monkeypatch.setattr(sys.modules[type(base).__module__], "apply_rotary_pos_emb", lambda *_: None)
    wrapped: dict[str, Any] = {"gated": first.mlp, "norm": norm, "loss": base.lm_head}
    if module := wrapped.get(lost.split(" ")[0]):
        module.forward = torch.autocast("cpu", dtype=torch.bfloat16)(module.forward)
    lost = "loss without logits (1 of 1)" if lost == "loss" else lost
    line = str(pk.patch(model)).splitlines()[0]
    assert line == "peft_kernels: 14 of 14 layers fused" + (f"; not fully fused: {lost}" if lost else "")


def test_a_subclass_of_a_patched_class() -> None:
    """As after `fully_shard`: unpatching leaves the subclass, and patching accepts it."""
    fsdp = pytest.importorskip("torch.distributed.fsdp", reason="this torch has no distributed")
    model = adapted(models.tiny_llama())
    report = pk.patch(model)
    expected = model(input_ids=ids()).logits
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    made = type("FSDPLinear", (fsdp.FSDPModule, type(layer)), {})
    layer.__class__ = made
    pk.unpatch(model)
    assert type(layer) is made
    report = pk.patch(model)
    assert type(layer) is made and all(entry.fused for entry in report.layers), report.details()
    assert torch.equal(model(input_ids=ids()).logits, expected) and not report.layers[0].fallbacks


def test_pickles_of_a_subclass_keep_it() -> None:
    first = models.tiny_llama()
    require_pickles(first)
    pk.patch(first)
    globals()["Own"] = type("Own", (type(first),), {"__module__": __name__, "extra": 1})
    model = globals()["Own"](first.config)
    pk.patch(model)
    assert type(pickle.loads(pickle.dumps(model))) is globals()["Own"]


@pytest.mark.parametrize("what", ["class", "swap"])
def test_an_error_leaves_the_model_as_it_was(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class cannot be created, or a module refuses it."""
    model = adapted(models.tiny_llama())
    before, expected = state(model), model(input_ids=ids()).logits
    head = model.base_model.model.lm_head
    kind = type(head)

    if what == "class":

        def refuse(cls: Any, **_: Any) -> None:
            raise TypeError("no subclass")

        monkeypatch.setattr(kind, "__init_subclass__", classmethod(refuse), raising=False)
        monkeypatch.setattr(fused, "_classes", {})
    else:

        def stays(self: Any, name: str, value: Any) -> None:
            if self is head and name == "__class__" and value is not kind:
                raise TypeError("no other class")
            nn.Module.__setattr__(self, name, value)

        monkeypatch.setattr(kind, "__setattr__", stays)
    with pytest.raises(TypeError, match="no subclass" if what == "class" else "no other class"):
        pk.patch(model)
    assert state(model) == before
    assert torch.equal(model(input_ids=ids()).logits, expected)
    monkeypatch.undo()
    assert pk.patch(model).losses[0].fused


class PlainNorm(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize("when", ["before", "after"])
def test_modules_compiled_by_torch_jit(when: str) -> None:
    """They have no forward in Python, and no dictionaries of parameters and children."""
    model = models.tiny_llama(num_hidden_layers=1)
    layer, head = model.model.layers[0], nn.Linear(64, model.config.vocab_size, bias=False)
    head.weight = model.lm_head.weight
    parts: dict[str, Any] = {
        "model.layers.0.self_attn.q_proj": torch.jit.script(layer.self_attn.q_proj),
        "model.layers.0.input_layernorm": torch.jit.script(PlainNorm(layer.input_layernorm.weight)),
        "model.layers.0.mlp.act_fn": torch.jit.script(nn.SiLU()),
        "model.layers.0.mlp.down_proj": torch.jit.trace(layer.mlp.down_proj, torch.randn(2, 96)),
        "lm_head": torch.jit.script(head),
        "beside": torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))),
    }
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["v_proj", "up_proj"]))
    want, base = model(input_ids=ids(), labels=ids()).loss, model.get_base_model()
    report = pk.patch(model) if when == "after" else None
    for name, part in parts.items():
        base.set_submodule(name, part)
    report = report or pk.patch(model)
    for _ in range(2):
        torch.testing.assert_close(model(input_ids=ids(), labels=ids()).loss, want)
    assert report.layers and all(layer.fused for layer in report.layers), report.details()
    assert "fused" in str(report) and "fused" in pk.explain(model)
    assert pk.unpatch(model)
    torch.testing.assert_close(model(input_ids=ids(), labels=ids()).loss, want)
    pk.quantize_model(base)
    assert isinstance(layer.mlp.gate_proj, pk.nn.NF4Linear) and base.lm_head is parts["lm_head"]

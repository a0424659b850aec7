"""quantize_model: which layers, how errors leave the model, how much memory."""

from __future__ import annotations

import gc
import logging
import weakref

import models
import pytest
import torch
from torch import nn

import peft_kernels as pk
from peft_kernels.nn import NF4Linear


def kinds(model: nn.Module) -> dict[str, type]:
    return {name: type(m) for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def test_replaces_linear_layers_and_skips_by_last_part_or_full_name() -> None:
    model = models.Net()
    x = torch.randn(4, 64)
    dense = model(x)
    assert pk.quantize_model(model) is model
    assert kinds(model) == {"q": NF4Linear, "o": NF4Linear, "lm_head": nn.Linear}
    assert 0 < (model(x) - dense).norm() / dense.norm() < 0.3

    model = nn.Sequential(models.Net(), models.Net())
    pk.quantize_model(model, skip=("0.q", "o"))
    assert [name for name, kind in kinds(model).items() if kind is nn.Linear] == ["0.q", "0.o", "1.o"]


def test_subclasses_of_linear_are_left_alone() -> None:
    class Special(nn.Linear):
        pass

    model = nn.Sequential(Special(64, 64), nn.Linear(64, 64))
    pk.quantize_model(model)
    assert kinds(model) == {"0": Special, "1": NF4Linear}


def test_tied_weights_are_left_alone() -> None:
    model = models.tiny_llama(tie_word_embeddings=True)
    pk.quantize_model(model, skip=())
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.model.embed_tokens.weight
    assert isinstance(model.model.layers[1].mlp.down_proj, NF4Linear)


def test_a_module_that_stands_in_two_places_stays_one() -> None:
    shared = nn.Linear(64, 64)
    model = nn.Sequential(shared, nn.Linear(64, 64), shared)
    pk.quantize_model(model)
    assert model[0] is model[2] and type(model[0]) is nn.Linear and isinstance(model[1], NF4Linear)

    block = nn.Sequential(nn.Linear(64, 64))  # a shared block is one block: its layer stands in one place
    model = pk.quantize_model(nn.Sequential(block, block))
    assert model[0] is model[1] and isinstance(model[0][0], NF4Linear)


def test_options_reach_every_weight() -> None:
    model = pk.quantize_model(models.Net().eval(), skip="q", blocksize=128, double_quant=False)
    assert kinds(model) == {"q": nn.Linear, "o": NF4Linear, "lm_head": NF4Linear}
    assert model.o.weight.blocksize == 128 and not model.o.weight.double_quant
    assert not model.o.training and model.lm_head.bias.requires_grad


def test_adapters_are_never_quantised() -> None:
    """A PEFT model's adapters are plain nn.Linear, and so is its trained copy of the head."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    config = peft.LoraConfig(
        r=4, target_modules=["q", "o"], modules_to_save=["lm_head"], init_lora_weights=False
    )
    model = peft.get_peft_model(models.Net(), config)
    x = torch.randn(5, 64)
    before, trained = model(x), {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    pk.quantize_model(model)
    quantised = {name for name, kind in kinds(model).items() if kind is NF4Linear}
    assert quantised == {"base_model.model.q.base_layer", "base_model.model.o.base_layer"}
    after = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert after.keys() == trained.keys() and all(torch.equal(after[name], trained[name]) for name in after)
    assert 0 < (model(x) - before).norm() / before.norm() < 0.3

    pk.quantize_model(model, skip=())  # the head that PEFT put aside is the base's, the copy is trained
    assert isinstance(model.base_model.model.lm_head.original_module, NF4Linear)
    assert type(model.base_model.model.lm_head.modules_to_save["default"]) is nn.Linear


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_weight_is_named_and_nothing_is_changed(bad: float) -> None:
    model = models.Net()
    with torch.no_grad():
        model.o.weight[3, 5] = bad
    with pytest.raises(ValueError, match=r"o\.weight: expected finite values, got 1 NaN or Inf among 8192"):
        pk.quantize_model(model)
    assert kinds(model) == {"q": nn.Linear, "o": nn.Linear, "lm_head": nn.Linear}


def test_large_finite_weights_are_no_error() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight.fill_(3e38)  # the sum overflows, no value does
    pk.quantize_model(model)
    assert isinstance(model[0], NF4Linear)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (models.Net, {"blocksize": 60}, "blocksize: expected one of .*, got 60"),
        (lambda: models.Net().double(), {}, r"q\.weight: expected float32, .*, got torch.float64"),
        (lambda: models.Net().to("meta"), {}, r"q\.weight: expected a loaded weight, .* meta device"),
        (lambda: nn.Linear(4, 4), {}, "model: expected a module that contains nn.Linear layers"),
    ],
    ids=["blocksize", "dtype", "meta", "bare-linear"],
)
def test_errors(make: object, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pk.quantize_model(make(), **options)  # type: ignore[operator]


def test_quantising_twice_changes_nothing() -> None:
    model = pk.quantize_model(models.Net())
    layer = model.q
    pk.quantize_model(model)
    assert model.q is layer


def test_experts_in_one_parameter_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    model = models.Net()
    model.experts = nn.Parameter(torch.zeros(8, 512, 512))
    with caplog.at_level(logging.WARNING, logger="peft_kernels"):
        pk.quantize_model(model)
    assert "1 three-dimensional" in caplog.text and "experts" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="peft_kernels"):
        pk.quantize_model(nn.Sequential(nn.Conv1d(512, 512, 5), nn.Linear(64, 64)))
    assert caplog.text == "", "the kernel of a convolution is no set of experts"


def test_progress_bar_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    pk.quantize_model(models.Net(), progress=True)
    assert "quantising to NF4" in capsys.readouterr().err
    pk.quantize_model(models.Net())
    assert capsys.readouterr().err == ""


def test_each_dense_weight_is_freed_before_the_next_layer_but_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    dense = [weakref.ref(layer.weight) for layer in model]
    alive: list[int] = []
    quantize = NF4Linear.from_linear.__func__

    def counting(cls: type, linear: nn.Linear, *args: object, **kwargs: object) -> NF4Linear:
        gc.collect()
        alive.append(sum(ref() is not None for ref in dense))
        return quantize(cls, linear, *args, **kwargs)

    monkeypatch.setattr(NF4Linear, "from_linear", classmethod(counting))
    pk.quantize_model(model)
    assert alive == [6, 5, 4, 3, 2, 1]

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
    assert "three-dimensional" in caplog.text and "experts" in caplog.text


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

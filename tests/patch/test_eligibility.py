"""Eligibility of LoRA layers: classes are recognised by their forward, and unknown PEFT versions by a
trial."""

from __future__ import annotations

import re
from typing import Any

import models
import pytest
import torch
from installed import before
from peft_models import lora, peft
from rounding import ONE_LAYER, ONE_MODEL
from torch import Tensor, nn

import peft_kernels as pk
import testing
from peft_kernels.patch.rules import sources, verdict


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verdicts are cached for the life of a process."""
    verdict._verdicts.clear()


def unknown(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(sources, "KNOWN", {k: v if k not in names else {} for k, v in sources.KNOWN.items()})


LINEAR = "peft.tuners.lora.layer.Linear.forward"
BNB = "peft.tuners.lora.bnb.Linear4bit.forward"
DORA = "peft.tuners.lora.variants.DoraLinearVariant.forward"


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("base", models.BASES)
def test_an_unknown_version_is_tried_once_per_class(
    base: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    unknown(monkeypatch, LINEAR, BNB, DORA)
    model, x = lora(models.base_model(base), **options), testing.tensor(3, 64)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    plain = model(x)
    with caplog.at_level("INFO", "peft_kernels"):
        report = pk.patch(model)
    # The Linear4bit of older bitsandbytes is tried too, whatever the table says.
    what = "PEFT .* tried on one layer" if before("bitsandbytes", "0.50") else ".*tried on one layer"
    tried = [record for record in caplog.messages if re.match(what, record)]
    assert len(tried) == 1 + bool(options) and "has changed" in tried[0], str(report)
    assert not report.original, str(report)
    assert report.details().count("(tried)") == 2
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert testing.relative_error(model(x), plain) < ONE_MODEL


@pytest.mark.parametrize("fault", ["scaled", "dropped", "raising"])
def test_version_with_other_results_is_not_fused(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = peft.tuners.lora.layer.Linear
    known = cls.forward

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if fault == "raising":
            raise NotImplementedError("what is new here")
        if fault == "dropped":
            return self.base_layer(x)
        return self.base_layer(x) + 1.1 * (known(self, x, *args, **kwargs) - self.base_layer(x))

    forward.__module__, forward.__qualname__ = cls.__module__, "Linear.forward"
    monkeypatch.setattr(cls, "forward", forward)
    report = pk.patch(lora(models.base_model("nf4")))
    assert len(report.original) == 2
    said = {"scaled": "and gives other results", "raising": "a trial failed"}.get(
        fault, "gives other results"
    )
    assert "lora.layer.Linear.forward" in str(report) and said in str(report), str(report)


@pytest.mark.parametrize("scale", [1.0, 1.1], ids=["same", "other"])
def test_an_unknown_linear4bit_is_tried(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes' own layer, with an adapter and alone. Before 0.50 it cast its bias in place."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    theirs = bnb.nn.Linear4bit.forward

    def forward(self: Any, x: Tensor) -> Tensor:
        if self.bias is not None:
            self.bias.data = self.bias.data.to(x.dtype)
        return scale * theirs(self, x)

    monkeypatch.setattr(bnb.nn.Linear4bit, "forward", forward)
    base = models.base_model("bnb")
    bias, before = base.q.bias, base.q.bias.detach().clone()
    x = testing.tensor(3, 64)
    for model in (base, lora(base)):
        plain = model(x)
        report = pk.patch(model)
        assert len(report.original) == (0 if scale == 1.0 else 2), str(report)
        assert bias.dtype is before.dtype and torch.equal(bias, before)
        assert testing.relative_error(model(x), plain) < ONE_MODEL
        pk.unpatch(model)


def test_dora_layers_without_a_cache() -> None:
    """Those of PEFT before 0.19."""
    model, x = lora(models.base_model("dense"), use_dora=True), testing.tensor(3, 64)
    plain = model(x)
    vectors = [m for m in model.modules() if hasattr(m, "_dora_cache")]
    report = pk.patch(model)
    for vector in vectors:
        del vector._dora_cache
    assert testing.relative_error(model(x), plain) < ONE_MODEL
    assert not any(entry.fallbacks for entry in report.layers)


class Scaled(nn.Linear):
    """Gives other results than nn.Linear, like layers for quantisation-aware training."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


class Renamed(nn.Linear):
    """Differs in name only."""


@pytest.mark.parametrize(("cls", "fused"), [(Scaled, False), (Renamed, True)])
def test_a_base_is_recognised_by_its_forward(cls: type[nn.Linear], fused: bool) -> None:
    model, x = lora(models.base_model("dense")), testing.tensor(3, 64)
    model.base_model.model.q.base_layer.__class__ = cls
    plain = model(x)
    report = pk.patch(model)
    assert [entry.fused for entry in report.layers] == [fused, True]
    assert testing.relative_error(model(x), plain) < ONE_MODEL


def test_a_weight_that_is_computed_in_each_call() -> None:
    model, x = lora(models.base_model("dense")), testing.tensor(3, 64)
    torch.nn.utils.parametrizations.weight_norm(model.base_model.model.q.base_layer)
    plain = model(x)
    report = pk.patch(model)
    assert testing.relative_error(model(x), plain) < ONE_LAYER
    assert "is not a parameter" in str(report)

"""Eligibility of adapters on experts: changed modules and unknown forwards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft_experts import (
    HIDDEN,
    ROWS,
    adapt,
    assert_same_numbers,
    dequantized,
    experts_of,
    fallbacks,
    fill,
    mixture,
    peft,
    tokens,
    weights_of,
)
from peft_models import run
from rounding import ONE_LAYER, ONE_MODEL
from torch import Tensor, nn

import peft_kernels as pk
import testing
from peft_kernels.patch.experts import forward as experts
from peft_kernels.patch.rules import sources, verdict


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verdicts are cached for the life of a process."""
    verdict._verdicts.clear()


# Not fused, and the reason.


def test_a_trained_base_gets_its_gradient() -> None:
    model = adapt(mixture("dense"))
    for weight in weights_of(model).values():
        weight.requires_grad_()
    plain = run(model, tokens())
    report = pk.patch(model)
    got = run(model, tokens())
    assert (
        fallbacks(report) == ["gate_up_proj is trained; freeze it to fuse it"] and got.keys() == plain.keys()
    )
    assert all(torch.equal(got[name], plain[name]) for name in got)


def test_a_trained_bias() -> None:
    model = adapt(mixture("dense", "gpt_oss"))
    experts_of(model).down_proj_bias.requires_grad_()
    report = pk.patch(model)
    got = run(model, tokens())
    assert fallbacks(report) == ["down_proj_bias is trained; freeze it to fuse it"] and any(
        "down_proj_bias" in name for name in got
    )


@pytest.mark.parametrize("place", ["outermost", "inner", "experts"])
def test_hooks_still_run(place: str) -> None:
    model, calls = adapt(mixture("nf4")), []
    outermost = model.base_model.model.experts
    report = pk.patch(model)
    where = {"outermost": outermost, "inner": outermost.base_layer, "experts": experts_of(model)}
    plain = model(tokens())
    where[place].register_forward_hook(lambda *_: calls.append(1))
    assert testing.relative_error(model(tokens()), plain) < ONE_MODEL
    assert calls == [1]
    assert bool(fallbacks(report)) == (place != "outermost")
    assert bool(report.original) == (place != "outermost")


def test_replaced_forward_of_the_experts() -> None:
    model = adapt(mixture("nf4"))
    report = pk.patch(model)
    inner = experts_of(model)
    original = inner.forward
    inner.forward = lambda *args: 2 * original(*args)
    plain = dequantized(adapt(mixture("nf4")))(tokens())
    assert testing.relative_error(model(tokens()), 2 * plain) < ONE_MODEL
    assert "was replaced on the instance" in fallbacks(report)[0]


def test_a_weight_that_is_computed_in_each_call() -> None:
    model = adapt(mixture("dense"))
    nn.utils.parametrize.register_parametrization(experts_of(model), "down_proj", Doubled())
    plain = copy.deepcopy(model)(tokens())  # PEFT 0.21 leaves its own parametrization on this one
    report = pk.patch(model)
    assert testing.relative_error(model(tokens()), plain) < ONE_LAYER
    assert fallbacks(report) == ["down_proj is not a parameter; remove the parametrization"]


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_extra_arguments_raise_peft_s_error() -> None:
    model = adapt(mixture("nf4"))
    report = pk.patch(model)
    rows, index = tokens(), torch.zeros(ROWS, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="mixed"):
        model.base_model.model.experts(rows, index, rows[:, :1], adapter_names=["default"] * ROWS)
    assert fallbacks(report) == ["extra arguments (adapter_names); call it without them"]


def test_two_wrappers_around_one_parameter() -> None:
    """PEFT does not create this; the fused forward distinguishes deltas by the parameter's name."""
    model = adapt(mixture("nf4"))
    wrapper = model.base_model.model.experts
    wrapper.base_layer.parameter_name = wrapper.parameter_name
    assert "several wrappers around one parameter" in str(pk.patch(model))


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_dropout": 0.1}, {"lora_bias": True}], ids=str)
def test_options_refused_by_peft(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="does not work with"):
        adapt(mixture("nf4"), **options)


def test_parameters_of_a_linear_layer() -> None:
    """PEFT's wrapper over a linear layer is not patched, even if the weight is packed."""
    model = nn.Sequential(nn.Linear(HIDDEN, HIDDEN))
    pk.quantize_model(model)
    model = adapt_linear(model)
    plain, gradients = model(tokens()), run(model, tokens())
    report = pk.patch(model)
    assert [str(layer) for layer in report.original] == [
        "original base_model.model.0 (PEFT LoRA on weight of NF4Linear): "
        "no fused forward over the parameters of an NF4Linear; nothing to do"
    ]
    assert torch.equal(model(tokens()), plain)
    weight = model.base_model.model[0].get_base_layer().weight
    assert isinstance(weight, pk.NF4Weight) and not weight.is_dense and len(gradients) == 4
    dense = nn.Linear(HIDDEN, HIDDEN)
    dense.weight.data, dense.bias = weight.dequantize(), model.base_model.model[0].get_base_layer().bias
    assert testing.relative_error(plain, adapt_linear(nn.Sequential(dense))(tokens())) < ONE_MODEL


def adapt_linear(model: nn.Module) -> Any:
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=[], target_parameters=["0.weight"])
    )
    fill(model)
    return model


# Unknown forwards.


WRAPPER = "peft.tuners.lora.layer.ParamWrapper.forward"


def test_an_unknown_version_of_peft_is_tried_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sources, "KNOWN", sources.KNOWN | {WRAPPER: {"0" * 16: "0.1"}})
    model = adapt(mixture("nf4"))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    plain = model(tokens())
    with caplog.at_level("INFO", "peft_kernels"):
        report = pk.patch(model)
        pk.patch(adapt(mixture("nf4")))
    tried = [message for message in caplog.messages if "tried on one layer" in message]
    assert len(tried) == 1 and "has changed" in tried[0] and not report.original, str(report)
    assert testing.relative_error(model(tokens()), plain) < ONE_MODEL
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("fault", ["scaled", "dropped", "raising"])
def test_version_with_other_results_is_not_fused(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = peft.tuners.lora.layer.ParamWrapper
    known = cls.forward

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if fault == "raising":
            raise NotImplementedError("what is new here")
        if fault == "dropped":
            return 0 * known(self, x, *args, **kwargs)
        return 1.1 * known(self, x, *args, **kwargs)

    forward.__module__, forward.__qualname__ = cls.__module__, "ParamWrapper.forward"
    monkeypatch.setattr(cls, "forward", forward)
    report = pk.patch(adapt(mixture("nf4")))
    (reason,) = [layer.reason for layer in report.original]
    assert ("a trial failed" if fault == "raising" else "gives other results") in reason


def test_experts_with_other_results_are_not_fused() -> None:
    model = adapt(mixture("dense"))
    known = type(experts_of(model)).forward
    halved = type("Halved", (type(experts_of(model)),), {"forward": lambda self, *a: 0.5 * known(self, *a)})
    experts_of(model).__class__ = halved
    plain = model(tokens())
    report = pk.patch(model)
    assert torch.equal(model(tokens()), plain)
    assert "Halved is not known, and gives other results" in report.original[0].reason


def test_custom_implementation() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

    def tripled(*args: Any) -> Tensor:
        return 3 * grouped_mm_experts_forward(*args)

    model = adapt(mixture("dense"))
    report = pk.patch(model)
    assert not report.original
    ALL_EXPERTS_FUNCTIONS.register("tripled", tripled)
    try:
        model.base_model.model.config._experts_implementation = "tripled"
        plain = dequantized(model)(tokens())
        assert torch.equal(model(tokens()), plain)
        assert "gives other results" in fallbacks(report)[0]
    finally:
        ALL_EXPERTS_FUNCTIONS._global_mapping.pop("tripled")


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_implementations_of_transformers(implementation: str) -> None:
    assert_same_numbers(adapt(mixture("dense", implementation=implementation)))


def test_experts_that_are_not_loaded_yet() -> None:
    """Verdicts on weights that are not loaded are not cached."""
    model = adapt(mixture("dense"))
    kept = {name: weight.data.clone() for name, weight in weights_of(model).items()}
    for weight in weights_of(model).values():
        weight.data.zero_()
    report = pk.patch(model)
    assert "weights are not loaded" in report.original[0].reason
    for name, weight in weights_of(model).items():
        weight.data.copy_(kept[name])
    assert (
        not report.original
        and testing.relative_error(model(tokens()), dequantized(model)(tokens())) < ONE_MODEL
    )


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_layout_of_peft(transposed: bool, swapped: bool) -> None:
    """Which side of a weight PEFT calls "in" depends on its version; its own delta is the reference."""
    wrapper = adapt(mixture("dense")).base_model.model.experts
    if swapped and not hasattr(wrapper, "_did_swap_in_out_features"):
        pytest.skip("PEFT before 0.19 has one layout")
    wrapper._did_swap_in_out_features = swapped
    delta = wrapper.get_delta_weight("default")
    a, b, scaling = experts.summed(wrapper, ["default"], transposed)
    got = scaling * b @ a
    assert testing.relative_error(got.transpose(1, 2) if transposed else got, delta) < ONE_LAYER

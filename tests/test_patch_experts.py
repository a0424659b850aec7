"""PEFT's `target_parameters` on experts: patched against unpatched, and against the weights dequantised."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from expert_models import (
    EXPERTS,
    FAMILIES,
    HIDDEN,
    INNER,
    adapt,
    dequantized,
    fill,
    in_fp64,
    lora_config,
    mixture,
    peft,
    weights_of,
)
from peft_models import REGIMES, run
from torch import Tensor, nn

import peft_kernels as pk
import testing
from peft_kernels.patch import experts, judge_experts, sources

BASES = ("dense", "nf4")
ROWS = 13


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """Verdicts are kept for the life of a process."""
    tables: tuple[Any, ...] = (judge_experts._wrapper_classes, judge_experts._expert_classes)
    kept = [dict(table) for table in tables]
    for table in tables:
        table.clear()
    yield
    for table, old in zip(tables, kept, strict=True):
        table.clear()
        table.update(old)


def tokens(dtype: torch.dtype = torch.float32, rows: int = ROWS) -> Tensor:
    return testing.tensor(rows, HIDDEN, dtype=dtype, seed=2)


def fallbacks(report: Any) -> list[str]:
    return [reason for layer in report.layers for reason in layer.fallbacks]


def assert_same_numbers(model: Any, x: Tensor, call: Any = None) -> None:
    """Patched against stock PEFT over dense weights, by the numbers policy."""
    truth, plain = run(in_fp64(model), x.double()), run(dequantized(model), x)
    with pk.patched(model) as report:
        got = run(model, x, None if call is None else call(model))
    assert report.layers and not report.original and not fallbacks(report), str(report)
    assert got.keys() == plain.keys() == truth.keys()
    for name in got:
        assert testing.relative_error(plain[name], truth[name]) < 0.03, name
        testing.assert_close(got[name], plain[name], truth[name], name)


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("base", BASES)
def test_same_numbers(base: str, family: str, dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    model = adapt(mixture(base, family, dtype))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter_dtype)
    assert_same_numbers(model, tokens(dtype))


def test_on_every_back_end(backend: str) -> None:
    assert_same_numbers(adapt(mixture("nf4", dtype=torch.bfloat16)), tokens(torch.bfloat16))


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("base", BASES)
def test_adapters_on_one_parameter(base: str, name: str) -> None:
    assert_same_numbers(adapt(mixture(base), target_parameters=[f"experts.{name}"]), tokens())


@pytest.mark.parametrize("base", BASES)
def test_several_adapters_of_several_ranks(base: str) -> None:
    model = adapt(mixture(base), rank_pattern={"experts": 3}, alpha_pattern={"experts": 5})
    model.add_adapter("second", lora_config(mixture(base), r=8, use_rslora=True))
    fill(model, "second")
    one = adapt(mixture(base))(tokens())
    for names in (["default"], ["second"], ["default", "second"]):
        model.base_model.set_adapter(names)
        assert testing.relative_error(model(tokens()), one) > 0.01
        assert_same_numbers(model, tokens())


def test_a_scaling_in_a_tensor() -> None:
    """As PEFT's hotswap has it."""
    model = adapt(mixture("nf4"))
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.layer.ParamWrapper):
            module.scaling["default"] = torch.tensor(1.7)
    assert_same_numbers(model, tokens())


@pytest.mark.parametrize("regime", REGIMES)
def test_what_a_training_loop_may_do(regime: str) -> None:
    assert_same_numbers(adapt(mixture("nf4")), tokens(), REGIMES[regime])


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base", BASES)
def test_autocast(base: str, weights: torch.dtype) -> None:
    """fp32 adapters and activations, products in bf16."""
    model, x = adapt(mixture(base, dtype=weights)), tokens()
    truth = run(in_fp64(model), x.double())
    stock = dequantized(model)
    stock.base_model.model.config._experts_implementation = "eager"  # grouped_mm does not autocast
    with torch.autocast("cpu", torch.bfloat16), pk.patched(model) as report:
        plain = run(stock, x)
        got = run(model, x)
    assert not fallbacks(report) and got["y"].dtype == torch.float32
    for name in got:
        testing.assert_close(got[name], plain[name], truth[name], name)


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("base", BASES)
def test_few_rows(base: str, rows: int) -> None:
    model = adapt(mixture(base))
    plain = model(tokens(rows=rows))
    with pk.patched(model) as report:
        got = model(tokens(rows=rows))
    assert got.shape == plain.shape and not fallbacks(report)
    if rows:
        assert testing.relative_error(got, plain) < 1e-5


def test_experts_without_tokens_get_no_gradient() -> None:
    """And the others get theirs."""
    model = adapt(mixture("nf4"))
    pk.patch(model)
    found = run(model, tokens())
    (down,) = [grad for name, grad in found.items() if "lora_A" in name and grad.shape[1] == INNER]
    norms = down.view(EXPERTS, -1).norm(dim=1)
    assert norms[-1] == 0 and bool((norms[:-1] > 0).all())


# What PEFT does to adapters between two calls.


@pytest.mark.parametrize("base", BASES)
def test_disabled_adapters(base: str) -> None:
    model = adapt(mixture(base))
    without = mixture(base)(tokens())
    report = pk.patch(model)
    assert testing.relative_error(model(tokens()), without) > 0.01
    with model.disable_adapter():
        assert testing.relative_error(model(tokens()), without) < 1e-6
    assert not fallbacks(report)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_and_taking_it_back(dtype: torch.dtype, patched: bool, safe: bool) -> None:
    """What is merged is in the weights, dense; what is taken back leaves the packed bytes."""
    model = adapt(mixture("nf4", dtype=dtype))
    expected = run(dequantized(model), tokens(dtype))["y"]
    before = {name: copy.deepcopy(w._state.packed_form()) for name, w in weights_of(model).items()}
    report = pk.patch(model) if patched else None
    model.merge_adapter(safe_merge=safe)
    assert all(weight.is_dense for weight in weights_of(model).values())
    error = testing.relative_error(model(tokens(dtype)), expected)
    assert error < (1e-5 if dtype == torch.float32 else 0.02), error
    with model.disable_adapter():  # PEFT unmerges, then
        model(tokens(dtype))
    for name, weight in weights_of(model).items():
        if safe:  # assigned, which PEFT does not tell from any other assignment
            assert weight.is_dense
            continue
        for part, value in weight._state.packed_form().items():
            assert torch.equal(value, before[name][part]), (name, part)
        assert not weight.is_dense
    if report is not None:
        assert not fallbacks(report)
        if not safe:
            assert testing.relative_error(model(tokens(dtype)), expected) < 0.02 and not fallbacks(report)


@pytest.mark.parametrize("merge", [True, False])
def test_unloading(merge: bool) -> None:
    model = adapt(mixture("nf4"))
    expected = model(tokens()) if merge else mixture("nf4")(tokens())
    pk.patch(model)
    plain = model.merge_and_unload() if merge else model.unload()
    assert testing.relative_error(plain(tokens()), expected) < 1e-5
    assert not any("lora" in name for name, _ in plain.named_parameters())


def test_switching_and_deleting() -> None:
    model = adapt(mixture("nf4"))
    report = pk.patch(model)
    first = model(tokens())
    model.add_adapter("second", lora_config(mixture("nf4"), r=2))
    fill(model, "second")
    model.set_adapter("second")
    second = model(tokens())
    assert testing.relative_error(first, second) > 0.01
    assert testing.relative_error(second, dequantized(model)(tokens())) < 1e-5
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(model(tokens()), first) and not fallbacks(report)


# What is not fused, and why.


def test_a_trained_base_gets_its_gradient() -> None:
    model = adapt(mixture("dense"))
    for weight in weights_of(model).values():
        weight.requires_grad_()
    plain = run(model, tokens())
    report = pk.patch(model)
    got = run(model, tokens())
    assert fallbacks(report) == ["gate_up_proj is trained"] and got.keys() == plain.keys()
    assert all(torch.equal(got[name], plain[name]) for name in got)


def test_a_trained_bias() -> None:
    model = adapt(mixture("dense", "gpt_oss"))
    experts_of(model).down_proj_bias.requires_grad_()
    report = pk.patch(model)
    got = run(model, tokens())
    assert fallbacks(report) == ["down_proj_bias is trained"] and any("down_proj_bias" in name for name in got)


def experts_of(model: Any) -> Any:
    return model.base_model.model.experts.get_base_layer()


@pytest.mark.parametrize("place", ["outermost", "inner", "experts"])
def test_hooks_still_run(place: str) -> None:
    model, calls = adapt(mixture("nf4")), []
    outermost = model.base_model.model.experts
    report = pk.patch(model)
    where = {"outermost": outermost, "inner": outermost.base_layer, "experts": experts_of(model)}
    plain = model(tokens())
    where[place].register_forward_hook(lambda *_: calls.append(1))
    assert testing.relative_error(model(tokens()), plain) < 1e-5
    assert calls == [1]
    assert bool(fallbacks(report)) == (place != "outermost")
    assert bool(report.original) == (place != "outermost")


def test_a_forward_that_is_replaced_on_the_experts() -> None:
    model = adapt(mixture("nf4"))
    report = pk.patch(model)
    inner = experts_of(model)
    original = inner.forward
    inner.forward = lambda *args: 2 * original(*args)
    plain = dequantized(adapt(mixture("nf4")))(tokens())
    assert testing.relative_error(model(tokens()), 2 * plain) < 1e-5
    assert "was replaced on the instance" in fallbacks(report)[0]


def test_a_weight_that_is_computed_in_each_call() -> None:
    model = adapt(mixture("dense"))
    nn.utils.parametrize.register_parametrization(experts_of(model), "down_proj", Doubled())
    plain = model(tokens())
    report = pk.patch(model)
    assert testing.relative_error(model(tokens()), plain) < 1e-6
    assert fallbacks(report) == ["down_proj is not a parameter"]


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_extra_arguments_are_peft_s_to_refuse() -> None:
    model = adapt(mixture("nf4"))
    report = pk.patch(model)
    rows, index = tokens(), torch.zeros(ROWS, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="mixed"):
        model.base_model.model.experts(rows, index, rows[:, :1], adapter_names=["default"] * ROWS)
    assert fallbacks(report) == ["extra arguments (adapter_names)"]


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_dropout": 0.1}, {"lora_bias": True}], ids=str)
def test_what_peft_refuses_itself(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="does not work with"):
        adapt(mixture("nf4"), **options)


def test_parameters_of_a_linear_layer() -> None:
    """PEFT's wrapper over them stays as it is, also where the weight is packed."""
    model = nn.Sequential(nn.Linear(HIDDEN, HIDDEN))
    pk.quantize_model(model)
    model = adapt_linear(model)
    plain, gradients = model(tokens()), run(model, tokens())
    report = pk.patch(model)
    assert [str(layer) for layer in report.original] == [
        "original base_model.model.0 (PEFT LoRA on weight of NF4Linear): "
        "no fused forward over the parameters of a NF4Linear"
    ]
    assert torch.equal(model(tokens()), plain)
    weight = model.base_model.model[0].get_base_layer().weight
    assert isinstance(weight, pk.NF4Weight) and not weight.is_dense and len(gradients) == 4
    dense = nn.Linear(HIDDEN, HIDDEN)
    dense.weight.data, dense.bias = weight.dequantize(), model.base_model.model[0].get_base_layer().bias
    assert testing.relative_error(plain, adapt_linear(nn.Sequential(dense))(tokens())) < 1e-5


def adapt_linear(model: nn.Module) -> Any:
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=[], target_parameters=["0.weight"]))
    fill(model)
    return model


# Forwards that nobody has read.


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
    tried = [message for message in caplog.messages if "tried on one module" in message]
    assert len(tried) == 1 and "has changed" in tried[0] and not report.original, str(report)
    assert testing.relative_error(model(tokens()), plain) < 1e-5
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("fault", ["scaled", "dropped", "raising"])
def test_a_version_that_computes_something_else_is_left_alone(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls = peft.tuners.lora.layer.ParamWrapper
    known = cls.forward

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if fault == "raising":
            raise NotImplementedError("what is new here")
        if fault == "dropped":
            return self.base_layer(x, *args)
        return 1.1 * known(self, x, *args, **kwargs)

    forward.__module__, forward.__qualname__ = cls.__module__, "ParamWrapper.forward"
    monkeypatch.setattr(cls, "forward", forward)
    report = pk.patch(adapt(mixture("nf4")))
    (reason,) = [layer.reason for layer in report.original]
    assert ("a trial failed" if fault == "raising" else "gives other results") in reason


def test_experts_that_compute_something_else_are_left_alone() -> None:
    model = adapt(mixture("dense"))
    known = type(experts_of(model)).forward
    halved = type("Halved", (type(experts_of(model)),), {"forward": lambda self, *a: 0.5 * known(self, *a)})
    experts_of(model).__class__ = halved
    plain = model(tokens())
    report = pk.patch(model)
    assert torch.equal(model(tokens()), plain)
    assert "Halved gives other results" in report.original[0].reason


def test_an_implementation_of_the_user_s() -> None:
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
        del ALL_EXPERTS_FUNCTIONS["tripled"]


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_implementations_of_transformers(implementation: str) -> None:
    assert_same_numbers(adapt(mixture("dense", implementation=implementation)), tokens())


def test_experts_that_are_not_loaded_yet() -> None:
    """A verdict on numbers that are not there is none."""
    model = adapt(mixture("dense"))
    kept = {name: weight.data.clone() for name, weight in weights_of(model).items()}
    for weight in weights_of(model).values():
        weight.data.zero_()
    report = pk.patch(model)
    assert "weights are not loaded" in report.original[0].reason
    for name, weight in weights_of(model).items():
        weight.data.copy_(kept[name])
    assert not report.original and testing.relative_error(
        model(tokens()), dequantized(model)(tokens())
    ) < 1e-5


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_layout_of_peft_s(transposed: bool, swapped: bool) -> None:
    """PEFT has taken either side of a weight for "in", by version. Its own delta says which."""
    wrapper = adapt(mixture("dense")).base_model.model.experts
    wrapper._did_swap_in_out_features = swapped
    delta = wrapper.get_delta_weight("default")
    a, b, scaling = experts.summed(wrapper, ["default"], transposed)
    got = scaling * b @ a
    assert testing.relative_error(got.transpose(1, 2) if transposed else got, delta) < 1e-6


# The machinery.


@pytest.mark.parametrize("base", BASES)
def test_unpatch_restores_the_model_to_the_bit(base: str) -> None:
    model = adapt(mixture(base))
    before = run(model, tokens())
    attributes = {name: (type(module), set(vars(module))) for name, module in model.named_modules()}
    pk.patch(model)
    run(model, tokens())
    assert pk.unpatch(model) == 1
    for name, module in model.named_modules():
        assert (type(module), set(vars(module))) == attributes[name], name
    assert all(torch.equal(value, before[name]) for name, value in run(model, tokens()).items())


def test_report() -> None:
    model = adapt(mixture("nf4"))
    expected = "base_model.model.experts (PEFT LoRA on gate_up_proj, down_proj of Qwen3MoeExperts)"
    assert str(pk.patch(model, dry_run=True)) == "peft_kernels: 1 of 1 layers would be fused"
    report = pk.patch(model)
    assert report.details() == f"fused    {expected}" and str(report) == "peft_kernels: 1 of 1 layers fused"
    assert str(pk.patch(model)) == str(report)
    experts_of(model).register_forward_hook(lambda *_: None)
    model(tokens())
    assert f"1 call of 1 layer: hooks on the base layer" in str(report) and expected in str(report)


def test_adapters_that_come_after_patch() -> None:
    model = mixture("nf4")
    report = pk.patch(model)
    model = adapt(model)
    assert "experts (PEFT LoRA on" in str(report) and "has come after patch" in str(report)
    pk.patch(model)
    assert "has come after patch" not in str(pk.patch(model))


@pytest.mark.parametrize("copying", [copy.deepcopy, lambda m: __import__("pickle").loads(__import__("pickle").dumps(m))])
def test_copies(copying: Callable[[Any], Any]) -> None:
    model = adapt(mixture("nf4"))
    pk.patch(model)
    plain = run(model, tokens())
    twin = copying(model)
    got = run(twin, tokens())
    assert all(testing.relative_error(got[name], plain[name]) < 1e-5 for name in plain)


def test_the_packed_weights_stay_as_they_are() -> None:
    """PEFT as it is makes them dense in each call, for as long as that lasts."""
    model = adapt(mixture("nf4"))
    before = {name: copy.deepcopy(w._state.packed_form()) for name, w in weights_of(model).items()}
    parameters = dict(weights_of(model))
    got, plain = run(model, tokens()), run(dequantized(model), tokens())
    assert all(testing.relative_error(got[name], plain[name]) < 1e-5 for name in plain)
    for name, weight in weights_of(model).items():
        assert weight is parameters[name] and not weight.is_dense and not weight.requires_grad
        for part, value in weight._state.packed_form().items():
            assert torch.equal(value, before[name][part])

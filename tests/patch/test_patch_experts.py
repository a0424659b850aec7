"""PEFT's `target_parameters` on experts: patched against unpatched, and against dequantised weights."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft_experts import (
    EXPERTS,
    FAMILIES,
    adapt,
    assert_same_numbers,
    compare,
    dequantized,
    experts_of,
    fallbacks,
    fill,
    in_fp64,
    lora_config,
    mixture,
    peft,
    skip_second_adapter,
    tokens,
    weights_of,
)
from peft_models import REGIMES, run
from rounding import ONE_LAYER, ONE_MODEL
from torch import Tensor
from torch.nn.modules import module as torch_module

import peft_kernels as pk
import peft_kernels.nf4.experts_forward
import testing

BASES = ("dense", "nf4")


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("base", BASES)
def test_same_numbers(base: str, family: str, dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    model = adapt(mixture(base, family, dtype))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter_dtype)
    assert_same_numbers(model)


def test_on_every_back_end(backend: str) -> None:
    assert_same_numbers(adapt(mixture("nf4", dtype=torch.bfloat16)))


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("base", BASES)
def test_adapters_on_one_parameter(base: str, name: str) -> None:
    assert_same_numbers(adapt(mixture(base), target_parameters=[f"experts.{name}"]))


@pytest.mark.parametrize("base", BASES)
def test_several_adapters_of_several_ranks(base: str) -> None:
    skip_second_adapter()
    ranks = {"rank_pattern": {"gate_up_proj": 3}, "alpha_pattern": {"gate_up_proj": 5}}
    model = adapt(mixture(base), **ranks)
    model.add_adapter("second", lora_config(mixture(base), r=8, use_rslora=True))
    fill(model, "second")
    one = adapt(mixture(base), **ranks)(tokens())
    for names in (["default"], ["second"], ["default", "second"]):
        model.base_model.set_adapter(names)
        assert (testing.relative_error(model(tokens()), one) > 0.01) == (names != ["default"])
        assert_same_numbers(model)


def test_a_scaling_in_a_tensor() -> None:
    """As PEFT's hotswap sets it."""
    model = adapt(mixture("nf4"))
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.layer.ParamWrapper):
            module.scaling["default"] = torch.tensor(1.7)
    assert_same_numbers(model)


@pytest.mark.parametrize("regime", REGIMES)
def test_training_regimes(regime: str) -> None:
    assert_same_numbers(adapt(mixture("nf4")), REGIMES[regime])


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base", BASES)
def test_autocast(base: str, weights: torch.dtype) -> None:
    """fp32 adapters and activations, GEMMs in bf16."""
    model = adapt(mixture(base, dtype=weights))
    stock, x = dequantized(model), tokens()
    inner = experts_of(stock)
    inner.config = copy.copy(inner.config)
    inner.config._experts_implementation = "eager"  # grouped_mm does not autocast
    truth = run(in_fp64(model), x.double())
    with torch.autocast("cpu", torch.bfloat16), pk.patched(model) as report:
        got, plain = run(model, x), run(stock, x)
    assert not fallbacks(report) and got["y"].dtype == torch.float32
    compare(got, plain, truth)


@pytest.mark.parametrize("base", BASES)
def test_adapters_are_rounded_only_under_autocast(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As autocast rounds weights of linear layers. Without autocast, or for a single token, nothing is
    rounded."""
    model, seen = adapt(mixture(base, dtype=torch.bfloat16)), []
    linear = peft_kernels.nf4.experts_forward.experts_lora_linear

    def noted(x: Tensor, ends: Tensor, weight: Tensor, a: Tensor, b: Tensor, *rest: Any) -> Tensor:
        seen.append((x.dtype, a.dtype, b.dtype))
        return linear(x, ends, weight, a, b, *rest)

    monkeypatch.setattr(peft_kernels.nf4.experts_forward, "experts_lora_linear", noted)
    pk.patch(model)
    wide, rounded = torch.float32, torch.bfloat16
    for enabled, x, adapters in (
        (False, tokens(), wide), (True, tokens(), rounded), (True, tokens(rows=1), wide),
    ):  # fmt: skip
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model(x.bfloat16())
        assert seen == [(torch.bfloat16, adapters, adapters)] * 2, (enabled, x.shape)
        seen.clear()


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("base", BASES)
def test_few_rows(base: str, rows: int) -> None:
    model = adapt(mixture(base))
    plain = model(tokens(rows=rows))
    with pk.patched(model) as report:
        got = model(tokens(rows=rows))
    assert got.shape == plain.shape and not fallbacks(report)
    if rows:
        assert testing.relative_error(got, plain) < ONE_MODEL


def test_experts_without_tokens_get_no_gradient() -> None:
    """The other parameters get their gradients."""
    model = adapt(mixture("nf4"))
    pk.patch(model)
    found = run(model, tokens())
    gradients = [grad for name, grad in found.items() if "lora_A" in name]
    assert len(gradients) == 2
    for gradient in gradients:
        norms = gradient.view(EXPERTS, -1).norm(dim=1)
        assert norms[-1] == 0 and bool((norms[:-1] > 0).all())


# Changes by PEFT between two calls.


@pytest.mark.parametrize("base", BASES)
def test_disabled_adapters(base: str) -> None:
    model = adapt(mixture(base))
    without = mixture(base)(tokens())
    report = pk.patch(model)
    assert testing.relative_error(model(tokens()), without) > 0.01
    with model.disable_adapter():
        assert testing.relative_error(model(tokens()), without) < ONE_LAYER
    assert not fallbacks(report)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_and_unmerge(dtype: torch.dtype, patched: bool, safe: bool) -> None:
    """Merged weights are dense; unmerging restores the packed bytes."""
    model = adapt(mixture("nf4", dtype=dtype))
    expected = run(dequantized(model), tokens(dtype))["y"]
    before = {name: copy.deepcopy(w._state.packed_form()) for name, w in weights_of(model).items()}
    report = pk.patch(model) if patched else None
    model.merge_adapter(safe_merge=safe)
    assert all(weight.is_dense for weight in weights_of(model).values())
    error = testing.relative_error(model(tokens(dtype)), expected)
    assert error < (1e-5 if dtype == torch.float32 else 0.02), error
    with model.disable_adapter():  # PEFT unmerges before this
        model(tokens(dtype))
    for name, weight in weights_of(model).items():
        for part, value in weight._state.packed_form().items():
            assert torch.equal(value, before[name][part]), (name, part)
        assert not weight.is_dense
    assert testing.relative_error(model(tokens(dtype)), expected) < 0.02
    assert report is None or not fallbacks(report)


@pytest.mark.parametrize("merge", [True, False])
def test_unloading(merge: bool) -> None:
    model = adapt(mixture("nf4"))
    expected = model(tokens()) if merge else mixture("nf4")(tokens())
    pk.patch(model)
    plain = model.merge_and_unload() if merge else model.unload()
    assert testing.relative_error(plain(tokens()), expected) < ONE_MODEL
    assert not any("lora" in name for name, _ in plain.named_parameters())


def test_switching_and_deleting() -> None:
    skip_second_adapter()
    model = adapt(mixture("nf4"))
    report = pk.patch(model)
    first = model(tokens())
    model.add_adapter("second", lora_config(mixture("nf4"), r=2))
    fill(model, "second")
    model.set_adapter("second")
    second = model(tokens())
    assert testing.relative_error(first, second) > 0.01
    assert testing.relative_error(second, dequantized(model)(tokens())) < ONE_MODEL
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(model(tokens()), first) and not fallbacks(report)


# patch, unpatch, report.


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
    assert "1 call of 1 layer: hooks on a Qwen3MoeExperts" in str(report) and expected in str(report)


def test_adapters_added_after_patch() -> None:
    model = mixture("nf4")
    report = pk.patch(model)
    model = adapt(model)
    assert "experts (PEFT LoRA on" in str(report) and "was added after patch" in str(report)
    pk.patch(model)
    assert "was added after patch" not in str(pk.patch(model))


@pytest.mark.parametrize(
    "copying", [copy.deepcopy, lambda m: __import__("pickle").loads(__import__("pickle").dumps(m))]
)
def test_copies(copying: Callable[[Any], Any]) -> None:
    model = adapt(mixture("nf4"))
    pk.patch(model)
    plain = run(model, tokens())
    twin = copying(model)
    got = run(twin, tokens())
    assert all(testing.relative_error(got[name], plain[name]) < ONE_MODEL for name in plain)


def test_packed_weights_are_unchanged() -> None:
    """Stock PEFT dequantises the weights for the duration of each call."""
    model = adapt(mixture("nf4"))
    before = {name: copy.deepcopy(w._state.packed_form()) for name, w in weights_of(model).items()}
    parameters = dict(weights_of(model))
    got, plain = run(model, tokens()), run(dequantized(model), tokens())
    assert all(testing.relative_error(got[name], plain[name]) < ONE_MODEL for name in plain)
    for name, weight in weights_of(model).items():
        assert weight is parameters[name] and not weight.is_dense and not weight.requires_grad
        for part, value in weight._state.packed_form().items():
            assert torch.equal(value, before[name][part])


def test_one_graph() -> None:
    model = adapt(mixture("nf4")).eval()
    plain = run(model, tokens())
    report = pk.patch(model)
    torch._dynamo.reset()
    got = run(torch.compile(model, backend="aot_eager", fullgraph=True), tokens())
    assert not fallbacks(report) and len(got) == len(plain)
    for name, value in got.items():
        assert testing.relative_error(value, plain[name.removeprefix("_orig_mod.")]) < ONE_MODEL, name


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_hooks_on_all_modules(base: str) -> None:
    """Hooks run for the experts, whose wrappers are skipped, and for their activation, which the op fuses."""
    stock = adapt(mixture(base))
    model = copy.deepcopy(stock)
    report = pk.patch(model)

    def calls(model: Any) -> Counter[str]:
        names = {module: name for name, module in model.named_modules()}
        seen: Counter[str] = Counter()
        handle = torch_module.register_module_forward_hook(
            lambda module, *_: seen.update([names[module]] if module in names else [])  # PEFT creates some
        )
        try:
            model(tokens())
        finally:
            handle.remove()
        return seen

    found = calls(model)
    assert found == calls(stock) and any("act_fn" in name for name in found)
    assert fallbacks(report) == [
        "hooks on all modules (register_module_forward_hook), which a fused forward would skip; remove them"
    ]
    model(tokens())
    assert report.layers[0].fallbacks.total() == 1 and report.layers[0].fused

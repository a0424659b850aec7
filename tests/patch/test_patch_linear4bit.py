"""Patched Linear4bit layers of bitsandbytes, with and without an adapter."""

from __future__ import annotations

import copy

import models
import pytest
import torch
from installed import before
from peft_models import DTYPES, in_fp64, lora, run
from torch import nn

import peft_kernels as pk
import testing


def test_fp32_activations_over_a_base_that_computes_in_bf16() -> None:
    """As after `prepare_model_for_kbit_training`: the base GEMM in bf16, the delta from the fp32 x."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.q = nn.Linear(128, 96, dtype=torch.bfloat16)
    models.to_base(model, "bnb", torch.bfloat16)
    layer, x = lora(model, target_modules=["q"]).base_model.model.q, testing.tensor(5, 128)
    truth, plain = run(in_fp64(layer), x.double()), run(layer, x)
    with pk.patched(layer) as report:
        got = run(layer, x)
    for name in got:
        testing.assert_close(got[name], plain[name], truth[name], name)
    with pk.patched(layer) as again, torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x)
    assert not any(entry.fallbacks for entry in (*report.layers, *again.layers))


def test_an_adapter_over_fp4() -> None:
    """The layer in place, without a copy of its weight."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.q = models.to_linear4bit(nn.Linear(128, 96), torch.float32, "fp4")
    layer, x = lora(model, target_modules=["q"]).base_model.model.q, testing.tensor(5, 128)
    nn.init.normal_(layer.lora_B["default"].weight)
    truth, plain = run(in_fp64(layer), x.double()), run(layer, x)
    packed = layer.base_layer.weight.data_ptr()
    with pk.patched(layer) as report:
        got = run(layer, x)
    assert str(report) == "peft_kernels: 1 of 1 layers fused" and layer.base_layer.weight.data_ptr() == packed
    for name in got:
        testing.assert_close(got[name], plain[name], truth[name], name)


# bitsandbytes' Linear4bit without an adapter.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_linear4bit_alone(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = models.to_linear4bit(nn.Linear(128, 96, dtype=dtype), dtype, kind)
    x = testing.tensor(9, 128, dtype=dtype)
    plain = run(layer, x)
    weight = pk.NF4Weight.from_bnb(layer.weight).dequantize(torch.float32).double()
    truth = nn.functional.linear(x.double(), weight, layer.bias.double())
    report = pk.patch(layer)
    assert str(report) == "peft_kernels: 1 of 1 layers fused"
    testing.assert_close(layer(x), plain["y"], truth, "y")
    dy = testing.tensor(9, 96, dtype=dtype, seed=9).double()
    testing.assert_close(run(layer, x)["x"], plain["x"], dy @ weight, "x.grad")


def test_linear4bit_compute_dtype() -> None:
    layer = models.to_linear4bit(nn.Linear(128, 96), compute_dtype=torch.bfloat16)
    x = testing.tensor(9, 128)
    plain = layer(x.requires_grad_())
    pk.patch(layer)
    assert layer(x).dtype == torch.float32
    assert testing.relative_error(layer(x), plain) < 0.01
    assert torch.equal(layer(x), layer(x).bfloat16().float()), "computed in bf16, as bitsandbytes would"


def test_linear4bit_evaluation_changes_no_state_and_training_goes_on() -> None:
    """bitsandbytes' own evaluation on CPUs repacks the weight: another absmax, and no x.grad afterwards."""
    torch.manual_seed(0)
    layer = models.to_linear4bit(nn.Linear(128, 96, dtype=torch.bfloat16))
    state = copy.deepcopy(layer.state_dict())
    pk.patch(layer)
    layer.eval()
    layer(testing.tensor(4, 128, dtype=torch.bfloat16))
    for key, value in layer.state_dict().items():
        assert torch.equal(value, state[key]), key
    layer.train()
    x = testing.tensor(4, 128, dtype=torch.bfloat16).requires_grad_()
    layer(x).sum().backward()
    weight = pk.NF4Weight.from_bnb(layer.weight).dequantize(torch.float32)
    assert testing.relative_error(x.grad, weight.sum(0).expand(4, 128)) < 0.01


@pytest.mark.parametrize("adapted", [False, True], ids=["alone", "adapted"])
@pytest.mark.parametrize("late", [False, True], ids=["at-once", "loaded-later"])
def test_scales_of_another_table_keep_the_original_forward(late: bool, adapted: bool) -> None:
    """bitsandbytes before 0.50 set the first value to -1 when it quantised on a CPU, and saved that."""
    if before("bitsandbytes", "0.50"):
        pytest.skip("models.to_linear4bit does not quantise scales with it")
    torch.manual_seed(0)
    model = nn.Sequential()
    model.q = models.to_linear4bit(nn.Linear(128, 96), torch.float32)
    layer = lora(model, target_modules=["q"]).base_model.model.q if adapted else model.q
    base, x = model.q.base_layer if adapted else model.q, testing.tensor(5, 128)
    made = copy.deepcopy(base.weight)
    made.quant_state.state2.code = made.quant_state.state2.code.clone()
    made.quant_state.state2.code[0] = -1
    made.quant_state.absmax.zero_()  # the first value everywhere
    if late:
        pk.patch(layer)
    base.weight, base.quant_state = made, made.quant_state
    stock = copy.deepcopy(layer)
    pk.unpatch(stock)
    report = pk.patch(layer)
    assert torch.equal(layer(x), stock(x))
    assert "another table than the standard one, as bitsandbytes before 0.50 made on CPUs" in str(report)
    with pytest.raises(ValueError, match="its scales have another table than the standard one, as bitsandby"):
        pk.NF4Weight.from_bnb(made)


def test_unreadable_linear4bit_is_reported() -> None:
    layer = models.to_linear4bit(nn.Linear(128, 96, dtype=torch.bfloat16))
    layer.weight.quant_state.packing_format_for_cpu = True
    report = pk.patch(layer)
    assert not report.fused and "repacked the weight for CPU inference" in str(report)

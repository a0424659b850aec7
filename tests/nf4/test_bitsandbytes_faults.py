"""Bugs of bitsandbytes 0.50 on the CPU, and that our kernels do not have them.

Each check raises where the bug is present: without `enable`, so that an upstream fix is noticed, and never
with it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bnb_layers import bnb_functional, quantized, their_layer
from nf4_oracle import oracle_dequantize, oracle_quantize
from nf4_weights import DTYPES
from torch import Tensor

import peft_kernels as pk
import testing
from peft_kernels.integrations.bitsandbytes import enable

BF16 = torch.bfloat16
REPACKS = bool(bnb_functional.has_avx512bf16())
"""Whether bitsandbytes repacks weights for its CPU kernel on this machine."""

Fault = Callable[[], None]
FAULTS: dict[str, Fault] = {}
OF_REPACKING: set[str] = set()


def fault(check: Fault) -> Fault:
    FAULTS[check.__name__] = check
    return check


def repacking_fault(check: Fault) -> Fault:
    OF_REPACKING.add(check.__name__)
    return fault(check)


def layer(out_features: int, in_features: int, nested: bool = True, bias: bool = False) -> Any:
    dense = testing.tensor(out_features, in_features, dtype=BF16, scale=0.1)
    return their_layer(dense, bias=bias, nested=nested).to(BF16)


def evaluated(one: Any, rows: int = 3) -> Tensor:
    with torch.no_grad():
        y: Tensor = one.eval()(testing.tensor(rows, one.in_features, dtype=BF16))
    return y


def expect_gradient(one: Any, weight: Tensor) -> None:
    x = testing.tensor(3, one.in_features, dtype=BF16).requires_grad_()
    one.train()(x).sum().backward()
    assert x.grad is not None, "no x.grad"
    want = weight.double().sum(0).expand_as(x)
    assert testing.relative_error(x.grad, want) < 0.01


def exact(one: Any) -> Tensor:
    return pk.NF4Weight.from_bnb(one.weight).dequantize(torch.float32)


@fault
def dequantises_blocks_that_cross_rows_wrongly() -> None:
    for dtype in DTYPES:
        packed, absmax = oracle_quantize(testing.tensor(64, 96), 64)
        arguments = packed[:, None], absmax, 64, "nf4", [64, 96], dtype
        got = torch.ops.bitsandbytes.dequantize_4bit(*arguments)
        want = oracle_dequantize(packed, absmax, 64, 64 * 96, dtype).view(64, 96)
        torch.testing.assert_close(got, want)


@fault
def dequantises_vectors_to_another_shape() -> None:
    packed, state = bnb_functional.quantize_4bit(testing.tensor(100), quant_type="nf4")
    assert bnb_functional.dequantize_4bit(packed, state).shape == (100,)


@fault
def has_no_out() -> None:
    params = quantized(testing.tensor(64, 64))
    out = torch.empty(64, 64)
    bnb_functional.dequantize_4bit(params.data, params.quant_state, out=out)
    assert torch.equal(out, bnb_functional.dequantize_4bit(params.data, params.quant_state))


@fault
def quantises_nan_and_inf() -> None:
    for bad in ("nan", "inf", "-inf"):
        dense = testing.tensor(8, 64)
        dense[3, 5] = float(bad)
        with pytest.raises(
            ValueError, match=r"A: expected finite values to quantise, got 1 NaN or Inf among 512"
        ):
            bnb_functional.quantize_4bit(dense, quant_type="nf4")


@fault
def gives_a_zero_tail_a_scale() -> None:
    """A partial last block of zeros. bitsandbytes' CUDA kernels and ours write a scale of 0."""
    _, state = bnb_functional.quantize_4bit(torch.zeros(33, 3), quant_type="nf4")
    assert torch.equal(state.absmax, torch.zeros(2))


@repacking_fault
def cannot_evaluate_40_output_features() -> None:
    assert evaluated(layer(40, 64)).isfinite().all()


@repacking_fault
def cannot_evaluate_blocks_that_cross_rows() -> None:
    one = layer(64, 96)
    weight = exact(one)
    x = testing.tensor(3, 96, dtype=BF16)
    assert testing.relative_error(evaluated(one), x.double() @ weight.double().t()) < 0.01


@repacking_fault
def loses_the_gradient_after_an_evaluation() -> None:
    for nested in (True, False):
        one = layer(64, 128, nested)
        weight = exact(one)
        evaluated(one)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            expect_gradient(one, weight)


@repacking_fault
def cannot_train_a_bias_after_an_evaluation() -> None:
    one = layer(64, 128, bias=True)
    weight = exact(one)
    evaluated(one)
    expect_gradient(one, weight)
    assert torch.equal(one.bias.grad, torch.full((64,), 3.0, dtype=BF16))


@repacking_fault
def saves_changed_scales_after_an_evaluation() -> None:
    for nested in (True, False):
        one = layer(64, 128, nested)
        before = copy.deepcopy(one.state_dict())
        evaluated(one)
        for key, value in one.state_dict().items():
            assert torch.equal(value, before[key]), key


@repacking_fault
def breaks_a_weight_without_nesting_when_it_is_saved() -> None:
    one = layer(64, 128, nested=False)
    before = evaluated(one)
    one.state_dict()
    assert torch.equal(evaluated(one), before)


@repacking_fault
def treats_a_plain_weight_as_repacked() -> None:
    params = quantized(testing.tensor(64, 128, dtype=BF16), nested=False)
    x = testing.tensor(1, 128, dtype=BF16)
    weight = bnb_functional.dequantize_4bit(params.data, params.quant_state)
    got = bnb_functional.gemv_4bit(x, params.data, state=params.quant_state)
    assert testing.relative_error(got, x.double() @ weight.double().t()) < 0.01


each_fault = pytest.mark.parametrize("name", FAULTS)


@each_fault
def test_fault_is_present_without_enable(name: str) -> None:
    if name in OF_REPACKING and not REPACKS:
        pytest.skip("bitsandbytes repacks nothing on this machine")
    with pytest.raises((Exception, pytest.fail.Exception)):  # each bug raises its own error
        FAULTS[name]()


@each_fault
def test_fault_is_gone_with_enable(name: str) -> None:
    with enable():
        FAULTS[name]()


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
def test_layer_repacked_before_enable_trains(nested: bool) -> None:
    """With rounded scales: bitsandbytes has discarded the original ones."""
    one = layer(64, 128, nested)
    weight = exact(one)
    evaluated(one)
    with enable():
        expect_gradient(one, weight)
        y = evaluated(one)
        x = testing.tensor(3, 128, dtype=BF16)
        assert testing.relative_error(y, x.double() @ weight.double().t()) < 0.01
        rounded = exact(one)
    assert testing.relative_error(rounded, weight.double()) < 0.01
    expect_gradient(one, weight)


def test_layer_survives_enable_and_disable() -> None:
    one = layer(64, 128)
    with enable():
        before = copy.deepcopy(one.state_dict())
        first = evaluated(one)
    if REPACKS:
        theirs = evaluated(copy.deepcopy(one))
        assert testing.relative_error(theirs, first.double()) < 0.01
    with enable():
        assert torch.equal(evaluated(one), first)
    assert all(torch.equal(value, before[key]) for key, value in one.state_dict().items())

"""NF4Weight behaves as a frozen tensor: what libraries do to one works or raises."""

from __future__ import annotations

import copy
import gc
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from nf4_weights import (
    COPIES,
    assert_equal_weights,
    assert_shares_nothing,
    each_dtype,
    each_nesting,
    each_shape,
    make,
    parts,
)
from rounding import ONE_MODEL
from torch import Tensor, nn

import peft_kernels as pk
import testing

# Attributes


@each_nesting
@each_shape
@each_dtype
def test_tensor_attributes(dtype: torch.dtype, shape: tuple[int, int], nested: bool) -> None:
    weight = make(shape, nested, dtype)
    assert isinstance(weight, Tensor) and weight.shape == shape and weight.dtype == dtype
    assert weight.numel() == shape[0] * shape[1] and weight.device.type == "cpu" and not weight.requires_grad
    assert (weight.absmax2 is not None) == (weight.offset is not None) == nested == weight.double_quant
    assert weight.packed.shape == (
        (shape[0], shape[1] // 2) if shape[1] % 2 == 0 else ((shape[0] * shape[1] + 1) // 2,)
    )
    assert weight.nbytes == sum(t.numel() * t.element_size() for t in parts(weight).values())
    assert repr(weight) == (
        f"NF4Weight({shape[0]}, {shape[1]}, dtype={dtype}, device=cpu, blocksize=32, double_quant={nested})"
    )
    assert not weight.is_dense and weight.dense is None


@each_dtype
def test_dequantize_takes_a_dtype(dtype: torch.dtype) -> None:
    weight = make(dtype=torch.bfloat16)
    assert weight.dequantize().dtype == torch.bfloat16
    assert torch.equal(weight.dequantize(dtype), weight.dequantize(torch.float32).to(dtype))


def test_quantize_an_nf4_weight_again() -> None:
    weight = make()
    again = pk.NF4Weight.quantize(weight, 64, double_quant=False)
    assert again.blocksize == 64 and not again.double_quant
    assert torch.equal(again.dequantize(), pk.NF4Weight.quantize(weight.dequantize(), 64, False).dequantize())


@pytest.mark.parametrize(
    "message,call",
    [
        (r"^weight: expected shape \(out_features, in_features\) or \(experts, .*\), got \(4,\)$",
         lambda: pk.NF4Weight.quantize(torch.ones(4))),
        (r"^weight: expected float32, bfloat16 or float16, got torch.float64$",
         lambda: pk.NF4Weight.quantize(torch.ones(4, 4, dtype=torch.float64))),
        (r"^weight: expected float32, .* got torch.int32$",
         lambda: pk.NF4Weight.quantize(torch.ones(4, 4, dtype=torch.int32))),
        (r"^blocksize: expected one of \(32, .*4096\), got 48$",
         lambda: pk.NF4Weight.quantize(torch.ones(4, 4), 48)),
        (r"^q_proj: expected shape", lambda: pk.NF4Weight.quantize(torch.ones(4), name="q_proj")),
    ],
    ids=["1-d", "fp64", "int32", "blocksize", "name"],
)  # fmt: skip
def test_quantize_refuses(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_quantize_does_not_change_its_input() -> None:
    dense = testing.tensor(5, 64).requires_grad_()
    before = dense.detach().clone()
    weight = pk.NF4Weight.quantize(dense)
    assert torch.equal(dense, before) and not weight.requires_grad


# Copies


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "clone"])
def test_copy_of_a_dense_weight(how: str) -> None:
    weight = make()
    weight.mul_(2.0)
    got = COPIES[how](weight)
    assert got.is_dense and torch.equal(got.dense, weight.dense)
    assert got.dense.data_ptr() != weight.dense.data_ptr()


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copy_of_a_layer(how: str) -> None:
    layer = pk.nn.NF4Linear.from_linear(nn.Linear(64, 12))
    got = COPIES[how](layer)
    assert isinstance(got, pk.nn.NF4Linear) and isinstance(got.weight, nn.Parameter)
    assert_equal_weights(got.weight, layer.weight)
    assert_shares_nothing(got.weight, layer.weight)
    x = testing.tensor(3, 64)
    assert torch.equal(got(x), layer(x))


def test_tied_weights_stay_tied_in_a_deepcopy() -> None:
    layer = pk.nn.NF4Linear.from_linear(nn.Linear(64, 12))
    both = nn.ModuleList([layer, layer])
    got = copy.deepcopy(both)
    assert got[0].weight is got[1].weight


def test_to_meta() -> None:
    moved = make().to("meta")
    assert isinstance(moved, pk.NF4Weight) and moved.device.type == "meta" and moved.shape == (12, 64)
    assert all(t.device.type == "meta" for t in parts(moved).values())


def test_to_an_integer_dtype_is_a_read() -> None:
    weight = make()
    assert torch.equal(weight.to(torch.int32), weight.dequantize().to(torch.int32))


@each_dtype
def test_module_to(dtype: torch.dtype) -> None:
    """nn.Module._apply, with and without swapping tensors."""
    x = testing.tensor(3, 64, dtype=dtype)
    for swap in (False, True):
        torch.__future__.set_swap_module_params_on_conversion(swap)
        try:
            layer = pk.nn.NF4Linear.from_linear(nn.Linear(64, 12))
            packed = layer.weight.packed.clone()
            layer.to(dtype)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        assert isinstance(layer.weight, pk.NF4Weight) and isinstance(layer.weight, nn.Parameter)
        assert layer.weight.dtype == dtype == layer.bias.dtype and torch.equal(layer.weight.packed, packed)
        assert layer(x).dtype == dtype
        layer.to("meta")
        assert layer.weight.device.type == "meta" and isinstance(layer.weight, pk.NF4Weight)


def test_copy_between_nf4_weights() -> None:
    """copy_ between NF4 weights copies the bytes, whether either was packed or dense."""
    target, source = make(seed=1), make(seed=2)
    alias = target.detach()
    assert target.copy_(source) is target
    assert_equal_weights(target, source)
    assert_equal_weights(alias, source)
    assert_shares_nothing(target, source)
    target.add_(1.0)
    target.copy_(source)
    assert_equal_weights(target, source)
    source.mul_(3.0)
    target.copy_(source)
    assert target.is_dense and torch.equal(target.dense, source.dense)


# In matmuls


@each_nesting
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_f_linear_runs_the_kernel(nested: bool, bias: bool, op_counts: Counter[str]) -> None:
    weight, x = make(nested=nested), testing.tensor(3, 64)
    b = testing.tensor(12) if bias else None
    layer = nn.Linear(64, 12, bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    want = pk.nf4_linear(x, weight, b)
    assert torch.equal(F.linear(x, weight, b), want)
    assert torch.equal(F.linear(x, weight=weight, bias=b), want)
    assert torch.equal(F.linear(input=x, weight=weight, bias=b), want)
    assert torch.equal(layer(x), pk.nf4_linear(x, weight))
    assert op_counts == {"nf4_linear": 6}


def test_nf4_activation_is_dequantised() -> None:
    weight, dense = make((12, 64)), testing.tensor(5, 64)
    assert torch.equal(F.linear(weight, dense), weight.dequantize() @ dense.t())
    assert torch.equal(F.linear(weight, weight), weight.dequantize() @ weight.dequantize().t())


def test_requires_grad_raises() -> None:
    layer = pk.nn.NF4Linear.from_linear(nn.Linear(64, 12), name="mlp.up_proj.weight")
    message = (
        r"^mlp\.up_proj: NF4 weights are frozen; for full fine-tuning load the model without quantize_model$"
    )
    writes: list[Callable[[], object]] = [
        lambda: layer.requires_grad_(True),
        lambda: layer.weight.requires_grad_(),
        lambda: setattr(layer.weight, "requires_grad", True),
        lambda: nn.Parameter(layer.weight),
    ]
    for call in writes:
        with pytest.raises(ValueError, match=message):
            call()
    layer.weight.requires_grad_(False)
    layer.weight.requires_grad = False
    assert not layer.weight.requires_grad


def test_autograd_through_f_linear() -> None:
    weight = nn.Parameter(make(), requires_grad=False)
    x = testing.tensor(3, 64).requires_grad_()
    F.linear(x, weight).sum().backward()
    torch.testing.assert_close(
        x.grad, weight.dequantize().sum(0).expand(3, 64), rtol=ONE_MODEL, atol=ONE_MODEL
    )
    assert weight.grad is None


# Layers


def test_dense_layer_becomes_nn_linear_when_its_weight_is_assigned() -> None:
    layer = pk.nn.NF4Linear.from_linear(nn.Linear(64, 12))
    want = layer.weight.dequantize() + 0.125
    layer.weight.data += 0.125
    assert type(layer) is pk.nn.NF4Linear and torch.equal(layer.weight, want)
    assert layer.state_dict().keys() == {"weight", "bias"} and torch.equal(layer.state_dict()["weight"], want)
    x = testing.tensor(3, 64)
    y = layer(x)
    layer.weight = layer.weight
    assert type(layer) is nn.Linear and type(layer.weight) is nn.Parameter and torch.equal(layer.weight, want)
    assert vars(layer).keys() == vars(nn.Linear(1, 1)).keys() and repr(layer) == repr(nn.Linear(64, 12))
    assert torch.equal(layer(x), y) and torch.equal(y, F.linear(x, want, layer.bias))


def test_parameters_of_a_model_are_frozen_nf4() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64))
    dense_bytes = sum(p.nbytes for p in model.parameters())
    pk.quantize_model(model)
    named = dict(model.named_parameters())
    assert isinstance(named["0.weight"], pk.NF4Weight) and not named["0.weight"].requires_grad
    assert sum(p.nbytes for p in model.parameters()) < 0.3 * dense_bytes
    assert [p for p in model.parameters() if p.requires_grad] == [model[0].bias, model[2].bias]


def test_memory_is_freed_with_the_weight() -> None:
    import weakref

    weight = make()
    packed = weakref.ref(weight.packed)
    x = testing.tensor(3, 64).requires_grad_()
    y = pk.nf4_linear(x, weight)
    del weight
    y.sum().backward()
    del y
    gc.collect()
    assert packed() is None

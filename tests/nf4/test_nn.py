"""NF4Linear, LoRALinear, NF4LoRALinear."""

from __future__ import annotations

import copy

import models
import pytest
import torch
from rounding import ONE_LAYER, ONE_MODEL
from torch import nn
from torch.nn import functional as F

import peft_kernels as pk
import testing
from peft_kernels.nn import LoRALinear, NF4Linear, NF4LoRALinear

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def linear(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(100, 48, bias=bias, dtype=dtype)


def adapted(kind: str, dtype: torch.dtype, **options: object) -> LoRALinear:
    layer = (NF4LoRALinear if kind == "nf4" else LoRALinear)(linear(dtype), r=8, **options)
    nn.init.normal_(layer.lora_B, std=0.1)
    return layer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_nf4_linear_forward_and_backward(backend: str, dtype: torch.dtype, bias: bool) -> None:
    dense = linear(dtype, bias)
    layer = NF4Linear.from_linear(dense)
    x = testing.tensor(3, 5, 100, dtype=dtype).requires_grad_()
    y = layer(x)
    dy = testing.tensor(3, 5, 48, dtype=dtype, seed=2)
    y.backward(dy)

    weight = layer.weight.dequantize(torch.float32).double()
    rounded = layer.weight.dequantize(dtype)
    wide = None if not bias else dense.bias.double()
    testing.assert_close(y, F.linear(x, rounded, dense.bias), F.linear(x.double(), weight, wide), "y")
    testing.assert_close(x.grad, dy @ rounded, dy.double() @ weight, "x.grad")
    if bias:
        testing.assert_close(dense.bias.grad, dy.sum((0, 1)), dy.double().sum((0, 1)), "bias.grad")
    assert layer.weight.grad is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_lora_linear_forward_and_backward(backend: str, kind: str, dtype: torch.dtype) -> None:
    layer = adapted(kind, dtype)
    x = testing.tensor(7, 100, dtype=dtype).requires_grad_()
    y = layer(x)
    dy = testing.tensor(7, 48, dtype=dtype, seed=2)
    y.backward(dy)
    assert layer.base_layer.weight.grad is None and layer.base_layer.bias.grad is None

    def peft_reference(cast: torch.dtype, weight: torch.Tensor) -> list[torch.Tensor]:
        """PEFT's order of operations: base matmul, then the delta in the adapter's dtype."""
        acc = torch.float64 if cast == torch.float64 else torch.float32
        xs, a, b = (
            t.detach().to(kind_).requires_grad_()
            for t, kind_ in ((x, cast), (layer.lora_A, acc), (layer.lora_B, acc))
        )
        base = F.linear(xs, weight.to(cast), layer.base_layer.bias.to(cast))
        out = (base.to(acc) + layer.scaling * (xs.to(acc) @ a.t() @ b.t())).to(cast)
        return [out, *torch.autograd.grad(out, (xs, a, b), dy.to(cast))]

    base = layer.base_layer.weight
    exact = base.dequantize(torch.float32) if kind == "nf4" else base
    plain, truth = peft_reference(dtype, exact.detach()), peft_reference(torch.float64, exact.detach())
    for what, got, p, t in zip(
        ("y", "x.grad", "A.grad", "B.grad"), (y, x.grad, layer.lora_A.grad, layer.lora_B.grad), plain, truth,
        strict=True,
    ):  # fmt: skip
        testing.assert_close(got, p, t, what)


def test_new_lora_equals_its_base() -> None:
    layer, x = LoRALinear(linear(), r=4), testing.tensor(3, 100)
    assert torch.equal(layer(x), layer.base_layer(x))


def test_scaling() -> None:
    assert LoRALinear(linear(), r=16, lora_alpha=32).scaling == 2.0
    assert LoRALinear(linear(), r=16, lora_alpha=32, use_rslora=True).scaling == 8.0


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_merge_gives_a_dense_layer_with_the_same_output(kind: str) -> None:
    layer, x = adapted(kind, torch.float32), testing.tensor(9, 100)
    merged = layer.merge()
    assert type(merged) is nn.Linear and merged.weight.dtype == torch.float32
    assert testing.relative_error(merged(x), layer(x)) < ONE_LAYER
    assert testing.relative_error(layer.base_layer(x), layer(x)) > 1e-2  # the delta exceeds rounding


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoRALinear(nn.Embedding(4, 4)), "base_layer: expected an nn.Linear .*, got Embedding"),
        (lambda: LoRALinear(linear(), r=0), "r: expected a positive integer, got 0"),
        (lambda: NF4Linear.from_linear(linear(), blocksize=48), "blocksize: expected one of .*, got 48"),
        (lambda: NF4Linear.from_linear(linear(torch.float64)), "weight: expected .* got torch.float64"),
    ],
)
def test_constructor_errors(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_from_linear_keeps_the_dense_layer_and_shares_its_bias() -> None:
    dense = linear().eval()
    before = dense.weight.clone()
    layer = NF4Linear.from_linear(dense)
    assert torch.equal(dense.weight, before) and dense.weight.requires_grad
    assert layer.bias is dense.bias and not layer.training
    assert isinstance(layer, nn.Linear) and (layer.in_features, layer.out_features) == (100, 48)


def test_state_dict_round_trip() -> None:
    layer, other = NF4Linear.from_linear(linear()), NF4Linear.from_linear(linear())
    with torch.no_grad():
        other.bias.zero_()
        other.weight.copy_(pk.NF4Weight.quantize(torch.zeros(48, 100)))
    x = testing.tensor(2, 100)
    assert not torch.equal(layer(x), other(x))
    assert str(other.load_state_dict(layer.state_dict())) == "<All keys matched successfully>"
    assert torch.equal(layer(x), other(x))
    saved = layer.state_dict()
    for key, value in other.state_dict().items():
        assert torch.equal(value, saved[key]), key
        assert value.data_ptr() != saved[key].data_ptr(), f"{key} is shared between the two layers"


def test_partial_load() -> None:
    layer = NF4Linear.from_linear(linear())
    packed, bias = layer.weight.packed.clone(), torch.ones(48)
    with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
        layer.load_state_dict({"bias": bias})
    assert layer.load_state_dict({"bias": bias}, strict=False).missing_keys == ["weight"]
    assert torch.equal(layer.weight.packed, packed) and torch.equal(layer.bias, bias)


@pytest.mark.parametrize("copying", [copy.deepcopy, models.pickled], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_copies_are_independent(kind: str, copying: object) -> None:
    layer, x = adapted(kind, torch.float32), testing.tensor(2, 100)
    y = layer(x)
    copied = copying(layer)  # type: ignore[operator]
    with torch.no_grad():
        layer.lora_B.zero_()
        layer.base_layer.weight.data.zero_()
    assert torch.equal(copied(x), y)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_compiles_without_graph_breaks(kind: str) -> None:
    layer = adapted(kind, torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = testing.tensor(4, 100)
    y = compiled(x)
    assert torch.equal(y, layer(x))
    y.sum().backward()
    got = layer.lora_A.grad.clone()
    layer.zero_grad()
    layer(x).sum().backward()
    assert torch.equal(got, layer.lora_A.grad)


def test_autocast_computes_in_its_dtype() -> None:
    layer, x = NF4Linear.from_linear(linear()), testing.tensor(2, 100)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_lora_under_autocast(kind: str, dtype: torch.dtype) -> None:
    layer, x = adapted(kind, torch.float32), testing.tensor(9, 100)
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x.to(dtype))
    assert y.dtype == torch.bfloat16
    assert testing.relative_error(y, expected) < 0.01
    y.sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32 and bool((layer.lora_A.grad != 0).any())
    for parameter in (layer.lora_A, layer.lora_B):
        parameter.data.copy_(parameter.bfloat16())  # as autocast casts them
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x.to(dtype)), y)


def test_quantisation_options_reach_the_weight() -> None:
    layer = NF4LoRALinear(linear(), blocksize=128, double_quant=False)
    assert layer.base_layer.weight.blocksize == 128 and layer.base_layer.weight.absmax.dtype == torch.float32
    base = NF4Linear.from_linear(linear())
    assert NF4LoRALinear(base, blocksize=128).base_layer is base  # quantised already: used as is


@pytest.mark.parametrize("merged", [False, True], ids=["packed", "merged"])
def test_fp32_activations_use_compute_dtype(backend: str, merged: bool) -> None:
    layer, x = NF4Linear.from_linear(linear(torch.bfloat16)), testing.tensor(7, 100).requires_grad_()
    if merged:
        layer.weight.data += testing.tensor(48, 100, seed=4)
    assert layer.compute_dtype is None
    y, wide = layer(x), layer(x.detach().bfloat16())
    assert y.dtype == torch.float32 and wide.dtype == torch.bfloat16 and torch.equal(y, wide.float())
    y.sum().backward()
    assert x.grad.dtype == torch.float32
    layer.compute_dtype = torch.float32
    assert layer(x).dtype == torch.float32 and not torch.equal(layer(x), y)
    layer.compute_dtype = torch.bfloat16
    half = x.detach().half()
    assert layer(half).dtype == torch.float16 and not torch.equal(layer(half).float(), layer(half.float()))


def test_compute_dtype_is_kept() -> None:
    layer = NF4Linear.from_linear(linear(), compute_dtype=torch.float16)
    other = NF4Linear.from_linear(linear(torch.bfloat16))
    layer.load_state_dict(other.state_dict())
    kept = [
        copy.deepcopy(layer),
        models.pickled(layer),
        layer.float(),
        NF4Linear.from_linear(layer, compute_dtype=torch.float16),
    ]
    assert [copied.compute_dtype for copied in kept] == [torch.float16] * 4
    assert "compute_dtype=torch.float16" in repr(layer)


def test_only_the_adapter_is_trained() -> None:
    layer = adapted("dense", torch.float32)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    layer = NF4LoRALinear(linear(), dtype=torch.bfloat16)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_dropout_in_training_only(kind: str) -> None:
    layer, x = adapted(kind, torch.float32), torch.ones(500, 100)
    y, base = layer(x), layer.base_layer(x)
    layer.lora_dropout = 0.5
    torch.manual_seed(1)
    first = layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first) and not torch.equal(layer(x), first)
    assert testing.relative_error((first - base).sum(0), (y - base).sum(0)) < 0.2
    assert torch.equal(layer.eval()(x), y)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_dora_init_training_and_merge(kind: str) -> None:
    make = NF4LoRALinear if kind == "nf4" else LoRALinear
    layer, x = make(linear(), r=4, use_dora=True), testing.tensor(7, 100)
    base = layer.base_layer(x)
    assert testing.relative_error(layer(x), base) < ONE_LAYER
    with torch.no_grad():
        layer.lora_B.copy_(testing.tensor(48, 4, scale=0.3))
        layer.lora_magnitude_vector.mul_(1 + testing.tensor(48, scale=0.1))
    y = layer(x)
    assert testing.relative_error(y, base) > 0.05
    assert testing.relative_error(layer.merge()(x), y) < ONE_MODEL
    v = layer._weight() + layer.delta_weight()
    v = (layer.lora_magnitude_vector / v.norm(dim=1))[:, None] * v
    assert testing.relative_error(y, nn.functional.linear(x, v, layer.base_layer.bias)) < ONE_MODEL
    y.sum().backward()
    assert {n for n, p in layer.named_parameters() if p.grad is not None and p.grad.any()} == {
        "lora_A",
        "lora_B",
        "lora_magnitude_vector",
    }


def test_invalid_dropout_raises() -> None:
    with pytest.raises(ValueError, match=r"lora_dropout: expected 0 to 1, got 1\.5"):
        LoRALinear(linear(), lora_dropout=1.5)


def test_repr() -> None:
    layer = adapted("nf4", torch.bfloat16)
    assert "r=8, scaling=4" in repr(layer)
    assert "NF4Linear(100, 48, bias=True, blocksize=64, dtype=torch.bfloat16)" in repr(layer.base_layer)

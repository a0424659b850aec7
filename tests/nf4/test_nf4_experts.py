"""NF4Weight of several experts: a stack of separately quantised weights in one tensor."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nf4_weights import COPIES, assert_equal_weights, each_dtype, each_nesting, parts
from rounding import ONE_MODEL
from torch import Tensor, nn

import peft_kernels as pk
import testing

SHAPES = {"even": (3, 12, 64), "odd": (4, 7, 33), "one-expert": (1, 5, 32), "long": (2, 33, 320)}

each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)

pytestmark = pytest.mark.filterwarnings("ignore:.* bytes for each value of an NF4 weight")


def dense(shape: tuple[int, int, int] = (3, 12, 64), dtype: torch.dtype = torch.float32) -> Tensor:
    """Experts of very different scales, so that a block or mean shared by two of them would show."""
    scales = torch.tensor([1.0, 100.0, 0.01, 7.0])[: shape[0], None, None]
    return (testing.tensor(*shape, seed=4) * scales).to(dtype)


def make(
    shape: tuple[int, int, int] = (3, 12, 64), nested: bool = True, dtype: torch.dtype = torch.float32
) -> pk.NF4Weight:
    return pk.NF4Weight.quantize(dense(shape, dtype), 32, nested)


# Quantisation, expert by expert


@each_nesting
@each_shape
@each_dtype
def test_each_expert_is_quantised_alone(
    dtype: torch.dtype, shape: tuple[int, int, int], nested: bool, backend: str
) -> None:
    weight = make(shape, nested, dtype)
    assert weight.shape == shape and weight.dtype == dtype and not weight.requires_grad
    assert weight.packed.shape == (
        (*shape[:2], shape[2] // 2) if shape[2] % 2 == 0 else (shape[0], (shape[1] * shape[2] + 1) // 2)
    )
    for e, matrix in enumerate(dense(shape, dtype)):
        alone = pk.NF4Weight.quantize(matrix, 32, nested)
        assert_equal_weights(weight[e], alone)
        assert torch.equal(weight.dequantize()[e], alone.dequantize())
    assert weight.dequantize(torch.float32).shape == shape


def test_tensor_attributes() -> None:
    weight = make()
    assert weight.numel() == 3 * 12 * 64 and weight.dim() == 3 and len(weight) == 3
    assert weight.nbytes == sum(t.nbytes for t in parts(weight).values()) < 0.8 * weight.numel()
    assert repr(weight) == (
        "NF4Weight(3, 12, 64, dtype=torch.float32, device=cpu, blocksize=32, double_quant=True)"
    )


@pytest.mark.parametrize(
    "message,call",
    [
        (r"^gate: expected shape \(out_features, in_features\) or \(experts, out_features, in_features\), "
         r"got \(1, 2, 3, 4\)$", lambda: pk.NF4Weight.quantize(torch.ones(1, 2, 3, 4), name="gate")),
        (r"^gate: expected at least one expert, got shape \(0, 4, 4\)$",
         lambda: pk.NF4Weight.quantize(torch.ones(0, 4, 4), name="gate")),
        (r"^gate\[1\]: expected finite values, got 1 NaN or Inf among 16$",
         lambda: pk.NF4Weight.quantize(experts_with_nan(), name="gate")),
        (r"^weight: expected float32, bfloat16 or float16, got torch.float64$",
         lambda: pk.NF4Weight.quantize(torch.ones(2, 4, 4, dtype=torch.float64))),
        (r"^blocksize: expected one of \(32, .*4096\), got 48$",
         lambda: pk.NF4Weight.quantize(torch.ones(2, 4, 4), 48)),
    ],
    ids=["4-d", "no-experts", "nan", "fp64", "blocksize"],
)  # fmt: skip
def test_quantize_refuses(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def experts_with_nan() -> Tensor:
    values = torch.ones(3, 4, 4)
    values[1, 2, 3] = float("nan")
    return values


# Indexing one expert


@each_nesting
@pytest.mark.parametrize("shape", [SHAPES["even"], SHAPES["odd"]], ids=["even", "odd"])
def test_expert_shares_memory(shape: tuple[int, int, int], nested: bool) -> None:
    weight = make(shape, nested, torch.bfloat16)
    x = testing.tensor(5, shape[2], dtype=torch.bfloat16)
    for index in (0, 2, -1, torch.tensor(1)):
        one, e = weight[index], int(index) % shape[0]
        assert isinstance(one, pk.NF4Weight) and one.shape == shape[1:] and one.dtype == torch.bfloat16
        for name, tensor in parts(one).items():
            whole = parts(weight)[name]
            begin = whole.data_ptr() + e * whole.stride(0) * whole.element_size()
            assert tensor.data_ptr() == begin, name
        assert torch.equal(one.dequantize(), weight.dequantize()[e])
        assert torch.equal(torch.nn.functional.linear(x, one), pk.nf4_linear(x, one))
    for index in (shape[0], -shape[0] - 1):
        with pytest.raises(IndexError, match=rf"^index: expected one of {shape[0]} experts, got {index}$"):
            weight[index]


def merge(one: Any) -> None:
    with one.merging():
        one.data = one.data + 1.0


WRITES: dict[str, Callable[[Tensor], object]] = {
    "add_": lambda one: one.add_(1.0),
    "mul_": lambda one: one.mul_(2.0),
    "fill_": lambda one: one.fill_(0.0),
    "copy_": lambda one: one.copy_(torch.zeros(12, 64)),
    "copy_-nf4": lambda one: one.copy_(make()[0]),
    "data": lambda one: one.data.add_(1.0),
    "data-assign": lambda one: setattr(one, "data", torch.zeros(12, 64)),
    "data-assign-nf4": lambda one: setattr(one, "data", make()[0]),
    "merging": lambda one: merge(one),
    "out": lambda one: torch.add(torch.ones(12, 64), 1.0, out=one),
}


@pytest.mark.parametrize("how", WRITES)
def test_write_to_one_expert_raises(how: str) -> None:
    """The write would be lost: the stack has no dense storage for one expert."""
    weight = pk.NF4Weight.quantize(dense(), 32, name="layer.experts.up")
    before = {name: tensor.clone() for name, tensor in parts(weight).items()}
    with pytest.raises(RuntimeError, match=r"^layer\.experts\.up: one expert of it was written to, expected"):
        WRITES[how](weight[1])
    assert not weight.is_dense and all(torch.equal(parts(weight)[n], t) for n, t in before.items())


@pytest.mark.parametrize("index", [slice(0, 2), [0, 2], (1, 2), None], ids=str)
def test_other_indexing_is_dense(index: Any) -> None:
    weight = make()
    got = weight[index]
    assert not isinstance(got, pk.NF4Weight) and torch.equal(got, weight.dequantize()[index])


def test_expert_of_a_dense_weight_is_plain() -> None:
    weight = make()
    weight.mul_(2.0)
    want = weight.dequantize()
    assert type(weight[1]) is Tensor and torch.equal(weight[1], want[1])
    weight[1] += 1.0
    assert torch.equal(weight.dequantize()[1], want[1] + 1)


# Copies


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "clone"])
def test_copy_of_one_expert_is_independent(how: str) -> None:
    """The copy is detached from the stack, so writes to it are kept."""
    weight = make()
    got = COPIES[how](weight[1])
    assert_equal_weights(got, weight[1])
    want = got.dequantize() + 1
    got.add_(1.0)
    assert torch.equal(got.dequantize(), want) and not weight.is_dense


def test_in_a_module() -> None:
    module = nn.Module()
    module.experts = nn.Parameter(make(), requires_grad=False)
    want = {name: tensor.clone() for name, tensor in parts(module.experts).items()}
    module.to(torch.bfloat16)
    assert isinstance(module.experts, pk.NF4Weight) and module.experts.dtype == torch.bfloat16
    assert all(torch.equal(parts(module.experts)[name], tensor) for name, tensor in want.items())
    assert_equal_weights(copy.deepcopy(module).experts, module.experts)


# In matmuls


@each_nesting
def test_expert_linear_runs_its_op(nested: bool, op_counts: Counter[str]) -> None:
    weight, x = make(nested=nested), testing.tensor(6, 64)
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    y = pk.experts_linear(x, ends, weight)
    assert op_counts == {"experts_linear": 1}
    torch.testing.assert_close(y[:2], x[:2] @ weight.dequantize()[0].t())
    torch.testing.assert_close(y[2:5], x[2:5] @ weight.dequantize()[2].t(), rtol=ONE_MODEL, atol=ONE_MODEL)
    assert torch.equal(y[5:], torch.zeros(1, 12))


def test_adapter_op_takes_a_merged_weight() -> None:
    weight, x, ends = make(), testing.tensor(6, 64), torch.tensor([2, 2, 6], dtype=torch.int32)
    a, b = testing.tensor(3, 4, 64, seed=1), testing.tensor(3, 12, 4, seed=2)
    weight.add_(0.5)
    want = pk.experts_lora_linear(x, ends, weight.dequantize(), a, b, 0.5)
    assert torch.equal(pk.experts_lora_linear(x, ends, weight, a, b, 0.5), want)

"""The format: value tables, checkpoint layout, size; and cases in which bitsandbytes fails.

The last of these, weights beyond 2^31 elements, is in test_large.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from rounding import assert_close
from skips import require
from torch import Tensor, nn

import peft_kernels as pk
import testing
from peft_kernels.core import code_tables

CPU = torch.device("cpu")

# As in bitsandbytes' CUDA source, with an f at the end: decimal digits rounded to fp32 once.
CODE_LITERALS = [
    "-1.0",
    "-0.6961928009986877",
    "-0.5250730514526367",
    "-0.39491748809814453",
    "-0.28444138169288635",
    "-0.18477343022823334",
    "-0.09105003625154495",
    "0.0",
    "0.07958029955625534",
    "0.16093020141124725",
    "0.24611230194568634",
    "0.33791524171829224",
    "0.44070982933044434",
    "0.5626170039176941",
    "0.7229568362236023",
    "1.0",
]
THRESHOLD_LITERALS = [
    "-0.8480964004993439",
    "-0.6106329262256622",
    "-0.4599952697753906",
    "-0.33967943489551544",
    "-0.23460740596055984",
    "-0.13791173323988914",
    "-0.045525018125772476",
    "0.03979014977812767",
    "0.1202552504837513",
    "0.2035212516784668",
    "0.2920137718319893",
    "0.3893125355243683",
    "0.5016634166240692",
    "0.6427869200706482",
    "0.8614784178118011",
]


def rounded_once(digits: str) -> float:
    """The fp32 value nearest to a decimal number, rounded once."""
    exact = Fraction(digits)
    near = np.float32(digits)
    candidates = (near, np.nextafter(near, np.float32(-2)), np.nextafter(near, np.float32(2)))
    return min((float(c) for c in candidates), key=lambda c: abs(Fraction(c) - exact))


def test_code_and_thresholds_are_the_literals_rounded_once() -> None:
    assert torch.tensor(code_tables.NF4_CODE).tolist() == [rounded_once(digits) for digits in CODE_LITERALS]
    assert code_tables.nf4_thresholds(CPU).tolist() == [rounded_once(digits) for digits in THRESHOLD_LITERALS]


def test_tables_in_cpp_equal_python() -> None:
    from peft_kernels.core.backends import cpu

    require("cpu")
    extension = cpu.BACKEND.extension
    assert extension.nf4_code() == torch.tensor(code_tables.NF4_CODE).tolist()
    assert extension.nf4_thresholds() == code_tables.nf4_thresholds(CPU).tolist()
    assert extension.dynamic_map() == code_tables.dynamic_map(CPU).tolist()


def test_dynamic_map() -> None:
    table = code_tables.dynamic_map(CPU)
    assert table.shape == (256,) and (table[1:] > table[:-1]).all()
    assert table[127] == 0 and table[255] == 1 and abs(table[0].item() + 0.99297) < 1e-5
    assert torch.equal(table[128:255], -table[:127].flip(0))


@pytest.mark.parametrize("shape", [(6, 96), (3, 5)], ids=str)
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
def test_checkpoint_items(nested: bool, shape: tuple[int, int]) -> None:
    weight = pk.NF4Weight.quantize(testing.tensor(*shape, dtype=torch.bfloat16), 32, nested)
    items = weight.state_dict("layer.")
    numel = shape[0] * shape[1]
    blocks = -(-numel // 32)
    want = {
        "layer.weight": (torch.uint8, ((numel + 1) // 2, 1)),
        "layer.weight.absmax": (torch.uint8 if nested else torch.float32, (blocks,)),
        "layer.weight.quant_map": (torch.float32, (16,)),
    }
    if nested:
        want["layer.weight.nested_absmax"] = (torch.float32, (-(-blocks // 256),))
        want["layer.weight.nested_quant_map"] = (torch.float32, (256,))
    blob = items.pop("layer.weight.quant_state.bitsandbytes__nf4")
    assert {name: (t.dtype, tuple(t.shape)) for name, t in items.items()} == want
    numbers = {"quant_type": "nf4", "blocksize": 32, "dtype": "bfloat16", "shape": list(shape)}
    if nested:
        offset = weight.offset.item()  # type: ignore[union-attr]
        numbers |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    assert blob.dtype == torch.uint8 and json.loads(bytes(blob.tolist())) == numbers


def test_cost_is_4_127_bits_a_weight() -> None:
    weight = pk.NF4Weight.quantize(torch.zeros(512, 1024))
    assert weight.nbytes * 8 / weight.numel() == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)
    plain = pk.NF4Weight.quantize(torch.zeros(512, 1024), double_quant=False)
    assert plain.nbytes * 8 / plain.numel() == 4.5


# Cases in which bitsandbytes is wrong or weak: one test per row of the table


def quantization_bound(weight: Tensor, blocksize: int) -> Tensor:
    """Half the widest gap of the code table, times each element's absmax."""
    flat = nn.functional.pad(weight.flatten(), (0, -weight.numel() % blocksize)).view(-1, blocksize)
    code = torch.tensor(code_tables.NF4_CODE)
    half_gap = (code[1:] - code[:-1]).max() / 2 + 1e-6
    scale = flat.abs().amax(1, keepdim=True).expand_as(flat)
    return (scale * half_gap).flatten()[: weight.numel()].view_as(weight)


@pytest.mark.parametrize("shape", [(100, 96), (33, 96), (7, 48), (5, 112)], ids=str)
def test_row_blocks_that_cross_rows_dequantize_right(backend: str, shape: tuple[int, int]) -> None:
    dense = testing.tensor(*shape, scale=0.5) * torch.logspace(-2, 1, shape[0])[:, None]
    weight = pk.NF4Weight.quantize(dense, 64, double_quant=False)
    assert ((weight.dequantize() - dense).abs() <= quantization_bound(dense, 64)).all()


def nf4_linear_layer(dense: Tensor, blocksize: int) -> nn.Module:
    linear = nn.Linear(dense.shape[1], dense.shape[0], bias=False)
    linear.weight = nn.Parameter(dense.clone())
    return pk.nn.NF4Linear.from_linear(linear, blocksize)


def patched_linear4bit(dense: Tensor, blocksize: int) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    layer = bnb.nn.Linear4bit(
        dense.shape[1], dense.shape[0], bias=False, compute_dtype=torch.float32, quant_type="nf4"
    )
    layer.weight = bnb.nn.Params4bit(
        dense.clone(), requires_grad=False, quant_type="nf4", blocksize=blocksize, module=layer
    )
    model = nn.Sequential(layer).to("cpu")
    assert model[0].weight.quant_state is not None
    assert len(pk.patch(model).fused) == 1
    return model


def weight_of(layer: nn.Module) -> Tensor:
    """The layer's own: the 8-bit scales of bitsandbytes' CPU build are not always ours."""
    if isinstance(layer, pk.nn.NF4Linear):
        return layer.weight.dequantize()
    return pk.NF4Weight.from_bnb(layer.get_submodule("0").weight).dequantize()


each_layer = pytest.mark.parametrize(
    "make", [nf4_linear_layer, patched_linear4bit], ids=["NF4Linear", "patched-Linear4bit"]
)
MakeLayer = Callable[[Tensor, int], nn.Module]
SHAPES = {"n33": (33, 128), "k96": (64, 96), "n33-k96": (33, 96), "even": (64, 128), "odd": (7, 33)}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@each_layer
@each_shape
def test_row_eval_forward_with_any_shape(backend: str, make: MakeLayer, shape: tuple[int, int]) -> None:
    dense = testing.tensor(*shape, scale=0.1)
    x = testing.tensor(3, shape[1])
    layer = make(dense, 64).eval()
    with torch.no_grad():
        y = layer(x)
    weight = weight_of(layer)
    assert_close(y, x @ weight.t(), x.double() @ weight.double().t())


@each_layer
@each_shape
def test_row_eval_forward_then_train(backend: str, make: MakeLayer, shape: tuple[int, int]) -> None:
    dense = testing.tensor(*shape, scale=0.1)
    layer = make(dense, 64).eval()
    x = testing.tensor(3, shape[1]).requires_grad_()
    with torch.no_grad():
        layer(x)
    layer.train()(x).sum().backward()
    weight = weight_of(layer)
    assert x.grad is not None
    assert_close(x.grad, torch.ones(3, len(weight)) @ weight, weight.double().sum(0).expand(3, -1))


@each_layer
@each_shape
def test_row_eval_forward_leaves_the_state_dict(
    backend: str, make: MakeLayer, shape: tuple[int, int]
) -> None:
    layer = make(testing.tensor(*shape, scale=0.1), 64)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.eval()
    with torch.no_grad():
        layer(testing.tensor(3, shape[1]))
        layer(testing.tensor(1, shape[1]))
    after = layer.state_dict()
    assert after.keys() == before.keys() and len(after) == 6
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
def test_row_zero_block(backend: str, nested: bool) -> None:
    """Exact zeros: the value of the code of 0.0 is 0 for any absmax."""
    dense = torch.zeros(4, 64)
    dense[1] = testing.tensor(64)
    weight = pk.NF4Weight.quantize(dense, 64, nested)
    rows = weight.packed
    assert rows is not None
    assert all((rows[i] == 0x77).all() for i in (0, 2, 3))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert all((weight.dequantize(dtype)[i] == 0).all() for i in (0, 2, 3))
    if not nested:
        assert weight.absmax is not None and weight.absmax[[0, 2, 3]].tolist() == [0, 0, 0]
    y = pk.nf4_linear(torch.full((1, 64), 3e38), weight)
    assert (y[0, [0, 2, 3]] == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_row_nonfinite_weight_is_refused_by_name(backend: str, dtype: torch.dtype, bad: float) -> None:
    dense = testing.tensor(8, 96, dtype=dtype)
    dense[3, 50] = bad
    dense[7, 95] = bad
    with pytest.raises(ValueError, match=r"^weight: expected finite values, got 2 NaN or Inf among 768$"):
        pk.NF4Weight.quantize(dense)
    with pytest.raises(ValueError, match=r"^up_proj\.weight: expected finite values"):
        pk.NF4Weight.quantize(dense, name="up_proj.weight")
    linear = nn.Linear(96, 8, bias=False)
    linear.weight = nn.Parameter(dense)
    with pytest.raises(ValueError, match=r"^weight: expected finite"):
        pk.nn.NF4Linear.from_linear(linear)
    model: Any = nn.ModuleDict({"good": nn.Linear(96, 8), "bad": linear})
    with pytest.raises(ValueError, match=r"^bad\.weight: expected finite"):
        pk.quantize_model(model)
    assert type(model["good"]) is nn.Linear, "a failed quantize_model changed the model"


def test_row_nonfinite_weight_with_the_check_off(backend: str) -> None:
    dense = testing.tensor(8, 64)
    dense[3, 50] = float("nan")
    weight = pk.NF4Weight.quantize(dense, double_quant=False, check_finite=False)
    good = [0, 1, 2, 4, 5, 6, 7]
    want = pk.NF4Weight.quantize(dense[good], double_quant=False).dequantize()
    assert torch.equal(weight.dequantize()[good], want)

"""bitsandbytes and this package write the same bytes and share them in memory."""

from __future__ import annotations

import bitsandbytes_map
import pytest
import torch
from bnb_layers import CPU, SHAPES, bnb, bnb_functional, quantized, their_layer
from nf4_weights import dtype_id, each_dtype, each_nesting
from rounding import ONE_MODEL

import peft_kernels as pk
import testing
from peft_kernels.core import code_tables
from peft_kernels.core.code_tables import BLOCKSIZES

ops = torch.ops.peft_kernels


# Codes and tables


@pytest.mark.skipif(not bitsandbytes_map.IS_OURS, reason="torch.linspace gives other values on this CPU")
def test_tables_equal_bitsandbytes() -> None:
    from bitsandbytes.functional import create_dynamic_map, get_4bit_type

    assert torch.equal(get_4bit_type("nf4", device="cpu"), torch.tensor(code_tables.NF4_CODE))
    assert torch.equal(create_dynamic_map(), code_tables.dynamic_map(CPU))
    assert torch.equal(create_dynamic_map(signed=False), code_tables.dynamic_map(CPU, signed=False))


# The adversarial ones are whole blocks at every blocksize: bitsandbytes' CPU build handles a partial last
# block differently from its CUDA build (absmax at least 1e-38, a division where other blocks multiply by the
# reciprocal). Subnormal blocks, which it scales by 1e38 instead of 1 / absmax, are in test_nf4.py.
WEIGHTS = {
    "normal": lambda: testing.tensor(67, 96, scale=0.02),
    "odd": lambda: testing.tensor(33, 37),
    "constant": lambda: torch.full((64, 64), -0.3),
    "tiny": lambda: testing.tensor(64, 64, scale=1e-37),
    "huge": lambda: testing.tensor(64, 64).clamp(-3, 3) * 1e38,
    "zero": lambda: torch.zeros(64, 64),
    "sparse": lambda: testing.tensor(64, 64) * (torch.arange(64) % 17 == 0),
    "one-outlier": lambda: testing.tensor(64, 64, scale=1e-4).index_fill(1, torch.tensor([5]), 7.0),
    "wide-range": lambda: torch.logspace(-9, 2, 64 * 64).view(64, 64) * testing.tensor(64, 64).sign(),
}


@each_dtype
@pytest.mark.parametrize("kind", WEIGHTS)
def test_packed_bytes_and_absmax_are_equal(backend: str, kind: str, dtype: torch.dtype) -> None:
    """bitsandbytes' CPU build compares with midpoints computed in fp32. Four of them differ by one ulp
    from those of its CUDA kernels and ours: no sample here scales exactly onto those."""
    dense = WEIGHTS[kind]()
    dense = (dense * 1e-34 if kind == "huge" and dtype == torch.float16 else dense).to(dtype)
    for blocksize in BLOCKSIZES:
        theirs, state = bnb_functional.quantize_4bit(dense, blocksize=blocksize, quant_type="nf4")
        packed, absmax = ops.quantize_nf4(dense, blocksize)
        assert torch.equal(absmax, state.absmax), f"absmax, blocksize {blocksize}"
        assert torch.equal(packed, theirs.view(-1)), f"packed, blocksize {blocksize}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_every_16_bit_value_quantizes_as_bitsandbytes(backend: str, dtype: torch.dtype) -> None:
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = every[every.isfinite() & (every.abs() >= 1e-37)]  # see WEIGHTS for the others
    finite = finite[: finite.numel() // 64 * 64][None]
    theirs, state = bnb_functional.quantize_4bit(finite, blocksize=64, quant_type="nf4")
    packed, absmax = ops.quantize_nf4(finite, 64)
    assert torch.equal(packed, theirs.view(-1)) and torch.equal(absmax, state.absmax)


@each_dtype
@pytest.mark.parametrize("blocksize", [64, 256])
def test_nested_state(backend: str, blocksize: int, dtype: torch.dtype) -> None:
    """Offset and nested absmax are equal. bitsandbytes' CPU build looks 8-bit codes up in 65,536 bins, so a
    few are one index off the nearest, or several that lie in one bin; ours are exact (test_nf4.py). How many
    is not counted in 16 bits, where most scales have one of a hundred values."""
    dense = testing.tensor(1000, 512, dtype=dtype, scale=0.02)
    theirs, state = bnb_functional.quantize_4bit(
        dense, blocksize=blocksize, quant_type="nf4", compress_statistics=True
    )
    weight = pk.NF4Weight.quantize(dense, blocksize)
    assert torch.equal(weight.packed.view(-1), theirs.view(-1))
    assert torch.equal(weight.offset, state.offset) and torch.equal(weight.absmax2, state.state2.absmax)
    beside = (weight.absmax.int() - state.absmax.int()).abs()
    ours, looked_up = (state.state2.code[codes.int()] for codes in (weight.absmax, state.absmax))
    assert ((beside <= 1) | ((ours - looked_up).abs() <= 2 / 65536)).all()
    assert dtype != torch.float32 or (beside > 0).sum() <= 5 + 0.005 * beside.numel()  # of 0.0015


def test_absmax_of_bnb_nested_state_is_equal(backend: str) -> None:
    _, state = bnb_functional.quantize_4bit(
        testing.tensor(1000, 500), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    theirs = bnb_functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert torch.equal(ops.unpack_absmax(state.absmax, state.state2.absmax, state.offset), theirs)


def test_a_map_made_on_another_cpu_is_read() -> None:
    """bitsandbytes' map differs in the last bits where torch.linspace has no fused multiply-adds."""
    params = quantized(testing.tensor(40, 64), nested=True)
    want, table = pk.NF4Weight.from_bnb(params).dequantize(), params.quant_state.state2.code
    params.quant_state.state2.code = table.nextafter(torch.zeros(()))
    assert torch.equal(pk.NF4Weight.from_bnb(params).dequantize(), want)
    items = {f"w.{key}": value for key, value in params.quant_state.as_dict(packed=True).items()}
    found = pk.NF4Weight.from_state_dict({"w": params.data, **items}, name="w")
    assert torch.equal(found.dequantize(), want)


@each_dtype
@each_nesting
def test_dequantized_values(backend: str, nested: bool, dtype: torch.dtype) -> None:
    """`code * absmax` in fp32, rounded once; bitsandbytes' CPU kernels do not always round like this."""
    params = quantized(testing.tensor(40, 64, scale=0.02), nested=nested)
    state = params.quant_state
    absmax = state.absmax
    if nested:
        absmax = bnb_functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    data = params.data.view(-1)
    codes = torch.stack((data >> 4, data & 15), 1).view(-1, 64)
    want = (state.code[codes.long()] * absmax[:, None]).view(40, 64)
    got = pk.NF4Weight.from_bnb(params).dequantize(dtype)
    assert torch.equal(got, want.to(dtype))
    if dtype == torch.float32:
        assert torch.equal(got, bnb_functional.dequantize_4bit(params.data, state))


def test_offset_of_another_float_type() -> None:
    params = quantized(testing.tensor(40, 64))
    params.quant_state.offset = params.quant_state.offset.bfloat16()
    weight = pk.NF4Weight.from_bnb(params)
    assert weight.offset.dtype == torch.float32
    assert torch.equal(weight.offset, params.quant_state.offset.float())


@each_nesting
def test_from_bnb_and_back_share_memory(nested: bool) -> None:
    params = quantized(testing.tensor(40, 64, dtype=torch.bfloat16), nested=nested)
    weight = pk.NF4Weight.from_bnb(params)
    back = weight.to_bnb()
    assert isinstance(back, bnb.nn.Params4bit) and not back.requires_grad and back.bnb_quantized
    assert params.data.data_ptr() == weight.packed.data_ptr() == back.data.data_ptr()
    first, last = params.quant_state, back.quant_state
    assert first.absmax.data_ptr() == weight.absmax.data_ptr() == last.absmax.data_ptr()
    assert last.blocksize == 64 and last.quant_type == "nf4" and last.dtype == torch.bfloat16
    assert last.nested == nested == back.compress_statistics and tuple(last.shape) == (40, 64)
    if nested:
        assert first.state2.absmax.data_ptr() == weight.absmax2.data_ptr() == last.state2.absmax.data_ptr()
        assert torch.equal(first.offset, last.offset)
    assert torch.equal(
        bnb_functional.dequantize_4bit(back.data, last), bnb_functional.dequantize_4bit(params.data, first)
    )


@each_nesting
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_to_bnb_works_in_linear4bit(shape: tuple[int, int], nested: bool) -> None:
    """bitsandbytes' matmul in training mode on our weight, in whole blocks (right on its CPU kernel)."""
    weight = pk.NF4Weight.quantize(testing.tensor(*shape), double_quant=nested)
    params = weight.to_bnb()
    assert pk.NF4Weight.from_bnb(params).state_dict().keys() == weight.state_dict().keys()
    if shape == SHAPES["even"]:
        x = testing.tensor(3, shape[1]).requires_grad_()
        y = bnb.matmul_4bit(x, params.t(), quant_state=params.quant_state)
        torch.testing.assert_close(y, pk.nf4_linear(x, weight), rtol=ONE_MODEL, atol=ONE_MODEL)


def test_to_bnb_refuses_a_dense_weight() -> None:
    weight = pk.NF4Weight.quantize(testing.tensor(4, 64))
    weight.add_(1.0)
    with pytest.raises(ValueError, match=r"^weight: expected packed values.*requantize_"):
        weight.to_bnb()


# Errors


def test_unreadable_params4bit_is_refused() -> None:
    other = quantized(testing.tensor(40, 64))
    other.quant_state.quant_type = "int4"
    with pytest.raises(ValueError, match="params4bit: quantisation type int4, expected nf4 or fp4"):
        pk.NF4Weight.from_bnb(other)
    unquantized = bnb.nn.Params4bit(testing.tensor(40, 64), requires_grad=False, quant_type="nf4")
    with pytest.raises(ValueError, match="params4bit: the weight is not quantised yet"):
        pk.NF4Weight.from_bnb(unquantized)


@pytest.mark.parametrize("item", ["packed", "absmax", "nested_absmax"])
def test_truncated_params4bit(item: str) -> None:
    params = quantized(testing.tensor(40, 64))
    if item == "packed":
        params.data = params.data[:-1]
    elif item == "absmax":
        params.quant_state.absmax = params.quant_state.absmax[:-1]
    else:
        params.quant_state.state2.absmax = params.quant_state.state2.absmax[:0]
    name = {
        "packed": "params4bit",
        "absmax": r"params4bit\.absmax",
        "nested_absmax": r"params4bit\.nested_absmax",
    }
    with pytest.raises(ValueError, match=f"^{name[item]}: expected"):
        pk.NF4Weight.from_bnb(params)


def test_weight_repacked_by_cpu_inference_is_refused() -> None:
    layer = their_layer(testing.tensor(64, 128, dtype=torch.bfloat16), bias=False).eval()
    with torch.no_grad():
        layer(testing.tensor(1, 128, dtype=torch.bfloat16))
    if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("bitsandbytes does not repack on this machine")
    with pytest.raises(ValueError, match="repacked the weight for CPU inference"):
        pk.NF4Weight.from_bnb(layer.weight)

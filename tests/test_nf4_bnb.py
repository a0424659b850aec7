"""bitsandbytes and this project read and write each other's weights."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft_kernels as pk
import testing
from peft_kernels import code_tables
from peft_kernels.code_tables import BLOCKSIZES

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
bnb_functional = bnb.functional

ops = torch.ops.peft_kernels
CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOB = "weight.quant_state.bitsandbytes__nf4"


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
each_nesting = pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])


# Codes and tables


def test_tables_equal_bitsandbytes() -> None:
    from bitsandbytes.functional import create_dynamic_map, get_4bit_type

    assert torch.equal(get_4bit_type("nf4", device="cpu"), code_tables.nf4_code(CPU))
    assert torch.equal(create_dynamic_map(), code_tables.dynamic_map(CPU))


# The adversarial ones are whole blocks at every blocksize: bitsandbytes' CPU build treats a partial last
# block in its own way (absmax at least 1e-38, a division where all other blocks multiply by the reciprocal),
# unlike its CUDA build. Subnormal blocks, which it scales by 1e38 instead of 1 / absmax, are in test_nf4.py.
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
    """bitsandbytes' CPU build compares with midpoints that it computes in fp32. Four of them differ from
    those of its CUDA kernels, and from ours, by one unit in the last place: no sample here scales
    exactly onto those."""
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
    finite = every[every.isfinite() & (every.abs() >= 1e-37)]  # see WEIGHTS for the rest
    finite = finite[: finite.numel() // 64 * 64][None]
    theirs, state = bnb_functional.quantize_4bit(finite, blocksize=64, quant_type="nf4")
    packed, absmax = ops.quantize_nf4(finite, 64)
    assert torch.equal(packed, theirs.view(-1)) and torch.equal(absmax, state.absmax)


@each_dtype
@pytest.mark.parametrize("blocksize", [64, 256])
def test_nested_state(backend: str, blocksize: int, dtype: torch.dtype) -> None:
    """Offset and second level equal. bitsandbytes' CPU build looks 8-bit codes up in 65,536 bins, so that
    a few land one index beside the nearest. Ours are exact (test_nf4.py): theirs may differ by that much."""
    dense = testing.tensor(1000, 512, dtype=dtype, scale=0.02)
    theirs, state = bnb_functional.quantize_4bit(
        dense, blocksize=blocksize, quant_type="nf4", compress_statistics=True
    )
    weight = pk.NF4Weight.quantize(dense, blocksize)
    assert torch.equal(weight.packed.view(-1), theirs.view(-1))
    assert torch.equal(weight.offset, state.offset) and torch.equal(weight.absmax2, state.state2.absmax)
    beside = (weight.absmax.int() - state.absmax.int()).abs()
    assert beside.max() <= 1 and (beside > 0).double().mean() <= 0.005


def test_unpacked_absmax_of_their_nested_state_is_equal(backend: str) -> None:
    _, state = bnb_functional.quantize_4bit(
        testing.tensor(1000, 500), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    theirs = bnb_functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert torch.equal(ops.unpack_absmax(state.absmax, state.state2.absmax, state.offset), theirs)


@each_dtype
@each_nesting
def test_dequantized_values(backend: str, nested: bool, dtype: torch.dtype) -> None:
    """`code * absmax` in fp32, rounded once; bitsandbytes' own CPU kernels do not always round so."""
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


# Checkpoints


def quantized(
    dense: Tensor,
    nested: bool = True,
    blocksize: int = 64,
    storage: torch.dtype = torch.uint8,
    kind: str = "nf4",
) -> Any:
    params = bnb.nn.Params4bit(
        dense.clone(), requires_grad=False, quant_type=kind, blocksize=blocksize,
        compress_statistics=nested, quant_storage=storage,
    )  # fmt: skip
    return params.to("cpu")


def their_layer(dense: Tensor, bias: bool = True, **options: Any) -> Any:
    layer = bnb.nn.Linear4bit(dense.shape[1], dense.shape[0], bias=bias, quant_type="nf4")
    layer.weight = quantized(dense, **options)
    layer.weight.module, layer.quant_state = layer, layer.weight.quant_state
    return layer


def our_layer(out_features: int, in_features: int, bias: bool = True, **options: Any) -> Any:
    return pk.nn.NF4Linear.from_linear(nn.Linear(in_features, out_features, bias=bias), **options)


def same_state(got: Any, want: Any) -> None:
    """A state dict equal to the bit; the JSON as numbers (key order is free)."""
    assert got.keys() == want.keys()
    for name in want:
        if "quant_state" in name:
            assert json.loads(bytes(got[name].tolist())) == json.loads(bytes(want[name].tolist()))
        else:
            assert got[name].dtype == want[name].dtype and torch.equal(got[name], want[name]), name


SHAPES = {"even": (40, 64), "odd": (7, 33), "crossing": (33, 96)}


@each_nesting
@each_dtype
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
def test_their_state_dict_loads_here(
    blocksize: int, shape: tuple[int, int], dtype: torch.dtype, nested: bool
) -> None:
    theirs = their_layer(testing.tensor(*shape, dtype=dtype), nested=nested, blocksize=blocksize)
    ours = our_layer(*shape)
    ours.load_state_dict(theirs.state_dict())
    assert ours.weight.dtype == dtype and ours.weight.blocksize == blocksize
    assert ours.weight.double_quant == nested
    same_state(ours.state_dict(), theirs.state_dict())


@each_nesting
@each_dtype
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_our_state_dict_loads_there(shape: tuple[int, int], dtype: torch.dtype, nested: bool) -> None:
    dense = testing.tensor(*shape, dtype=dtype)
    state = pk.NF4Weight.quantize(dense, 64, nested).state_dict()
    stats = {name.removeprefix("weight."): t for name, t in state.items() if name != "weight"}
    params = bnb.nn.Params4bit.from_prequantized(state["weight"], dict(stats), device="cpu")
    assert params.quant_state.dtype == dtype and tuple(params.quant_state.shape) == shape
    back = {f"weight.{name}": t for name, t in params.quant_state.as_dict(packed=True).items()}
    same_state(back | {"weight": params.data}, state)
    same_state(pk.NF4Weight.from_bnb(params).state_dict(), state)


@each_nesting
def test_safetensors_file_both_ways(tmp_path: Path, nested: bool) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    theirs = their_layer(testing.tensor(40, 96), nested=nested)
    safetensors.save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    ours = our_layer(40, 96)
    ours.load_state_dict(safetensors.load_file(tmp_path / "theirs.safetensors"))
    same_state(ours.state_dict(), theirs.state_dict())
    safetensors.save_file(ours.state_dict(), tmp_path / "ours.safetensors")
    same_state(safetensors.load_file(tmp_path / "ours.safetensors"), theirs.state_dict())


@each_nesting
@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32], ids=dtype_id)
@pytest.mark.parametrize("shape", [(40, 64), (7, 32)], ids=str)
def test_float_storage(shape: tuple[int, int], storage: torch.dtype, nested: bool) -> None:
    """FSDP asks for it: the packed bytes under a float type."""
    dense = testing.tensor(*shape)
    theirs = their_layer(dense, bias=False, nested=nested, storage=storage)
    assert theirs.weight.data.dtype == storage
    want = quantized(dense, nested=nested)
    ours = our_layer(*shape, bias=False)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.weight.packed.view(-1), want.data.view(-1))
    view = pk.NF4Weight.from_bnb(theirs.weight)
    assert torch.equal(view.packed.view(-1), want.data.view(-1))
    assert torch.equal(view.dequantize(), ours.weight.dequantize())


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
def test_to_bnb_serves_their_layer(shape: tuple[int, int], nested: bool) -> None:
    """Their matmul in training mode on our weight, where their CPU dequantise is right: whole blocks."""
    weight = pk.NF4Weight.quantize(testing.tensor(*shape), double_quant=nested)
    params = weight.to_bnb()
    assert pk.NF4Weight.from_bnb(params).state_dict().keys() == weight.state_dict().keys()
    if shape == SHAPES["even"]:
        x = testing.tensor(3, shape[1]).requires_grad_()
        y = bnb.matmul_4bit(x, params.t(), quant_state=params.quant_state)
        torch.testing.assert_close(y, pk.nf4_linear(x, weight), rtol=1e-5, atol=1e-5)


def test_to_bnb_refuses_a_dense_weight() -> None:
    weight = pk.NF4Weight.quantize(testing.tensor(4, 64))
    weight.add_(1.0)
    with pytest.raises(ValueError, match=r"^weight: expected packed NF4.*requantize_"):
        weight.to_bnb()


# What is refused


def test_params4bit_that_cannot_be_read_in_place() -> None:
    with pytest.raises(ValueError, match="params4bit: quantisation type fp4, expected nf4"):
        pk.NF4Weight.from_bnb(quantized(testing.tensor(40, 64), kind="fp4"))
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


def test_weight_that_their_cpu_inference_repacked() -> None:
    layer = their_layer(testing.tensor(64, 128, dtype=torch.bfloat16), bias=False).eval()
    with torch.no_grad():
        layer(testing.tensor(1, 128, dtype=torch.bfloat16))
    if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("bitsandbytes does not repack on this machine")
    with pytest.raises(ValueError, match="repacked the weight for CPU inference"):
        pk.NF4Weight.from_bnb(layer.weight)


def edit_blob(state: dict[str, Tensor], **changes: Any) -> None:
    numbers = json.loads(bytes(state[BLOB].tolist())) | changes
    numbers = {name: value for name, value in numbers.items() if value is not None}
    state[BLOB] = torch.tensor(list(json.dumps(numbers).encode()), dtype=torch.uint8)


def drop(name: str) -> Any:
    return lambda state: state.pop(name)


def shorten(name: str) -> Any:
    return lambda state: state.update({name: state[name].view(-1)[:-1]})


def replace(name: str, make: Any) -> Any:
    return lambda state: state.update({name: make(state[name])})


def blob(**changes: Any) -> Any:
    return lambda state: edit_blob(state, **changes)


BROKEN = {
    "packed truncated": (shorten("weight"), r"weight: expected 1280 bytes .* got 1279"),
    "packed missing": (drop("weight"), r"weight: expected a tensor"),
    "packed too long": (replace("weight", lambda t: torch.cat((t, t))), r"weight: expected 1280 bytes"),
    "absmax truncated": (shorten("weight.absmax"), r"weight\.absmax: expected number of blocks 40, got 39"),
    "absmax missing": (drop("weight.absmax"), r"weight\.absmax: expected a tensor"),
    "absmax not nested": (
        replace("weight.absmax", lambda t: t.float()),
        r"weight\.absmax: expected dtype torch\.uint8, got torch\.float32",
    ),
    "nested_absmax truncated": (
        shorten("weight.nested_absmax"),
        r"weight\.nested_absmax: expected number of blocks 1",
    ),
    "nested_absmax missing": (drop("weight.nested_absmax"), r"weight\.nested_absmax: expected a tensor"),
    "nested level lost": (
        lambda state: (drop("weight.nested_absmax")(state), edit_blob(state, nested_offset=None)),
        r"weight\.absmax: expected a floating dtype, got torch\.uint8",
    ),
    "quant_map foreign": (
        replace("weight.quant_map", lambda t: t * 1.001),
        r"weight\.quant_map: expected the standard",
    ),
    "quant_map missing": (drop("weight.quant_map"), r"weight\.quant_map: expected a tensor"),
    "quant_map short": (shorten("weight.quant_map"), r"weight\.quant_map: expected the standard"),
    "nested_quant_map foreign": (
        replace("weight.nested_quant_map", lambda t: t.flip(0)),
        r"weight\.nested_quant_map: expected the standard",
    ),
    "nested_quant_map missing": (
        drop("weight.nested_quant_map"),
        r"weight\.nested_quant_map: expected a tensor",
    ),
    "JSON missing": (drop(BLOB), r"bitsandbytes__nf4: expected a tensor"),
    "JSON garbage": (
        replace(BLOB, lambda t: torch.full((40,), 200, dtype=torch.uint8)),
        r"bitsandbytes__nf4: expected bitsandbytes' JSON",
    ),
    "JSON truncated": (shorten(BLOB), r"bitsandbytes__nf4: expected bitsandbytes' JSON"),
    "JSON no object": (
        replace(BLOB, lambda t: torch.tensor(list(b"[1, 2]"), dtype=torch.uint8)),
        r"bitsandbytes__nf4: expected bitsandbytes' JSON",
    ),
    "blocksize 48": (blob(blocksize=48), r"blocksize one of .* got 48"),
    "blocksize 128": (blob(blocksize=128), r"weight\.absmax: expected number of blocks 20, got 40"),
    "blocksize missing": (blob(blocksize=None), r"bitsandbytes__nf4: .*blocksize"),
    "shape other": (blob(shape=[40, 66]), r"weight: expected 1320 bytes"),
    "shape transposed": (blob(shape=[64, 40]), r"weight: expected shape \(40, 64\), got \(64, 40\)"),
    "shape 1-d": (blob(shape=[2560]), r"expected a shape \(out_features, in_features\)"),
    "shape negative": (blob(shape=[-40, -64]), r"expected a shape \(out_features, in_features\), got"),
    "dtype int": (blob(dtype="int8"), r"expected dtype float32, bfloat16 or float16, got torch\.int8"),
    "dtype no dtype": (blob(dtype="Tensor"), r"expected dtype float32, bfloat16 or float16"),
    "dtype unknown": (blob(dtype="float31"), r"bitsandbytes__nf4: "),
    "nested_blocksize 128": (
        blob(nested_blocksize=128),
        r"bitsandbytes__nf4: expected nested_blocksize 256, got 128",
    ),
    "nested_offset missing": (
        blob(nested_offset=None),
        r"bitsandbytes__nf4: expected a number nested_offset",
    ),
    "nested_offset text": (blob(nested_offset="0.1"), r"bitsandbytes__nf4: expected a number nested_offset"),
    "quant_type fp4": (blob(quant_type="fp4"), r"bitsandbytes__nf4: .*fp4"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoint(case: str) -> None:
    """The error names the item, and the layer stays as it was."""
    change, message = BROKEN[case]
    layer = our_layer(40, 64)
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    state = our_layer(40, 64).state_dict()
    change(state)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)
    assert isinstance(layer.weight, pk.NF4Weight)
    same_state(layer.state_dict(), before)
    if case != "shape transposed":  # a weight by itself has no shape to disagree with
        with pytest.raises(ValueError, match=message):
            pk.NF4Weight.from_state_dict(state)


def test_bias_that_does_not_fit_leaves_the_weight_too() -> None:
    layer, state = our_layer(40, 64), our_layer(40, 64).state_dict()
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    state["bias"] = torch.zeros(39)
    with pytest.raises(RuntimeError, match="bias"):
        layer.load_state_dict(state)
    same_state(layer.state_dict(), before)


def test_missing_and_unexpected_items_are_reported() -> None:
    layer = our_layer(40, 64)
    assert layer.load_state_dict({}, strict=False).missing_keys == ["weight", "bias"]
    extra = our_layer(40, 64).state_dict() | {"scale": torch.ones(1)}
    assert layer.load_state_dict(extra, strict=False).unexpected_keys == ["scale"]
    with pytest.raises(RuntimeError, match="scale"):
        layer.load_state_dict(extra)


def test_fp4_checkpoint_is_refused_by_name() -> None:
    theirs = bnb.nn.Linear4bit(64, 40, bias=False, quant_type="fp4")
    theirs.weight = quantized(testing.tensor(40, 64), kind="fp4")
    with pytest.raises(
        ValueError, match=r"weight\.quant_state\.bitsandbytes__fp4: expected quantisation type nf4"
    ):
        pk.NF4Weight.from_state_dict(theirs.state_dict())


def test_names_carry_the_prefix() -> None:
    state = our_layer(40, 64, bias=False).state_dict(prefix="model.layers.0.up_proj.")
    assert "model.layers.0.up_proj.weight.absmax" in state
    pk.NF4Weight.from_state_dict(state, "model.layers.0.up_proj.")
    del state["model.layers.0.up_proj.weight.absmax"]
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.up_proj\.weight\.absmax: expected a tensor"):
        pk.NF4Weight.from_state_dict(state, "model.layers.0.up_proj.")


def test_loading_does_not_take_over_the_checkpoint() -> None:
    """What is loaded is a copy: writing to the layer must not reach the state dict it came from, nor back."""
    state = our_layer(40, 64, bias=False).state_dict()
    saved = copy.deepcopy(state)
    layer = our_layer(40, 64, bias=False)
    layer.load_state_dict(state)
    layer.weight.packed.fill_(0)
    same_state(state, saved)

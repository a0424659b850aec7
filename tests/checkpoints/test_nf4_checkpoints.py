"""bitsandbytes and this package read and write each other's checkpoints; unreadable ones are refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bnb_layers import SHAPES, bnb, our_layer, quantized, same_state, their_layer
from nf4_weights import dtype_id, each_dtype, each_nesting
from torch import Tensor

import peft_kernels as pk
import testing

BLOB = "weight.quant_state.bitsandbytes__nf4"


@each_nesting
@each_dtype
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
def test_bitsandbytes_state_dict_loads_here(
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
def test_our_state_dict_loads_in_bitsandbytes(
    shape: tuple[int, int], dtype: torch.dtype, nested: bool
) -> None:
    dense = testing.tensor(*shape, dtype=dtype)
    state = pk.NF4Weight.quantize(dense, 64, nested).state_dict()
    stats = {name.removeprefix("weight."): t for name, t in state.items() if name != "weight"}
    params = bnb.nn.Params4bit.from_prequantized(state["weight"], dict(stats), device="cpu")
    assert params.quant_state.dtype == dtype and tuple(params.quant_state.shape) == shape
    back = {f"weight.{name}": t for name, t in params.quant_state.as_dict(packed=True).items()}
    same_state(back | {"weight": params.data}, state)
    same_state(pk.NF4Weight.from_bnb(params).state_dict(), state)


@each_nesting
def test_safetensors_round_trips(tmp_path: Path, nested: bool) -> None:
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
    """FSDP asks for it: packed bytes viewed as a float dtype."""
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
    """The error names the item, and the layer stays unchanged."""
    change, message = BROKEN[case]
    layer = our_layer(40, 64)
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    state = our_layer(40, 64).state_dict()
    change(state)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)
    assert isinstance(layer.weight, pk.NF4Weight)
    same_state(layer.state_dict(), before)
    if case != "shape transposed":  # a weight without a layer has no expected shape
        with pytest.raises(ValueError, match=message):
            pk.NF4Weight.from_state_dict(state)


def test_mismatched_bias_changes_nothing() -> None:
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


@each_nesting
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_fp4_checkpoints_of_both(shape: tuple[int, int], nested: bool) -> None:
    theirs = their_layer(testing.tensor(*shape, dtype=torch.bfloat16), nested=nested, kind="fp4")
    ours = our_layer(*shape)
    ours.load_state_dict(theirs.state_dict())
    same_state(ours.state_dict(), theirs.state_dict())
    assert ours.weight._state.format == "fp4"
    state = ours.weight.state_dict()
    stats = {name.removeprefix("weight."): t for name, t in state.items() if name != "weight"}
    params = bnb.nn.Params4bit.from_prequantized(state["weight"], stats, device="cpu")
    assert params.quant_state.quant_type == "fp4"
    same_state(pk.NF4Weight.from_bnb(params).state_dict(), state)


def test_fp4_with_the_table_of_nf4_is_refused() -> None:
    state = pk.NF4Weight.quantize(testing.tensor(40, 64), format="fp4").state_dict()
    state["weight.quant_map"] = pk.NF4Weight.quantize(testing.tensor(40, 64)).state_dict()["weight.quant_map"]
    with pytest.raises(ValueError, match=r"^weight\.quant_map: expected the standard table of the format"):
        pk.NF4Weight.from_state_dict(state)


def test_table_of_scales_of_old_bitsandbytes_on_cpus_is_refused_by_name() -> None:
    state = pk.NF4Weight.quantize(testing.tensor(40, 64)).state_dict()
    state["weight.nested_quant_map"][0] = -1
    expected = (
        r"^weight\.nested_quant_map: expected the standard .* got other values, as bitsandbytes before 0\.50"
    )
    with pytest.raises(ValueError, match=expected):
        pk.NF4Weight.from_state_dict(state)


def test_another_type_is_refused_by_name() -> None:
    state = our_layer(40, 64, bias=False).state_dict()
    state["weight.quant_state.bitsandbytes__int4"] = state.pop(BLOB)
    with pytest.raises(ValueError, match=r"^weight\.quant_state\.bitsandbytes__int4: expected .* nf4 or fp4"):
        pk.NF4Weight.from_state_dict(state)


def test_prefixed_names() -> None:
    state = our_layer(40, 64, bias=False).state_dict(prefix="model.layers.0.up_proj.")
    assert "model.layers.0.up_proj.weight.absmax" in state
    pk.NF4Weight.from_state_dict(state, "model.layers.0.up_proj.")
    del state["model.layers.0.up_proj.weight.absmax"]
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.up_proj\.weight\.absmax: expected a tensor"):
        pk.NF4Weight.from_state_dict(state, "model.layers.0.up_proj.")


def test_loading_copies_the_checkpoint() -> None:
    """Loading copies: writes to the layer do not reach the state dict, nor the reverse."""
    state = our_layer(40, 64, bias=False).state_dict()
    saved = copy.deepcopy(state)
    layer = our_layer(40, 64, bias=False)
    layer.load_state_dict(state)
    layer.weight.packed.fill_(0)
    same_state(state, saved)

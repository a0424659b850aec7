"""Checkpoints in int4 and FP8: loaded packed, and saved as they were."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from owned_folders import E2M1, assert_same_file, stored
from packed_models import KINDS, Made, config_of, make
from torch import Tensor
from transformers_models import Auto, nf4_layers, read, same_bits, transformers

from peft_kernels.core.packed_state import PackedState
from peft_kernels.integrations import transformers as integration
from peft_kernels.quantize.transformers.mapped_files import MappedFiles


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(made: Made, folder: Path) -> Any:
    return read(folder)


def values(state: PackedState) -> Tensor:
    """A weight in fp32, by the definition of our formats, without the kernels."""
    assert state.packed is not None and state.absmax is not None
    out, into = state.shape
    if state.format == "int4":
        codes = torch.stack((state.packed >> 4, state.packed & 15), -1).view(out, into)
        blocks = (codes.view(-1, state.blocksize), state.absmax.float(), state.offset)
        zeros = torch.full_like(state.absmax, 8, dtype=torch.uint8) if blocks[2] is None else blocks[2]
        return ((blocks[0].int() - zeros[:, None].int()) * blocks[1][:, None]).view(out, into)
    if state.format == "mxfp4":
        assert state.absmax2 is not None
        codes = torch.stack((state.packed >> 4, state.packed & 15), -1).view(-1, 32)
        return (torch.tensor(E2M1)[codes.int()] * state.absmax2[state.absmax.int()][:, None]).view(out, into)
    fp8 = state.format == "fp8"
    found = state.packed.view(torch.float8_e4m3fn if fp8 else torch.int8).float()
    if not state.blocksize:
        return found * state.absmax[:, None]
    scales = state.absmax.view(-1, -(-into // state.blocksize)).repeat_interleave(state.blocksize, 1)
    return found * scales.repeat_interleave(state.blocksize if fp8 else 1, 0)[:out, :into]


def nbytes(state: PackedState) -> int:
    return sum(tensor.nbytes for tensor in state.tensors().values())


def test_layers_are_packed_and_saved_as_they_were(
    kind: str, made: Made, folder: Path, model: Any, tmp_path: Path
) -> None:
    assert nf4_layers(model) == {name.removesuffix(".weight") for name in made.dense} and len(made.dense) == 7
    expected = sum(t.nbytes for name, t in made.tensors.items() if "proj." not in name)
    for name, dense in made.dense.items():
        weight = model.get_parameter(name)
        state = weight._state
        assert (state.format, weight.dtype, state.name) == (KINDS[kind].format, torch.bfloat16, name)
        assert torch.equal(values(state), dense)
        block = state.blocksize
        scales = state.absmax.numel()
        if state.format == "int4":
            assert nbytes(state) == dense.numel() // 2 + scales * (2 if state.offset is None else 3)
            assert scales == dense.numel() // block
        elif state.format == "mxfp4":
            assert nbytes(state) == dense.numel() // 2 + dense.numel() // 32 + 4 * 256
        else:
            assert nbytes(state) == dense.numel() + 4 * scales
        expected += nbytes(state)
    assert model.get_memory_footprint() == expected + sum(buffer.nbytes for buffer in model.buffers())
    model.save_pretrained(tmp_path)
    assert_same_file(tmp_path, made.tensors)
    assert stored(tmp_path) == stored(folder) == config_of(kind)


def test_blocks(kind: str, model: Any) -> None:
    """Groups as they are, whole rows of 96 in threes of 32, and so 64 and a shorter last group."""
    down = model.get_parameter("model.layers.0.mlp.down_proj.weight")._state
    rows = {"fp8 rows", "fp8 rows in fp32", "fp8 tensor", "fp8 whole", "fp8 modelopt", "fp8 modelopt rows"}
    rows |= {"int8", "int8 words", "gptq int8 rows"}
    if KINDS[kind].format in ("fp8", "int8"):
        expected = up = 0 if kind in rows else 64 if kind == "gptq int8 v2" else 128
    else:
        expected, up = 32, 64 if kind.endswith(("rows", "last")) else 32
    assert down.blocksize == expected
    assert model.get_parameter("model.layers.0.mlp.up_proj.weight")._state.blocksize == up
    if KINDS[kind].format == "mxfp4":
        return
    shifted = {"gptq", "gptq v2", "gptq rows", "gptq last", "awq", "awq rows", "packed zeros"}
    assert (down.offset is not None) == (kind in shifted)


def test_without_the_owners_library(kind: str, made: Made, folder: Path, model: Any, tmp_path: Path) -> None:
    """And saved as it was, with keys of which transformers' configurations know nothing."""
    integration.enable()
    try:
        enabled = Auto.from_pretrained(folder)
    finally:
        integration.disable()
    for name in made.dense:
        one, other = (each.get_parameter(name)._state.tensors() for each in (enabled, model))
        assert one.keys() == other.keys()
        assert all(same_bits(one[key], other[key]) for key in one)
    enabled.save_pretrained(tmp_path)
    assert_same_file(tmp_path, made.tensors)
    assert stored(tmp_path) == config_of(kind)


def test_what_has_no_effect_is_logged(
    kind: str, made: Made, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="peft_kernels"):
        read(folder)
    text = "the quantisation of activations has no effect here: only weights are quantised"
    assert (text in caplog.text) == KINDS[kind].activations


@pytest.mark.parametrize(
    "kind", ["gptq symmetric", "gptq rows", "awq", "packed zeros", "fp8", "fp8 tensor"], indirect=True
)
def test_on_meta(kind: str, made: Made, folder: Path, model: Any) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    empty = read(folder, device_map={"": "meta"})
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    # Whether all zero points are 8 cannot be seen.
    zeros = sum(d.numel() // 32 for d in made.dense.values()) if kind == "gptq symmetric" else 0
    assert empty.get_memory_footprint() == model.get_memory_footprint() + zeros


@pytest.mark.parametrize("kind", ["fp8"], indirect=True)
def test_fp8_equals_transformers_to_the_bit(kind: str, tmp_path: Path) -> None:
    """And is dense between `enable` and `disable` too, if they ask for it. Its reader takes whole blocks."""
    made = make(tmp_path, kind, hidden_size=256, intermediate_size=384, num_hidden_layers=1)
    ours = read(tmp_path)
    integration.enable()
    try:
        config = transformers.FineGrainedFP8Config(dequantize=True)
        theirs = Auto.from_pretrained(tmp_path, quantization_config=config)
    finally:
        integration.disable()
    assert not nf4_layers(theirs)
    for name in made.dense:
        expected = theirs.get_parameter(name)
        assert expected.dtype == torch.bfloat16
        assert torch.equal(values(ours.get_parameter(name)._state).bfloat16(), expected)


@pytest.mark.parametrize("kind", ["gptq", "awq", "fp8"], indirect=True)
def test_pages_of_the_file(kind: str, made: Made, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of int4 are released; FP8 is used where it is."""
    released: list[int] = []
    monkeypatch.setattr(MappedFiles, "release", lambda _, tensor: released.append(tensor.nbytes))
    read(folder)
    codes = [tensor for name, tensor in made.tensors.items() if name.endswith(".qweight")]
    assert len(codes) == (0 if kind == "fp8" else 7)
    for tensor in codes:
        released.remove(tensor.nbytes)


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "gptq", "bits": 3, "group_size": 128},
        {"quant_method": "awq", "bits": 4, "version": "gemv"},
        {"quant_method": "fp8", "weight_block_size": [64, 64]},
    ],
    ids=lambda config: config["quant_method"],
)
def test_what_we_refuse_is_left_to_transformers(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.quantizers import auto

    def theirs(found: Any, pre_quantized: bool) -> Any:
        return "theirs", found.quant_method, pre_quantized

    method = config["quant_method"]
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, method, theirs)
    integration.enable()
    try:
        assert auto.AutoHfQuantizer.from_config(config, pre_quantized=True) == ("theirs", method, True)
    finally:
        integration.disable()
    assert auto.AUTO_QUANTIZER_MAPPING[method] is theirs

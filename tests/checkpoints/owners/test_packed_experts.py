"""Mixtures of experts in int4 and NVFP4, whose experts are layers in the file and one weight in the model."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_damage import change_tensors, write
from experts_folders import (
    EXPERTS,
    FORMS,
    check_dequantize,
    dense_experts,
    in_file,
    make_moe,
    stored_config,
    weights_of,
)
from moe_routes import on_same_routes
from owned_folders import (
    FILE,
    assert_same_file,
    dense_weight,
    nvfp4_parts,
    stored,
    trained,
    with_adapters,
)
from packed_models import Made, gptq
from rounding import ONE_STEP
from safetensors.torch import load_file
from transformers_models import Auto, ids, logits, read, read_config, transformers

import peft_kernels as pk
import testing
from peft_kernels.core.formats import FORMATS
from peft_kernels.nf4.experts_packing import NF4Experts
from peft_kernels.nf4.owners import OWNERS, owner_of
from peft_kernels.nf4.owners.stacked import joined
from peft_kernels.quantize.transformers.mapped_files import MappedFiles

ROUTER = "model.layers.1.mlp.gate.weight"
CASES = [("qwen", form) for form in FORMS]
CASES += [
    (kind, form) for kind in ("deepseek", "mixtral") for form in ("gptq", "packed zeros", "nvfp4 of modelopt")
]
LORA: dict[str, Any] = {
    "target_modules": ["o_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}


@pytest.fixture(scope="module", params=CASES, ids=", ".join)
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def kind(case: tuple[str, str]) -> str:
    return case[0]


@pytest.fixture(scope="module")
def form(case: tuple[str, str]) -> str:
    return case[1]


@pytest.fixture(scope="module")
def folder(case: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("moe") / "model"


@pytest.fixture(scope="module")
def made(kind: str, form: str, folder: Path) -> Made:
    return make_moe(folder, kind, form)


@pytest.fixture(scope="module")
def twin(made: Made, folder: Path) -> Path:
    return dense_experts(folder, made, folder.parent / "twin")


@pytest.fixture(scope="module")
def model(made: Made, folder: Path) -> Any:
    return read(folder)


def as_saved(made: Made, kind: str) -> dict[str, torch.Tensor]:
    """transformers keeps DeepSeek's routers in fp32, and saves them so."""
    wide = {ROUTER: made.tensors[ROUTER].float()} if kind == "deepseek" else {}
    return made.tensors | wide


def test_experts_are_packed(kind: str, form: str, made: Made, model: Any) -> None:
    """With the owner's values, to the bit."""
    owner = owner_of(stored_config(form))
    assert owner is not None
    for name, dense in weights_of(made, kind).items():
        weight = model.get_parameter(name)
        state, (experts, out, into) = weight._state, dense.shape
        blocksize = 16 if owner.format == "nvfp4" else 32
        assert (state.format, state.blocksize, state.name, weight.shape) == (
            owner.format,
            blocksize,
            name,
            dense.shape,
        )
        assert state.packed.shape == (experts, out, into // 2)
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(weight.dequantize(dtype), dense.to(dtype))
            alone = torch.stack([weight[e].dequantize(dtype) for e in range(experts)])
            assert torch.equal(alone, dense.to(dtype))
        for scales in (state.absmax, state.offset):
            assert scales is None or scales.shape == (
                experts,
                FORMATS[owner.format].scales((out, into), blocksize),
            )
        assert (state.offset is not None) == (
            owner.format == "int4" and form not in ("gptq symmetric", "packed")
        )
    packed = {name for name, p in model.named_parameters() if isinstance(p, pk.NF4Weight)}
    assert packed == {*weights_of(made, kind), *(n for n in made.dense if ".experts." not in n)}
    assert isinstance(model.get_submodule(EXPERTS[kind]), NF4Experts)


def test_saved_as_they_were(
    kind: str, form: str, made: Made, folder: Path, model: Any, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "one")
    assert_same_file(tmp_path / "one", as_saved(made, kind))
    assert stored(tmp_path / "one") == stored(folder) == stored_config(form)
    for number, other in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        other.save_pretrained(tmp_path / str(number))
        assert_same_file(tmp_path / str(number), as_saved(made, kind))
    model.save_pretrained(tmp_path / "shards", max_shard_size="100kB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    again = read(tmp_path / "shards")
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "again")
    assert_same_file(tmp_path / "again", as_saved(made, kind))


def test_pages_of_the_file_are_released(made: Made, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that experts are not resident twice."""
    released: list[int] = []
    monkeypatch.setattr(MappedFiles, "release", lambda _, tensor: released.append(tensor.nbytes))
    read(folder)
    for name, tensor in made.tensors.items():
        if ".experts." in name:
            released.remove(tensor.nbytes)


def test_indices_of_groups_are_kept_once(made: Made, model: Any) -> None:
    """They are all alike, and have 1% of the bytes of a weight in 4 bits."""
    for module in model.modules():
        for layout in (getattr(module, "stacks", None) or {}).values():
            kept = [
                aside[part]
                for asides in layout.asides
                for aside in asides
                for part in aside
                if "g_idx" in part
            ]
            assert len({tensor.data_ptr() for tensor in kept}) == len(layout.sources) * bool(kept)


def test_on_meta(form: str, made: Made, folder: Path, model: Any) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    empty = read(folder, device_map={"": "meta"})
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    found, expected = empty.get_memory_footprint(), model.get_memory_footprint()
    # Whether zero points are all 8 is not seen.
    assert found > expected if form == "gptq symmetric" else found == expected


def test_the_model_without_its_head(kind: str, made: Made, folder: Path, tmp_path: Path) -> None:
    """Its names lack the prefix that those in the file have."""
    base = transformers.AutoModel.from_pretrained(folder, config=read_config(folder))
    for name, dense in weights_of(made, kind).items():
        weight = base.get_parameter(name.removeprefix("model."))
        assert torch.equal(weight.dequantize(torch.float32), dense)
    base.save_pretrained(tmp_path)
    again = transformers.AutoModel.from_pretrained(tmp_path, config=read_config(tmp_path))
    for name, parameter in base.named_parameters():
        other = again.get_parameter(name)
        assert type(other) is type(parameter)
        if isinstance(parameter, pk.NF4Weight):
            assert torch.equal(parameter.dequantize(), other.dequantize())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits(made: Made, folder: Path, twin: Path, dtype: torch.dtype) -> None:
    plain = Auto.from_pretrained(twin, dtype=dtype).to(dtype)
    wide = copy.deepcopy(plain).double()
    wide.set_experts_implementation("eager")
    ours = read(folder, dtype=dtype).to(dtype)
    truth, got, expected = on_same_routes(lambda model: model(ids()).logits, wide, ours, plain)
    testing.assert_close(got, expected, truth)


# Adapters


@pytest.mark.parametrize("patch", [False, True])
def test_training_equals_the_dense_model(
    kind: str, patch: bool, made: Made, folder: Path, twin: Path, tmp_path: Path
) -> None:
    """And the base is saved as it was, after training."""
    _, expected = trained(Auto.from_pretrained(twin, dtype=torch.float32), steps=3, **LORA)
    tuned, found = trained(read(folder, dtype=torch.float32), patch, steps=3, **LORA)
    assert found == pytest.approx(expected, rel=ONE_STEP) and found[-1] < 0.99 * found[0]
    model = tuned.unload()
    model.save_pretrained(tmp_path)
    wide = {
        name: tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        for name, tensor in made.tensors.items()
    }
    packed = tuple(name.removesuffix("weight") for name in made.dense)
    assert_same_file(
        tmp_path, {n: made.tensors[n] if n.startswith(packed) else wide[n] for n in made.tensors}
    )


def test_merged_experts_are_saved_dense(
    kind: str, form: str, made: Made, folder: Path, tmp_path: Path
) -> None:
    """As layers again, so that other readers find them."""
    model = with_adapters(read(folder), **LORA).merge_and_unload()
    module = model.get_submodule(EXPERTS[kind])
    assert not isinstance(module, NF4Experts) and not hasattr(module, "stacks")
    model.save_pretrained(tmp_path)
    assert EXPERTS[kind].rpartition(".")[2] in str(stored(tmp_path))
    again = read(tmp_path)
    assert not isinstance(again.get_submodule(EXPERTS[kind]), NF4Experts)
    assert torch.equal(logits(again), logits(model))


def test_packed_again(kind: str, form: str, made: Made, folder: Path, tmp_path: Path) -> None:
    """Saved as layers if the file can hold them."""
    model = read(folder, dtype=torch.float32)
    for key in ("gate_up_proj", "down_proj"):
        weight = model.get_parameter(f"{EXPERTS[kind]}.{key}")
        weight.data.add_(0.01)
        weight.requantize_()
    if form == "nvfp4 of compressed-tensors":  # which stores reciprocals of scales
        with pytest.raises(
            ValueError, match=r"weight_global_scale: expected the scale of the file, got a weight"
        ):
            model.save_pretrained(tmp_path)
        return
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(read(tmp_path, dtype=torch.float32)), logits(model))


def test_dequantize(kind: str, made: Made, folder: Path) -> None:
    check_dequantize(folder, made, kind)


@pytest.mark.parametrize("which", [(0, 0), (2, 1), (3, 2)])
def test_a_layer_that_needs_no_zero_points(which: tuple[int, int], tmp_path: Path) -> None:
    """Since all are 8, among others that need them."""
    made = make_moe(tmp_path / "model", "qwen", "gptq")
    name = f"{in_file('qwen', *which)}."
    parts, made.dense[f"{name}weight"] = gptq(128, 128, symmetric=True)
    made.tensors |= {name + part: tensor for part, tensor in parts.items()}
    write(tmp_path / "model" / FILE, made.tensors)
    model = read(tmp_path / "model")
    for key, dense in weights_of(made, "qwen").items():
        assert torch.equal(model.get_parameter(key).dequantize(torch.float32), dense)
    model.save_pretrained(tmp_path / "saved")
    assert_same_file(tmp_path / "saved", made.tensors)


# Layers of an expert in NVFP4, of which each has a scale of its own


NVFP4 = ("nvfp4 of compressed-tensors", "nvfp4 of modelopt")
WHOLE = {"nvfp4 of compressed-tensors": "weight_global_scale", "nvfp4 of modelopt": "weight_scale_2"}


@pytest.mark.parametrize("form", NVFP4)
def test_one_scale_for_both_layers(form: str, tmp_path: Path) -> None:
    """As inference engines want it: codes of scales stay as they are in the file."""
    make_moe(tmp_path / "model", "qwen", form)
    file = tmp_path / "model" / FILE
    names = [tuple(f"{in_file('qwen', e, layer)}." for layer in range(2)) for e in range(4)]
    whole = WHOLE[form]
    change_tensors(file, lambda t: t.update({up + whole: t[gate + whole].clone() for gate, up in names}))
    tensors, model = load_file(file), read(tmp_path / "model")
    state = model.get_parameter(f"{EXPERTS['qwen']}.gate_up_proj")._state
    for e, layers in enumerate(names):
        scales = torch.cat([tensors[f"{layer}weight_scale"] for layer in layers]).view(torch.uint8)
        assert torch.equal(state.absmax[e], scales.view(-1))
    model.save_pretrained(tmp_path / "saved")
    assert_same_file(tmp_path / "saved", tensors)


@pytest.mark.parametrize("form", NVFP4)
def test_zeros_of_both_signs(form: str, tmp_path: Path) -> None:
    """-0 is a valid scale, with which values are zeros of another sign."""
    made = make_moe(tmp_path / "model", "qwen", form)
    gate, up = (f"{in_file('qwen', 1, layer)}." for layer in range(2))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for number, stem in enumerate((gate, up)):
            scales = tensors[f"{stem}weight_scale"].view(torch.uint8)
            scales[: 5 + number], scales[-3 - number :] = 128, 0

    change_tensors(tmp_path / "model" / FILE, change)
    tensors, model = load_file(tmp_path / "model" / FILE), read(tmp_path / "model")
    weight = model.get_parameter(f"{EXPERTS['qwen']}.gate_up_proj")
    for e in range(4):
        stems = [f"{in_file('qwen', e, layer)}.weight" for layer in range(2)]
        expected = torch.cat([dense_weight(tensors, stem) for stem in stems])
        found = weight[e]._state.dequantize(torch.float32)
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
    assert made.tensors.keys() == tensors.keys()
    model.save_pretrained(tmp_path / "saved")
    assert_same_file(tmp_path / "saved", tensors)


def test_three_scales_of_layers() -> None:
    """No model has them; a table has room for two."""
    states = [OWNERS["modelopt"].read(nvfp4_parts(16, 32, "modelopt"), f"{name}.weight")[0] for name in "abc"]
    with pytest.raises(ValueError, match=r"^c\.weight: expected at most two scales of whole layers"):
        joined([states], 1, "weight")

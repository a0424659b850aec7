"""Mixtures of experts in FP8, whose experts are layers in the file and one weight in the model."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from experts_folders import DTYPES, EXPERTS, MODELS, check_dequantize, in_file, make_moe, weights_of
from moe_routes import on_same_routes
from owned_folders import assert_same_file, stored, trained, with_adapters
from packed_models import Made, config_of
from rounding import ONE_STEP
from safetensors import safe_open
from transformers_models import Auto, ids, logits, read, read_config, transformers

import peft_kernels as pk
import testing
from peft_kernels.nf4.experts_packing import NF4Experts
from peft_kernels.quantize.transformers.mapped_files import MappedFiles

ROUTER = "model.layers.1.mlp.gate.weight"


@pytest.fixture(scope="module", params=MODELS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("moe") / "model"


@pytest.fixture(scope="module")
def made(kind: str, folder: Path) -> Made:
    return make_moe(folder, kind)


@pytest.fixture(scope="module")
def model(made: Made, folder: Path) -> Any:
    return read(folder)


def theirs(folder: Path, **options: Any) -> Any:
    """The model as transformers' own reader dequantises it."""
    config = transformers.FineGrainedFP8Config(dequantize=True)
    return Auto.from_pretrained(folder, quantization_config=config, **options)


def as_saved(made: Made, kind: str) -> dict[str, torch.Tensor]:
    """transformers keeps DeepSeek's routers in fp32, and saves them so."""
    wide = {ROUTER: made.tensors[ROUTER].float()} if kind == "deepseek" else {}
    return made.tensors | wide


def test_experts_are_packed(kind: str, made: Made, model: Any) -> None:
    for name, dense in weights_of(made, kind).items():
        weight = model.get_parameter(name)
        state, (experts, out, into) = weight._state, dense.shape
        assert (state.format, state.blocksize, state.name, weight.shape) == ("fp8", 128, name, dense.shape)
        assert (state.packed.dtype, state.packed.shape) == (torch.uint8, dense.shape)
        assert state.absmax.dtype == torch.float32
        assert state.absmax.shape == (experts, -(-out // 128) * -(-into // 128))
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(weight.dequantize(dtype), dense.to(dtype))
        alone = torch.stack([weight[e].dequantize(torch.float32) for e in range(experts)])
        assert torch.equal(alone, dense)
    packed = {name for name, p in model.named_parameters() if isinstance(p, pk.NF4Weight)}
    assert packed == {*weights_of(made, kind), *(n for n in made.dense if ".experts." not in n)}
    assert isinstance(model.get_submodule(EXPERTS[kind]), NF4Experts)
    router = model.get_parameter(EXPERTS[kind].replace("experts", "gate.weight"))
    assert router.dtype == (torch.float32 if kind == "deepseek" else torch.bfloat16)


def test_values_equal_transformers_to_the_bit(made: Made, folder: Path, model: Any) -> None:
    other = theirs(folder, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        expected = other.get_parameter(name)
        found = parameter.dequantize() if isinstance(parameter, pk.NF4Weight) else parameter
        assert found.dtype == expected.dtype and torch.equal(found, expected), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits(made: Made, folder: Path, dtype: torch.dtype) -> None:
    plain = theirs(folder, dtype=torch.float32).to(dtype)
    plain.load_state_dict({n: t.to(dtype) for n, t in theirs(folder, dtype=dtype).state_dict().items()})
    wide = copy.deepcopy(plain).double()
    wide.set_experts_implementation("eager")
    ours = read(folder, dtype=dtype).to(dtype)
    truth, got, expected = on_same_routes(lambda model: model(ids()).logits, wide, ours, plain)
    testing.assert_close(got, expected, truth)


def test_saved_as_they_were(kind: str, made: Made, folder: Path, model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "one")
    assert_same_file(tmp_path / "one", as_saved(made, kind))
    assert stored(tmp_path / "one") == stored(folder) == config_of("fp8")
    for number, other in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        other.save_pretrained(tmp_path / str(number))
        assert_same_file(tmp_path / str(number), as_saved(made, kind))
    model.save_pretrained(tmp_path / "shards", max_shard_size="100kB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    again = read(tmp_path / "shards")
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "again")
    assert_same_file(tmp_path / "again", as_saved(made, kind))


def test_pages_of_the_file_are_released(
    kind: str, made: Made, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that experts are not resident twice."""
    released: list[int] = []
    monkeypatch.setattr(MappedFiles, "release", lambda _, tensor: released.append(tensor.nbytes))
    read(folder)
    for name, tensor in made.tensors.items():
        if ".experts." in name and name.endswith(".weight"):
            released.remove(tensor.nbytes)


def test_on_meta(made: Made, folder: Path, model: Any) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    empty = read(folder, device_map={"": "meta"})
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert empty.get_memory_footprint() == model.get_memory_footprint()


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


# Adapters


LORA: dict[str, Any] = {
    "target_modules": ["o_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}


@pytest.mark.parametrize("patch", [False, True])
def test_training_equals_the_dense_model(
    kind: str, patch: bool, made: Made, folder: Path, tmp_path: Path
) -> None:
    """Of transformers' reader, without and with the patch."""
    _, expected = trained(theirs(folder, dtype=torch.float32), steps=3, **LORA)
    _, found = trained(read(folder, dtype=torch.float32), patch, steps=3, **LORA)
    assert found == pytest.approx(expected, rel=ONE_STEP) and found[-1] < 0.99 * found[0]


def test_saved_after_training(kind: str, made: Made, folder: Path, tmp_path: Path) -> None:
    model, _ = trained(read(folder), steps=1, **LORA)
    model.unload().save_pretrained(tmp_path)
    assert_same_file(tmp_path, as_saved(made, kind))


def test_merged_experts_are_saved_dense(kind: str, made: Made, folder: Path, tmp_path: Path) -> None:
    """As layers again, so that other readers find them."""
    model = with_adapters(read(folder), **LORA).merge_and_unload()
    module = model.get_submodule(EXPERTS[kind])
    assert not isinstance(module, NF4Experts) and not hasattr(module, "stacks")
    model.save_pretrained(tmp_path)
    assert EXPERTS[kind] in stored(tmp_path)["modules_to_not_convert"]
    again = read(tmp_path)
    assert not isinstance(again.get_submodule(EXPERTS[kind]), NF4Experts)
    assert torch.equal(logits(again), logits(model))
    names = {f"{in_file(kind, e, layer)}.weight" for e in range(4) for layer in range(3)}
    with safe_open(tmp_path / "model.safetensors", "pt") as opened:
        assert names <= {*opened.keys()}


def test_dense_and_packed_layers(tmp_path: Path) -> None:
    """The experts of one layer were merged, those of another stay packed."""
    make_moe(tmp_path / "model", "qwen", num_hidden_layers=2)
    model = read(tmp_path / "model")
    layer = model.model.layers[0].mlp.experts
    for key in ("gate_up_proj", "down_proj"):
        getattr(layer, key).data.add_(0.01)
    model.save_pretrained(tmp_path / "saved")
    again = read(tmp_path / "saved")
    assert type(again.model.layers[0].mlp.experts.down_proj) is torch.nn.Parameter
    assert isinstance(again.model.layers[1].mlp.experts.down_proj, pk.NF4Weight)
    for one, other in zip(model.model.layers, again.model.layers, strict=True):
        for key in ("gate_up_proj", "down_proj"):
            weights = [getattr(each.mlp.experts, key) for each in (one, other)]
            dense = [w.dequantize() if isinstance(w, pk.NF4Weight) else w for w in weights]
            assert torch.equal(*dense)


def test_packed_again(kind: str, made: Made, folder: Path, tmp_path: Path) -> None:
    """With the scales that a file has in fp32; those in bf16 cannot hold them."""
    model = read(folder, dtype=torch.float32)
    weight = model.get_parameter(f"{EXPERTS[kind]}.gate_up_proj")
    weight.data.add_(0.01)
    weight.requantize_()
    if DTYPES[kind] == torch.bfloat16:
        with pytest.raises(
            ValueError, match=r"0\.gate_proj\.weight_scale_inv: expected scales that torch\.b"
        ):
            model.save_pretrained(tmp_path)
        return
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(read(tmp_path, dtype=torch.float32)), logits(model))


def test_dequantize(kind: str, made: Made, folder: Path) -> None:
    check_dequantize(folder, made, kind)


FORMS = ("fp8 static", "fp8 rows", "fp8 tensor", "fp8 blocks", "fp8 modelopt")


@pytest.mark.parametrize("form", FORMS)
def test_other_formats_of_fp8(form: str, tmp_path: Path) -> None:
    """With scales of rows or of a whole layer, and of activations, which are kept for each expert."""
    made = make_moe(tmp_path / "model", "qwen", form)
    model = read(tmp_path / "model")
    for name, dense in weights_of(made, "qwen").items():
        assert torch.equal(model.get_parameter(name).dequantize(torch.float32), dense)
    model.save_pretrained(tmp_path / "saved")
    assert_same_file(tmp_path / "saved", made.tensors)

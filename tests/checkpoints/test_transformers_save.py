"""save_pretrained of a model in 4 bits, read by this package and by transformers with bitsandbytes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import models
import pytest
import safetensors.torch
import torch
from checkpoint_damage import change_json, change_tensors
from moe_checkpoints import stored
from torch import nn
from transformers.core_model_loading import Chunk, WeightConverter
from transformers_models import (
    MODELS,
    Auto,
    assert_same_state,
    auto,
    bnb_config,
    gpt2,
    ids,
    llama,
    loaded,
    logits,
    nf4_layers,
    read,
    read_config,
    saved,
    transformers,
)

import peft_kernels as pk
from peft_kernels.quantize.model import report_of
from peft_kernels.quantize.transformers import layouts

# Saved and loaded by this package


@pytest.mark.parametrize("kind", MODELS)
def test_round_trip(kind: str, tmp_path: Path) -> None:
    model = loaded(saved(tmp_path / "dense", kind), kind)
    model.save_pretrained(tmp_path / "4bit", max_shard_size="30kB")
    again = read(tmp_path / "4bit", kind)
    assert_same_state(model, again)
    assert nf4_layers(model) == nf4_layers(again)
    assert torch.equal(logits(model), logits(again))
    ours, theirs = report_of(model), report_of(again)
    assert ours is not None and theirs is not None and ours.layers == theirs.layers
    again.save_pretrained(tmp_path / "again", max_shard_size="30kB")
    for file in (tmp_path / "4bit").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("kind", MODELS)
def test_save_after_quantize_model(kind: str, tmp_path: Path) -> None:
    dense = auto(kind).from_pretrained(saved(tmp_path / "dense", kind))
    model = pk.quantize_model(dense, blocksize=128, double_quant=False)
    model.save_pretrained(tmp_path)
    numbers = stored(tmp_path)
    assert (numbers["bnb_4bit_blocksize"], numbers["bnb_4bit_use_double_quant"]) == (128, False)
    again = read(tmp_path, kind)
    assert_same_state(model, again)
    assert torch.equal(logits(model), logits(again))


def test_shared_configuration_of_a_dense_model(tmp_path: Path) -> None:
    """Models made by hand may share one configuration object."""
    dense = llama()
    other = type(dense)(dense.config)
    pk.quantize_model(other)
    other.save_pretrained(tmp_path / "4bit")
    dense.save_pretrained(tmp_path / "dense")
    assert stored(tmp_path / "4bit") is not None and stored(tmp_path / "dense") is None
    assert_same_state(read(tmp_path / "4bit"), other)


def test_written_files(tmp_path: Path) -> None:
    model = loaded(saved(tmp_path), nf4={"modules_to_not_convert": ["mlp", "lm_head"]})
    model.save_pretrained(tmp_path / "4bit")
    numbers = stored(tmp_path / "4bit")
    expected = bnb_config(llm_int8_skip_modules=numbers["llm_int8_skip_modules"]).to_dict()
    assert numbers == json.loads(json.dumps(expected))
    dense = {f"model.layers.{i}.mlp.{name}_proj" for i in (0, 1) for name in ("gate", "up", "down")}
    assert set(numbers["llm_int8_skip_modules"]) == {"lm_head", *dense}
    keys = set(safetensors.torch.load_file(tmp_path / "4bit" / "model.safetensors"))
    names = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
    layer = "model.layers.0.self_attn.q_proj.weight"
    assert {key for key in keys if key.startswith(layer)} == {
        *(layer + name for name in names),
        f"{layer}.quant_state.bitsandbytes__nf4",
    }


@pytest.mark.parametrize("times", [1, 2])
def test_overwriting_the_loaded_file(times: int, tmp_path: Path) -> None:
    model = loaded(saved(tmp_path))
    for _ in range(times):
        model.save_pretrained(tmp_path)
        model = read(tmp_path)
    assert_same_state(model, pk.quantize_model(llama().to(torch.bfloat16)))


@pytest.mark.parametrize(
    ("kind", "name", "count"),
    [("llama", "model.layers.0.mlp.up_proj", 14), ("gpt2", "transformer.h.0.mlp.c_fc", 8)],
)
def test_merged_layer_is_saved_dense(kind: str, name: str, count: int, tmp_path: Path) -> None:
    model = loaded(saved(tmp_path, kind), kind)
    layer = model.get_submodule(name)
    delta = torch.full_like(layer.weight.dequantize(), 0.01)
    layer.weight.data += delta
    model.save_pretrained(tmp_path / "merged")
    assert name in stored(tmp_path / "merged")["llm_int8_skip_modules"]
    again = read(tmp_path / "merged", kind)
    dense = again.get_submodule(name)
    assert type(dense) is layer.plain_class
    assert_same_state(again, model)
    assert len(nf4_layers(again)) == count - 1
    layer.weight.data -= delta
    model.save_pretrained(tmp_path / "unmerged")
    assert_same_state(read(tmp_path / "unmerged", kind), loaded(saved(tmp_path / "dense", kind), kind))


@pytest.mark.parametrize("form", ["nf4", "nvfp4"])
def test_layers_that_stayed_dense(form: str, tmp_path: Path) -> None:
    """Those of Conv1D are stored transposed."""
    nf4 = {"modules_to_not_convert": ["c_fc", "h.1.attn"], "format": form}
    model = loaded(saved(tmp_path / "dense", "gpt2"), "gpt2", nf4=nf4)
    model.save_pretrained(tmp_path / "packed")
    again = read(tmp_path / "packed", "gpt2")
    assert len(nf4_layers(again)) == 4
    assert_same_state(again, model)
    assert torch.equal(
        again.transformer.h[0].mlp.c_fc.weight, gpt2().to(torch.bfloat16).transformer.h[0].mlp.c_fc.weight
    )


def test_fully_merged_model_has_no_quantization_config(tmp_path: Path) -> None:
    model = loaded(saved(tmp_path))
    layers = [model.get_submodule(name) for name in nf4_layers(model)]
    deltas = [torch.full_like(layer.weight.dequantize(), 0.01) for layer in layers]
    for layer, delta in zip(layers, deltas, strict=True):
        layer.weight.data += delta
    model.save_pretrained(tmp_path / "merged")
    assert stored(tmp_path / "merged") is None
    assert torch.equal(logits(Auto.from_pretrained(tmp_path / "merged")), logits(model))
    for layer, delta in zip(layers, deltas, strict=True):
        layer.weight.data -= delta
    model.save_pretrained(tmp_path / "unmerged")
    assert_same_state(read(tmp_path / "unmerged"), model)


@pytest.mark.parametrize("made", ["loaded", "quantized", "read"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [None, torch.float32], ids=str)
def test_dequantize(made: str, kind: str, dtype: Any, tmp_path: Path) -> None:
    saved(tmp_path, kind)
    model = loaded(tmp_path, kind)
    if made == "quantized":
        model = pk.quantize_model(Auto.from_pretrained(tmp_path))
    elif made == "read":
        model.save_pretrained(tmp_path / "4bit")
        model = read(tmp_path / "4bit", kind)
    plain = Auto.from_pretrained(tmp_path)
    values = {name: model.get_submodule(name).weight.dequantize(dtype) for name in nf4_layers(model)}
    model = model.dequantize(dtype)
    assert not nf4_layers(model) and model.dtype == (dtype or torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {dtype or torch.bfloat16}
    for name, value in values.items():
        layer = model.get_submodule(name)
        assert type(layer) is type(plain.get_submodule(name))
        assert torch.equal(layer.weight, value if isinstance(layer, nn.Linear) else value.t())
    left = vars(model).keys() - vars(plain).keys()
    assert left == set(), "flags of a model in 4 bits"
    model.float()  # refused for a quantised model
    model.save_pretrained(tmp_path / "dense")
    assert stored(tmp_path / "dense") is None
    assert torch.equal(logits(Auto.from_pretrained(tmp_path / "dense")), logits(model))


def test_copied_model_saves(tmp_path: Path) -> None:
    model = loaded(saved(tmp_path))
    other = copy.deepcopy(model)
    model.dequantize()
    other.save_pretrained(tmp_path / "4bit")
    assert_same_state(read(tmp_path / "4bit"), other)
    assert len(nf4_layers(other)) == 14


def test_other_heads_on_one_file(tmp_path: Path) -> None:
    loaded(saved(tmp_path / "dense")).save_pretrained(tmp_path / "4bit")
    config = read_config(tmp_path / "4bit", num_labels=3)
    for kind in (transformers.AutoModel, transformers.AutoModelForSequenceClassification):
        model = kind.from_pretrained(tmp_path / "4bit", config=config)
        assert len(nf4_layers(model)) == 14
        model.save_pretrained(tmp_path / "again")
        again = kind.from_pretrained(tmp_path / "again", config=read_config(tmp_path / "again"))
        assert_same_state(again, model)
    assert model.score.weight.shape == (3, 64)


def test_pickled_model_saves(tmp_path: Path) -> None:
    model = models.pickled(loaded(saved(tmp_path)))
    model.save_pretrained(tmp_path / "4bit")
    assert_same_state(read(tmp_path / "4bit"), model)


# Read and written by bitsandbytes


@pytest.mark.parametrize("kind", MODELS)
def test_bitsandbytes_reads_ours(kind: str, tmp_path: Path) -> None:
    bnb_config()
    model = loaded(saved(tmp_path / "dense", kind), kind)
    model.save_pretrained(tmp_path / "4bit")
    theirs = auto(kind).from_pretrained(tmp_path / "4bit")
    assert_same_state(model, theirs)
    assert {n for n, m in theirs.named_modules() if type(m).__name__ == "Linear4bit"} == nf4_layers(model)
    assert_outputs_agree(kind, model, theirs)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_ours_reads_bitsandbytes(kind: str, double_quant: bool, tmp_path: Path) -> None:
    config = bnb_config(bnb_4bit_use_double_quant=double_quant)
    theirs = auto(kind).from_pretrained(saved(tmp_path / "dense", kind), quantization_config=config)
    theirs.save_pretrained(tmp_path / "4bit")
    model = read(tmp_path / "4bit", kind)
    assert_same_state(model, theirs)
    assert {n for n, m in theirs.named_modules() if type(m).__name__ == "Linear4bit"} == nf4_layers(model)
    assert_outputs_agree(kind, model, theirs)
    model.save_pretrained(tmp_path / "again")
    weights = [folder / "model.safetensors" for folder in (tmp_path / "4bit", tmp_path / "again")]
    first, second = (safetensors.torch.load_file(file) for file in weights)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def assert_outputs_agree(kind: str, model: Any, theirs: Any) -> None:
    """Our error against fp64 on the same 4 bits is at most twice bitsandbytes', plus one rounding."""
    exact = copy.deepcopy(model).dequantize(torch.float32)
    if kind != "moe":  # its grouped matmuls have no fp64
        exact.double().config.dtype = torch.float64
    truth = exact(input_ids=ids()).logits.detach().double()
    ours, other = (float((logits(each).double() - truth).abs().max()) for each in (model, theirs))
    assert ours <= 2 * other + torch.finfo(torch.bfloat16).eps * float(truth.abs().max()), (ours, other)


def test_float_storage(tmp_path: Path) -> None:
    """As FSDP with bitsandbytes stores them."""
    config = bnb_config(bnb_4bit_quant_storage=torch.bfloat16)
    theirs = Auto.from_pretrained(saved(tmp_path / "dense"), quantization_config=config)
    theirs.save_pretrained(tmp_path / "4bit")
    assert_same_state(read(tmp_path / "4bit"), loaded(tmp_path / "dense"))


def test_dense_layers_take_the_requested_dtype(tmp_path: Path) -> None:
    model = loaded(saved(tmp_path / "dense", "biased"))
    model.save_pretrained(tmp_path / "4bit")
    again = read(tmp_path / "4bit", dtype=torch.float16)
    layer = again.model.layers[0].mlp.up_proj
    assert layer.weight.dtype == torch.bfloat16, "what was quantised"
    assert {p.dtype for p in again.parameters() if p is not layer.weight} >= {torch.float16}
    assert again.model.norm.weight.dtype == again.lm_head.weight.dtype == layer.bias.dtype == torch.float16
    assert torch.isfinite(logits(again)).all()


# Refused, each with a sentence


def test_dense_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^path: expected a checkpoint in 4 bits, got one without a"):
        read_config(saved(tmp_path))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"bnb_4bit_quant_type": "int4"},
            r"^bnb_4bit_quant_type: expected one of \('nf4', 'fp4'\), got 'int4'$",
        ),
        ({"load_in_8bit": True, "load_in_4bit": False}, r"^quantization_config: .*, got 'load_in_8bit'$"),
        ({"quant_method": "hqq"}, r"^quantization_config: expected bitsandbytes in 4 bits, got 'hqq'$"),
        ({"bnb_4bit_compute_dtype": "int4"}, r"^bnb_4bit_compute_dtype: expected float32, .*, got 'int4'$"),
        ({"bnb_4bit_blocksize": 65}, r"^blocksize: expected one of .*, got 65$"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_other_configuration(change: Any, sentence: str, tmp_path: Path) -> None:
    loaded(saved(tmp_path)).save_pretrained(tmp_path)
    change_json(tmp_path / "config.json", lambda found: found["quantization_config"].update(change))
    with pytest.raises(ValueError, match=sentence):
        read_config(tmp_path)


def broken(folder: Path, change: Any) -> Path:
    """A checkpoint in 4 bits whose items were edited by `change`."""
    loaded(saved(folder)).save_pretrained(folder)
    change_tensors(folder / "model.safetensors", change)
    return folder


KEY = "model.layers.1.mlp.up_proj.weight"


def truncate(items: Any) -> None:
    items[KEY] = items[KEY][:-1].clone()


def other_shape(items: Any) -> None:
    for name in [name for name in items if name.startswith("model.layers.1.mlp.down_proj.weight")]:
        items[name.replace("down_proj", "up_proj")] = items[name].clone()


def as_fp4(items: Any) -> None:
    state = f"{KEY}.quant_state.bitsandbytes__nf4"
    items[state.replace("nf4", "fp4")] = items.pop(state)


def norm_in_4_bits(items: Any) -> None:
    for name in [name for name in items if name.startswith(KEY)]:
        items[name.replace(KEY, "model.norm.weight")] = items[name].clone()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (truncate, rf"^{KEY}: expected 4096 bytes for shape \(128, 64\), got 4095$"),
        (lambda items: items.pop(f"{KEY}.absmax"), rf"^{KEY}\.absmax: expected a tensor"),
        (lambda items: items.pop(KEY), rf"^{KEY}: expected a tensor in the state dict"),
        (other_shape, rf"^{KEY}: expected shape \(128, 64\), got \(64, 128\)$"),
        (as_fp4, rf"^{KEY}\.quant_state\.bitsandbytes__fp4: expected quant_type fp4, got 'nf4'$"),
        (norm_in_4_bits, r"^model\.norm\.weight: expected a dense weight for a LlamaRMSNorm, got 4 bits$"),
    ],
    ids=["truncated", "no-absmax", "no-weight", "other-shape", "fp4", "norm"],
)
def test_broken_checkpoint(change: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        read(broken(tmp_path, change))


def test_packed_layer_that_the_model_splits() -> None:
    """transformers 4 saved such models, where query, key and value were one layer."""
    conversions = [
        WeightConverter("attn.qkv.weight", ["attn.q.weight", "attn.k.weight"], [Chunk(dim=0)]),
        WeightConverter("mlp.wi.weight", "mlp.wi.weight", [Chunk(dim=0)]),
    ]
    expected = r"^h\.0\.attn\.qkv\.weight: expected a dense weight, which this model .*, got 4 bits; quantise"
    with pytest.raises(ValueError, match=expected):
        layouts.check_own(conversions, ["h.0.attn.qkv.weight"], "4 bits")
    layouts.check_own(conversions, ["h.0.mlp.wi.weight", "h.0.other.weight"], "4 bits")


def test_quantize_model_keeps_another_quantizer(tmp_path: Path) -> None:
    config = bnb_config(llm_int8_skip_modules=["mlp"])
    theirs = Auto.from_pretrained(saved(tmp_path), quantization_config=config)
    quantizer = theirs.hf_quantizer
    pk.quantize_model(theirs)
    assert theirs.hf_quantizer is quantizer
    assert theirs.config.quantization_config is quantizer.quantization_config

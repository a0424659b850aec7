"""from_pretrained(quantization_config=NF4Config()) makes the model of quantize_model while reading."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from checkpoint_damage import change_json, change_tensors
from torch import nn
from transformers_models import (
    MODELS,
    Auto,
    NF4Config,
    assert_same_state,
    auto,
    ids,
    llama,
    loaded,
    logits,
    nf4_layers,
    qwen_moe,
    read,
    saved,
    transformers,
)

import peft_kernels as pk
from peft_kernels.integrations.transformers import NF4Quantizer
from peft_kernels.quantize.model import report_of


@pytest.mark.parametrize("kind", MODELS)
def test_equals_quantize_model(kind: str, tmp_path: Path) -> None:
    saved(tmp_path, kind)
    model = loaded(tmp_path, kind, dtype=torch.bfloat16)
    other = pk.quantize_model(auto(kind).from_pretrained(tmp_path, dtype=torch.bfloat16))
    assert nf4_layers(model) == nf4_layers(other) != set()
    assert_same_state(model, other)
    assert torch.equal(logits(model), logits(other))
    ours, theirs = report_of(model), report_of(other)
    assert ours == theirs and ours is not None and ours.bytes_after < ours.bytes_before
    for flag in ("is_loaded_in_4bit", "quantization_method"):
        assert getattr(model, flag) == getattr(other, flag)


@pytest.mark.parametrize("blocksize", [32, 128])
@pytest.mark.parametrize("double_quant", [True, False])
def test_options(blocksize: int, double_quant: bool, tmp_path: Path) -> None:
    saved(tmp_path)
    options = {"blocksize": blocksize, "double_quant": double_quant, "compute_dtype": torch.float16}
    model = loaded(tmp_path, nf4=options)
    assert_same_state(model, pk.quantize_model(Auto.from_pretrained(tmp_path), **options))
    layer = model.model.layers[0].mlp.up_proj
    assert (layer.weight.blocksize, layer.weight.double_quant) == (blocksize, double_quant)
    assert layer.compute_dtype == torch.float16


def test_shards(tmp_path: Path) -> None:
    one, many = saved(tmp_path / "one"), saved(tmp_path / "many", shards="30kB")
    assert len(list(many.glob("*.safetensors"))) > 3
    assert_same_state(loaded(one), loaded(many))


def test_unmapped_and_pickled_files(tmp_path: Path) -> None:
    model = loaded(saved(tmp_path / "file"))
    assert_same_state(loaded(tmp_path / "file", disable_mmap=True), model)
    items = safetensors.torch.load_file(tmp_path / "file" / "model.safetensors")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "config.json").write_text((tmp_path / "file" / "config.json").read_text())
    torch.save(items, tmp_path / "bin" / "pytorch_model.bin")
    assert_same_state(loaded(tmp_path / "bin"), model)


def test_user_state_dict_is_not_released(tmp_path: Path) -> None:
    """It may be in a mapped file, whose pages must not be released: they have been written to."""
    saved(tmp_path)
    items = safetensors.torch.load_file(tmp_path / "model.safetensors")
    for item in items.values():
        item.mul_(2)
    before = {key: item.clone() for key, item in items.items()}
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    model = transformers.LlamaForCausalLM.from_pretrained(
        None, config=config, state_dict=items, quantization_config=NF4Config(), dtype=torch.bfloat16
    )
    assert all(torch.equal(items[key], before[key]) for key in items)
    dense = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    dense.load_state_dict(items)
    assert_same_state(model, pk.quantize_model(dense))


@pytest.mark.parametrize("stored", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("asked", ["auto", torch.bfloat16, None], ids=str)
def test_requested_dtype(stored: torch.dtype, asked: Any, tmp_path: Path) -> None:
    saved(tmp_path, dtype=stored)
    options = {} if asked is None else {"dtype": asked}
    dense, model = Auto.from_pretrained(tmp_path, **options), loaded(tmp_path, **options)
    assert model.dtype == dense.dtype == (stored if asked == "auto" or asked is None else asked)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == dense.dtype
    assert_same_state(model, pk.quantize_model(dense))


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, "sequential"], ids=str)
def test_cpu_device_maps(device_map: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    saved(tmp_path)
    model = loaded(tmp_path, device_map=device_map)
    if torch.cuda.is_available() and device_map in ("auto", "sequential"):
        pytest.skip("it may go to the GPU")
    assert_same_state(model, loaded(tmp_path))


def test_meta(tmp_path: Path) -> None:
    """Shapes and byte counts, without memory."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    saved(tmp_path)
    model, real = loaded(tmp_path, device_map={"": "meta"}), loaded(tmp_path)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model.get_memory_footprint() == real.get_memory_footprint()
    assert model.state_dict().keys() == real.state_dict().keys()
    model.load_state_dict(real.state_dict(), assign=True)
    assert_same_state(model, real)


@pytest.mark.parametrize("device_map", [{"": "disk"}, {"model": "cpu", "lm_head": "disk"}], ids=str)
def test_offloading_is_refused(device_map: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    with pytest.raises(ValueError, match=r"^device_map: expected all of a 4-bit model on the CPU or all"):
        loaded(saved(tmp_path), device_map=device_map, offload_folder=str(tmp_path / "offload"))


@pytest.mark.parametrize(
    "device_map", [{"a": 0, "b": "cuda:1"}, {"a": torch.device("cpu"), "b": "cpu"}, None, "auto"], ids=str
)
def test_device_maps_without_offload(device_map: Any) -> None:
    NF4Quantizer(NF4Config()).validate_environment(device_map=device_map, weights_only=True)


@pytest.mark.parametrize("device_map", [{"a": 0, "b": "cpu"}, {"a": "cuda:0", "b": "meta"}], ids=str)
def test_device_maps_with_offload(device_map: Any) -> None:
    with pytest.raises(ValueError, match=r"^device_map: expected all of a 4-bit model on the CPU or all"):
        NF4Quantizer(NF4Config()).validate_environment(device_map=device_map)


# Layers that stay dense


def test_modules_to_not_convert(tmp_path: Path) -> None:
    saved(tmp_path)
    model = loaded(tmp_path, nf4={"modules_to_not_convert": ["mlp", "layers.0"]})
    assert "lm_head" in nf4_layers(model)
    assert not any("mlp" in name or "layers.0" in name for name in nf4_layers(model))
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear


def test_tied_head_stays_dense(tmp_path: Path) -> None:
    saved(tmp_path, "tied")
    model = loaded(tmp_path, nf4={"modules_to_not_convert": ()})
    assert model.lm_head.weight is model.model.embed_tokens.weight
    report = report_of(model)
    assert report is not None
    assert report.left == {"lm_head": "it shares its weight with another place in the model"}


def test_missing_weight_is_initialised_dense(tmp_path: Path) -> None:
    saved(tmp_path, "gpt2")
    file = tmp_path / "model.safetensors"
    items = safetensors.torch.load_file(file)
    del items["transformer.h.1.mlp.c_fc.weight"]
    safetensors.torch.save_file(items, file, metadata={"format": "pt"})
    model = loaded(tmp_path, "gpt2")
    layer = model.transformer.h[1].mlp.c_fc
    assert type(layer) is transformers.pytorch_utils.Conv1D and layer.weight.shape == (64, 256)
    assert layer.weight.std() > 0, "it has to be initialised"
    assert torch.isfinite(logits(model)).all()


def test_missing_head_is_initialised_dense(tmp_path: Path) -> None:
    saved(tmp_path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, quantization_config=NF4Config(), num_labels=3, dtype=torch.bfloat16
    )
    assert type(model.score) is nn.Linear and model.score.weight.shape == (3, 64)
    assert len(nf4_layers(model)) == 14


def test_nothing_to_pack_leaves_an_ordinary_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path)
    model = loaded(tmp_path, nf4={"modules_to_not_convert": ["model", "lm_head"]})
    assert "no layer of LlamaForCausalLM is NF4" in caplog.text
    assert not getattr(model, "is_loaded_in_4bit", False) and not getattr(model, "is_quantized", False)
    model.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())


# Refused, each with a sentence


def test_unmatched_skip_name(tmp_path: Path) -> None:
    expected = (
        r"^modules_to_not_convert: expected names of modules of the model, got 'lm_hed'.*near it are lm_head"
    )
    with pytest.raises(ValueError, match=expected):
        loaded(saved(tmp_path), nf4={"modules_to_not_convert": ["lm_hed"]})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"blocksize": 48}, r"^blocksize: expected one of \(32, .*4096\), got 48$"),
        ({"double_quant": "yes"}, r"^double_quant: expected True or False, got 'yes'$"),
        ({"compute_dtype": "int8"}, r"^compute_dtype: expected float32, bfloat16 or float16, got 'int8'$"),
        ({"modules_to_not_convert": [3]}, r"^modules_to_not_convert: expected names of modules, got \[3\]$"),
        ({"modules_to_not_convert": 3}, r"^modules_to_not_convert: expected names of modules, got 3$"),
        ({"format": []}, r"^format: expected one of nf4, .*, got \[\]$"),
        ({"blocksize": 64.0}, r"^blocksize: expected one of \(32, .*, got 64\.0$"),
        ({"quant_method": "awq"}, r"^quant_method: expected peft_kernels_nf4, got 'awq'$"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_options(options: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        NF4Config(**options)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weight(bad: float, tmp_path: Path) -> None:
    model = llama()
    model.model.layers[1].self_attn.k_proj.weight.data[3, 4] = bad
    model.save_pretrained(tmp_path)
    name = r"model\.layers\.1\.self_attn\.k_proj\.weight"
    with pytest.raises(ValueError, match=rf"^{name}: expected finite values, got 1 NaN or Inf among 2048$"):
        loaded(tmp_path)


def test_packed_layers_that_the_model_merges(tmp_path: Path) -> None:
    """bitsandbytes packs layers of experts that transformers merges since."""
    qwen_moe().save_pretrained(tmp_path)
    method = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    change_json(tmp_path / "config.json", quantization_config=method)
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    mark = {f"{name}.quant_state.bitsandbytes__nf4": torch.zeros(8, dtype=torch.uint8)}
    change_tensors(tmp_path / "model.safetensors", lambda tensors: tensors.update(mark))
    with pytest.raises(ValueError, match=f"^{name}: expected a dense weight, which this model converts to"):
        read(tmp_path)


def test_weight_of_another_shape(tmp_path: Path) -> None:
    saved(tmp_path)
    change_json(tmp_path / "config.json", intermediate_size=96)
    sentence = (
        r"^model\.layers\.0\.mlp\.(down|gate|up)_proj\.weight: expected shape \(\d+, \d+\), got \(\d+, \d+\)$"
    )
    with pytest.raises(ValueError, match=sentence):
        loaded(tmp_path)


def test_casts_and_generation(tmp_path: Path) -> None:
    """transformers refuses to cast a quantised model, and generates with it."""
    model = loaded(saved(tmp_path))
    with pytest.raises(ValueError, match="float"):
        model.float()
    out = model.generate(ids(), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert out.shape == (2, 10)


@pytest.mark.parametrize(
    "rank,current,count,want", [(None, 0, 2, 0), (1, 0, 2, 1), (1, 0, 1, 0), (0, 1, 2, 1)]
)
def test_default_gpu_of_each_process(
    monkeypatch: pytest.MonkeyPatch, rank: int | None, current: int, count: int, want: int
) -> None:
    """By LOCAL_RANK, even before set_device is called; a call to it takes precedence."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    quantizer = NF4Quantizer(NF4Config())
    assert quantizer.update_device_map(None) == {"": want}
    assert quantizer.update_device_map({"": "cpu"}) == {"": "cpu"}


def test_distributed_model_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Before anything is read, except plans for tensor parallelism (test_tensor_parallel.py)."""
    folder = saved(tmp_path)
    sizes = {"tp_size": 1, "pp_size": 2, "ep_size": 1, "fsdp_size": 3}

    preprocess = NF4Quantizer.preprocess_model

    def distributed(self: Any, model: Any, **options: Any) -> None:
        preprocess(self, model, **options)
        model.config.distributed_config = SimpleNamespace(**sizes)  # as transformers does, one step later

    monkeypatch.setattr(NF4Quantizer, "preprocess_model", distributed)
    with pytest.raises(ValueError, match="for a 4-bit model, got pp_size=2, fsdp_size=3: shard it by FSDP2"):
        loaded(folder)
    sizes.update(pp_size=1, fsdp_size=1)
    assert nf4_layers(loaded(folder))

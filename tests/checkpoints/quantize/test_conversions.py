"""Models that transformers converts while it reads and saves them: packed ones, against dense ones.

For every list of conversions in its table that does more than rename, a small model of one of its entries.
"""

from __future__ import annotations

import functools
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_damage import change_json
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers_models import (
    NF4Config,
    assert_same_state,
    gpt2,
    nf4_layers,
    read_config,
    same_bits,
    transformers,
)

import peft_kernels as pk
from peft_kernels.checkpoints.checks import faults
from peft_kernels.checkpoints.folder import Checkpoint
from peft_kernels.integrations import transformers as integration
from peft_kernels.nf4.experts_packing import packed_weights

FILE = "model.safetensors"
CONV1D = transformers.pytorch_utils.Conv1D
SIZES = {
    64: "hidden_size d_model intermediate_size ffn_dim projection_hidden_size out_hidden_size "
    "max_position_embeddings text_hidden_size audio_hidden_size condition_dim adapter_in_dim "
    "adapter_out_dim adapter_input_size",
    4: "num_attention_heads num_heads num_key_value_heads num_experts num_local_experts n_routed_experts",
    2: "num_hidden_layers num_layers depth num_experts_per_tok num_experts_per_token eos_token_id",
    1: "n_group topk_group first_k_dense_replace bos_token_id num_layers_per_stack",
    0: "pad_token_id num_nextn_predict_layers num_mtp_layers",
    16: "head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim",
    32: "moe_intermediate_size shared_expert_intermediate_size q_lora_rank kv_lora_rank",
    128: "vocab_size unpadded_vocab_size",
    28: "image_size",
    14: "patch_size",
}
SMALL = {name: size for size, names in SIZES.items() for name in names.split()}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}
OPTIONS: dict[str, dict[str, Any]] = {
    "dots3_note_vision_encoder": {
        "text_config.per_layer_config": {}, "vision_config.per_layer_config": {}, "text_config.head_dim": 32,
    },
    "ernie4_5_vl_moe": {
        "text_config.rope_parameters": ROPE, "text_config.moe_intermediate_size": [32, 32],
        "text_config.moe_num_experts": 4,
    },
    "glm5_next": {"text_config.qk_rope_head_dim": 0, "text_config.head_dim": 0},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "minimax_m3_vl": {"projector_hidden_size": 64, "merged_hidden_size": 256},
    "mistral_large4": {"text_config.kv_source_layers": [0, 1]},
    "nemo_speechlm": {"word_timestamp_config.blank_token_id": 127},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 32,
        "indexer_compress_ratio": 4, "ngram_vocab_size_base": 100, "split_ngram_parts": 2,
    },
    "radio": {"patch_dim": 588},
    "step3p5_vision": {"vision_config.mlp_ratio": 1.0},
    "step3p7": {"vision_config.mlp_ratio": 1.0},
}  # fmt: skip
"""More of the sizes of some entries."""
PARENTS = {
    "UnlimitedOcrVisionEncoder": "UnlimitedOcrForConditionalGeneration",
    "dots3_note_vision_encoder": "Dots3NoteForConditionalGeneration",
    "step3p5_vision": "Step3p7ForConditionalGeneration",
}
"""Classes of models that have one of an entry inside, where it is none by itself."""
UNBUILT = {"inkling_mm_model": "with few layers its vision tower needs scipy, and else 230 million weights"}
"""Entries without a small model, and why."""


def entries() -> list[str]:
    """The first entry with each list of conversions."""
    from transformers import conversion_mapping, core_model_loading

    first: dict[str, str] = {}
    for name, transforms in conversion_mapping._build_checkpoint_conversion_mapping().items():
        found = [
            (each._original_source_patterns, each._original_target_patterns, list(map(type, each.operations)))
            for each in transforms
            if isinstance(each, core_model_loading.WeightConverter)
        ]
        if found:
            first.setdefault(str(found), name)
    return list(first.values())


def shrunk(config: Any) -> Any:
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PreTrainedConfig):
            shrunk(value)
        elif name in SMALL and isinstance(value, int) and not isinstance(value, bool):
            setattr(config, name, SMALL[name])
        elif name in ("layer_types", "mlp_layer_types") and isinstance(value, list):
            setattr(config, name, value[-SMALL["num_hidden_layers"] :])
        elif name == "stage_names":
            config.stage_names, config._out_features, config._out_indices = value[:3], [value[2]], [2]
    return config


def changed(entry: str, config: Any) -> Any:
    """Shrunk, with the entry's own sizes."""
    shrunk(config)
    for path, value in OPTIONS.get(entry, {}).items():
        *parts, name = path.split(".")
        setattr(functools.reduce(getattr, parts, config), name, value)
    return config


def built(entry: str) -> Any:
    """A small model of an entry: the name of a class or of a type of models."""
    torch.manual_seed(0)
    if entry == "gpt2":
        return gpt2()
    if hasattr(transformers, name := PARENTS.get(entry, entry)):
        cls = getattr(transformers, name)
        return cls(changed(entry, cls.config_class()))
    config = changed(entry, transformers.CONFIG_MAPPING[entry]())
    for name in ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModel"):
        auto = getattr(transformers, name)
        if type(config) in auto._model_mapping:
            return auto.from_config(config)
    raise ValueError(f"entry: expected one with a model, got {entry}")


def loaded(cls: Any, folder: Path, **options: Any) -> Any:
    """Complete, without weights that were made up."""
    options.setdefault("config", transformers.AutoConfig.from_pretrained(folder))
    model, about = cls.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True, **options)
    assert not about["missing_keys"] and not about["mismatched_keys"], about
    return model


def expected(dense: Any, packed: set[str]) -> tuple[dict[str, Tensor], set[str]]:
    """What a file should have of dense weights: the tensors of transformers that have no part of a packed
    weight, and the rest in the model's own layout; and the names of packed weights."""
    from transformers.core_model_loading import (
        WeightConverter,
        apply_converters,
        apply_renamings,
        revert_weight_conversion,
    )

    back = [each.reverse_transform() for each in reversed(dense._weight_conversions or [])]
    converters = [each for each in back if isinstance(each, WeightConverter)]
    renamings = [each for each in back if not isinstance(each, WeightConverter)]
    state = dense.state_dict()
    stored = {name: apply_converters(name, converters)[0] for name in state}
    touched = {stored[name] for name in packed}
    own = {name: apply_renamings(name, renamings) for name in state if stored[name] in touched}
    found = revert_weight_conversion(dense, {name: t for name, t in state.items() if name not in own})
    found |= {new: state[name] for name, new in own.items() if name not in packed}
    return found, {own[name] for name in packed}


@pytest.mark.parametrize("entry", ["gpt2", *sorted({*entries()} - {*UNBUILT})])
def test_dense_weights_are_saved_as_transformers_saves_them(entry: str, tmp_path: Path) -> None:
    model = built(entry).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "dense")
    dense = loaded(type(model), tmp_path / "dense")
    dense.save_pretrained(tmp_path / "stock")
    linear = [name for name, module in dense.named_modules() if type(module) in (nn.Linear, CONV1D)]
    skip = [name for name in linear if zlib.crc32(name.encode()) % 3 == 0]
    config = NF4Config(blocksize=32, experts=True, modules_to_not_convert=skip)
    packed = loaded(type(model), tmp_path / "dense", quantization_config=config)
    names = {f"{name}.{key}" for name, module in packed.named_modules() for key in packed_weights(module)}
    assert names and skip

    packed.save_pretrained(tmp_path / "packed")
    file = load_file(tmp_path / "packed" / FILE)
    want, items = expected(dense, names)
    stock = load_file(tmp_path / "stock" / FILE)
    assert all(same_bits(want[name], stock[name]) for name in want.keys() & stock.keys())
    alone = {
        n: t for n, t in file.items() if n not in items and not n.startswith(tuple(f"{i}." for i in items))
    }
    tied = dense.all_tied_weights_keys
    assert alone.keys() == want.keys() - tied
    assert [name for name in alone if not same_bits(alone[name], want[name])] == []

    again = loaded(type(model), tmp_path / "packed", config=read_config(tmp_path / "packed"))
    assert_same_state(again, packed)


def test_configuration_of_the_text_model(tmp_path: Path) -> None:
    """Some files have it there: it is saved as the model's own, where all readers look first."""
    model = built("kimi_k25").to(torch.bfloat16)
    pk.quantize_model(model)
    model.save_pretrained(tmp_path)

    def move(config: Any) -> None:
        config["text_config"]["quantization_config"] = config.pop("quantization_config")

    change_json(tmp_path / "config.json", move)
    assert list(faults(Checkpoint.open(tmp_path))) == []
    integration.enable()
    try:
        again = loaded(type(model), tmp_path)
    finally:
        integration.disable()
    again.save_pretrained(tmp_path / "packed")
    for name in nf4_layers(again):
        weight = again.get_submodule(name).weight
        weight.data += torch.full_like(weight.dequantize(), 0.01)  # as a merge does
    again.save_pretrained(tmp_path / "dense")
    for folder, has in (("packed", True), ("dense", False)):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert ("quantization_config" in config) == has
        assert "quantization_config" not in config["text_config"]

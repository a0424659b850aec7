"""NF4 models in transformers, PEFT, TRL, Trainer and accelerate; heads, Conv1D, FalconLinear."""

from __future__ import annotations

import pickle
from typing import Any

import models
import pytest
import torch
from rounding import ONE_MODEL
from torch import nn

import peft_kernels as pk
import testing
from peft_kernels.nn import NF4Linear
from peft_kernels.quantize.model import report_of

peft = pytest.importorskip("peft", reason="PEFT is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*bytes for each value of an NF4 weight"),
    pytest.mark.filterwarnings("ignore:.*use_reentrant"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True"),
    pytest.mark.filterwarnings("ignore:.*may get different generations due to rounding errors"),
]

SMALL = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 128}
ENCODER = {**SMALL, "intermediate_size": 96, "pad_token_id": 0}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", ENCODER),
    "gpt2": (
        "GPT2Config",
        {"n_embd": 64, "n_head": 2, "n_layer": 2, "vocab_size": 128, "n_positions": 64, "pad_token_id": 0}
        | {"bos_token_id": 1, "eos_token_id": 2},
    ),
    "falcon": ("FalconConfig", {**SMALL, "pad_token_id": 0}),
    "bert": ("BertConfig", ENCODER),
    "roberta": ("RobertaConfig", ENCODER),
    "t5": (
        "T5Config",
        {"d_model": 64, "d_kv": 32, "num_heads": 2, "d_ff": 96, "num_layers": 2, "vocab_size": 128}
        | {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0},
    ),
    "vit": ("ViTConfig", {**ENCODER, "image_size": 32, "patch_size": 16}),
}


def build(arch: str, auto: str = "AutoModelForSequenceClassification", **options: Any) -> Any:
    name, config = CONFIGS[arch]
    config = {k: v for k, v in config.items() if arch != "vit" or k not in ("vocab_size", "pad_token_id")}
    torch.manual_seed(0)
    model = getattr(transformers, auto).from_config(getattr(transformers, name)(**config))
    return model.to(torch.bfloat16) if options.get("bf16") else model


def llama() -> Any:
    return pk.quantize_model(models.tiny_llama().bfloat16())


def batch(arch: str) -> dict[str, torch.Tensor]:
    if arch == "vit":
        return {"pixel_values": testing.tensor(2, 3, 32, 32), "labels": torch.tensor([0, 1])}
    ids = torch.arange(2, 18).view(2, 8)
    if arch == "t5":
        ids[:, -1] = 1
    return {"input_ids": ids, "labels": torch.tensor([0, 1])}


def packed_layers(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, NF4Linear)]


# Attributes that libraries read


def test_kbit_preparation_checkpoints_and_widens_no_nf4() -> None:
    model = llama()
    packed = {
        name: p.packed.data_ptr() for name, p in model.named_parameters() if isinstance(p, pk.NF4Weight)
    }
    model = peft.prepare_model_for_kbit_training(model)
    assert model.is_gradient_checkpointing
    for name, p in model.named_parameters():
        if name in packed:
            assert p.dtype == torch.bfloat16 and p.packed.data_ptr() == packed[name]
        else:
            assert p.dtype == torch.float32, name
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear")).train()
    ids = torch.arange(24).view(2, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    grads = [p.grad for _, p in model.named_parameters() if p.requires_grad]
    assert len(grads) == 28 and all(g is not None for g in grads)


def test_parameter_counts_and_memory_footprint() -> None:
    model, dense = llama(), models.tiny_llama()
    assert model.num_parameters() == dense.num_parameters()
    exact = sum(p.nbytes for p in model.parameters())
    assert 0 <= model.get_memory_footprint(return_buffers=False) - exact <= 14 * 2, (
        "to a bf16 value in each of 14 layers"
    )
    assert model.get_memory_footprint() < 0.5 * dense.bfloat16().get_memory_footprint()
    assert (
        peft.get_peft_model(model, peft.LoraConfig()).get_nb_trainable_parameters()[1]
        > dense.num_parameters()
    )


def test_counting_parameters_does_not_need_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util
    import sys

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "bitsandbytes" else find(n, *a)
    )
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    model = llama()
    assert model.num_parameters() == models.tiny_llama().num_parameters() and model.is_loaded_in_4bit
    assert pickle.loads(pickle.dumps(model)).num_parameters() == model.num_parameters()


@pytest.mark.parametrize("where", ["model", "peft", "wrapper"])
def test_quantisation_flags_follow_the_layers(where: str) -> None:
    model: Any = models.tiny_llama()
    outer = model
    if where == "wrapper":
        outer = nn.ModuleDict({"inner": model})
    if where == "peft":
        outer = model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    pk.quantize_model(outer)
    assert outer.is_loaded_in_4bit and model.is_loaded_in_4bit and report_of(outer) is not None
    if where != "peft":
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    whole = outer if where == "wrapper" else model
    assert model.is_loaded_in_4bit and len(report_of(whole).layers) == 14  # type: ignore[union-attr]
    base = model.merge_and_unload()
    assert not getattr(base, "is_loaded_in_4bit", False) and report_of(outer) is None
    assert b"peft_kernels" not in pickle.dumps(base)


# Heads


@pytest.mark.parametrize("arch", CONFIGS)
def test_classification_heads_stay_dense_and_train(arch: str) -> None:
    auto = "AutoModelForImageClassification" if arch == "vit" else "AutoModelForSequenceClassification"
    model = pk.quantize_model(build(arch, auto))
    inside = set(model.base_model.modules()) if model.base_model is not model else set()
    head = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m not in inside]
    assert head and not set(head) & set(packed_layers(model))
    top = head[0].partition(".")[0]
    config = peft.LoraConfig(
        task_type=None if arch == "vit" else "SEQ_CLS", target_modules="all-linear", modules_to_save=[top]
    )
    if arch == "t5":
        config.target_modules = ["q", "v"]
    model = peft.get_peft_model(model, config).train()
    before = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    assert any("modules_to_save" in n for n in before)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # B starts at zero, so A changes only in the second step
        model.zero_grad()
        model(**batch(arch)).loss.backward()
        optimizer.step()
    after = dict(model.named_parameters())
    assert all(
        not torch.equal(after[n], p) for n, p in before.items() if "modules_to_save" in n and "bias" not in n
    )
    assert sum(not torch.equal(after[n], p) for n, p in before.items()) > len(before) // 2
    model.merge_and_unload()(**batch(arch))


@pytest.mark.parametrize("auto", ["AutoModelForTokenClassification", "AutoModelForQuestionAnswering"])
@pytest.mark.parametrize("arch", ["bert", "llama", "gpt2"])
def test_other_heads_stay_dense(arch: str, auto: str) -> None:
    model = pk.quantize_model(build(arch, auto))
    names = packed_layers(model)
    assert names and not any(part in name for name in names for part in ("classifier", "qa_outputs", "score"))


def test_heads_by_structure_and_by_class_attributes() -> None:
    model = pk.quantize_model(build("t5"))
    left = report_of(model).left  # type: ignore[union-attr]
    assert {k: v for k, v in left.items() if "head" in k} == dict.fromkeys(
        ("classification_head.dense", "classification_head.out_proj"),
        "in the model's head; skip=() would pack it",
    )
    assert sum("_keep_in_fp32_modules" in reason for reason in left.values()) == 4  # wo
    full = pk.quantize_model(build("t5"), skip=())
    assert "classification_head.dense" in packed_layers(full) and not report_of(full).left  # type: ignore[union-attr]


# Conv1D and FalconLinear


@pytest.mark.parametrize("arch", ["gpt2", "falcon"])
def test_linear_layers_of_other_classes(arch: str) -> None:
    dense = build(arch, "AutoModelForCausalLM").eval()
    types = {
        n: (type(m), m.weight.shape) for n, m in dense.named_modules() if "h.0." in n and hasattr(m, "weight")
    }
    ids = torch.arange(2, 18).view(2, 8)
    with torch.no_grad():
        expected = dense(ids).logits
    rounded = build(arch, "AutoModelForCausalLM").eval()
    for module in rounded.modules():
        if type(module).__name__ in ("Conv1D", "FalconLinear") and module is not rounded.lm_head:
            weight = module.weight.data
            weight = weight.t() if type(module).__name__ == "Conv1D" else weight
            value = pk.NF4Weight.quantize(weight.contiguous()).dequantize()
            module.weight.data = value.t().contiguous() if type(module).__name__ == "Conv1D" else value
    model = pk.quantize_model(dense)
    assert len(packed_layers(model)) == 8
    with torch.no_grad():
        assert testing.relative_error(model(ids).logits, rounded(ids).logits) < ONE_MODEL
        assert testing.relative_error(model(ids).logits, expected) < 0.5
    torch.manual_seed(0)
    config = peft.LoraConfig(
        target_modules="all-linear", init_lora_weights=False, fan_in_fan_out=arch == "gpt2"
    )
    adapted = peft.get_peft_model(model, config)
    pk.patch(adapted)
    with torch.no_grad():
        y = adapted(ids).logits
        adapted.merge_adapter()
        adapted.unmerge_adapter()
        assert torch.equal(adapted(ids).logits, y)
        merged = adapted.merge_and_unload()
        assert testing.relative_error(merged(ids).logits, y) < ONE_MODEL
    for name, (kind, shape) in types.items():
        module = merged.get_submodule(name)
        assert type(module) is kind and module.weight.shape == shape, name
    assert b"peft_kernels" not in pickle.dumps(merged)

"""QLoRA on an MoE: adapters on attention and on the experts' parameters, against stock PEFT on the
dequantised weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import installed
import peft
import pytest
import torch
import transformers
from flow_checks import Calls, assert_curve, assert_near, fallbacks, language_loss, step, train
from flow_models import ids, logged, trainer
from moe_routes import on_same_routes
from peft_experts import skip_stored_transposed, weights_of
from peft_models import gradients
from rounding import BF16, CURVE, ONE_LAYER, ONE_MODEL, ONE_STEP
from torch import Tensor

import peft_kernels as pk
import testing

STEPS = 20
MODELS: dict[str, Any] = {
    "qwen3_moe": ("Qwen3Moe", {"moe_intermediate_size": 32, "num_experts": 8, "head_dim": 32}),
    "mixtral": ("Mixtral", {"num_local_experts": 8}),
    "gpt_oss": ("GptOss", {"num_local_experts": 8, "head_dim": 32, "layer_types": ["full_attention"] * 2}),
    "deepseek_v3": (
        "DeepseekV3",
        {"n_routed_experts": 8, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
        | dict.fromkeys(("n_group", "topk_group"), 1)
        | dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim"), 16)
        | {"v_head_dim": 16},
    ),
}
FAMILIES = pytest.mark.parametrize("family", MODELS)


def mixture(family: str = "qwen3_moe") -> Any:
    """Two layers, with weights large enough that a different forward changes the losses."""
    name, options = MODELS[family]
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_experts_per_tok": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    sizes |= {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes |= {"initializer_range": 0.2, "tie_word_embeddings": False}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes | options)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def pair(family: str = "qwen3_moe") -> tuple[Any, Any]:
    """A packed model and a dense one with the same values."""
    dense = mixture(family)
    packed = pk.quantize_model(copy.deepcopy(dense), experts=True)
    for name, weight in packed.named_parameters():
        if isinstance(weight, pk.NF4Weight):
            target = dense.get_parameter(name)
            values = weight.dequantize()
            target.data = values.mT.contiguous() if family == "gpt_oss" and values.dim() == 3 else values
    return packed, dense


def adapted(model: Any) -> Any:
    skip_stored_transposed(model)
    torch.manual_seed(1)
    attention = ["q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "kv_b_proj"]
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=[
            name for name in attention if any(m.endswith(name) for m, _ in model.named_modules())
        ],
        target_parameters=sorted(weights_of(model)),
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = testing.tensor(*parameter.shape, seed=len(name), scale=0.05)
    return model


def in_fp64(model: Any) -> Any:
    wide = copy.deepcopy(model).double()
    wide.base_model.model.config._experts_implementation = "eager"  # grouped_mm has no fp64
    return wide


def loss(model: Any, i: int) -> Tensor:
    return language_loss(model, ids(i % 4))


@FAMILIES
def test_training(family: str) -> None:
    packed, dense = map(adapted, pair(family))
    report = pk.patch(packed)
    assert not report.original, report.details()
    counts = []

    def losses(model: Any) -> list[float]:
        with Calls() as calls:
            found = train(model, loss, STEPS)
        counts.append(calls)
        return found

    truth, got, stock = on_same_routes(losses, in_fp64(dense), packed, dense)
    _, ours, theirs = counts
    assert ours.counts["experts_lora_linear"] >= 2 * STEPS and not fallbacks(report), str(report)
    assert theirs.fused == theirs.counts["experts_lora_linear"] == 0, "the stock side must be stock"
    assert_curve(got, stock, truth, BF16)


@FAMILIES
def test_one_step_of_unpatched_packed_experts(family: str) -> None:
    """Stock PEFT dequantises the weights in each call: slow but correct."""
    packed, dense = map(adapted, pair(family))
    results = [step(model, lambda m: loss(m, 0)) for model in (packed, dense)]
    assert_near(*results, ONE_STEP)


def test_trainer_with_checkpointing(tmp_path: Path) -> None:
    packed, dense = map(adapted, pair())
    report = pk.patch(packed)
    curves = []
    for name, model in (("ours", packed), ("stock", dense)):
        found = trainer(model, tmp_path / name, 4, gradient_checkpointing=True)
        torch.manual_seed(0)
        found.train()
        curves.append(logged(found))
    assert not fallbacks(report) and len(curves[0]) == 4
    assert curves[0] == pytest.approx(curves[1], rel=CURVE)


@FAMILIES
def test_generating(family: str) -> None:
    packed, dense = map(adapted, pair(family))
    options = {"max_new_tokens": 8, "do_sample": False}
    prompt = ids()[:2, :5]
    stock = dense.generate(input_ids=prompt, **options)
    report = pk.patch(packed)
    assert torch.equal(packed.generate(input_ids=prompt, **options), stock) and not fallbacks(report)


@FAMILIES
def test_saving_and_loading_adapters(family: str, tmp_path: Path) -> None:
    """The adapter files equal those of a dense model, and load into a dense or a packed model."""
    if installed.before("peft", "0.20") and not installed.before("peft", "0.19"):
        pytest.skip("PEFT 0.19 loads no adapters of experts with transformers since 5.10")
    packed, dense = map(adapted, pair(family))
    pk.patch(packed)
    before = logits(packed)
    packed.save_pretrained(tmp_path / "ours")
    dense.save_pretrained(tmp_path / "stock")
    files = [peft.utils.save_and_load.load_peft_weights(str(tmp_path / name)) for name in ("ours", "stock")]
    assert_near(*files, ONE_LAYER)
    for base in pair(family):
        model = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
        pk.patch(model)
        assert_near(logits(model), before, ONE_STEP)


def logits(model: Any) -> dict[str, Tensor]:
    with torch.no_grad():
        return {"logits": model(input_ids=ids()).logits}


@pytest.mark.parametrize("patched", [False, True])
@FAMILIES
@pytest.mark.filterwarnings("ignore:.*merg.*")
def test_merge_and_unload(family: str, patched: bool) -> None:
    packed, dense = pair(family)
    model, plain = adapted(packed), type(next(m for m in dense.modules() if hasattr(m, "is_transposed")))
    before = logits(model)
    if patched:
        pk.patch(model)
    merged = model.merge_and_unload()
    assert_near(logits(merged), before, ONE_STEP)
    experts = [module for module in merged.modules() if hasattr(module, "is_transposed")]
    assert experts and all(type(module) is plain for module in experts)
    assert all(not isinstance(weight, pk.NF4Weight) for weight in weights_of(merged).values())


def test_packed_experts_without_adapters() -> None:
    """NF4 experts need no patch."""
    packed, dense = pair()
    report = pk.patch(packed)
    experts = [entry for entry in report.layers if "experts" in entry.name]
    assert len(experts) == 2 and all(entry.fused and entry.record is None for entry in experts)
    with Calls() as calls:
        assert_near(logits(packed), logits(dense), ONE_MODEL)
    assert calls.counts["experts_linear"] == 4


def test_attention_alone() -> None:
    """Adapters on attention only, as usual: gradients pass through packed experts."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    results = []
    for model in pair():
        torch.manual_seed(1)
        model = peft.get_peft_model(model, config)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = testing.tensor(*parameter.shape, seed=len(name), scale=0.05)
        pk.patch(model)
        results.append(step(model, lambda m: loss(m, 0)))
        assert gradients(model)
    assert_near(*results, ONE_STEP)

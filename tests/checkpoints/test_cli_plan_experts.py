"""`peft-kernels plan` for mixture-of-experts models, against the measured memory of small ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from plan_measures import (
    BATCH,
    CPU_PARTS,
    RANK,
    SEQ,
    SIZES,
    enable_checkpointing,
    measured_activations,
    planned,
    planned_activations,
    planned_to_measured_peak,
    relative_difference,
)
from skips import require_bf16_attention
from torch import nn

import peft_kernels as pk
from peft_kernels.cli import memory
from peft_kernels.cli.architecture import describe
from peft_kernels.cli.main import main
from peft_kernels.cli.sizes import Model, Run

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("transformers.integrations.moe", reason="transformers is older than 5")
peft = pytest.importorskip("peft", reason="peft is not installed")

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 6, "sliding_window": None}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"num_experts": 6, "moe_intermediate_size": 48, "head_dim": 32, "num_experts_per_tok": 3},
    ),
    "gpt_oss": ("GptOss", {"num_local_experts": 6, "head_dim": 16, "intermediate_size": 48}),
}


def config_of(kind: str) -> Any:
    family, options = KINDS[kind]
    sizes = SIZES | {"num_experts_per_tok": 2, "norm_topk_prob": True} | options
    return getattr(transformers, f"{family}Config")(**sizes)


def plan_model(kind: str, parameters: Any = ()) -> Model:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config_of(kind))
    return describe(model, torch.bfloat16, ATTENTION, parameters)


def trainable(kind: str, experts: bool | None, parameters: Any = (), prepared: bool = False) -> Any:
    """experts: True packs them, False leaves them dense, None quantises nothing."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_of(kind)).to(torch.bfloat16)
    model.config.use_cache = False
    if experts is not None:
        pk.quantize_model(model, experts=experts)
    if prepared:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    targets = {"target_modules": ATTENTION, "target_parameters": list(parameters) or None}
    model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, task_type="CAUSAL_LM", **targets))
    pk.patch(model, without=CPU_PARTS)
    return model.train()


def nbytes(model: nn.Module, adapters: bool) -> int:
    return sum(p.nbytes for name, p in model.named_parameters() if ("lora_" in name) == adapters)


@pytest.mark.parametrize("experts", [None, False, True], ids=["bf16", "dense experts", "packed experts"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_adapters(kind: str, experts: bool | None) -> None:
    model = plan_model(kind, [UP, DOWN])
    run = Run("lora" if experts is None else "qlora", BATCH, SEQ, RANK, experts=bool(experts))
    real = trainable(kind, experts, [UP, DOWN])
    assert relative_difference(memory.weights(model, run), nbytes(real, False)) < 0.001
    assert memory.adapters(model, run) == memory.gradients(model, run) == nbytes(real, True)
    of_attention = memory.adapters(plan_model(kind), run)
    assert of_attention == nbytes(trainable(kind, experts), True) < memory.adapters(model, run)


@pytest.mark.parametrize("prepared", [False, True], ids=["plain", "kbit-prepared"])
@pytest.mark.parametrize("parameters", [[], [DOWN], [UP, DOWN]], ids=str)
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_activations_of_packed_experts(kind: str, parameters: list[str], prepared: bool) -> None:
    """To 1%, so that a missing term shows."""
    model = plan_model(kind, parameters)
    run = Run("qlora", BATCH, SEQ, RANK, experts=True, prepared=prepared)
    real = trainable(kind, True, parameters, prepared)
    assert relative_difference(planned_activations(model, run), measured_activations(real)) < 0.01
    assert relative_difference(memory.weights(model, run), nbytes(real, False)) < 0.001


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_peak(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LOGIT_BYTES", 0)
    batch, seq = 1, 96
    model, run = plan_model("qwen3_moe"), Run("qlora", batch, seq, RANK, experts=True)
    real = trainable("qwen3_moe", True)
    if checkpointing:
        enable_checkpointing(real)
    require_bf16_attention()
    assert 0.9 < planned_to_measured_peak(real, model, run, checkpointing) < 1.2


@pytest.fixture
def mixtral(tmp_path: Path) -> str:
    """Mixtral 8x7B from its configuration: well-known sizes."""
    config = transformers.MixtralConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2,
        dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    return str(tmp_path)


def test_command_on_mixtral(mixtral: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = [mixtral, "--method", "lora,qlora", "--memory", "48GB", "--target-modules", *ATTENTION]
    dense = planned(capsys, *options)
    packed = planned(capsys, *options, "--experts")
    assert dense["parameters"] == packed["parameters"] == 46_702_792_704
    of_experts = 32 * 8 * 3 * 4096 * 14336
    lora, qlora, with_experts = (
        plan["weights"]
        for plan in (dense["methods"]["lora"], dense["methods"]["qlora"], packed["methods"]["qlora"])
    )
    assert lora == 2 * 46_702_792_704
    assert qlora - with_experts == pytest.approx((2 - 4.127 / 8) * of_experts, rel=1e-3)
    assert 24e9 < with_experts < 25e9 and packed["methods"]["qlora"]["fits_checkpointed"]
    assert "activations" not in dense["methods"]["qlora"] and "activations" not in packed["methods"]["lora"]
    assert any("--experts packs them" in note for note in dense["notes"])
    assert not any("--experts packs them" in note for note in packed["notes"])
    for report in (dense, packed):
        assert any("activations of dense experts" in note for note in report["notes"])
    assert main(["plan", *options, "--experts"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    (row,) = [line for line in lines if line[:1] == ["activations"] and line[1] != "of"]
    assert row[1] == "?" and float(row[2]) > 0


def test_all_experts_packed(mixtral: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With adapters on experts too, and our own optimizer by its class."""
    options = [mixtral, "--method", "qlora", "--experts", "--rank", "4", "--target-parameters", UP, DOWN]
    report = planned(capsys, *options, "--optim", "AdamW8bit")
    rows = {"gate_up_proj": 4096 + 2 * 14336, "down_proj": 14336 + 4096}
    attention = 2 * (4096 + 4096) + 2 * (4096 + 1024)
    adapters = 4 * 32 * 4 * (attention + 8 * sum(rows.values()))
    plan = report["methods"]["qlora"]
    assert plan["adapters"] == adapters and plan["optimiser"] == pytest.approx(adapters * 2.03 / 4, rel=0.01)
    assert not any("activations of dense" in note or "all-linear" in note for note in report["notes"])


def test_unknown_expert_activations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config_of("gpt_oss").save_pretrained(tmp_path)
    report = planned(capsys, str(tmp_path), "--experts", "--memory", "1GB")
    assert report["methods"]["qlora"]["weights"] < report["methods"]["lora"]["weights"]
    assert not any("activations" in plan for plan in report["methods"].values())
    assert any("activations are not known for layers like those of gpt_oss" in n for n in report["notes"])


def test_wrong_arguments(mixtral: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong, sentence in (
        (["--target-parameters", UP], "expected --method lora, qlora or both"),
        (["--method", "lora", "--target-parameters", "mlp.up"], "names of weights of experts, got 'mlp.up'"),
    ):
        assert main(["plan", mixtral, *wrong]) == 1
        assert sentence in capsys.readouterr().err
    transformers.LlamaConfig(**SIZES).save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "--experts"]) == 1
    assert "expected a model with experts" in capsys.readouterr().err

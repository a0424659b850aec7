"""`peft-kernels plan` against the measured memory of small models."""

from __future__ import annotations

import argparse
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
    loss_of,
    measured_activations,
    nbytes,
    planned,
    planned_activations,
    planned_to_measured_peak,
    relative_difference,
)
from skips import require_bf16_attention
from torch import Tensor, nn

import peft_kernels as pk
from peft_kernels.cli import memory
from peft_kernels.cli.architecture import build, describe
from peft_kernels.cli.main import main
from peft_kernels.cli.plan import byte_count, largest_batch
from peft_kernels.cli.sizes import METHODS, OPTIMISERS, Model, Run

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")

REDUCTION, VIRTUAL = 4, 5
KINDS = {
    "llama": ("Llama", {}),
    "llama-mha": ("Llama", {"num_key_value_heads": 4}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "mistral": ("Mistral", {"sliding_window": None}),
}
CASES = [
    *((kind, method) for kind in ("llama", "qwen2-tied", "qwen3") for method in METHODS),
    *(("llama-mha", method) for method in ("lora", "prefix")),
    ("mistral", "lora"),
]
OPTIONS = {"rank": RANK, "reduction": REDUCTION, "virtual_tokens": VIRTUAL}


def config_of(kind: str, **changes: Any) -> Any:
    family, options = KINDS[kind]
    return getattr(transformers, f"{family}Config")(**SIZES | options | changes)


def plan_model(kind: str, dtype: torch.dtype = torch.bfloat16, targets: Any = None, **changes: Any) -> Model:
    config = config_of(kind, **changes)
    with torch.device("meta"):
        return describe(transformers.AutoModelForCausalLM.from_config(config), dtype, targets)


class Bottleneck(nn.Module):
    """x + up(gelu(down(x))): Houlsby et al. 2019."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(hidden, hidden // REDUCTION), nn.Linear(hidden // REDUCTION, hidden)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(nn.functional.gelu(self.down(x)))
        return x + y


def trainable(
    kind: str, method: str, dtype: torch.dtype = torch.bfloat16, targets: Any = None, **changes: Any
) -> Any:
    """A model set up for training as a user would."""
    torch.manual_seed(0)
    config = config_of(kind, **changes)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    model.config.use_cache = False
    if method in ("qlora", "prepared"):
        pk.quantize_model(model)
    if method == "prepared":
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        method = "qlora"
    if method in ("lora", "qlora", "dora"):
        options = {"r": RANK, "target_modules": targets or "all-linear", "task_type": "CAUSAL_LM"}
        model = peft.get_peft_model(model, peft.LoraConfig(**options, use_dora=method == "dora"))
    elif method == "prefix":
        model = peft.get_peft_model(
            model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL)
        )
    elif method == "adapter":
        model.requires_grad_(False)
        for layer in model.model.layers:
            for part in (layer.self_attn, layer.mlp):
                insert(part, Bottleneck(config.hidden_size).to(dtype))
    pk.patch(model, without=CPU_PARTS)
    return model.train()


def insert(part: Any, adapter: nn.Module) -> None:
    """Adds an adapter after a module whose forward returns a tensor, or a tuple that begins with one."""
    part.adapter = adapter

    def hook(module: Any, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (adapter(output[0]), *output[1:])
        return adapter(output)

    part.register_forward_hook(hook)


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_measured_memory(kind: str, method: str) -> None:
    """Activations to 1%, so that a missing term shows; the rest to 5%."""
    model, run = plan_model(kind), Run(method, BATCH, SEQ, **OPTIONS)
    real = trainable(kind, method)
    assert relative_difference(planned_activations(model, run), measured_activations(real)) < 0.01
    added = ("lora_", "prompt_encoder", "adapter.")
    base = [p for n, p in real.named_parameters() if not any(part in n for part in added)]
    extra = [p for n, p in real.named_parameters() if any(part in n for part in added)]
    assert relative_difference(memory.weights(model, run), sum(p.nbytes for p in base)) < 0.05
    factor = 2 if method == "adapter" else 1  # the measured adapters are in bf16
    if method != "full":
        assert relative_difference(memory.adapters(model, run), factor * sum(p.nbytes for p in extra)) < 0.05
    loss_of(real).loss.backward()
    gradients = sum(p.grad.nbytes for p in real.parameters() if p.grad is not None)
    assert relative_difference(memory.gradients(model, run), factor * gradients) < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_other_dtypes(method: str, dtype: torch.dtype) -> None:
    model, run = plan_model("llama", dtype), Run(method, BATCH, SEQ, **OPTIONS)
    real = trainable("llama", method, dtype)
    assert relative_difference(memory.weights(model, run) + memory.adapters(model, run), nbytes(real)) < 0.05
    assert relative_difference(planned_activations(model, run), measured_activations(real)) < 0.01


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["o_proj", "down_proj"], ["gate_proj"]], ids=str)
@pytest.mark.parametrize("method", ["lora", "qlora", "dora"])
def test_adapters_on_some_layers(method: str, targets: list[str]) -> None:
    model, run = plan_model("qwen3", targets=targets), Run(method, BATCH, SEQ, **OPTIONS)
    real = trainable("qwen3", method, targets=targets)
    assert relative_difference(planned_activations(model, run), measured_activations(real)) < 0.05
    trained = sum(p.nbytes for p in real.parameters() if p.requires_grad)
    assert relative_difference(memory.adapters(model, run), trained) < 0.05


@pytest.mark.parametrize("targets", [None, ["q_proj", "v_proj"]], ids=["all", "q and v"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_after_kbit_preparation(kind: str, targets: Any) -> None:
    """PEFT casts all that is not quantised to fp32; matmuls stay in bf16."""
    model = plan_model(kind, targets=targets)
    run = Run("qlora", BATCH, SEQ, **OPTIONS, prepared=True)
    real = trainable(kind, "prepared", targets=targets)
    assert relative_difference(planned_activations(model, run), measured_activations(real)) < 0.01
    assert relative_difference(memory.weights(model, run) + memory.adapters(model, run), nbytes(real)) < 0.05


OURS = {
    "paged_adamw": "PagedAdamW",
    "adam8bit": "Adam8bit",
    "adamw8bit": "AdamW8bit",
    "paged_adamw8bit": "PagedAdamW8bit",
    "lion8bit": "Lion8bit",
}
OTHERS = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD, "adafactor": transformers.Adafactor}


def make_optimizer(optim: str, parameters: Any) -> Any:
    if optim == "bitsandbytes":
        bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        return bnb.optim.AdamW8bit(parameters)
    return (getattr(pk.optim, OURS[optim]) if optim in OURS else OTHERS[optim])(parameters)


def step(model: nn.Module, optim: str) -> int:
    """Bytes of the optimizer's state after a step."""
    optimiser = make_optimizer(optim, [p for p in model.parameters() if p.requires_grad])
    optimiser.step()
    found: dict[int, int] = {}
    for state in optimiser.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return sum(found.values())


@pytest.mark.filterwarnings("ignore:.*[Pp]ag")  # a CPU has no memory to page to
@pytest.mark.parametrize("optim", [*OPTIMISERS, "bitsandbytes"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_optimiser_state(method: str, optim: str) -> None:
    changes = {"hidden_size": 128, "num_hidden_layers": 1}  # some tensors exceed bitsandbytes' 4096 elements
    planned = "adamw8bit" if optim == "bitsandbytes" else optim
    model, run = plan_model("llama", **changes), Run(method, BATCH, SEQ, 40, planned)
    if method == "full":
        real = trainable("llama", "full", **changes)
    else:
        real = nn.ParameterList(torch.zeros(shape) for shape in memory.trained(model, run))
    for parameter in real.parameters():
        parameter.grad = torch.ones_like(parameter)
    expected = step(real, optim)
    assert memory.optimiser(model, run) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("method", ["lora", "qlora", "dora", "full"])
def test_checkpointing(method: str) -> None:
    """Checkpoints of the forward, and activations of one layer as the difference between two depths."""
    model, run = plan_model("llama"), Run(method, BATCH, SEQ, **OPTIONS)
    real = trainable("llama", method)
    enable_checkpointing(real)
    # cos and sin live in a closure, which hooks cannot see.
    rotary = 2 * SEQ * (SIZES["hidden_size"] // SIZES["num_attention_heads"]) * 2
    saved = memory.checkpoints(model, run) + memory.loss(model, run)
    assert relative_difference(saved, measured_activations(real) + rotary) < 0.1
    deeper = measured_activations(trainable("llama", method, num_hidden_layers=4))
    layer = deeper - measured_activations(trainable("llama", method))
    assert relative_difference(memory.layer(model, run), layer) < 0.05


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("vocabulary", [96, 3000])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_peak(method: str, vocabulary: int, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak of a step of a patched model, whose loss takes the same for any vocabulary."""
    monkeypatch.setattr(memory, "LOGIT_BYTES", 0)  # a CPU's kernel has none outside of its caches
    batch, seq = 2, 192
    changes = {"vocab_size": vocabulary}
    model, run = plan_model("llama", **changes), Run(method, batch, seq, **OPTIONS)
    real = trainable("llama", method, **changes)
    if checkpointing:
        enable_checkpointing(real)
    require_bf16_attention()
    assert 0.9 < planned_to_measured_peak(real, model, run, checkpointing) < 1.2


def test_the_loss_has_the_logits_of_some_rows() -> None:
    header = Path(__file__).parents[2] / "csrc" / "cuda" / "loss" / "cross_entropy_head.h"
    assert f"kLogitBytes = {memory.LOGIT_BYTES >> 20} << 20;" in header.read_text()
    model, few, many = plan_model("llama"), Run("lora", 1, 512), Run("lora", 1 << 12, 512)
    for run, logits in ((few, 512 * 96 * 2), (many, memory.LOGIT_BYTES)):
        assert memory.loss_work(model, run) == logits + run.tokens * 64 * 2


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_largest_batch(checkpointing: bool) -> None:
    model, run = plan_model("llama"), Run("lora", 1, SEQ)
    for batch in (1, 2, 7):
        total = memory.total(model, Run("lora", batch, SEQ), checkpointing)
        assert largest_batch(model, run, checkpointing, total) == batch
        assert largest_batch(model, run, checkpointing, total - 1) == batch - 1


def test_command_on_llama(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Llama 3.1 8B from its configuration: well-known sizes."""
    config = transformers.LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    path = str(tmp_path / "config.json")
    report = planned(capsys, path, "--method", "lora,qlora,full", "--memory", "24GB", "--seq", "1024")
    assert report["parameters"] == 8_030_261_248 and report["memory"] == 24_000_000_000
    lora, qlora, full = (report["methods"][name] for name in ("lora", "qlora", "full"))
    assert lora["weights"] == full["weights"] == 2 * 8_030_261_248
    assert 5.6e9 < qlora["weights"] < 5.8e9
    assert lora["adapters"] == 4 * 41_943_040  # r = 16, all linear layers
    assert not full["fits"] and full["largest_batch"] == 0
    assert qlora["fits_checkpointed"] and qlora["largest_batch_checkpointed"] > qlora["largest_batch"] >= 1
    assert main(["plan", path, "--memory", "24GB", "--batch", "2"]) == 0
    text = capsys.readouterr().out
    assert "largest batch, with checkpointing" in text and "assumed: a model patched by pk.patch" in text


def test_reserve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config_of("llama").save_pretrained(tmp_path)

    def lora(*options: str) -> Any:
        return planned(capsys, tmp_path, "--method", "lora", *options)["methods"]["lora"]

    total = lora()["total"]
    assert lora("--memory", str(total), "--reserve", "0")["fits"]
    assert not lora("--memory", str(total - 1), "--reserve", "0")["fits"]
    assert not lora("--memory", str(total + 10**9 - 1))["fits"]
    assert lora("--memory", str(total + 10**9))["largest_batch"] == 1


def test_unknown_layers_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers.GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=96).save_pretrained(tmp_path)
    report = planned(capsys, tmp_path, "--memory", "24GB")
    assert "not known for layers like those of gpt2" in report["notes"][0]
    assert set(report["methods"]) == {"lora", "qlora", "dora", "full"}
    assert not any("fits" in plan or "activations" in plan for plan in report["methods"].values())


def test_from_the_configuration_alone(tmp_path: Path) -> None:
    """A model of 400 billion parameters is described at once, without allocating it."""
    changes = {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 3, "head_dim": 128}
    config_of("llama", **changes, num_attention_heads=128, num_key_value_heads=8).save_pretrained(tmp_path)
    model = build(tmp_path)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_wrong_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["--memory", "much"], ["--method", "lora,pigeon"], ["--seq", "0"], ["--optim", "x"]):
        with pytest.raises(SystemExit) as caught:
            main(["plan", str(tmp_path), *wrong])
        assert caught.value.code == 2
    capsys.readouterr()
    for path in (tmp_path, tmp_path / "nothing", tmp_path / "config.json"):
        assert main(["plan", str(path)]) == 1  # without asking a hub
        told = f"{path}: expected a folder with config.json, or such a file, got none"
        assert capsys.readouterr().err == f"peft-kernels: {told}\n"
    (tmp_path / "config.json").write_text("{}")
    assert main(["plan", str(tmp_path)]) == 1
    assert "expected the configuration of a language model" in capsys.readouterr().err
    config_of("llama").save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "--target-modules", "q_prj"]) == 1
    assert "expected names of linear layers, got 'q_prj'" in capsys.readouterr().err


def test_an_adapter_has_no_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "the/base"}')
    assert main(["plan", str(tmp_path)]) == 1
    assert f"{tmp_path}: an adapter, expected a model; its base is the/base" in capsys.readouterr().err


def test_size_units() -> None:
    assert byte_count("24GB") == 24 * 10**9 and byte_count("80GiB") == 80 * 2**30
    assert byte_count("1.5 tb") == 15 * 10**11 and byte_count("512") == 512
    for text in ("0", "0GB", "GB", "-1"):
        with pytest.raises(
            argparse.ArgumentTypeError, match=f"expected a size like 24GB or 80GiB, got '{text}'"
        ):
            byte_count(text)

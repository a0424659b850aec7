"""PEFT on models of NF4Linear layers: injecting, training, saving, merging, without bitsandbytes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn

import peft_kernels as pk
from peft_kernels import testing
from peft_kernels.integrations.peft import merge_and_unload
from peft_kernels.nn import NF4Linear

peft = pytest.importorskip("peft", reason="PEFT is not installed")


def config(**options: Any) -> Any:
    defaults = {"r": 8, "lora_alpha": 16, "target_modules": ["q", "o"], "init_lora_weights": False}
    return peft.LoraConfig(**defaults | options)


def adapted(
    base: str = "nf4", dtype: torch.dtype = torch.bfloat16, patched: bool = True, **options: Any
) -> Any:
    model = models.base_model(base, dtype)
    torch.manual_seed(3)
    model = peft.get_peft_model(model, config(**options))
    if patched:
        pk.patch(model)
    return model


def inputs(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return testing.tensor(33, 64, dtype=dtype)


PATCHED = pytest.mark.parametrize("patched", [True, False], ids=["patched", "plain"])


def test_only_the_adapters_train(capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted()
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 4 and all("lora_" in name for name in trainable)
    model.print_trainable_parameters()
    assert "trainable params: 3,072 || all params: 20,234" in capsys.readouterr().out
    model(inputs()).sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)


@PATCHED
def test_disabling_gives_the_base_model_to_the_bit(patched: bool) -> None:
    base = models.base_model("nf4", torch.bfloat16)
    expected = base(inputs())
    model = adapted(patched=patched)
    assert not torch.equal(model(inputs()), expected)
    with model.disable_adapter():
        assert torch.equal(model(inputs()), expected)


@PATCHED
@pytest.mark.parametrize(("writer", "reader"), [("nf4", "nf4"), ("nf4", "bnb"), ("bnb", "nf4")])
def test_adapters_saved_on_one_base_load_on_another(
    tmp_path: Path, writer: str, reader: str, patched: bool
) -> None:
    model = adapted(writer, torch.float32, patched)
    model.save_pretrained(tmp_path)
    assert {f.name for f in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    other = peft.PeftModel.from_pretrained(models.base_model(reader, torch.float32), tmp_path).train()
    if patched:
        assert not pk.patch(other).original
    x = inputs(torch.float32).requires_grad_()  # so that bitsandbytes does not take its repacking path
    difference = testing.relative_error(other(x), model(x))
    # The double-quantised scales of the two libraries differ in a few entries.
    assert difference == 0 if writer == reader else difference < 5e-3


@PATCHED
@pytest.mark.parametrize("safe", [False, True], ids=["merge", "safe_merge"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merge_and_unload_gives_dense_layers_with_the_same_output(
    dtype: torch.dtype, safe: bool, patched: bool
) -> None:
    model, x = adapted(dtype=dtype, patched=patched), inputs(dtype)
    y = model(x)
    with model.disable_adapter():
        base = model(x)
    merged = model.merge_and_unload(safe_merge=safe)
    for name in ("q", "o"):
        layer = getattr(merged, name)
        assert not isinstance(layer.weight, pk.NF4Weight) and layer.weight.dtype == dtype
        assert type(layer) is nn.Linear
    error, lost = testing.relative_error(merged(x), y), testing.relative_error(base, y)
    assert error < 8 * torch.finfo(dtype).eps < lost / 4, (error, lost)


@PATCHED
@pytest.mark.parametrize("safe", [False, True], ids=["merge", "safe_merge"])
def test_merge_then_unmerge(safe: bool, patched: bool) -> None:
    model, x = adapted(dtype=torch.float32, patched=patched), inputs(torch.float32)
    y = model(x)
    model.merge_adapter(safe_merge=safe)
    assert testing.relative_error(model(x), y) < 1e-6
    model.unmerge_adapter()
    assert testing.relative_error(model(x), y) < 1e-6
    with model.disable_adapter():
        assert testing.relative_error(model(x), y) > 0.1


def test_safe_merge_of_a_broken_adapter_changes_nothing() -> None:
    model = adapted()
    layer = model.base_model.model.q
    packed = layer.base_layer.weight.packed.clone()
    with torch.no_grad():
        layer.lora_B.default.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert isinstance(layer.base_layer, NF4Linear) and torch.equal(layer.base_layer.weight.packed, packed)


def test_merging_one_of_two_adapters() -> None:
    model, x = adapted(dtype=torch.float32), inputs(torch.float32)
    model.add_adapter("other", config(r=4))
    model.set_adapter("other")
    y = model(x)
    merged = model.merge_and_unload(adapter_names=["other"])
    assert testing.relative_error(merged(x), y) < 1e-6


@pytest.mark.parametrize("safe", [False, True], ids=["merge", "safe_merge"])
def test_merging_back_into_nf4_on_request(safe: bool) -> None:
    model, x = adapted(dtype=torch.float32), inputs(torch.float32)
    y = model(x)
    with model.disable_adapter():
        base = model(x)
    dense = copy.deepcopy(model).merge_and_unload()
    merged = merge_and_unload(model, quantize=True, safe_merge=safe)
    for name in ("q", "o"):
        layer = getattr(merged, name)
        assert type(layer) is NF4Linear and not layer.weight.is_dense
        expected = pk.NF4Weight.quantize(getattr(dense, name).weight)
        assert torch.equal(layer.weight.packed, expected.packed)
    error, lost = testing.relative_error(merged(x), y), testing.relative_error(base, y)
    assert error < 0.3 * lost, (error, lost)


def test_merging_a_broken_adapter_back_into_nf4_changes_nothing() -> None:
    model, x = adapted(dtype=torch.float32), inputs(torch.float32)
    layers = model.base_model.model.q, model.base_model.model.o
    with model.disable_adapter():
        base = model(x)
    with torch.no_grad():
        layers[1].lora_A.default.weight[0, 0] = float("inf")
    message = r"model\.o\.lora_A\.default\.weight: expected finite values, got NaN or Inf; nothing is merged"
    with pytest.raises(ValueError, match=message):
        merge_and_unload(model, quantize=True)
    assert not any(layer.merged for layer in layers)
    with model.disable_adapter():
        assert torch.equal(model(x), base)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}], ids=str)
@pytest.mark.filterwarnings("ignore:.*lora_bias=True.*has no bias")
def test_variants_merge_into_nf4_layers(options: dict[str, bool]) -> None:
    model, x = adapted(dtype=torch.float32, target_modules=["q"], **options), inputs(torch.float32)
    y = model(x)
    with model.disable_adapter():
        base = model(x)
    merged = model.merge_and_unload()
    assert testing.relative_error(merged(x), y) < 1e-5 < 1e-2 < testing.relative_error(base, y)


def test_merging_a_patched_bitsandbytes_model() -> None:
    """PEFT quantises the merged weight again; the layer stays a patched Linear4bit."""
    model, x = adapted("bnb", torch.float32), inputs(torch.float32)
    y = model(x)
    with model.disable_adapter():
        base = model(x)
    merged = model.merge_and_unload()
    error, lost = testing.relative_error(merged(x), y), testing.relative_error(base, y)
    assert error < 0.3 * lost, (error, lost)
    assert pk.unpatch(merged) == 2


def test_quantising_a_merged_model_again() -> None:
    merged = adapted().merge_and_unload()
    pk.quantize_model(merged)
    assert type(merged.q) is NF4Linear and isinstance(merged.q.weight, pk.NF4Weight)


def test_unload_without_merging_gives_the_base_back() -> None:
    model = adapted()
    weight = model.base_model.model.q.base_layer.weight
    assert model.unload().q.weight is weight


def test_all_linear_targets_nf4_layers() -> None:
    model = peft.get_peft_model(pk.quantize_model(models.tiny_llama()), config(target_modules="all-linear"))
    assert sum(isinstance(module, peft.tuners.lora.Linear) for module in model.modules()) == 14
    report = pk.patch(model)
    assert len(report.fused) == 28 and not report.original


def test_prepare_model_for_kbit_training_keeps_weights_packed() -> None:
    model = pk.quantize_model(models.tiny_llama().to(torch.bfloat16))
    model = peft.prepare_model_for_kbit_training(model)
    model = peft.get_peft_model(model, config(target_modules="all-linear"))
    pk.patch(model)
    layers = [module for module in model.modules() if isinstance(module, NF4Linear)]
    assert len(layers) == 14 and all(isinstance(layer.weight, pk.NF4Weight) for layer in layers)
    ids = torch.arange(16).view(2, 8)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained)


@pytest.mark.parametrize("init", ["pissa", "olora", "gaussian", "orthogonal"])
def test_initialisations_that_read_or_change_the_base_weight(init: str) -> None:
    """PiSSA and OLoRA subtract the adapter from the base weight, which becomes dense; none may lose that."""
    base = models.base_model("nf4", torch.float32)
    x, expected = inputs(torch.float32), None
    expected = base(x)
    model = peft.get_peft_model(base, config(init_lora_weights=init, lora_alpha=8))
    pk.patch(model)
    changes_base = init in ("pissa", "olora")
    assert isinstance(model.base_model.model.q.base_layer.weight, pk.NF4Weight) is not changes_base
    if init != "orthogonal":  # the others start as the identity
        assert testing.relative_error(model(x), expected) < 1e-4
    with model.disable_adapter():
        if changes_base:
            assert testing.relative_error(model(x), expected) > 0.05
        else:
            assert torch.equal(model(x), expected)


def test_an_initialisation_that_needs_a_view_of_the_weight_raises() -> None:
    with pytest.raises(NotImplementedError, match=r"an NF4 weight has no view of its numbers.*dequantize"):
        peft.get_peft_model(models.base_model("nf4"), config(init_lora_weights="pissa_niter_4"))


def test_trainer_runs_saves_and_resumes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")

    def fresh() -> Any:
        model = pk.quantize_model(models.tiny_llama())
        torch.manual_seed(5)
        model = peft.get_peft_model(model, config(target_modules="all-linear", init_lora_weights=True))
        assert len(pk.patch(model).fused) == 28
        return model

    ids = torch.randint(0, 128, (16, 12), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in ids]

    def trainer(steps: int, folder: Path) -> Any:
        arguments = transformers.TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            save_steps=4,
            logging_steps=1,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=0,
        )
        return transformers.Trainer(model=fresh(), args=arguments, train_dataset=data)

    whole = trainer(8, tmp_path / "whole")
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert len(losses) == 8 and losses[-1] < losses[0] - 0.1

    trainer(4, tmp_path / "parts").train()
    resumed = trainer(8, tmp_path / "parts")
    resumed.train(resume_from_checkpoint=True)
    again = [entry["loss"] for entry in resumed.state.log_history if "loss" in entry]
    assert again == pytest.approx(losses, abs=2e-4)

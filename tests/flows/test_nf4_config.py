"""A model loaded with NF4Config, in PEFT, transformers' Trainer and TRL."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import transformers_models
from flow_checks import Calls, assert_fused
from flow_families import tiny
from flow_models import adapted, arguments, config, ids, llama, logged, tokenizer, trainer, words
from installed import before
from torch import nn

import peft_kernels as pk

NF4Config, read_config = transformers_models.NF4Config, transformers_models.read_config
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
Auto = transformers.AutoModelForCausalLM
STEPS = 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    llama(dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def loaded(folder: Path, made: str = "dense") -> Any:
    """From a dense checkpoint, from an NF4 one of this package, or from one of bitsandbytes."""
    if made == "dense":
        return Auto.from_pretrained(folder, quantization_config=NF4Config(), dtype=torch.bfloat16)
    if made == "bnb":
        options = {"quantization_config": transformers_models.bnb_config(), "dtype": torch.bfloat16}
    else:
        options = {"quantization_config": NF4Config(), "dtype": torch.bfloat16}
    packed = folder.with_name("4bit")
    Auto.from_pretrained(folder, **options).save_pretrained(packed)
    return Auto.from_pretrained(packed, config=read_config(packed))


NEW = pytest.mark.skipif(before("transformers", "5.24"), reason="transformers before 5.24 does not have it")
CUT = ["hrm_text", *(pytest.param(family, marks=NEW) for family in ("lara_mini", "sarvam_moe"))]
"""Families whose checkpoints hold fused tensors that transformers splits into linear layers."""


@pytest.mark.parametrize("family", [*CUT, "hunyuan_v1_moe", "gemma2", "falcon", "opt", "modernbert-decoder"])
def test_families(family: str, tmp_path: Path) -> None:
    """Each layer is packed as by quantize_model, and is the same after saving and loading, also by
    bitsandbytes."""
    tiny(family).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    options = {"quantization_config": NF4Config(), "dtype": torch.bfloat16}
    model = Auto.from_pretrained(tmp_path / "dense", **options)
    other = pk.quantize_model(Auto.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16))
    transformers_models.assert_same_state(model, other)
    model.save_pretrained(tmp_path / "4bit")
    other.save_pretrained(tmp_path / "other")
    for folder in ("4bit", "other"):
        read = Auto.from_pretrained(tmp_path / folder, config=read_config(tmp_path / folder))
        transformers_models.assert_same_state(read, model)
    read.save_pretrained(tmp_path / "again")
    again = Auto.from_pretrained(tmp_path / "again", config=read_config(tmp_path / "again"))
    transformers_models.assert_same_state(again, model)
    if family != "falcon":  # bitsandbytes leaves its linear layers dense
        transformers_models.bnb_config()
        transformers_models.assert_same_state(Auto.from_pretrained(tmp_path / "4bit"), model)
    dense = model.dequantize()
    dense.save_pretrained(tmp_path / "dense-again")
    transformers_models.assert_same_state(Auto.from_pretrained(tmp_path / "dense-again"), dense)


@pytest.mark.parametrize("made", ["dense", "ours", "bnb"])
def test_trainer(made: str, folder: Path, tmp_path: Path) -> None:
    """As in tutorials: prepared, adapted, patched; the same losses as with quantize_model."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    histories = []
    for base in (loaded(folder, made), pk.quantize_model(Auto.from_pretrained(folder, dtype=torch.bfloat16))):
        model = adapted(peft.prepare_model_for_kbit_training(base))
        report = pk.patch(model)
        found = trainer(model, tmp_path / "out", STEPS)
        torch.manual_seed(0)
        found.train()
        assert_fused(model, report, blocks=2)
        histories.append(logged(found))
    assert histories[0] == histories[1] and len(histories[0]) == STEPS


@pytest.mark.parametrize("device_map", [None, "auto"])
def test_sft(device_map: Any, folder: Path, tmp_path: Path) -> None:
    """TRL loads the model from a path and creates the adapter."""
    if importlib.util.find_spec("trl") is None or importlib.util.find_spec("datasets") is None:
        pytest.skip("TRL or datasets is not installed")
    import datasets
    import trl

    tokenizer().save_pretrained(folder)
    rows = [
        {"prompt": words(row[:3]), "completion": " " + words(row[3:7])} for i in range(3) for row in ids(i)
    ]
    options = {"quantization_config": NF4Config(), "dtype": torch.bfloat16, "device_map": device_map}
    made = trl.SFTTrainer(
        model=str(folder),
        args=arguments(trl.SFTConfig, tmp_path / "out", STEPS, max_length=16, model_init_kwargs=options),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=config(),
    )
    report = pk.patch(made.model)
    with Calls() as calls:
        made.train()
    assert calls.fused >= 2 * STEPS
    assert_fused(made.model, report, blocks=2)
    assert all(loss > 0 for loss in logged(made)) and len(logged(made)) == STEPS


def test_training_without_adapters_is_refused(folder: Path, tmp_path: Path) -> None:
    """transformers refuses it for every quantised model, where only norms would train."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    with pytest.raises(ValueError, match="purely quantized models"):
        trainer(loaded(folder), tmp_path / "out", STEPS)


def test_save_and_load_adapters(folder: Path, tmp_path: Path) -> None:
    base = loaded(folder)
    model = adapted(base)
    pk.patch(model)
    model.eval().save_pretrained(tmp_path / "adapter")
    expected = model(input_ids=ids()).logits
    again = peft.PeftModel.from_pretrained(loaded(folder, "ours"), tmp_path / "adapter")
    pk.patch(again)
    assert torch.equal(again(input_ids=ids()).logits, expected)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]], ids=["all", "some"])
@pytest.mark.parametrize("made", ["dense", "ours"])
def test_merge_and_unload(made: str, targets: Any, folder: Path, tmp_path: Path) -> None:
    """Merged layers are dense, the others stay in 4 bits, also when saved."""
    model = adapted(loaded(folder, made), target_modules=targets).eval()
    expected = model(input_ids=ids()).logits.detach().float()
    merged = model.merge_and_unload()
    packed = {name for name, module in merged.named_modules() if isinstance(module, pk.nn.NF4Linear)}
    assert len(packed) == (0 if targets == "all-linear" else 12)
    assert type(merged.model.layers[0].self_attn.q_proj) is nn.Linear
    assert bool(packed) == bool(getattr(merged, "is_loaded_in_4bit", False))
    merged.save_pretrained(tmp_path / "merged")
    options = {"config": read_config(tmp_path / "merged")} if packed else {}
    again = Auto.from_pretrained(tmp_path / "merged", **options)
    got, same = (each(input_ids=ids()).logits.detach().float() for each in (again, merged))
    assert torch.equal(got, same)
    assert (got - expected).abs().max() < 0.05 * expected.abs().max()
    if not packed:
        assert not getattr(merged, "is_quantized", False)
        merged.float()


def test_dequantize_under_adapters(folder: Path) -> None:
    model = adapted(loaded(folder)).eval()
    expected = copy.deepcopy(model)(input_ids=ids()).logits.float()
    model.dequantize()
    assert not any(isinstance(module, pk.nn.NF4Linear) for module in model.modules())
    pk.patch(model)
    got = model(input_ids=ids()).logits.float()
    assert (got - expected).abs().max() < 0.05 * expected.abs().max()

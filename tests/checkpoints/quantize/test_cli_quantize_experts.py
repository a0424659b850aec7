"""`peft-kernels quantize --experts` writes what a model loaded with NF4Config(experts=True) saves."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import moe_models as moe
import pytest
import torch
from checkpoint_damage import change_json, change_tensors
from models import tiny_llama
from moe_checkpoints import expert_modules, items_of, loaded, saved, stored
from transformers_models import NF4Config, assert_same_state, read, same_bits, transformers

from peft_kernels.checkpoints.convert import quantize_checkpoint
from peft_kernels.checkpoints.folder import Checkpoint
from peft_kernels.checkpoints.header import CheckpointError, Entry
from peft_kernels.cli.main import main

SHARD = "30kB"
EXPERTS = "model.layers.1.mlp.experts"


def same_folder(ours: Path, theirs: Path) -> None:
    """Bit for bit."""
    got, expected = items_of(ours), items_of(theirs)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same_bits(got[name], tensor), name
    assert stored(ours) == stored(theirs)


def many_experts() -> Any:
    """Enough experts that their names have two digits."""
    torch.manual_seed(0)
    config = moe.MODELS["qwen3_moe"]()
    config.num_experts = 12
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("kind", [*moe.MODELS, "many"])
def test_equals_save_pretrained_of_a_packed_model(kind: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    if kind == "many":
        many_experts().save_pretrained(source, max_shard_size=SHARD)
    else:
        saved(source, kind, max_shard_size=SHARD)
    done = quantize_checkpoint(source, tmp_path / "ours", experts=True)
    apart = {len(weight.entries) > 1 for weight in done.choice.experts.values()}
    spans = any(len({e.path for e in weight.entries}) > 1 for weight in done.choice.experts.values())
    assert apart == {kind not in ("gpt_oss", "granitemoe")} and spans == apart.pop()
    model = loaded(source)
    model.save_pretrained(tmp_path / "theirs")
    same_folder(tmp_path / "ours", tmp_path / "theirs")
    again = read(tmp_path / "ours")
    assert expert_modules(again).keys() == expert_modules(model).keys() != set()
    assert_same_state(again, model)


def test_remaining_shards_are_renumbered(tmp_path: Path) -> None:
    """Experts of one layer are spread over several files, some of which hold nothing else."""
    many_experts().save_pretrained(tmp_path / "source", max_shard_size=SHARD)
    quantize_checkpoint(tmp_path / "source", tmp_path / "ours", experts=True)
    files = sorted(path.name for path in (tmp_path / "ours").glob("*.safetensors"))
    assert 1 < len(files) < len(list((tmp_path / "source").glob("*.safetensors")))
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    assert not Checkpoint.examine(tmp_path / "ours").faults


def test_blocksize_and_skip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "source", "gpt_oss", torch.bfloat16)
    options = ["--experts", "--blocksize", "32", "--no-double-quant", "--skip", "layers.1.mlp.experts"]
    assert main(["quantize", str(tmp_path / "source"), str(tmp_path / "ours"), *options, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    names = [f"model.layers.0.mlp.experts.{name}" for name in ("down_proj", "gate_up_proj")]
    assert report["experts"] == names and report["left"][EXPERTS] == "named in skip"
    nf4 = {
        "blocksize": 32,
        "double_quant": False,
        "modules_to_not_convert": ["layers.1.mlp.experts", "lm_head"],
    }
    loaded(tmp_path / "source", nf4=nf4, dtype="auto").save_pretrained(tmp_path / "theirs")
    same_folder(tmp_path / "ours", tmp_path / "theirs")


def test_experts_in_another_layout(tmp_path: Path) -> None:
    """Qwen3-VL's files have them transposed."""
    text = moe.SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "intermediate_size": 64}
    text["moe_intermediate_size"] = 64
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    cls = transformers.Qwen3VLMoeForConditionalGeneration
    cls(transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)).save_pretrained(
        tmp_path / "source"
    )
    done = quantize_checkpoint(tmp_path / "source", tmp_path / "ours", experts=True)
    weight = next(iter(done.choice.experts.values()))
    assert weight.converter is not None and len(weight.entries) == 1
    model = cls.from_pretrained(tmp_path / "source", quantization_config=NF4Config(experts=True))
    model.save_pretrained(tmp_path / "theirs")
    same_folder(tmp_path / "ours", tmp_path / "theirs")


@pytest.mark.parametrize(("kind", "most"), [("qwen3_moe", 2), ("gpt_oss", 1)])
def test_one_expert_at_a_time(kind: str, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gate and up of one expert together, where a file stores them separately."""
    saved(tmp_path / "source", kind)
    alive: list[weakref.ref[Any]] = []
    reads, read_entry = [], Entry.read

    def watched(self: Entry) -> torch.Tensor:
        assert sum(ref() is not None for ref in alive) < most
        tensor = read_entry(self)
        reads.append(tensor.nbytes)
        alive.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    monkeypatch.setattr(Entry, "read", watched)
    seen: dict[str, int] = {}
    done = quantize_checkpoint(
        tmp_path / "source", tmp_path / "target", experts=True, progress=seen.__setitem__
    )
    assert max(reads) <= max(w.shape[1] * w.shape[2] * 4 for w in done.choice.experts.values())
    assert (
        sum(seen.values()) == done.bytes_before and seen.keys() == Checkpoint.open(tmp_path / "source").keys()
    )


def test_report_without_the_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = saved(tmp_path / "source", "mixtral", torch.bfloat16)
    experts = sum(t.nbytes for name, t in items_of(source).items() if ".experts." in name)
    assert main(["quantize", str(source), str(tmp_path / "a")]) == 0
    assert "393 kB of experts stay dense: --experts packs them" in capsys.readouterr().out
    assert main(["quantize", str(source), str(tmp_path / "b"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["experts"] == [] and report["experts_dense_bytes"] == experts == 393_216
    assert "bitsandbytes' format does not have" in report["left"][EXPERTS]
    assert stored(tmp_path / "b")["quant_method"] == "bitsandbytes"
    assert main(["quantize", str(source), str(tmp_path / "c"), "--experts"]) == 0
    text = capsys.readouterr().out
    assert "8 linear layers and 4 weights of experts become NF4" in text and "stay dense" not in text


def test_interrupted_run_resumes(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", "olmoe", max_shard_size=SHARD)
    quantize_checkpoint(source, tmp_path / "whole", experts=True)
    names: list[str] = []

    def progress(name: str, nbytes: int) -> None:
        names.append(name)
        if len(names) == 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, tmp_path / "target", experts=True, progress=progress)
    assert not (tmp_path / "target").exists()
    with pytest.raises(CheckpointError, match=r"other settings.*--restart"):
        quantize_checkpoint(source, tmp_path / "target")
    done = quantize_checkpoint(source, tmp_path / "target", experts=True)
    assert done.taken_over
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "target" / path.name).read_bytes(), path.name


# Refused before anything is written


def changed(source: Path, change: Callable[[dict[str, Any]], object]) -> None:
    change_tensors(source / "model.safetensors", change)


PART = f"{EXPERTS}.2.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda items: items.pop(PART), rf"^{EXPERTS}.down_proj: expected 4 experts as .*, got 3"),
        (lambda items: items.update({PART: items[PART][2:].clone()}), rf"^{PART}: expected shape .*\(62"),
        (lambda items: items.update({PART: items[PART].half()}), rf"^{PART}: expected dtype torch.float32"),
        (
            lambda items: [items.pop(key) for key in list(items) if f"{EXPERTS}." in key],
            rf"^{EXPERTS}.gate_up_proj: expected its experts in the checkpoint, got no such tensors",
        ),
        (
            lambda items: [items.pop(key) for key in list(items) if f"{EXPERTS}." in key and ".up_" in key],
            rf"^{EXPERTS}.gate_up_proj: expected shape of an expert \(128, 64\), got \(64, 64\)",
        ),
        (
            lambda items: items.update({f"{EXPERTS}.down_proj": torch.zeros(4, 64, 64)}),
            rf"^{EXPERTS}.down_proj: expected one tensor, or its parts",
        ),
    ],
    ids=["missing", "shape", "dtype", "none", "no up", "twice"],
)  # fmt: skip
def test_mismatched_expert_tensors(change: Any, sentence: str, tmp_path: Path) -> None:
    changed(saved(tmp_path / "source", "qwen3_moe"), change)
    with pytest.raises(CheckpointError, match=sentence):
        quantize_checkpoint(tmp_path / "source", tmp_path / "target", experts=True)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_non_finite_weight(tmp_path: Path) -> None:
    def change(items: dict[str, Any]) -> None:
        items[PART][3, 4] = float("nan")

    changed(saved(tmp_path / "source", "qwen3_moe"), change)
    with pytest.raises(CheckpointError, match=rf"{EXPERTS}\.down_proj\[2\]: expected finite values, got 1"):
        quantize_checkpoint(tmp_path / "source", tmp_path / "target", experts=True)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def llama4() -> Any:
    sizes = moe.SIZES | {"intermediate_size": 64, "intermediate_size_mlp": 64, "num_local_experts": 4}
    config = transformers.Llama4TextConfig(**sizes, head_dim=16)
    return transformers.Llama4ForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [(tiny_llama, "got none in LlamaForCausalLM"), (llama4, r"got none in Llama4.*feed_forward.* none of")],
)
def test_models_without_supported_experts(
    make: Any, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make().save_pretrained(tmp_path / "source")
    options = [str(tmp_path / "source"), str(tmp_path / "target")]
    assert main(["quantize", *options, "--experts"]) == 1
    error = capsys.readouterr().err
    assert re.search(sentence, error), error
    assert {path.name for path in tmp_path.iterdir()} == {"source"}
    assert main(["quantize", *options]) == 0
    assert ("of experts stay dense: they cannot be packed" in capsys.readouterr().out) == (make is llama4)


def test_unknown_architecture(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", "qwen3_moe")
    change_json(source / "config.json", model_type="its_own", architectures=["ItsOwn"])
    with pytest.raises(
        CheckpointError, match=r"experts: expected an architecture that transformers knows .*its_own"
    ):
        quantize_checkpoint(source, tmp_path / "target", experts=True)


def test_experts_in_a_shared_list(tmp_path: Path) -> None:
    """Ernie's text and image experts are in one list."""
    text = moe.SIZES | {"intermediate_size": 64, "moe_num_experts": 4, "moe_k": 2, "head_dim": 16}
    text |= {"moe_intermediate_size": [64, 32]}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 4]}
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32}
    config = transformers.Ernie4_5_VLMoeConfig(text_config=text, vision_config=vision)
    transformers.Ernie4_5_VLMoeForConditionalGeneration(config).save_pretrained(tmp_path / "source")
    with pytest.raises(
        CheckpointError, match="expected experts that can be packed by themselves, got ones that"
    ):
        quantize_checkpoint(tmp_path / "source", tmp_path / "target", experts=True)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}

"""`peft-kernels merge` with bases in other owners' formats: PEFT's merge into the dequantised model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from all_folders import FOLDERS
from checkpoint_damage import change_json, change_tensors
from merge_folders import CAUSAL, adapt, assert_same_tensors, merged_by_peft, peft
from owned_folders import FILE, assert_same_file, stored
from packed_models import gptq
from rounding import ONE_MODEL, ONE_STEP
from safetensors.torch import load_file
from transformers_models import logits, read

import peft_kernels as pk
import testing
from peft_kernels.checkpoints.checks import faults
from peft_kernels.checkpoints.folder import Checkpoint
from peft_kernels.checkpoints.header import CheckpointError, Entry
from peft_kernels.checkpoints.merge import merge_checkpoint
from peft_kernels.checkpoints.owned_entries import PackedEntry, as_dense
from peft_kernels.cli.main import main
from peft_kernels.integrations.peft import merge_and_unload

pytestmark = pytest.mark.filterwarnings("ignore")
Captured = pytest.CaptureFixture[str]


def experts_of(model: Any) -> list[str]:
    return sorted(name for name, p in model.named_parameters() if p.dim() == 3 and name.endswith("_proj"))


def base_and_adapter(kind: str, here: Path, half: bool = False, **options: Any) -> tuple[Path, Path, Path]:
    """A packed folder, its dequantised twin, and an adapter of both. `half`: what is dense is in fp16."""
    base, dense, adapter = here / "base", here / "dense", here / "adapter"
    FOLDERS[kind].write(base)
    if half:
        change_json(base / "config.json", dtype="float16")
        change_tensors(
            base / FILE,
            lambda t: t.update({n: x.half() for n, x in t.items() if x.dtype == torch.bfloat16}),
        )
    model = read(base, dtype="auto")
    model.dequantize()
    model.save_pretrained(dense, max_shard_size="60kB")
    tuned = CAUSAL.from_pretrained(dense)
    targets = ["q_proj", "o_proj"] if experts_of(tuned) else ["q_proj", "down_proj"]
    adapt(tuned, adapter, **{"target_modules": targets, "target_parameters": experts_of(tuned)} | options)
    return base, dense, adapter


@pytest.mark.parametrize("kind", FOLDERS)
def test_equals_peft_merge(kind: str, tmp_path: Path) -> None:
    base, dense, adapter = base_and_adapter(kind, tmp_path)
    expected = merged_by_peft(dense, adapter, tmp_path / "expected")
    done = merge_checkpoint(base, adapter, tmp_path / "out")
    got = Checkpoint.open(tmp_path / "out")
    assert_same_tensors(got, expected)
    assert stored(tmp_path / "out") is None and done.title and done.rounding.share is None
    before = Checkpoint.open(dense)
    assert done.plan.changes.keys() == {name for name in before if not torch.equal(before[name], got[name])}


# Into the format of the base


PACKED = (
    "gptq",
    "gptq v2",
    "gptq symmetric",
    "awq",
    "packed",
    "packed zeros",
    "fp8 static",
    "fp8 rows in fp32",
    "nvfp4 of modelopt",
    "mxfp4",
    "experts in gptq",
    "experts in packed zeros",
)


@pytest.mark.parametrize("kind", PACKED)
def test_packed_again_equals_the_merge_in_memory(kind: str, tmp_path: Path) -> None:
    """Byte for byte; and what the adapter does not change is as it was."""
    half = kind.removeprefix("experts in ").startswith(("gptq", "awq"))
    base, _, adapter = base_and_adapter(kind, tmp_path, half)
    model = peft.PeftModel.from_pretrained(read(base, dtype="auto"), adapter)
    merge_and_unload(model, quantize=True).save_pretrained(tmp_path / "expected")
    done = merge_checkpoint(base, adapter, tmp_path / "out", "packed")
    assert_same_file(tmp_path / "out", load_file(tmp_path / "expected" / FILE))
    assert stored(tmp_path / "out") == stored(base) and not list(faults(Checkpoint.open(tmp_path / "out")))
    before, after = load_file(base / FILE), load_file(tmp_path / "out" / FILE)
    changed = {name for name in before if not torch.equal(*(_bits(t[name]) for t in (before, after)))}
    stems = tuple(name.removesuffix("weight") for name in done.plan.changes)
    assert changed and all(name.startswith(stems) for name in changed)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize("kind", ["experts in nvfp4 of modelopt", "experts in gptq", "mxfp4"])
def test_experts_packed_again(kind: str, tmp_path: Path) -> None:
    """Each layer as its dense merge, packed alone; and the loss is told."""
    base, _, adapter = base_and_adapter(kind, tmp_path)
    merge_checkpoint(base, adapter, tmp_path / "dense out")
    done = merge_checkpoint(base, adapter, tmp_path / "out", "packed")
    was, dense, again = (as_dense(Checkpoint.open(tmp_path / n)) for n in ("base", "dense out", "out"))
    error = change = 0.0
    for name in done.plan.changes:
        entry = again.entries[name]
        if not isinstance(entry, PackedEntry):  # attention of GPT-OSS
            assert torch.equal(again[name], dense[name])
            continue
        turned = dense[name].mT.contiguous() if entry.transposed else dense[name]
        state = entry.state()[0]
        turned = turned.half() if state.format == "int4" else turned  # which has scales in fp16 here
        expected = pk.NF4Weight.quantize(turned, state.blocksize, state.double_quant, format=state.format)
        assert torch.equal(state.packed, expected._state.packed), name
        assert torch.equal(state.dequantize(torch.float32), expected._state.dequantize(torch.float32)), name
        error += float((again[name].double() - dense[name].double()).square().sum())
        change += float((dense[name].double() - was[name].double()).square().sum())
    assert done.rounding.share == pytest.approx((error / change) ** 0.5, rel=ONE_STEP)
    # The model loads, and computes what its weights say.
    found, truth = read(tmp_path / "out", dtype=torch.float32), read(tmp_path / "out", dtype=torch.float32)
    truth.dequantize()
    assert testing.relative_error(logits(found), logits(truth)) < ONE_MODEL


HOLDS_NOT = {
    "fp8": "weight_scale_inv: expected scales that torch.bfloat16 of shape",
    "fp8 tensor": "weight_scale: expected scales that torch.bfloat16 of shape (1,) can hold",
    "awq rows": "scales: expected one value for each group of the file, got a weight that was packed again",
    "nvfp4 of compressed-tensors": "weight_global_scale: expected the scale of the file, got a weight",
}


@pytest.mark.parametrize("kind", HOLDS_NOT)
def test_formats_that_cannot_hold_new_scales(kind: str, tmp_path: Path, capsys: Captured) -> None:
    base, _, adapter = base_and_adapter(kind, tmp_path)
    out = tmp_path / "results" / "out"
    out.parent.mkdir()
    assert main(["merge", str(base), str(adapter), str(out), "--format", "packed"]) == 1
    assert HOLDS_NOT[kind] in capsys.readouterr().err and not list(out.parent.iterdir())


# What is refused, and the command


def damaged(name: str, change: Any) -> Any:
    return lambda base: change_tensors(base / FILE, lambda t: t.update({name: change(t[name])}))


Q = "model.layers.0.self_attn.q_proj."
REFUSED: dict[str, tuple[str, Any, str]] = {
    "no scales": (
        "gptq",
        lambda base: change_tensors(base / FILE, lambda t: t.pop(f"{Q}scales")),
        f"{Q}scales: expected this tensor of a packed weight, got none",
    ),
    "act-order": (
        "gptq",
        damaged(f"{Q}g_idx", lambda x: x.flip(0)),
        f"{Q}g_idx: expected groups of consecutive input features",
    ),
    "NaN scale": (
        "awq",
        damaged(f"{Q}scales", lambda x: x.fill_(torch.nan)),
        f"{Q}scales: expected finite scales, got 128 NaN or Inf among 128",
    ),
    "NaN code": (
        "fp8 static",
        damaged(f"{Q}weight", lambda x: x.view(torch.uint8).fill_(127).view(x.dtype)),
        f"{Q}weight: expected codes of finite values",
    ),
    "other shape": (
        "awq",
        damaged(f"{Q}qweight", lambda x: x[:, :4].contiguous()),
        f"{Q}scales: expected shape (2, 32), got (2, 64)",
    ),
    "no layer": (
        "nvfp4 of modelopt",
        lambda base: change_tensors(base / FILE, lambda t: [t.pop(n) for n in [*t] if n.startswith(Q)]),
        f"{Q}weight: expected this tensor, as LlamaForCausalLM has it, got none",
    ),
    "no layer of an expert": (
        "experts in awq",
        lambda base: change_tensors(base / FILE, lambda t: [t.pop(n) for n in [*t] if ".experts.2.up" in n]),
        "model.layers.0.mlp.experts.gate_up_proj",
    ),
    "nothing packed": (
        "gptq",
        lambda base: change_tensors(base / FILE, lambda t: [t.pop(n) for n in [*t] if "proj" in n]),
        "config.json: expected weights in GPTQ, as its quantization_config says, got none",
    ),
    "another variant": (
        "gptq",
        lambda base: change_json(base / "config.json", quantization_config=stored(base) | {"bits": 3}),
        "bits: expected 4 or 8, for GPTQ, got 3",
    ),
    "another method": (
        "gptq",
        lambda base: change_json(base / "config.json", quantization_config={"quant_method": "hqq"}),
        "expected a base that is dense or in a format that is read packed, got one quantised by hqq",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("form", ["dense", "packed"])
def test_refused(what: str, form: str, tmp_path: Path) -> None:
    kind, change, expected = REFUSED[what]
    base, _, adapter = base_and_adapter(kind, tmp_path)
    change(base)
    out = tmp_path / "results" / "out"
    out.parent.mkdir()
    with pytest.raises(CheckpointError) as caught:
        merge_checkpoint(base, adapter, out, form)
    assert expected in str(caught.value) and not list(out.parent.iterdir())


def test_experts_that_differ(tmp_path: Path) -> None:
    """In their groups: loading refuses them, since one packed weight cannot have them. A dense one can."""
    base, _, adapter = base_and_adapter("experts in gptq", tmp_path, target_parameters=[])
    name = "model.layers.0.mlp.experts.1.up_proj."
    parts, values = gptq(128, 128, 64)
    change_tensors(base / FILE, lambda t: t.update({name + part: tensor for part, tensor in parts.items()}))
    with pytest.raises(ValueError, match=r"1\.up_proj\.weight: expected shape \(128, 128\) in blocks of 32"):
        read(base)
    merge_checkpoint(base, adapter, tmp_path / "out")
    assert torch.equal(Checkpoint.open(tmp_path / "out")[f"{name}weight"], values.bfloat16())


def test_command(tmp_path: Path, capsys: Captured) -> None:
    """The loss is told, and files that say how the base is packed are left out of a dense model."""
    base, _, adapter = base_and_adapter("gptq", tmp_path)
    for name in ("quantize_config.json", "tokenizer.json"):
        (base / name).write_text("{}")
    arguments = "merge", str(base), str(adapter)
    assert main([*arguments, str(tmp_path / "dense out")]) == 0
    text = capsys.readouterr().out
    assert "GPTQ becomes dense: repacking (--format packed) can lose most of what was trained" in text
    assert "or say how BASE is packed: quantize_config.json" in text
    assert not (tmp_path / "dense out" / "quantize_config.json").exists()
    assert main([*arguments, str(tmp_path / "out"), "--format", "packed", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["format"], report["base"]) == ("packed", "GPTQ") and report["rounding"] > 0.01
    assert report["bytes_before"] == report["bytes_after"] and "quantize_config.json" in report["copied"]
    assert main([*arguments, str(tmp_path / "other"), "--format", "nf4"]) == 1
    assert "form: expected dense or packed, for a base in GPTQ, got nf4" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "out")]) == main(["inspect", str(tmp_path / "dense out")]) == 0


def test_rounding_to_8_bits(tmp_path: Path, capsys: Captured) -> None:
    base, _, adapter = base_and_adapter("fp8 static", tmp_path)
    assert main(["merge", str(base), str(adapter), str(tmp_path / "out"), "--format", "packed"]) == 0
    assert "rounding to 8 bits changed the merged weights by 0." in capsys.readouterr().out


def test_one_expert_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the packed base; each byte of it is read once."""
    base, _, adapter = base_and_adapter("mxfp4", tmp_path)
    entries, read_of, sizes = Checkpoint.open(base).entries, Entry.read, dict[str, list[int]]()

    def watched(self: Entry) -> torch.Tensor:
        if not isinstance(self, PackedEntry) and self.path.parent == base:
            sizes.setdefault(self.name, []).append(self.nbytes)
        return read_of(self)

    monkeypatch.setattr(Entry, "read", watched)
    merge_checkpoint(base, adapter, tmp_path / "out")
    packed = [name for name in entries if name.endswith(("_blocks", "_scales"))]
    assert len(packed) == 8 and all(sizes[name] == [entries[name].nbytes // 4] * 4 for name in packed)

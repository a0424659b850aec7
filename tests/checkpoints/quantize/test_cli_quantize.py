"""`peft-kernels quantize` writes the folder that bitsandbytes would, completely or not at all."""

from __future__ import annotations

import json
import shutil
import signal
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_damage import change_json
from fresh_process import Python
from models import tiny_llama

import peft_kernels as pk
from peft_kernels.checkpoints import convert
from peft_kernels.checkpoints.convert import quantize_checkpoint
from peft_kernels.checkpoints.folder import Checkpoint
from peft_kernels.checkpoints.header import CheckpointError
from peft_kernels.cli.main import main
from peft_kernels.core.code_tables import dynamic_map

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
SHARD = "100KB"


def saved(model: Any, folder: Path, **options: Any) -> Path:
    model.to(torch.bfloat16).save_pretrained(folder, **options)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A Llama in two shards, with the other files of a model."""
    folder = saved(tiny_llama(), tmp_path / "source", max_shard_size=SHARD)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_templates").mkdir()
    (folder / "chat_templates" / "tool.jinja").write_text("x")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "junk").write_text("x")
    (folder / "pytorch_model.bin").write_text("weights again")
    return folder


def tiny_gpt2(**_: Any) -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=128, n_positions=64, n_embd=64, n_layer=2, n_head=4)
    )


def tiny_qwen2(**_: Any) -> Any:
    config = tiny_llama().config.to_dict() | {"model_type": "qwen2", "tie_word_embeddings": True}
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config.from_dict(config))


def tiny_mixtral(**_: Any) -> Any:
    """Experts are separate weights in the file and one parameter in the model, which stays dense."""
    config = transformers.MixtralConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def tiny_classifier(**_: Any) -> Any:
    config = tiny_llama().config
    config.num_labels = 3
    return transformers.LlamaForSequenceClassification(config)


def bnb_config(**changes: Any) -> Any:
    import transformers_models

    return transformers_models.bnb_config(**changes)


def stored(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def same_tensors(ours: Path, theirs: Path) -> None:
    """Bit for bit, but bitsandbytes' CPU kernel may pick a neighbouring code, or one in the same bin."""
    a, b = Checkpoint.open(ours), Checkpoint.open(theirs)
    assert a.keys() == b.keys()
    scales = wrong = 0
    for name in a:
        if name.endswith(".absmax"):
            scales, wrong = scales + a[name].numel(), wrong + int((a[name] != b[name]).sum())
            i, j = a[name].int(), b[name].int()
            apart = dynamic_map(i.device)[i] - dynamic_map(i.device)[j]
            assert (((i - j).abs() <= 1) | (apart.abs() <= 2 / 65536)).all()
        elif "quant_state" in name:
            assert json.loads(bytes(a[name].tolist())) == json.loads(bytes(b[name].tolist()))
        else:
            assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name
    assert wrong <= 0.01 * scales


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_qwen2, tiny_mixtral, tiny_classifier])
def test_equals_transformers_with_bitsandbytes(make: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    source = saved(make(), tmp_path / "source", max_shard_size=SHARD)
    quantize_checkpoint(source, tmp_path / "ours")
    Auto = transformers.AutoModelForCausalLM
    skipped = {}
    if make is tiny_classifier:  # bitsandbytes packs the last module of the head, we pack none
        Auto, skipped = transformers.AutoModelForSequenceClassification, {"llm_int8_skip_modules": ["score"]}
    theirs = Auto.from_pretrained(source, quantization_config=bnb_config(**skipped))
    theirs.save_pretrained(tmp_path / "theirs")
    same_tensors(tmp_path / "ours", tmp_path / "theirs")
    written, expected = (stored(tmp_path / name) for name in ("ours", "theirs"))
    assert written.keys() == expected.keys()
    assert [key for key in written if written[key] != expected[key]] in ([], ["llm_int8_skip_modules"])
    ours = Auto.from_pretrained(tmp_path / "ours")
    layers = {name for name, module in ours.named_modules() if type(module).__name__ == "Linear4bit"}
    assert layers == {n for n, m in theirs.named_modules() if type(m).__name__ == "Linear4bit"} and layers
    ids = torch.arange(2, 34)[None]
    kwargs = {"input_ids": ids, **({} if make is not tiny_classifier else {"attention_mask": ids > 0})}
    if make is tiny_classifier:
        ours.config.pad_token_id = theirs.config.pad_token_id = 0
    error = (ours(**kwargs).logits - theirs(**kwargs).logits).float().norm() / theirs(**kwargs).logits.norm()
    assert error < 0.05


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("blocksize, kind", [(128, "nf4"), (64, "fp4")])
def test_other_forms_load_in_bitsandbytes(
    blocksize: int, kind: str, double_quant: bool, source: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    options = ["--blocksize", str(blocksize), "--format", kind]
    options += [] if double_quant else ["--no-double-quant"]
    assert main(["quantize", str(source), str(tmp_path / "ours"), *options]) == 0
    assert main(["inspect", str(tmp_path / "ours")]) == 0
    config = stored(tmp_path / "ours")
    assert config["bnb_4bit_quant_type"] == kind
    assert config.get("bnb_4bit_blocksize", 64) == blocksize  # as NF4Config writes it
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    weight = model.model.layers[1].mlp.down_proj.weight
    state = weight.quant_state
    assert (state.quant_type, state.blocksize, state.nested) == (kind, blocksize, double_quant)
    dense = Checkpoint.open(source)["model.layers.1.mlp.down_proj.weight"]
    expected = pk.NF4Weight.quantize(dense, blocksize, double_quant, format=kind)
    assert torch.equal(pk.NF4Weight.from_bnb(weight).dequantize(), expected.dequantize())


def test_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "target"
    assert main(["quantize", str(source), str(target), "--json", "--skip", "down_proj"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (
        len(report["quantised"]) == 12 and report["left"]["model.layers.0.mlp.down_proj"] == "named in skip"
    )
    assert report["chosen_by"] == "LlamaForCausalLM of transformers" and not report["taken_over"]
    tensors = Checkpoint.open(target).entries.values()
    assert report["bytes_after"] == sum(entry.nbytes for entry in tensors) < report["bytes_before"] == 156_288
    found = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    shards = {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    others = {"config.json", "generation_config.json", "tokenizer.json", "chat_templates/tool.jinja"}
    assert found == shards | others | {"model.safetensors.index.json"}
    skipped = stored(target)["llm_int8_skip_modules"]
    assert skipped == ["lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert not list(tmp_path.glob(".*"))
    assert main(["inspect", str(target)]) == 0
    assert "no faults found" in capsys.readouterr().out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


KILLED = """
import os, signal, sys

sys.modules["transformers"] = None  # to import it takes seconds; names and shapes tell the same here
from peft_kernels.checkpoints.convert import quantize_checkpoint

def progress(name, nbytes):
    if name == {last!r}:
        os.kill(os.getpid(), signal.SIGKILL)

quantize_checkpoint({source!r}, {target!r}, progress=progress)
"""


def test_killed_run_resumes(tmp_path: Path, python: Python) -> None:
    model = tiny_llama(num_key_value_heads=4)
    source = saved(model, tmp_path / "source", max_shard_size=SHARD)
    whole, target = tmp_path / "whole", tmp_path / "target"
    quantize_checkpoint(source, whole)
    checkpoint = Checkpoint.open(source)
    last = list(checkpoint.of_file(checkpoint.files[1]))[3]
    code = KILLED.format(last=last, source=str(source), target=str(target))
    root = Path(pk.__file__).parent.parent
    assert python._processes.run(code, root, {}).returncode == -signal.SIGKILL
    assert not target.exists()
    work = tmp_path / ".target.partial"
    first = work / "model" / checkpoint.files[0].name
    assert sorted(path.name for path in (work / "model").iterdir()) == [
        checkpoint.files[0].name, f"{checkpoint.files[1].name}.tmp",
    ]  # fmt: skip
    before = first.stat()
    done = quantize_checkpoint(source, target)
    assert done.taken_over == [checkpoint.files[0].name]
    after = (target / checkpoint.files[0].name).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert contents(target) == contents(whole) and not work.exists()


class Stopped(Exception):
    pass


def interrupted(source: Path, target: Path, after: int = 1, **options: Any) -> None:
    """Interrupts a run after this many shards."""
    checkpoint = Checkpoint.open(source)
    last = next(iter(checkpoint.of_file(checkpoint.files[after])))

    def progress(name: str, nbytes: int) -> None:
        if name == last:
            raise Stopped

    with pytest.raises(Stopped):
        quantize_checkpoint(source, target, progress=progress, **options)


def test_other_settings_do_not_mix_with_an_interrupted_run(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    interrupted(source, target)
    with pytest.raises(CheckpointError, match=r"other settings.*--restart"):
        quantize_checkpoint(source, target, blocksize=128)
    done = quantize_checkpoint(source, target, blocksize=128, restart=True)
    assert not done.taken_over and not (tmp_path / ".target.partial").exists()
    assert len(Checkpoint.open(target)["model.layers.0.mlp.up_proj.weight.absmax"]) == 96 * 64 // 128


def test_changed_source_is_refused(source: Path, tmp_path: Path) -> None:
    interrupted(source, tmp_path / "target")
    saved(tiny_llama(), source, max_shard_size=SHARD)
    with pytest.raises(CheckpointError, match="another source"):
        quantize_checkpoint(source, tmp_path / "target")


def test_run_that_failed_before_its_first_shard_leaves_nothing(source: Path, tmp_path: Path) -> None:
    interrupted(source, tmp_path / "target", after=0)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_concurrent_runs(source: Path, tmp_path: Path) -> None:
    errors = []

    def second(name: str, nbytes: int) -> None:
        if not errors:
            with pytest.raises(CheckpointError, match="another run is at work") as caught:
                quantize_checkpoint(source, tmp_path / "target")
            errors.append(caught)

    quantize_checkpoint(source, tmp_path / "target", progress=second)
    assert errors and Checkpoint.open(tmp_path / "target")


def test_existing_destination_is_not_changed(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    assert main(["quantize", str(source), str(target)]) == 1
    assert "expected a path where nothing is yet" in capsys.readouterr().err
    assert not list(target.iterdir()) and not list(tmp_path.glob(".*"))
    with pytest.raises(CheckpointError, match="expected a folder to write into"):
        quantize_checkpoint(source, tmp_path / "no" / "target")


def test_quantised_source_is_refused(source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "once")
    with pytest.raises(CheckpointError, match=r"once: expected a dense model.*bitsandbytes"):
        quantize_checkpoint(tmp_path / "once", tmp_path / "twice")
    change_json(tmp_path / "once" / "config.json", lambda config: config.pop("quantization_config"))
    with pytest.raises(CheckpointError, match=r"proj\.weight: expected a dense weight"):
        quantize_checkpoint(tmp_path / "once", tmp_path / "twice")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "once"}


def test_too_little_space_is_reported_before_writing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: usage(10**6, 0, 80_000))
    with pytest.raises(CheckpointError, match=r"expected 9.*e-05 GB of free space .* got 8e-05 GB"):
        quantize_checkpoint(source, tmp_path / "target")
    assert {path.name for path in tmp_path.iterdir()} == {"source"}
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: usage(10**6, 0, 110_000))
    quantize_checkpoint(source, tmp_path / "target")


def test_unmatched_skip_name_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'dwn_proj', which fits none; near it .*down_proj"):
        quantize_checkpoint(source, tmp_path / "target", skip=["dwn_proj"])


def test_unknown_architecture_by_names_and_shapes(source: Path, tmp_path: Path) -> None:
    """A Llama under another name: the same choice as by classes, and a note says so."""
    known = quantize_checkpoint(source, tmp_path / "known")
    unknown = tmp_path / "unknown"
    shutil.copytree(source, unknown)
    change_json(unknown / "config.json", model_type="its_own", architectures=["ItsOwnForCausalLM"])
    done = quantize_checkpoint(unknown, tmp_path / "target")
    # k_proj and v_proj of this tiny model, (32, 64), are too small to be recognised.
    small = {name for name in known.choice.quantise if "k_proj" in name or "v_proj" in name}
    assert done.choice.quantise.keys() == known.choice.quantise.keys() - small
    assert "names and shapes" in done.choice.source and "its_own" in done.choice.source
    assert "lm_head" in done.choice.skip_modules
    with pytest.raises(CheckpointError, match="'nothing', which fits none"):
        quantize_checkpoint(unknown, tmp_path / "other", skip=["nothing"])


@pytest.mark.parametrize("architectures", [None, ["LlamaWithMore"]])
def test_head_stays_dense_where_only_the_base_is_known(
    architectures: Any, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Otherwise bitsandbytes' loaders make a 4-bit layer of it, which cannot compute."""
    change_json(source / "config.json", architectures=architectures)
    assert main(["quantize", str(source), str(tmp_path / "target")]) == 0
    text = capsys.readouterr().out
    assert "14 linear layers" in text and "1 left (lm_head): a head, it seems, which LlamaModel lacks" in text
    written = stored(tmp_path / "target")
    assert written["llm_int8_skip_modules"] == ["lm_head"]
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "target")
    assert type(model.lm_head) is torch.nn.Linear


def test_symbolic_links_are_copied_as_files(source: Path, tmp_path: Path) -> None:
    """The Hub's cache consists of symbolic links."""
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in source.iterdir():
        if path.is_file():
            (linked / path.name).symlink_to(path)
    quantize_checkpoint(linked, tmp_path / "target")
    assert not any(path.is_symlink() for path in (tmp_path / "target").iterdir())
    (linked / "notes.md").symlink_to("nowhere.md")
    with pytest.raises(CheckpointError, match=r"notes\.md: expected a file to copy, got a broken link"):
        quantize_checkpoint(linked, tmp_path / "other", progress=lambda *_: pytest.fail("too late"))
    assert {path.name for path in tmp_path.iterdir()} == {"source", "linked", "target"}


def test_safetensors_format(source: Path, tmp_path: Path) -> None:
    """As read by the safetensors library, with every tensor aligned to its dtype."""
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    quantize_checkpoint(source, tmp_path / "target")
    checkpoint = Checkpoint.open(tmp_path / "target")
    for file in checkpoint.files:
        theirs = safetensors.load_file(file)
        assert theirs.keys() == checkpoint.of_file(file).keys()
        for name, entry in checkpoint.of_file(file).items():
            assert entry.begin % entry.dtype.itemsize == 0
            assert torch.equal(theirs[name], checkpoint[name])


def test_result_loads_without_bitsandbytes_and_transformers(source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "target")
    model = pk.quantize_model(tiny_llama().to(torch.bfloat16))
    pk.load_checkpoint(model, tmp_path / "target")
    expected = pk.quantize_model(transformers.AutoModelForCausalLM.from_pretrained(source))
    got, want = model.state_dict(), expected.state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)

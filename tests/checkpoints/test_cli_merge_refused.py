"""`peft-kernels merge` refuses invalid folders with a sentence that names the fault, and writes nothing."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_damage import change_tensors
from merge_folders import CAUSAL, adapt, edit_config, saved
from models import tiny_llama

from peft_kernels.checkpoints import convert, destination
from peft_kernels.checkpoints.convert import quantize_checkpoint
from peft_kernels.checkpoints.folder import Checkpoint
from peft_kernels.checkpoints.header import CheckpointError
from peft_kernels.checkpoints.merge import merge_checkpoint
from peft_kernels.cli.main import main

pytestmark = pytest.mark.filterwarnings("ignore")

A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")
NAN = float("nan")


@dataclass
class Folders:
    base: Path
    adapter: Path

    @property
    def weights(self) -> Path:
        return self.adapter / "adapter_model.safetensors"

    def of_base(self, name: str) -> Path:
        return Checkpoint.open(self.base).entries[name].path


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("originals")
    base = saved(tiny_llama(), here / "base")
    adapt(CAUSAL.from_pretrained(base), here / "adapter")
    return here


@pytest.fixture
def folders(originals: Path, tmp_path: Path) -> Folders:
    for name in ("base", "adapter"):
        shutil.copytree(originals / name, tmp_path / name)
    return Folders(tmp_path / "base", tmp_path / "adapter")


def config(**changes: Any) -> Callable[[Folders], None]:
    return lambda folders: edit_config(folders.adapter, **changes)


def base_config(**changes: Any) -> Callable[[Folders], None]:
    return lambda folders: edit_config(folders.base, **changes)


def tensors(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Folders], None]:
    return lambda folders: change_tensors(folders.weights, edit)


def base_tensor(name: str, edit: Callable[[Any], Any]) -> Callable[[Folders], None]:
    def change(folders: Folders) -> None:
        change_tensors(folders.of_base(name), lambda found: found.update({name: edit(found[name])}))

    return change


def set_last(value: float) -> Callable[[Any], Any]:
    def edit(tensor: Any) -> Any:
        tensor.view(-1)[-1] = value
        return tensor

    return edit


def renamed(new: str) -> Callable[[dict[str, Any]], Any]:
    return lambda found: found.update({new: found.pop(A)})


def only_bin(folders: Folders) -> None:
    folders.weights.rename(folders.adapter / "adapter_model.bin")


def without_base_tensor(folders: Folders) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    file = folders.of_base(name)
    (folders.base / "model.safetensors.index.json").unlink()
    change_tensors(file, lambda found: found.pop(name))


UP = "model.layers.1.mlp.up_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
REFUSED: dict[str, tuple[Callable[[Folders], Any], str]] = {
    # Adapters that cannot be merged
    "other-method": (config(peft_type="IA3"), r"expected peft_type 'LORA', got IA3; merge it with PEFT's"),
    "alora": (config(alora_invocation_tokens=[1]), r"alora_invocation_tokens: .* some tokens of a sequence"),
    "arrow": (config(arrow_config={"top_k": 2}), r"arrow_config: .* token by token"),
    "tokens": (config(trainable_token_indices=[1]), r"trainable_token_indices: .* rows of embeddings"),
    "replicated": (config(layer_replication=[[0, 2]]), r"layer_replication: .* layers that the base lacks"),
    "pissa": (config(init_lora_weights="pissa"), r"leaves the base as it is, got pissa .*initial_model"),
    "bias": (config(bias="some"), r"bias: expected 'none', 'all' or 'lora_only', got some"),
    "names": (config(modules_to_save=[1]), r"modules_to_save: expected a list of names, got \[1\]"),
    "pattern": (config(alpha_pattern={"(a|a)*b\\1": 2}), r"alpha_pattern: "),
    # The adapter's tensors
    "no-safetensors": (only_bin, r"expected adapter_model.safetensors, got none; save_pretrained"),
    "rank": (
        config(r=8),
        r"1\.self_attn\.q_proj: expected r=8 as adapter_config.json has it, got 4|expected r=8",
    ),
    "half": (tensors(lambda found: found.pop(B)), r"layers\.1\.self_attn\.q_proj: expected a, b, got a$"),
    "layer-gone": (
        tensors(lambda found: (found.pop(A), found.pop(B))),
        r"expected an adapter for model\.layers\.1\.self_attn\.q_proj, as target_modules has it, got none",
    ),
    "no-magnitude": (config(use_dora=True), r"expected a, b, magnitude, got a, b"),
    "nan": (
        tensors(lambda found: found.update({B: set_last(NAN)(found[B])})),
        r"q_proj\.lora_B\.weight: .*finite",
    ),
    "shape": (
        tensors(lambda found: found.update({A: found[A][:, :60].clone()})),
        r"q_proj: expected an adapter for a weight of shape \(64, 64\), got one for \(64, 60\)",
    ),
    "ranks-differ": (
        tensors(lambda found: found.update({B: found[B][:, :3].clone()})),
        r"lora_B\.weight: expected shape \(64, 4\), got \(64, 3\)",
    ),
    "dtype": (
        tensors(lambda found: found.update({A: found[A].int()})),
        r"expected a matrix of fp32, bf16 or fp16, got torch\.int32",
    ),
    "conv": (
        tensors(lambda found: found.update({A: found[A][:, :, None]})),
        r"lora_A\.weight: expected a matrix",
    ),
    "other-layer": (
        tensors(
            lambda found: [
                found.update({key.replace("layers.1", "layers.7"): found[key].clone()}) for key in (A, B)
            ]
        ),
        r"layers\.7\.self_attn\.q_proj: expected a layer of LlamaForCausalLM",
    ),
    "other-prefix": (tensors(renamed("model" + A)), r"expected a name that starts with base_model\.model\."),
    "unknown-part": (
        tensors(renamed(A.replace("lora_A", "lora_C"))),
        r"lora_C\.weight: expected a part of LoRA or DoRA",
    ),
    "stray": (
        tensors(lambda found: found.update({"base_model.model.model.norm.weight": torch.ones(64)})),
        r"model\.norm\.weight: expected LoRA, a tensor of modules_to_save, an embedding",
    ),
    "saved-gone": (
        config(modules_to_save=["lm_head"]),
        r"expected lm_head\.weight, as modules_to_save has it, got none",
    ),
    "resized": (
        tensors(
            lambda found: found.update({"base_model.model.model.embed_tokens.weight": torch.ones(130, 64)})
        ),
        r"embed_tokens\.weight: expected shape \(128, 64\), as the base has it, got \(130, 64\) \(a vocab",
    ),
    "new-head": (
        lambda folders: (
            edit_config(folders.adapter, modules_to_save=["score"]),
            change_tensors(
                folders.weights,
                lambda found: found.update({"base_model.model.score.weight": torch.ones(3, 64)}),
            ),
        ),
        r"score\.weight: expected a tensor that the base has, too, .*LlamaForCausalLM; give the folder of",
    ),
    "bias-gone": (
        lambda folders: (
            edit_config(folders.adapter, lora_bias=True),
            change_tensors(
                folders.weights,
                lambda found: found.update(
                    {key.replace("weight", "bias"): torch.ones(64) for key in list(found) if "lora_B" in key}
                ),
            ),
        ),
        r"down_proj\.bias: expected a tensor of this name in LlamaForCausalLM, got none",
    ),
    # The base
    "no-weight": (
        without_base_tensor,
        r"q_proj\.weight: expected a tensor of this name in LlamaForCausalLM, got none",
    ),
    "gptq": (
        base_config(quantization_config={"quant_method": "gptq"}),
        r"expected a base that is dense or in a format that is read packed, got one quantised by gptq "
        r"\(bits: expected 4 or 8, for GPTQ, got None\)",
    ),
    "int8": (
        base_config(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        r"got one quantised by bitsandbytes",
    ),
    "fp8": (
        base_tensor(DOWN, lambda found: found.to(torch.float8_e4m3fn)),
        r"down_proj\.weight: expected float32, bfloat16 or float16, got torch\.float8_e4m3fn",
    ),
    "base-nan": (base_tensor(UP, set_last(NAN)), r"up_proj\.weight: 1 of 6144 values are NaN or Inf"),
    "base-inf": (
        base_tensor(DOWN, set_last(float("inf"))),
        r"down_proj\.weight: expected finite values after merging, got NaN or Inf",
    ),
    "no-config": (
        lambda folders: (folders.base / "config.json").unlink(),
        r"expected a model's folder with a config\.json",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, folders: Folders, tmp_path: Path) -> None:
    spoil, message = REFUSED[case]
    spoil(folders)
    with pytest.raises(CheckpointError, match=message):
        merge_checkpoint(folders.base, folders.adapter, tmp_path / "out", partial=case == "no-weight")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_base_without_a_tensor(folders: Folders, tmp_path: Path) -> None:
    """A tensor that the adapter does not change."""
    file = folders.of_base(UP)
    (folders.base / "model.safetensors.index.json").unlink()
    change_tensors(file, lambda found: found.pop(UP))
    with pytest.raises(CheckpointError, match=rf"{UP}.*\(--partial merges into what is there\)"):
        merge_checkpoint(folders.base, folders.adapter, tmp_path / "out")
    merge_checkpoint(folders.base, folders.adapter, tmp_path / "out", partial=True)
    assert UP not in Checkpoint.open(tmp_path / "out")


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_lora_on_one_of_two_tied_weights(target: str, tmp_path: Path) -> None:
    """A merge would change the other weight too; PEFT merges here, with a warning."""
    base = saved(tiny_llama(tie_word_embeddings=True), tmp_path / "base")
    adapt(CAUSAL.from_pretrained(base), tmp_path / "adapter", target_modules=["q_proj", target])
    with pytest.raises(
        CheckpointError, match=rf"{target}\.weight: expected a weight of its own, got one that"
    ):
        merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")


def test_fp16_overflow(tmp_path: Path) -> None:
    base = saved(tiny_llama(), tmp_path / "base", torch.float16)
    model = adapt(CAUSAL.from_pretrained(base), tmp_path / "adapter")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "1.mlp.down_proj.lora" in name:
                parameter.fill_(300.0)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"down_proj\.weight: expected finite values after merging"):
        merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_output_options(folders: Folders, tmp_path: Path, capsys: Any) -> None:
    paths = [str(folders.base), str(folders.adapter)]
    assert main(["merge", *paths, str(tmp_path / "out"), "--format", "nf4"]) == 1
    assert "expected a base in NF4 to merge into NF4, got a dense one" in capsys.readouterr().err
    assert main(["merge", *paths, str(tmp_path / "out"), "--format", "packed"]) == 1
    assert "expected a base in a packed form to merge into a packed form, got a" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    assert main(["merge", *paths, str(tmp_path / "out")]) == 1
    assert "expected a path where nothing is yet" in capsys.readouterr().err
    assert main(["merge", *paths, str(tmp_path / "no" / "out")]) == 1
    assert "expected a folder to write into" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="form: expected one of dense, packed, nf4, got int8"):
        merge_checkpoint(folders.base, folders.adapter, tmp_path / "new", "int8")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "out"}


def test_concurrent_run(folders: Folders, tmp_path: Path) -> None:
    tried = []

    def second(name: str, nbytes: int) -> None:
        if not tried:
            tried.append(name)
            with pytest.raises(CheckpointError, match="another run is at work there"):
                merge_checkpoint(folders.base, folders.adapter, tmp_path / "out")

    merge_checkpoint(folders.base, folders.adapter, tmp_path / "out", progress=second)
    assert tried and Checkpoint.open(tmp_path / "out")


def test_file_system_without_locks(folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(destination.fcntl, "flock", flock)
    with pytest.warns(
        UserWarning, match=r"the file system has no locks \(No locks available\): start no other"
    ):
        merge_checkpoint(folders.base, folders.adapter, tmp_path / "out")
    assert Checkpoint.open(tmp_path / "out")


def test_too_little_space(folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: usage(10**6, 0, 80_000))
    with pytest.raises(CheckpointError, match=r"GB of free space for the result, got 8e-05 GB"):
        merge_checkpoint(folders.base, folders.adapter, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_damaged_packed_weight(folders: Folders, tmp_path: Path) -> None:
    base = tmp_path / "nf4"
    quantize_checkpoint(folders.base, base, double_quant=False)
    name = f"{DOWN}.absmax"
    change_tensors(Checkpoint.open(base).entries[name].path, lambda found: found[name].fill_(NAN))
    with pytest.raises(CheckpointError, match=rf"{name}"):
        merge_checkpoint(base, folders.adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_saved_module_that_is_packed_in_the_base(folders: Folders, tmp_path: Path) -> None:
    base = tmp_path / "nf4"
    quantize_checkpoint(folders.base, base)
    edit_config(folders.adapter, modules_to_save=["1.mlp.up_proj"])
    change_tensors(
        folders.weights, lambda found: found.update({f"base_model.model.{UP}": torch.ones(96, 64)})
    )
    with pytest.raises(
        CheckpointError, match=r"up_proj\.weight: expected no replacement of a weight in 4 bits"
    ):
        merge_checkpoint(base, folders.adapter, tmp_path / "out")


def test_experts_of_an_unknown_architecture(folders: Folders, tmp_path: Path) -> None:
    edit_config(folders.base, model_type="its_own", architectures=["Own"])
    change_tensors(folders.weights, renamed(A.replace("q_proj", "experts")))
    with pytest.raises(CheckpointError, match=r"experts: expected a"):
        merge_checkpoint(folders.base, folders.adapter, tmp_path / "out")

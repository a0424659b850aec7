"""`peft-kernels merge` equals merge_and_unload and save_pretrained of the dense model, bit for bit."""

from __future__ import annotations

import copy
import json
import weakref
from pathlib import Path
from typing import Any

import moe_models as moe
import pytest
import torch
from fresh_process import Python
from merge_folders import CAUSAL, adapt, assert_same_tensors, edit_config, merged_by_peft, saved, transformers
from models import tiny_llama
from rounding import ONE_STEP

import peft_kernels as pk
from peft_kernels.checkpoints.checks import faults, nf4_weights, read_nf4
from peft_kernels.checkpoints.convert import quantize_checkpoint
from peft_kernels.checkpoints.folder import Checkpoint
from peft_kernels.checkpoints.header import Entry
from peft_kernels.checkpoints.merge import merge_checkpoint
from peft_kernels.cli.main import main
from peft_kernels.nf4.experts_packing import NF4Experts, unpack

pytestmark = pytest.mark.filterwarnings("ignore")


def gpt2() -> Any:
    """With Conv1D, whose weights are (in_features, out_features)."""
    config = transformers.GPT2Config(vocab_size=128, n_positions=64, n_embd=64, n_layer=1, n_head=4)
    return transformers.GPT2LMHeadModel(config)


def tied() -> Any:
    return tiny_llama(tie_word_embeddings=True)


def biased() -> Any:
    return tiny_llama(attention_bias=True)


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "lora": (tiny_llama, {}),
    "dora": (tiny_llama, {"use_dora": True}),
    "all-linear": (tiny_llama, {"target_modules": "all-linear"}),
    "rslora-patterns": (
        tiny_llama,
        {
            "use_rslora": True,
            "rank_pattern": {"layers.0.self_attn.q_proj": 8},
            "alpha_pattern": {"down_proj": 3},
        },
    ),
    "lora-bias": (biased, {"lora_bias": True, "target_modules": ["q_proj"]}),
    "all-biases": (biased, {"bias": "all"}),
    "biases-of-lora": (biased, {"bias": "lora_only"}),
    "head-too": (tiny_llama, {"target_modules": ["q_proj", "lm_head"]}),
    "embedding": (tiny_llama, {"target_modules": ["q_proj", "embed_tokens"]}),
    "embedding-dora": (tiny_llama, {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    "saved-head": (tiny_llama, {"modules_to_save": ["lm_head"]}),
    "saved-norms": (tiny_llama, {"modules_to_save": ["input_layernorm"]}),
    "saved-head-of-two-tied": (tied, {"modules_to_save": ["lm_head"]}),
    "saved-embedding-of-two-tied": (tied, {"modules_to_save": ["embed_tokens"]}),
    "both-saved-of-two-tied": (tied, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj"]}),
    "conv1d-dora": (gpt2, {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "parameter": (tiny_llama, {"target_modules": [], "target_parameters": ["q_proj.weight"]}),
}


OTHER_DTYPES = [(case, dtype) for case in ("lora", "dora") for dtype in (torch.float32, torch.float16)]


@pytest.mark.parametrize(
    ("case", "dtype"), [*((case, torch.bfloat16) for case in CASES), *OTHER_DTYPES], ids=str
)
def test_equals_peft_merge(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make, options = CASES[case]
    base, adapter, out = saved(make(), tmp_path / "base", dtype), tmp_path / "adapter", tmp_path / "out"
    adapt(CAUSAL.from_pretrained(base), adapter, **options)
    expected = merged_by_peft(base, adapter, tmp_path / "expected")
    done = merge_checkpoint(base, adapter, out)
    got, before = Checkpoint.open(out), Checkpoint.open(base)
    assert_same_tensors(got, expected)
    assert got.config == expected.config
    changed = {name for name in before if not torch.equal(before[name], got[name])}
    assert changed == done.plan.changes.keys() and got.keys() - before.keys() == done.plan.added.keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "granitemoe"])
def test_experts(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """One tensor per expert in the files, transposed, or stacked as in the model."""
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    saved(moe.model(kind), base, dtype)
    model = CAUSAL.from_pretrained(base)
    adapt(
        model, adapter, target_parameters=experts_of(model), alpha_pattern={"down_proj": 3}, use_rslora=True
    )
    expected = merged_by_peft(base, adapter, tmp_path / "expected")
    merge_checkpoint(base, adapter, out)
    assert_same_tensors(Checkpoint.open(out), expected)


def experts_of(model: Any) -> list[str]:
    return sorted(name for name, p in model.named_parameters() if p.dim() == 3 and name.endswith("_proj"))


def test_tied_weights_stored_twice_are_untied(tmp_path: Path) -> None:
    """Otherwise the trained head would be skipped in favour of the embedding."""
    base, adapter = saved(tiny_llama(), tmp_path / "base"), tmp_path / "adapter"
    edit_config(base, tie_word_embeddings=True)
    adapt(CAUSAL.from_pretrained(base), adapter, modules_to_save=["lm_head"])
    merge_checkpoint(base, adapter, tmp_path / "out")
    got = Checkpoint.open(tmp_path / "out")
    assert got.config["tie_word_embeddings"] is False
    assert torch.equal(got["model.embed_tokens.weight"], Checkpoint.open(base)["model.embed_tokens.weight"])
    head = Checkpoint.open(adapter / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    assert torch.equal(CAUSAL.from_pretrained(tmp_path / "out").lm_head.weight, head)


def test_classifier_with_its_head(tmp_path: Path) -> None:
    config = tiny_llama().config
    config.num_labels = 3
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    auto = transformers.AutoModelForSequenceClassification
    saved(transformers.LlamaForSequenceClassification(config), base)
    adapt(auto.from_pretrained(base), adapter, task_type="SEQ_CLS")
    expected = merged_by_peft(base, adapter, tmp_path / "expected", auto)
    done = merge_checkpoint(base, adapter, tmp_path / "out")
    assert_same_tensors(Checkpoint.open(tmp_path / "out"), expected)
    assert "score.weight" in done.plan.changes


def test_unknown_architecture_is_merged_by_names(tmp_path: Path) -> None:
    base, adapter = saved(tiny_llama(), tmp_path / "base"), tmp_path / "adapter"
    adapt(CAUSAL.from_pretrained(base), adapter)
    expected = merged_by_peft(base, adapter, tmp_path / "expected")
    edit_config(base, model_type="its_own", architectures=["Own"])
    done = merge_checkpoint(base, adapter, tmp_path / "out")
    assert "its_own" in done.plan.source
    assert_same_tensors(Checkpoint.open(tmp_path / "out"), expected)


# Bases in NF4

PACKED = {
    "llama": (tiny_llama, {}, {}),
    "llama-dora": (tiny_llama, {"use_dora": True}, {"blocksize": 128, "double_quant": False}),
    "llama-mxfp4": (tiny_llama, {"target_modules": ["q_proj"]}, {"format": "mxfp4"}),
    "gpt2": (gpt2, {"target_modules": ["c_attn"]}, {}),
    "mixtral-nvfp4": (lambda: moe.model("mixtral"), {}, {"experts": True, "format": "nvfp4"}),
    "mixtral": (lambda: moe.model("mixtral"), {}, {"experts": True}),
    "gpt_oss": (lambda: moe.model("gpt_oss"), {}, {"experts": True}),
}


@pytest.mark.parametrize("case", PACKED)
def test_nf4_base(case: str, tmp_path: Path) -> None:
    """The dense result equals PEFT's merge into the dequantised base; packed again, that merge in 4 bits."""
    make, options, how = PACKED[case]
    dense_base, base, adapter = saved(make(), tmp_path / "dense"), tmp_path / "base", tmp_path / "adapter"
    quantize_checkpoint(dense_base, base, **how)
    dequantised = dense_base_of(base, dense_base, bool(how.get("experts")))
    parameters = experts_of(dequantised) if how.get("experts") else None
    model = adapt(dequantised, adapter, **options, target_parameters=parameters)
    expected = copy.deepcopy(model).merge_and_unload().state_dict()

    done = merge_checkpoint(base, adapter, tmp_path / "merged")
    assert "quantization_config" not in Checkpoint.open(tmp_path / "merged").config
    got = CAUSAL.from_pretrained(tmp_path / "merged").state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)

    again = merge_checkpoint(base, adapter, tmp_path / "again", "nf4")
    before, after, merged = (Checkpoint.open(tmp_path / name) for name in ("base", "again", "merged"))
    assert not list(faults(after)) and after.config == before.config and after.keys() == before.keys()
    weights = nf4_weights(before.entries)
    error = change = 0.0
    for name, items in weights.items():
        if name not in done.plan.changes:
            assert all(after[item].view(torch.uint8).equal(before[item].view(torch.uint8)) for item in items)
            continue
        (was, dtype), (state, _) = (read_nf4(folder, name, items) for folder in (before, after))
        dense = merged[name].mT.contiguous() if name in done.plan.transposed else merged[name]
        form = how.get("blocksize"), how.get("double_quant", True)
        packed = pk.NF4Weight.quantize(dense, *form, format=how.get("format", "nf4"))
        for part in ("packed", "absmax"):
            assert torch.equal(getattr(state, part).flatten(), getattr(packed._state, part).flatten()), name
        error += float((packed.dequantize().double() - dense.double()).square().sum())
        change += float((dense.double() - was.dequantize(dtype).double()).square().sum())
    assert done.rounding.share is None
    assert again.rounding.share == pytest.approx((error / change) ** 0.5, rel=ONE_STEP)


def dense_base_of(base: Path, dense_base: Path, experts: bool) -> Any:
    """The base with its dequantised weights."""
    if experts:
        model = CAUSAL.from_pretrained(base)
        for module in list(model.modules()):
            if isinstance(module, NF4Experts):
                unpack(module)
            elif isinstance(module, pk.nn.NF4Linear):
                module.weight.data = module.weight.dequantize()
                module.revert_to_linear_if_dense()
        return model
    model, checkpoint = CAUSAL.from_pretrained(dense_base), Checkpoint.open(base)
    for name, items in nf4_weights(checkpoint.entries).items():
        state, dtype = read_nf4(checkpoint, name, items)
        dense, parameter = state.dequantize(dtype), model.get_parameter(name)
        is_conv1d = type(model.get_submodule(name.removesuffix(".weight"))).__name__ == "Conv1D"
        parameter.data = dense.t().contiguous() if is_conv1d else dense
    return model


# The command line and interrupted runs


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base in two files, and an adapter. Tests must not write to them."""
    here = tmp_path_factory.mktemp("folders")
    base = saved(tiny_llama(), here / "base")
    (base / "tokenizer.json").write_text("{}")
    adapt(CAUSAL.from_pretrained(base), here / "adapter")
    return base, here / "adapter"


def test_command(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = folders
    assert main(["merge", str(base), str(adapter), str(tmp_path / "out"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["changed"]) == 4 and report["added"] == [] and report["rounding"] is None
    assert report["format"] == "dense" and report["chosen_by"] == "LlamaForCausalLM of transformers"
    assert report["bytes_after"] == report["bytes_before"] == 156_288
    assert "tokenizer.json" in report["copied"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in base.iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert main(["inspect", str(tmp_path / "out")]) == 0


def test_rounding_to_4_bits_is_reported(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = tmp_path / "base", folders[1]
    quantize_checkpoint(folders[0], base)
    assert main(["merge", str(base), str(adapter), str(tmp_path / "dense")]) == 0
    assert "repacking (--format nf4) can lose most of what was trained" in capsys.readouterr().out
    assert main(["merge", str(base), str(adapter), str(tmp_path / "nf4"), "--format", "nf4"]) == 0
    assert "rounding to 4 bits changed the merged weights by 0." in capsys.readouterr().out


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_error_leaves_no_files(folders: tuple[Path, Path], tmp_path: Path, error: Any) -> None:
    names: list[str] = []

    def stop(name: str, nbytes: int) -> None:
        names.append(name)
        if len(names) == 20:  # in the second file
            raise error

    with pytest.raises(error if isinstance(error, type) else type(error)):
        merge_checkpoint(*folders, tmp_path / "out", progress=stop)
    assert len(names) == 20 and not list(tmp_path.iterdir())


def test_killed_run_is_restarted(folders: tuple[Path, Path], tmp_path: Path) -> None:
    work = tmp_path / ".out.merging" / "model"
    work.mkdir(parents=True)
    (work / "model-00001-of-00002.safetensors").write_text("half")
    (work / "leftover").write_text("x")
    merge_checkpoint(*folders, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "leftover").exists() and Checkpoint.open(tmp_path / "out")


def test_one_tensor_of_the_base_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of experts, one at a time, or one part of one."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    saved(moe.model("granitemoe"), base)
    model = CAUSAL.from_pretrained(base)
    adapt(model, adapter, target_parameters=experts_of(model))
    alive: list[weakref.ref[Any]] = []
    sizes: dict[str, list[int]] = {}
    read = Entry.read

    def watched(self: Entry) -> torch.Tensor:
        tensor = read(self)
        if self.path.parent == base:
            assert not [one for ref in alive if (one := ref()) is not None]
            alive.append(weakref.ref(tensor.untyped_storage()))
            sizes.setdefault(self.name, []).append(self.nbytes)
        return tensor

    monkeypatch.setattr(Entry, "read", watched)
    done = merge_checkpoint(base, adapter, tmp_path / "out")
    entries = Checkpoint.open(base).entries
    experts = [name for name in done.plan.changes if len(entries[name].shape) == 3]
    assert len(experts) == 4
    for name in experts:
        assert sizes[name] == [entries[name].nbytes // 4] * 4


PEAK = """
import json, sys
from pathlib import Path

sys.modules["transformers"] = None  # to import it takes seconds and memory; names tell the same here
import safetensors.torch, torch
from peft_kernels.checkpoints.merge import merge_checkpoint

def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024

here, layers, shape = Path({here!r}), 12, (1024, 2048)
base, adapter = here / "base", here / "adapter"
base.mkdir(), adapter.mkdir()
for i in range(layers):
    tensors = {{f"layers.{{i}}.proj.weight": torch.zeros(shape, dtype=torch.bfloat16)}}
    safetensors.torch.save_file(tensors, base / f"model-{{i + 1:05}}-of-{{layers:05}}.safetensors")
(base / "config.json").write_text("{{}}")
parts = {{}}
for i in range(layers):
    name = f"base_model.model.layers.{{i}}.proj.lora_"
    parts |= {{name + "A.weight": torch.ones(8, shape[1]), name + "B.weight": torch.ones(shape[0], 8)}}
safetensors.torch.save_file(parts, adapter / "adapter_model.safetensors")
config = {{"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["proj"]}}
(adapter / "adapter_config.json").write_text(json.dumps(config))
del tensors, parts
merge_checkpoint(base, adapter, here / "first")  # what libraries take once
open("/proc/self/clear_refs", "w").write("5")
before = peak()
merge_checkpoint(base, adapter, here / "out")
print(json.dumps([peak() - before, shape[0] * shape[1] * 2, layers]))
"""


def test_peak_memory_is_that_of_one_tensor(tmp_path: Path, python: Python) -> None:
    """bf16 and its delta in fp32: three times the tensor plus the check for NaN, not the whole model."""
    grown, tensor, layers = json.loads(python(PEAK.format(here=str(tmp_path))).stdout)
    assert grown < 5 * tensor < layers * tensor / 2

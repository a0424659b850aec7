"""Merging and unmerging NF4 models, once and in cycles; a merged model does not need this package."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from flow_checks import Calls, assert_fused, assert_near
from flow_models import adapted, ids, in_fp64, llama, patched_copy
from torch import nn

import peft_kernels as pk
from peft_kernels.core import nf4_state

CYCLES = 20

pytestmark = pytest.mark.filterwarnings("ignore:.*merg.*")


def packed(model: nn.Module) -> dict[str, Any]:
    return {name: p for name, p in model.named_parameters() if isinstance(p, pk.NF4Weight)}


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    """All tensors of the NF4 weights."""
    return {
        f"{name}.{key}": value.clone()
        for name, weight in packed(model).items()
        for key, value in weight.state_dict().items()
        if isinstance(value, torch.Tensor)
    }


def size(model: nn.Module) -> int:
    """Bytes of all parameters as stored."""
    return sum(
        sum(v.nbytes for v in p.state_dict().values() if isinstance(v, torch.Tensor))
        if isinstance(p, pk.NF4Weight)
        else p.nbytes
        for p in model.parameters()
    )


def logits(model: Any) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {"logits": model(input_ids=ids()).logits}


@pytest.mark.parametrize(
    ("adapter", "is_patched"),
    [("lora", False), ("lora", True), ("dora", True)],
    ids=["lora-stock", "lora-patched", "dora-patched"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_cycles_restore_every_bit(dtype: torch.dtype, adapter: str, is_patched: bool) -> None:
    model = adapted(llama("nf4", dtype), use_dora=adapter == "dora").eval()
    report = pk.patch(model) if is_patched else None
    before, state, bytes_ = logits(model), bits(model), size(model)
    assert state
    for _ in range(CYCLES):
        model.merge_adapter()
        model.unmerge_adapter()
    assert size(model) == bytes_
    after = bits(model)
    assert after.keys() == state.keys()
    assert all(torch.equal(after[key], state[key]) for key in state)
    assert torch.equal(logits(model)["logits"], before["logits"])
    if report is not None and adapter == "lora":
        assert_fused(model, report, blocks=2)


@pytest.fixture
def _reset_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """The warning about a merge's memory is given once per process."""
    monkeypatch.setattr(nf4_state, "_warned", set())


@pytest.mark.usefixtures("_reset_warning")
def test_doras_cycle_on_an_unpatched_model_leaves_dense_weights() -> None:
    """Unpatched, DoRA's merge is a plain assignment: no bit is lost, but the weights stay dense."""
    model = adapted(llama("nf4"), use_dora=True).eval()
    before = logits(model)
    with pytest.warns(UserWarning, match="from now on"):
        model.merge_adapter()
    model.unmerge_adapter()
    assert_near(logits(model), before, 1e-5)
    assert all(w.is_dense for w in model.parameters() if isinstance(w, pk.NF4Weight))


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_merged_equals_unmerged(adapter: str) -> None:
    """Within a cycle, compared with the truth."""
    stock = adapted(llama("nf4"), use_dora=adapter == "dora").eval()
    truth = logits(in_fp64(stock))
    model, _ = patched_copy(stock)
    for _ in range(2):
        model.merge_adapter()
        with Calls() as calls:
            assert_near(logits(model), truth, 1e-5)
        assert calls.fused == 0
        model.unmerge_adapter()
        assert_near(logits(model), truth, 1e-5)


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_training_goes_on_after_a_cycle(adapter: str) -> None:
    """As in trainers that merge for generation in each step."""
    stock = adapted(llama("nf4"), use_dora=adapter == "dora")
    model, _ = patched_copy(stock)
    cycled = copy.deepcopy(model)
    losses: list[list[float]] = []
    for each, merges in ((model, False), (cycled, True)):
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        for i in range(3):
            if merges:
                each.merge_adapter()
                logits(each)
                each.unmerge_adapter()
            optimizer.zero_grad()
            loss = each(input_ids=ids(i), labels=ids(i)).loss
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == losses[1]


@pytest.mark.usefixtures("_reset_warning")
def test_merge_reports_its_memory() -> None:
    model = adapted(llama("nf4"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.merge_adapter()
    said = [str(w.message) for w in caught if "dense" in str(w.message).lower()]
    assert said and any(word in said[0] for word in ("MB", "MiB", "GB", "GiB", "bytes", "times")), said


BLOCKED = """
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "peft_kernels":
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
import pickle
import torch

torch.set_num_threads(1)
for folder in sys.argv[1:]:
    want = torch.load(f"{folder}/logits.pt")
    tokens = torch.load(f"{folder}/tokens.pt")
    answers = {
        "save": lambda: torch.load(f"{folder}/save", weights_only=False)(input_ids=tokens).logits,
        "deepcopy": lambda: torch.load(f"{folder}/deepcopy", weights_only=False)(input_ids=tokens).logits,
        "pickle": lambda: pickle.load(open(f"{folder}/pickle", "rb"))(input_ids=tokens).logits,
        "trace": lambda: torch.jit.load(f"{folder}/trace")(tokens),
    }
    for way, answer in answers.items():
        got = answer()
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-4), (folder, way, (got - want).abs().max())
        print(way)
assert "peft_kernels" not in sys.modules
"""


class Logits(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits


def save_merged(base: str, folder: Path) -> None:
    """Saves a merged model in `folder` in every format, with its logits."""
    stock = adapted(llama(base)).eval()
    model, _ = patched_copy(stock)
    model = model.merge_and_unload()
    assert_near(logits(model), logits(stock), 1e-5)
    assert not any(type(module).__module__.startswith("peft_kernels") for module in model.modules())
    torch.save(ids(), folder / "tokens.pt")
    torch.save(logits(model)["logits"], folder / "logits.pt")
    torch.save(model, folder / "save")
    torch.save(copy.deepcopy(model), folder / "deepcopy")
    (folder / "pickle").write_bytes(pickle.dumps(model))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.jit.trace(Logits(model), (ids(),), check_trace=False).save(str(folder / "trace"))


def test_merged_model_does_not_need_this_package(tmp_path: Path) -> None:
    folders = [tmp_path / base for base in ("dense", "nf4")]
    for folder in folders:
        folder.mkdir()
        save_merged(folder.name, folder)
    command = [sys.executable, "-c", BLOCKED, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["save", "deepcopy", "pickle", "trace"] * 2, done.stderr[-2000:]
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_unload_leaves_a_plain_model(base: str) -> None:
    stock = llama(base).eval()
    want = logits(stock)
    model = adapted(copy.deepcopy(stock)).eval()
    pk.patch(model)
    plain = model.unload()
    assert torch.equal(logits(plain)["logits"], want["logits"])
    mlps = [module for name, module in plain.named_modules() if name.endswith("mlp")]
    assert mlps and all("forward" not in vars(mlp) for mlp in mlps)
    twin = copy.deepcopy(plain)
    assert torch.equal(logits(twin)["logits"], want["logits"])

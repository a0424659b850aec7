"""The parts of a training step that bench/gpu/run.py checks and times, without a GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from itertools import combinations
from math import prod
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import peft_kernels as pk
from bench.gpu import device_cases, run, step_cases, step_estimate
from bench.gpu.decoder_layer import Layer
from bench.gpu.roofline import BY_ARCHITECTURE
from bench.gpu.step_cases import Parts
from bench.lib.harness import Absent, Case
from bench.lib.report import OURS, Timing, missing

H100 = BY_ARCHITECTURE[90]
NORM, ROTARY = {"torch", "F.rms_norm"}, {"torch"}
PARTS = {
    "layer": ({"torch on bnb", "torch on dense"}, 2 + 2 * 7),
    "loss": ({"F.cross_entropy", "Liger"}, 2),
    "norm": (NORM, 1),
    "add-norm": (NORM, 2),
    "add-norm-train": (NORM, 4),
    "rotary": (ROTARY, 2),
    "rotary-train": (ROTARY, 4),
    "norm-train": (NORM, 2),
    "norm-train-weight": (NORM, 3),
    "loss-nf4": ({"F.cross_entropy"}, 2),
}
"""Peers, and the number of outputs and gradients."""
NEEDS = {"torch on bnb": "bitsandbytes", "Liger": "liger_kernel"}


@pytest.fixture
def on_cpu() -> Iterator[None]:
    if reason := run.refusal("cpu"):
        pytest.skip(reason)
    with pk.use_backend("cpu"):
        yield


def parts(tiny: bool = True) -> dict[str, Case]:
    made = Parts("cpu", tiny, 1 << 20, lambda: None)
    return {case.group.removeprefix("step-"): case for case in made.cases()}


def test_these_are_all() -> None:
    assert parts().keys() == PARTS.keys()
    shapes = [case.shape for case in parts(tiny=False).values()]
    assert shapes[:3] == ["14336x4096", "128256x4096", "4096x4096"]


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("part", PARTS)
def test_each_part_is_timed_and_each_result_checked(part: str) -> None:
    """Of ours and of peers."""
    case, (peers, count) = parts()[part], PARTS[part]
    result = case.run(Timing(0.0, 1))
    assert not result.wrong, result.wrong
    assert set(result.contenders) == {OURS, *peers}
    assert result.seconds.keys() == {OURS, *(name for name in peers if not missing(NEEDS.get(name, "")))}
    for contender in case.build():
        if isinstance(contender, Absent):
            continue
        found = contender.calls[0]()
        assert len(found) == count
        for name, t in found.items():
            with pytest.raises(AssertionError, match=r"RMS error|relative error"):
                contender.verify({**found, name: 1.1 * t})


def test_tensors_of_one_shape_are_told_apart() -> None:
    layer = Layer(step_cases.TINY, "cpu")
    bases = [weights.exact for weights in layer.weights]
    tensors = [*bases, *layer.norms, *layer.adapters(torch.float32).values()]
    for one, other in combinations(tensors, 2):
        assert one.shape != other.shape or not torch.equal(one, other)
    assert all((norm - norm[0]).any() for norm in layer.norms)


@pytest.mark.usefixtures("on_cpu")
def test_contenders_that_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU alone: a C++ compiler takes seconds for each."""
    monkeypatch.setattr(step_cases, "LLAMA", step_cases.TINY)
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: compiled.append(function) or function)
    for part in ("norm", "rotary-train"):
        result = parts(tiny=False)[part].run(Timing(0.0, 1))
        assert not result.wrong and "torch, compiled" in result.seconds
    assert len(compiled) == 2


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_liger_is_checked_and_timed(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        return F.cross_entropy(
            F.linear(x, weight).float(), labels, ignore_index=ignore_index, reduction=reduction
        )

    for name in ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.functional"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(module, "liger_fused_linear_cross_entropy", loss, raising=False)
    result = parts()["loss"].run(Timing(0.0, 1))
    assert ("Liger" in result.seconds) == (reduction == "mean")
    assert ("Liger" in result.wrong) == (reduction == "sum")


def allowed(part: str) -> float:
    """Seconds of an H100."""
    case = parts(tiny=False)[part]
    seconds = device_cases.roofline(case, H100)
    assert seconds is not None
    return seconds


def test_what_a_card_allows() -> None:
    sizes = step_estimate.LLAMA
    elements = prod(sizes.states)
    for part, nbytes in (("norm", 4), ("add-norm", 8), ("norm-train", 4 + 6), ("add-norm-train", 16)):
        assert allowed(part) == pytest.approx(nbytes * elements / H100.bandwidth, rel=0.01), part
    heads = prod(sizes.queries) + prod(sizes.keys)
    assert allowed("rotary-train") == pytest.approx(8 * heads / H100.bandwidth, rel=0.01)
    head = 4 * elements * sizes.vocabulary / H100.flops
    assert head < allowed("loss") < 1.1 * head < allowed("loss-nf4") < 1.5 * head
    weights = sum(n * k for group in sizes.groups for n, k in group)
    assert allowed("layer") > 4 * sizes.tokens * weights / H100.flops
    forward, backward = step_estimate.layer(step_estimate.Ours(H100))
    assert allowed("layer") == pytest.approx(forward.seconds + backward.seconds)

"""Cases of ops and models: all contenders run and agree, and a wrong result of ours is not timed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from bench_checks import TINY_BLOCK, skip_without

import peft_kernels as pk
from bench.lib.harness import Case
from bench.lib.report import ONCE, OURS
from bench.models import prefix, serving
from bench.models.model import ModelSizes
from bench.ops import bottlenecks, experts
from bench.ops.bottlenecks import Kind
from peft_kernels.adapters.adapter import BottleneckAdapter
from peft_kernels.serving import layers

KINDS = [
    Kind(train=False),
    Kind(train=False, parallel=True, mixed=True, activation="silu"),
    Kind(train=True, parallel=True, activation="gelu"),
    Kind(train=True, mixed=True),
    Kind(train=True, autocast=True),
]
EXPERTS = experts.Shape(4, 2, 64, 128)
MODEL = ModelSizes(TINY_BLOCK, layers=2, vocabulary=128)


def bottleneck(kind: Kind, m: int = 9, dtype: str = "bf16") -> Case:
    return bottlenecks.bottleneck(kind, m, dtype, 64, 12)


def decode(group: str) -> Case:
    return serving.decode(group, 5, "bf16", MODEL)


whole = partial(serving.whole, 4, 3, "bf16", MODEL)
bottleneck_peers = {bottlenecks.MODULES}
experts_peers = {experts.DENSE, experts.DEQUANTISED}
prefix_peers = {prefix.PEFT}

Made = tuple[Callable[[], Case], set[str]]
CASES: dict[str, Made] = {
    **{
        f"{kind.group}-m{m}-{dtype}": (partial(bottleneck, kind, m, dtype), bottleneck_peers)
        for kind in KINDS
        for m, dtype in ((1, "bf16"), (70, "bf16"), (5, "fp32"))
        if not (kind.autocast and dtype == "fp32")  # there is no autocast to fp32 on a CPU
    },
    **{
        f"{group}-m{m}": (partial(experts.experts, group, EXPERTS, m, "bf16"), experts_peers)
        for group in experts.TITLES
        for m in (1, 9)
    },
    **{
        f"prefix-attention-{dtype}": (partial(prefix.attention, 5, 3, 7, dtype), prefix_peers)
        for dtype in ("bf16", "fp32")
    },
    "prefix-join": (partial(prefix.join, 5, 3, 7, "bf16"), {prefix.PEFT}),
    **{
        f"prefix-step{'-projection' * projection}": (
            partial(prefix.step, 3, projection, 2, 5, "fp32", MODEL),
            {prefix.PEFT},
        )
        for projection in (False, True)
    },
    serving.WHOLE: (whole, {serving.PASSES}),
    **{
        group: (partial(decode, group), {serving.ONE})
        for group in (serving.DECODE, serving.DECODE_16, serving.BOTTLENECK)
    },
}


@pytest.mark.parametrize("name", CASES)
def test_all_contenders_run_and_agree(name: str) -> None:
    if not name.startswith(("bottleneck", "experts")):
        skip_without("transformers", "peft")
    make, peers = CASES[name]
    result = make().run(ONCE)
    assert not result.wrong and not result.absent, (result.wrong, result.absent)
    assert set(result.seconds) == {OURS, *peers} and torch.is_grad_enabled()


def swapped(original: Any) -> Any:
    """Rows get another adapter's."""
    return lambda base, layers, groups, x: original(base, layers, groups[::-1], x)


def scaled(original: Any) -> Any:
    return lambda *args: original(*args) * 1.1


WRONG: dict[str, tuple[Callable[[], Case], Any, str, Any]] = {
    "bottleneck-forward": (partial(bottleneck, KINDS[1]), BottleneckAdapter, "forward", scaled),
    experts.TRAIN: (
        partial(experts.experts, experts.TRAIN, EXPERTS, 9, "bf16"),
        pk,
        "experts_linear",
        scaled,
    ),
    serving.WHOLE: (whole, layers, "_mixed", swapped),
    serving.DECODE: (partial(decode, serving.DECODE), layers, "_mixed", swapped),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_result_is_not_timed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not name.startswith(("bottleneck", "experts")):
        skip_without("transformers", "peft")
    make, owner, function, change = WRONG[name]
    monkeypatch.setattr(owner, function, change(getattr(owner, function)))
    result = make().run(ONCE)
    assert OURS in result.wrong and not result.seconds


def test_every_token_has_its_experts() -> None:
    ends = experts.Experts(experts.GATE_UP, torch.bfloat16).ends(16)
    assert ends.shape == (128,) and ends.dtype == torch.int32 and ends[-1] == 16 * 8
    counts = ends.diff(prepend=ends.new_zeros(1))
    assert counts.min() >= 0 and counts.max() <= 16

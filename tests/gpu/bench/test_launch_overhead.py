"""Host cost of calls of the CUDA back end: launches and torch functions."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from stub_device import stub_device

import peft_kernels as pk
import ptx_backend as ptx
import testing
from bench import run
from bench.gpu import launch_overhead
from bench.lib import report
from bench.lib.report import OURS, Timing

COUNTS = {
    "nf4_linear": (1, 3),
    "lora_linear": (3, 7),
    launch_overhead.GOAL_OF: (3, 7),
    "forward + backward of it": (8, 19),
}
"""Launches, and torch functions called for memory and views of x, y and h."""


@pytest.fixture(scope="module")
def cost() -> launch_overhead.HostCost:
    pytest.importorskip("peft")
    testing.register_ptx()
    if (reason := testing.unavailable("ptx")) is not None:
        pytest.skip(f"ptx: {reason}")
    return launch_overhead.Case("bf16").run(Timing(0.0, 1))


@pytest.mark.parametrize("call", COUNTS)
def test_counts(cost: launch_overhead.HostCost, call: str) -> None:
    assert (cost.launches[call], cost.torch_ops[call]) == COUNTS[call]


def test_the_table(cost: launch_overhead.HostCost) -> None:
    text = report.render([cost])
    assert "host code of back end cuda on a stub device, host-2048x2048-m1-bf16: per call" in text
    for call in COUNTS:
        assert f"\n{call} " in text
    slow = dataclasses.replace(cost, us={launch_overhead.GOAL_OF: report.Spread(26.0, 26.0, 26.0)})
    assert list(slow.goals()) == [("patched PEFT layer: at most 25 us, measured 26.0", False)]
    assert report.json_data(cost, {})["launches"]["nf4_linear"] == 1


def test_it_runs_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--only", "^host", "--list"]) == 0
    assert capsys.readouterr().out == "host-2048x2048-m1-bf16\n"


def test_without_the_stub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(testing, "unavailable", lambda name: "not built")
    cost = launch_overhead.Case("bf16").run(Timing(0.0, 1))
    assert cost.absent == {OURS: "not built"} and cost.line() == "ours: not built"


@pytest.mark.parametrize("n,k", [(4096, 4096), (4096, 14336)])
def test_launches_at_2048_rows(n: int, k: int) -> None:
    """Of a layer with LoRA, including torch's GEMM with the single piece of the weight."""
    if (reason := testing.unavailable("ptx")) is not None:
        pytest.skip(f"ptx: {reason}")
    weight = pk.NF4Weight.quantize(torch.ones(n, k, dtype=torch.bfloat16))
    a, b = (torch.ones(*shape, requires_grad=True) for shape in ((16, k), (n, 16)))
    x = torch.ones(2048, k, dtype=torch.bfloat16, requires_grad=True)
    with stub_device() as launches:
        y = pk.lora_linear(x, weight, a, b, 2.0)
        forward = len(launches())
        torch.autograd.grad(y, (x, a, b), torch.ones_like(y))
        backward = len(launches())
    extension = ptx.BACKEND.extension
    assert extension.piece_of(n, k, 2) >= n and extension.piece_of(k, n, 2) >= k
    assert (1 + forward, 1 + backward) == (4, 6)

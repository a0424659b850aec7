"""bench/gpu/run.py without a GPU: the cases, the tables, the timing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_ops import break_op

from bench.gpu import device_cases, events, run
from bench.gpu.device_cases import Suite
from bench.gpu.roofline import BY_ARCHITECTURE, Gpu
from bench.lib import session
from bench.lib.harness import Absent, Case, Contender, Result
from bench.lib.report import OURS, Timing
from bench.ops import experts, optimizers

TINY = Gpu("a card", 90, 1, 1e10, 1e11, 1 << 20)
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


# The cases.


def tiny(*names: str) -> list[Case]:
    return [case for case in Suite("cpu", True, 1 << 20).cases() if case.name in names]


def options(tmp_path: Path, *arguments: str) -> Any:
    return run._parse(
        ["--backend", "cpu", "--min-time", "0", "--repeats", "1", "--output", str(tmp_path), *arguments]
    )


@pytest.fixture
def on_cpu() -> Iterator[None]:
    if reason := run.refusal("cpu"):
        pytest.skip(reason)
    with run.pk.use_backend("cpu"):
        yield


def test_cases_are_those_of_the_design() -> None:
    names = [case.name for case in Suite("cuda", False, 1 << 20).cases()]
    assert len(names) == len(set(names)) == 4 * (3 * 10 + 1) + 3 + 4 + 10
    for name in (
        "forward-4096x4096-m1-bf16", "dx-14336x4096-m8192-bf16", "dequantize-1024x4096-bf16",
        "adamw-one-tensor-7168x700-fp32", "adamw-448-tensors-7168x700-fp32", "adamw-100m-100000x1000-fp32",
        "experts-forward-32-1536x2048-m32768-bf16", "experts-qlora-32-1536x2048-m1024-bf16",
    ):  # fmt: skip
        assert name in names
    # Time may run out: the most important rows of every shape come first.
    telling = [
        names.index(f"{group}-1024x4096-m{m}-bf16") for group in ("forward", "qlora") for m in (1, 2048)
    ]
    later = min(i for i, name in enumerate(names) if "-m4-" in name or "-m8192-" in name)
    assert max(telling) < names.index("step-layer-14336x4096-4x2048-bf16") < later
    assert names[:4] == [f"forward-4096x4096-m{m}-bf16" for m in (1, 16, 128, 2048)]


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    "name",
    [
        "forward-72x64-m5-bf16",
        "dequantize-72x64-bf16",
        "dx-72x64-m33-bf16",
        "qlora-72x64-m5-bf16",
        "experts-forward-4-80x64-m9-bf16",
        "experts-qlora-4-80x64-m9-bf16",
    ],
)
def test_every_kind_of_case_is_checked_and_timed(name: str) -> None:
    (case,) = tiny(name)
    result = case.run(Timing(0.0, 1))
    assert not result.wrong and OURS in result.seconds, result.wrong
    assert (device_cases.roofline(case, TINY) is None) == name.startswith(("qlora", "experts"))
    assert not name.startswith("experts") or experts.DEQUANTISED in result.seconds


@pytest.mark.usefixtures("on_cpu")
def test_steps_of_optimizers_are_checked_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On their own copies; the first step is checked, and one in the wrong direction is not timed."""
    (case,) = tiny("adamw-448-tensors-210x256-fp32")
    made = case.build()
    names = [contender.name for contender in made]
    assert names == [OURS, optimizers.BNB_8BIT, optimizers.BNB_32BIT, optimizers.TORCH]
    assert all(isinstance(one, Absent) or len({id(c.params) for c in one.calls}) == 2 for one in made)
    result = case.run(Timing(0.0, 1))
    assert not result.wrong and {OURS, optimizers.TORCH} <= result.seconds.keys()
    floor = device_cases.roofline(case, TINY)
    assert floor == pytest.approx(210 * 256 * (3 * 4 + 4 + 4 * 4 / 256) / TINY.bandwidth)
    step = run.pk.optim.AdamW8bit.step

    def backwards(self: Any) -> None:
        for group in self.param_groups:
            group["lr"] = -group["lr"]
        step(self)

    monkeypatch.setattr(run.pk.optim.AdamW8bit, "step", backwards)
    result = case.run(Timing(0.0, 1))
    assert "the first step is off" in result.wrong[OURS] and not result.seconds


@pytest.mark.usefixtures("on_cpu")
def test_kernels_used_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = ("a forward kernel", "a backward kernel")
    monkeypatch.setattr(run.BACKENDS["cpu"], "plan", lambda m, n, k, blocksize, dtype: ways, raising=False)
    for case, way in zip(tiny("forward-72x64-m5-bf16", "dx-72x64-m5-bf16"), ways, strict=True):
        assert case.run(Timing(0.0, 1)).remarks == {OURS: f"by {way}"}


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("op", ["nf4_linear", "dequantize_nf4"])
def test_wrong_results_are_found(op: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_op(monkeypatch, op, lambda result: result * 1.02)
    (case,) = tiny("forward-72x64-m33-bf16")
    done = run.run([case], options(tmp_path, "--check"), {})
    wrong = bool(done.outcomes[0].wrong)
    assert wrong == (op == "nf4_linear")
    assert ("0 cases right, 1 wrong" in run.render(done, TINY, timed=False)) == wrong


def test_rows_to_check_reach_from_the_first_to_the_last() -> None:
    assert device_cases.checked_rows(1).tolist() == [0]
    assert device_cases.checked_rows(7).tolist() == list(range(7))
    rows = device_cases.checked_rows(8192).tolist()
    assert rows[0] == 0 and rows[-1] == 8191 and len(set(rows)) == device_cases.CHECKED_ROWS


def test_a_case_that_fails_leaves_the_others_alone(tmp_path: Path) -> None:
    def fails() -> Sequence[Contender | Absent]:
        raise MemoryError("no memory")

    def works() -> Sequence[Contender | Absent]:
        return [Contender(OURS, [lambda: None], lambda result: 0.0)]

    cases = [Case("forward", 8, 8, m, "bf16", build) for m, build in ((1, fails), (2, works))]
    done = run.run(cases, options(tmp_path), {})
    assert [result.case.m for result in done.outcomes] == [2]
    assert "FAILED forward-8x8-m1-bf16: MemoryError: no memory" in run.render(done, TINY)


def test_times_are_reported_with_rooflines() -> None:
    case = Case("forward", 4096, 4096, 1, "bf16", list)
    result = Result(case, contenders=[OURS, "bnb"], seconds={OURS: [5e-6], "bnb": [1e-5]})
    text = run.render(session.Done([result]), BY_ARCHITECTURE[90])
    assert "us per call" in text and "4096x4096 ours  5.00" in text
    assert "forward: roofline / time of ours\n           M=1\n4096x4096  52%" in text


def test_clocks_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        run, "_output_of", lambda command: "580.1, 1980 MHz, 2619 MHz, 1980 MHz, 90 W, 700 W, 41"
    )
    assert run.clocks() == (
        "driver_version 580.1, clocks.sm 1980 MHz, clocks.mem 2619 MHz, clocks.max.sm 1980 MHz, "
        "power.draw 90 W, power.limit 700 W, temperature.gpu 41"
    )
    monkeypatch.setattr(run, "_output_of", lambda command: None)
    assert run.clocks() is None


@no_gpu
def test_without_a_gpu_the_benchmark_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--output", str(tmp_path)]) == 2
    assert "back end cuda cannot be used here: torch sees no GPU" in capsys.readouterr().err


# The timing, with a simulated card.


class Card:
    """Replaces torch.cuda: calls take given times, and replays the sum over the captured calls."""

    def __init__(self, captures: bool = True) -> None:
        self.now, self.captures = 0.0, captures
        self.recording: list[tuple[str, float]] | None = None
        self.calls: list[str] = []
        card = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = card.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Event) -> float:
                return (end.at - self.at) * 1e3

        class CUDAGraph:
            nodes: list[tuple[str, float]]

            def replay(self) -> None:
                for name, took in self.nodes:
                    card.calls.append(name)
                    card.now += took

        @contextmanager
        def graph(into: CUDAGraph) -> Iterator[None]:
            card.recording = []
            yield
            into.nodes, card.recording = card.recording, None

        self.Event, self.CUDAGraph, self.graph = Event, CUDAGraph, graph

    def contender(self, name: str, on_card: float, in_python: float = 0.0, copies: int = 1) -> Contender:
        def call(label: str) -> None:
            if self.recording is not None:
                if not self.captures:
                    self.recording = None
                    raise RuntimeError("operation not permitted when stream is capturing")
                self.recording.append((label, on_card))
            else:
                self.calls.append(label)
                self.now += max(on_card, in_python)

        calls = [lambda i=i: call(f"{name}{i}") for i in range(copies)]  # type: ignore[misc]
        return Contender(name, calls, lambda result: 0.0)

    class Stream:
        def wait_stream(self, other: Card.Stream) -> None:
            pass

    def current_stream(self) -> Stream:
        return self.Stream()

    def stream(self, stream: Stream) -> Any:
        return nullcontext()

    def synchronize(self) -> None:
        pass


def take_turns(
    monkeypatch: pytest.MonkeyPatch, card: Card, contenders: Sequence[Contender], graphs: bool = True
) -> dict[str, float]:
    monkeypatch.setattr(torch, "cuda", card)
    turns = events.take_turns(contenders, graphs)
    card.calls.clear()
    return {name: turn() for name, turn in turns.items()}


def test_graphs_leave_python_out_and_rotate(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card()
    contenders = [card.contender("A", 2**-18, in_python=2**-15, copies=3), card.contender("B", 2**-17)]
    assert take_turns(monkeypatch, card, contenders) == {"A": 2**-18, "B": 2**-17}
    turn = [call for call in card.calls if call[0] == "A"]
    # Enough calls for a millisecond of GPU time, not of Python's.
    assert turn == [f"A{i % 3}" for i in range(len(turn))] and 2**-18 * len(turn) >= events.MIN_TURN


def test_long_calls_are_each_copy_once(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card()
    assert take_turns(monkeypatch, card, [card.contender("A", 1.0, copies=3)]) == {"A": 1.0}
    assert card.calls == ["A0", "A1", "A2"]


def test_without_graphs_for_one_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(captures=False)
    contenders = [card.contender("A", 2**-12, in_python=2**-11)]
    assert take_turns(monkeypatch, card, contenders) == {"A": 2**-11}
    assert contenders[0].remark() == "timed without graphs: operation not permitted when stream is capturing"
    assert take_turns(monkeypatch, Card(), [card.contender("A", 2**-12)], graphs=False) == {"A": 0.0}

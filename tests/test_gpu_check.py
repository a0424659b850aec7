"""What is run on a machine with a GPU, as far as it runs without one: the script, the cases, the timing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_ops import break_op

sys.path.append(str(Path(__file__).resolve().parent.parent))

from bench import device_cases, events, gpu, session
from bench.device_cases import Suite
from bench.floors import BY_ARCHITECTURE, Gpu
from bench.harness import Absent, Case, Contender, Result
from bench.report import OURS, Timing

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "gpu_check.sh"
TINY = Gpu("a card", 90, 1, 1e9, 1e10, 1e11, 1 << 20)
needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


# The script.


def gpu_check(out: Path, python: str | Path = sys.executable, **variables: str) -> tuple[int, str]:
    """Its status, and what it said."""
    done = subprocess.run(
        ["bash", str(SCRIPT), out.name],
        cwd=out.parent,
        env={**os.environ, "PYTHON": str(python), **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Programs on the path that write down their calls, and fail where a call matches a pattern."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def stub(name: str, fails: str = "nothing", run: str = "") -> Path:
        path = folder / name
        path.write_text(
            f'#!/usr/bin/env bash\necho "{name} $*" >> "{tmp_path}/calls"\n'
            f'case "$*" in {fails}) echo "{name} is out of luck"; exit 1;; esac\n{run}\nexit 0\n'
        )
        path.chmod(0o755)
        return path

    return stub


@no_gpu
@needs_bash
def test_without_a_gpu_the_script_says_so(tmp_path: Path) -> None:
    status, said = gpu_check(tmp_path)
    assert status == 3
    assert said.startswith("gpu_check: there is no usable GPU here: torch ") and len(said.splitlines()) == 1


@needs_bash
def test_without_a_folder_the_script_says_what_it_wants() -> None:
    done = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "usage: bench/gpu_check.sh OUT\n")


@needs_bash
def test_a_rehearsal_goes_through_all_parts(tmp_path: Path) -> None:
    if reason := gpu.refusal("cpu"):
        pytest.skip(reason)
    # An installed package may have them while the source tree has none.
    if not list((SCRIPT.parent.parent / "peft_kernels").glob("_C.*")):
        pytest.skip("the script runs the source tree, in which no kernels are compiled")
    status, said = gpu_check(tmp_path, REHEARSE="1", OMP_NUM_THREADS="1")
    assert status == 0, said
    for name in ("environment", "check", "tests", "bench", "bench-eager"):
        assert f"\n{name}: passed" in said
        assert (tmp_path / f"{name}.log").exists()
    lines = (tmp_path / "bench" / "results.jsonl").read_text().splitlines()
    assert {json.loads(line)["group"] for line in lines} == {"forward", "dequantize", "dx", "qlora"}
    assert "cases right, 0 wrong" in (tmp_path / "check" / "table.txt").read_text()


@needs_bash
def test_the_way_of_a_machine_with_a_gpu(tmp_path: Path, stubs: Callable[..., Path]) -> None:
    """All programs are stubs; the last part but one, and only that, fails."""
    python = stubs("python-stub", run='case "$*" in *capability*) echo 9.0;; esac')
    stubs("nvcc")
    stubs("compute-sanitizer", fails="*racecheck*", run='[ "$1" = --help ] && echo "  --kernel-regex"')
    status, said = gpu_check(tmp_path, python)
    assert status == 1
    lines = (tmp_path / "summary.txt").read_text().splitlines()
    outcomes = dict(line.split(": ", 1) for line in lines if ": " in line)
    assert {name for name, outcome in outcomes.items() if not outcome.startswith("passed")} == {"racecheck"}
    assert {"environment", "build", "check", "tests", "bench", "memcheck", "bench-eager"} < outcomes.keys()
    assert "racecheck: FAILED (status 1" in said and "compute-sanitizer is out of luck" in said
    calls = (tmp_path / "calls").read_text()
    assert "python-stub setup.py build_ext --inplace" in calls
    assert "--tool memcheck --kernel-regex kns=peft_kernels" in calls
    assert "-m pytest -q -p no:cacheprovider -n 4 --dist loadfile --maxfail 40 -k cuda" in calls


@needs_bash
def test_what_is_missing_is_skipped_with_its_reason(tmp_path: Path, stubs: Callable[..., Path]) -> None:
    python = stubs("python-stub", fails="*\"'hypothesis'\"*|*\"'peft'\"*")
    status, said = gpu_check(tmp_path, python, CUDA_HOME=str(tmp_path), PATH=f"{tmp_path}/bin:/usr/bin:/bin")
    assert status == 0, said
    assert "build: skipped, there is no nvcc" in said
    assert f"tests: skipped, {python} lacks pytest or hypothesis" in said
    assert "sanitizer: skipped, there is no compute-sanitizer" in said
    assert "contender peft: skipped, it is not installed" in said


@needs_bash
def test_without_kernels_nothing_is_measured(tmp_path: Path, stubs: Callable[..., Path]) -> None:
    python = stubs("python-stub", fails="*probe*")
    status, said = gpu_check(tmp_path, python)
    assert status == 1
    assert "back end cuda: NOT USABLE, so nothing more is run: python-stub is out of luck" in said
    assert "bench/gpu.py" not in (tmp_path / "calls").read_text()


# The cases.


def tiny(*names: str) -> list[Case]:
    return [case for case in Suite("cpu", True, 1 << 20).cases() if case.name in names]


def options(tmp_path: Path, *arguments: str) -> Any:
    return gpu._parse(
        ["--backend", "cpu", "--min-time", "0", "--repeats", "1", "--output", str(tmp_path), *arguments]
    )


@pytest.fixture
def on_cpu() -> Iterator[None]:
    if reason := gpu.refusal("cpu"):
        pytest.skip(reason)
    with gpu.pk.use_backend("cpu"):
        yield


def test_cases_are_those_of_the_design() -> None:
    names = [case.name for case in Suite("cuda", False, 1 << 20).cases()]
    assert len(names) == len(set(names)) == 4 * (3 * 10 + 1)
    for name in ("forward-4096x4096-m1-bf16", "dx-14336x4096-m8192-bf16", "dequantize-1024x4096-bf16"):
        assert name in names
    assert names.index("qlora-4096x4096-m8192-bf16") < names.index("forward-1024x4096-m1-bf16")


@pytest.mark.usefixtures("on_cpu")
def test_every_kind_of_case_is_checked_and_timed() -> None:
    for case in tiny(
        "forward-72x64-m5-bf16", "dequantize-72x64-bf16", "dx-72x64-m33-bf16", "qlora-72x64-m5-bf16"
    ):
        result = case.run(Timing(0.0, 1))
        assert not result.wrong and result.time(OURS) is not None, result.wrong
        assert device_cases.floor(case, TINY) is not None or case.group == "qlora"


@pytest.mark.usefixtures("on_cpu")
def test_the_kernels_taken_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = ("a forward kernel", "a backward kernel")
    monkeypatch.setattr(gpu.BACKENDS["cpu"], "plan", lambda m, n, k, blocksize, dtype: ways, raising=False)
    for case, way in zip(tiny("forward-72x64-m5-bf16", "dx-72x64-m5-bf16"), ways, strict=True):
        assert case.run(Timing(0.0, 1)).remarks == {OURS: f"by {way}"}


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("op", ["nf4_linear", "dequantize_nf4"])
def test_wrong_results_are_found(op: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_op(monkeypatch, op, lambda result: result * 1.02)
    (case,) = tiny("forward-72x64-m33-bf16")
    done = gpu.run([case], options(tmp_path, "--check"), {})
    wrong = bool(done.outcomes[0].wrong)
    assert wrong == (op == "nf4_linear")
    assert ("0 cases right, 1 wrong" in gpu.render(done, TINY, timed=False)) == wrong


def test_rows_to_check_reach_from_the_first_to_the_last() -> None:
    assert device_cases.checked_rows(1).tolist() == [0]
    assert device_cases.checked_rows(7).tolist() == list(range(7))
    rows = device_cases.checked_rows(8192).tolist()
    assert rows[0] == 0 and rows[-1] == 8191 and len(set(rows)) == device_cases.CHECKED_ROWS


def test_a_case_that_fails_leaves_the_others_alone(tmp_path: Path) -> None:
    def fails() -> Sequence[Contender | Absent]:
        raise MemoryError("no room")

    def works() -> Sequence[Contender | Absent]:
        return [Contender(OURS, [lambda: None], lambda result: 0.0)]

    cases = [Case("forward", 8, 8, m, "bf16", build) for m, build in ((1, fails), (2, works))]
    done = gpu.run(cases, options(tmp_path), {})
    assert [result.case.m for result in done.outcomes] == [2]
    assert "FAILED forward-8x8-m1-bf16: MemoryError: no room" in gpu.render(done, TINY)
    done = gpu.run(cases, options(tmp_path, "--seconds", "-1"), {})
    assert not done.outcomes and not done.failed
    assert "left out, 2 cases: forward-8x8-m1-bf16, forward-8x8-m2-bf16" in gpu.render(done, TINY)


def test_times_stand_beside_floors() -> None:
    case = Case("forward", 4096, 4096, 1, "bf16", list)
    result = Result(case, contenders=[OURS, "bnb"], seconds={OURS: [5e-6], "bnb": [1e-5]})
    text = gpu.render(session.Done([result]), BY_ARCHITECTURE[90])
    assert "us per call" in text and "4096x4096 ours  5.00" in text
    assert "forward: floor / time of ours\n           M=1\n4096x4096  52%" in text


@no_gpu
def test_without_a_gpu_the_benchmark_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--output", str(tmp_path)]) == 2
    assert "back end cuda cannot be used here: torch sees no GPU" in capsys.readouterr().err


# The timing, with a card that only counts.


class Card:
    """Stands in for torch.cuda: calls take the time they say, replays that of the calls recorded."""

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
    # As many as make a millisecond of the card's own time, after those that made one of Python's.
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

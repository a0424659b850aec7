"""The benchmark suite as a whole: tables, saved bytes, output and exit status of a run."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_checks import TINY, TINY_BLOCK, Machine, block_case, line_of, measure, skip_without
from broken_ops import break_op

import peft_kernels as pk
import testing
from bench import run
from bench.lib import cases, layers, report
from bench.lib.harness import Case, Result
from bench.lib.report import OURS
from bench.models import memory, model

pytestmark = pytest.mark.usefixtures("one_thread")


def test_costs_are_relative_to_yardsticks() -> None:
    """Costing more than a yardstick is no loss."""
    machine = Machine()
    contenders = machine.contender(OURS, 0.01), machine.contender("other", 0.008)
    case = Case(cases.BLOCK_LORA, *TINY, 8, "bf16", lambda: contenders, 2, ["other"])
    result = measure(case, machine)
    text = report.render([result])
    assert "cost, time of ours / other\n        2x4\n64x128  1.25 (1.25-1.25)" in text
    assert report.LOSES not in text
    line = line_of(result)
    assert line["costs"].keys() == {"other"} and not line["ratios"] and line["batch"] == 2


def test_figures_of_one_title_share_a_table() -> None:
    def figures(label: str, row: str, **values: Any) -> report.Figures:
        found = report.Figures(Case(label, 1, 1, 1, "", list), title="a table", forms={"a": ".1%", "b": ""})
        found.label, found.values = label, {row: values}
        return found

    spread = report.Spread(2.0, 1.0, 3.0)
    found = [figures("x", "ours", a=0.5), figures("x", "ours", b=spread), figures("", "peer", b=123.4)]
    table = "a table\n         a      b\nx, ours  50.0%  2.00 (1.00-3.00)\npeer     -      123\n"
    assert report.render(found) == table
    assert line_of(found[1])["values"] == {"ours": {"b": {"median": 2.0, "q1": 1.0, "q3": 3.0}}}
    assert found[1].value("ours", "b") == 2.0 and found[1].value("peer", "b") is None
    assert found[2].line() == "peer: b 123"


@pytest.mark.parametrize("case", memory.standard("bf16"), ids=lambda case: case.name)
def test_every_kind_of_saved_bytes(case: memory.Case) -> None:
    skip_without("peft", "transformers", *["bitsandbytes"] * (case.base == "nf4"))
    saved = dataclasses.replace(case, sizes=TINY_BLOCK).run()
    assert saved.absent == {} and saved.ratio is not None and saved.ratio <= 1.0
    assert f"{saved.ratio:.1%}" in report.render([saved])
    line = line_of(saved)
    assert line["values"] == saved.values and saved.values[""].keys() == memory.FORMS.keys()


def test_saved_bytes_without_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "missing", lambda needs: "peft not installed")
    saved = memory.standard("bf16")[0].run()
    assert saved.ratio is None
    text = report.render([saved])
    assert "- PEFT on dense: peft not installed (memory-layer-dense-lora-bf16)" in text


def test_table_has_shapes_as_rows_and_m_as_columns_and_marks_what_loses() -> None:
    def result(shape: tuple[int, int], m: int, ratio: float) -> Result:
        case = Case(cases.FORWARD, *shape, m, "bf16", list)
        return Result(case, contenders=[OURS, "peer"], seconds={OURS: [1.0], "peer": [ratio]})

    results = [result((8, 4), 16, 1.5), result((8, 4), 2, 2.0), result((4, 8), 16, 0.75)]
    text = report.render(results)
    found = text.partition("time of peer / ours\n")[2].splitlines()
    lines = [re.split(r" {2,}", line) for line in found]
    assert lines[0] == ["", "M=2", "M=16"]
    assert lines[1] == ["8x4", "2.00 (2.00-2.00)", "1.50 (1.50-1.50)"]
    assert lines[2] == ["4x8", "0.75 (0.75-0.75) LOSES"]
    assert found[4:] == [
        "3 cells: 2 win, 1 lose", "  LOSES forward-4x8-m16-bf16 against peer: 0.75 (0.75-0.75)"
    ]  # fmt: skip
    assert "peer 0.75" in results[2].line()


def run_of(
    monkeypatch: pytest.MonkeyPatch, output: Path, *found: Any, arguments: Sequence[str] = ("--full",)
) -> tuple[int, list[Any], str]:
    """Status, JSON lines and table of a run of these cases."""
    timed = [case for case in found if isinstance(case, Case)]
    monkeypatch.setattr(cases, "standard", lambda dtype: timed)
    monkeypatch.setattr(model, "standard", lambda dtype: [])
    monkeypatch.setattr(memory, "standard", lambda dtype: [case for case in found if case not in timed])
    status = run.main([*arguments, "--repeats", "2", "--min-time", "1e-9", "--output", str(output)])
    lines = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    return status, lines, (output / "table.txt").read_text()


@pytest.mark.usefixtures("small_rotation")
def test_run_writes_json_lines_and_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = [cases.forward(TINY, m, "bf16") for m in (1, 3)]
    saved = memory.Case(memory.BLOCK, "dense", "lora", "bf16", TINY_BLOCK)
    status, lines, table = run_of(monkeypatch, tmp_path, *tiny, block_case(cases.BLOCK_DORA), saved)
    assert status == 0
    assert [line["name"] for line in lines] == [
        "forward-64x128-m1-bf16",
        "forward-64x128-m3-bf16",
        "block-dora-256x512-2x16-bf16",
        "memory-block-dense-lora-bf16",
    ]
    for line in lines[:2]:
        assert line["times_ms"][OURS]["median"] > 0
        assert line["errors"][OURS] < 0.01
        assert line["ratios"]["torch dense"].keys() == {"median", "q1", "q3"}
        assert line["versions"]["torch"] and line["shape"] == [64, 128] and line["dtype"] == "bf16"
    assert lines[2]["ratios"].keys() == {cases.PEFT_ON_DENSE} and lines[2]["costs"].keys() == {
        cases.PLAIN_LORA
    }
    for text in (
        "NF4 linear, forward without grad, bf16: time of torch dense / ours",
        torch.__version__.partition("+")[0],
        "2x16",
        "cost, time of ours / ours, plain LoRA",
        "bytes per token",
    ):
        assert text in table
    said = capsys.readouterr().out
    assert "4 cases, about" in said and "[4/4]" in said

    break_op(monkeypatch, "nf4_linear", lambda y: y * 1.02)
    layers.shared.cache_clear()
    status, _, table = run_of(monkeypatch, tmp_path, tiny[1])
    assert status == 1 and "WRONG" in table


def test_a_run_that_ends_early_keeps_results_and_names_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Ctrl-C, or because cases would take too long."""

    def stop() -> Any:
        raise KeyboardInterrupt

    builds = (lambda: [Machine().contender(OURS, 0.01)], stop)
    found = [Case(cases.FORWARD, *TINY, m, "bf16", build) for m, build in enumerate(builds, 1)]
    status, lines, table = run_of(monkeypatch, tmp_path, *found)
    assert (status, [line["name"] for line in lines]) == (130, [found[0].name])
    assert f"left out, 1 cases: {found[1].name}" in table
    status, lines, table = run_of(monkeypatch, tmp_path, *found, arguments=["--full", "--seconds", "1e-9"])
    assert (status, lines) == (0, [])
    assert f"left out, 2 cases: {found[0].name}, {found[1].name}" in table


def test_unknown_cases_and_isa_are_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--only", "nothing-like-this", "--output", str(tmp_path / "a")]) == 2
    assert run.main(["--isa", "sse9", "--output", str(tmp_path / "b")]) == 2
    assert "sse9" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_names_of_cases() -> None:
    modules = map(importlib.import_module, (*run.TIMED, *run.BY_NAME))
    names = [case.name for module in modules for case in module.standard("bf16")]
    assert len(names) == len(set(names))
    some = """
        forward-14336x4096-m2048-bf16 block-lora-576x1536-4x256-bf16 block-mixed-576x1536-8x128-bf16
        bottleneck-train-768x768-m2048-bf16 bottleneck-parallel-mixed-forward-768x768-m1-bf16
        serving-decode-1536x576-8x1-bf16 formats-int4-4096x4096-m16-bf16
    """
    assert set(some.split()) < set(names)


def test_default_cases_fit_in_five_minutes(capsys: pytest.CaptureFixture[str]) -> None:
    """By their estimates; all kinds that do not run only by name are among them."""

    def listed(*arguments: str) -> set[str]:
        assert run.main(["--list", *arguments]) == 0
        return set(capsys.readouterr().out.split())

    every, default, full = listed(), listed("--only", "|".join(run.DEFAULT)), listed("--full")
    quick = listed("--quick")
    assert default < full < every and quick < full
    by_name = [importlib.import_module(name).standard("bf16") for name in run.BY_NAME]
    assert every - full == {case.name for cases_of in by_name for case in cases_of}
    kinds = {name.rpartition("-")[0] if "memory" in name else re.split(r"-\d", name)[0] for name in full}
    for chosen in (default, quick):
        assert {kind for kind in kinds if any(name.startswith(kind) for name in chosen)} >= kinds - {
            "textbook", "step", "decode", *(kind for kind in kinds if "memory-block" in kind),
        }  # fmt: skip
    seconds = {case.name: case.seconds for of in (cases, model, memory) for case in of.standard("bf16")}
    assert sum(seconds[name] + 1.0 for name in default) < 240
    assert sum(seconds[name] + 1.0 for name in quick) < 70
    assert {"step-576x1536-4x256-bf16", "qlora-1536x576-m4096-bf16", "forward-4096x4096-m512-bf16"} < default


@pytest.mark.usefixtures("small_rotation")
def test_isa_option_limits_our_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := testing.unavailable("cpu-scalar"):
        pytest.skip(reason)
    arguments = ["--full", "--isa", "scalar"]
    _, (line,), _ = run_of(monkeypatch, tmp_path, cases.dequantize(TINY, "bf16"), arguments=arguments)
    assert line["isa"] == "scalar"


@pytest.mark.parametrize("asked", [True, False])
def test_kept_memory_is_reported(
    asked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(pk, "keep_freed_memory", lambda: calls.append(True) or True)
    arguments = ["--full", *(["--keep-memory"] if asked else [])]
    _, (line,), _ = run_of(monkeypatch, tmp_path, cases.dequantize(TINY, "bf16"), arguments=arguments)
    assert line["memory_kept"] is asked and calls == [True] * asked
    assert ("the process keeps freed memory" in capsys.readouterr().out) is asked

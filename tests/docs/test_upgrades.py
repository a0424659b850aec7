"""tools/upgrades.py without the package index: its reading of reports, its comparison, and when it runs
tests again."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tool_modules import tool_module


@pytest.fixture
def tool() -> ModuleType:
    return tool_module("upgrades")


TESTS = """
import pytest
def test_passes(): pass
def test_fails(): assert 1 == 2, "why\\nand more"
@pytest.mark.skip(reason="no card")
def test_skipped(): pass
@pytest.fixture
def broken(): raise ValueError("of the fixture")
def test_errs(broken): pass
"""


def test_outcomes_are_those_of_pytest(tool: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "test_import.py").write_text("from json import nothing")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-c",
        "/dev/null",
        "--rootdir",
        ".",
        "--junitxml=out.xml",
    ]
    command += ["--continue-on-collection-errors", "-p", "no:cacheprovider"]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    found = dict(tool.outcomes(tmp_path / "out.xml"))
    assert found.pop("test_it::test_passes") == ("passed", "")
    assert found.pop("test_it::test_fails") == ("failed", "AssertionError: why")
    assert found.pop("test_it::test_skipped") == ("skipped", "no card")
    assert found.pop("test_it::test_errs")[0] == "failed"
    (broken,) = found.values()
    assert broken.outcome == "failed"
    assert broken.message.startswith("ImportError: cannot import name 'nothing' from 'json'")


def test_oldest_are_the_lower_bounds_and_newest_include_pre_releases(tool: ModuleType) -> None:
    oldest = tool.packages("oldest")
    assert [word.partition("==")[0] for word in oldest] == list(tool.LIBRARIES)
    assert all(word.partition("==")[2] for word in oldest)
    assert tool.packages("newest") == ["--pre", "--upgrade", *tool.LIBRARIES]


def made(tool: ModuleType, **tests: str) -> Any:
    outcomes = {n: tool.Outcome(w.split(":")[0], w.partition(":")[2]) for n, w in tests.items()}
    return tool.Run({"peft": "1"}, outcomes, Path("end/bin/python"), Path("end.xml"))


def test_tests_that_do_not_run_are_told_and_no_failure(
    tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    pinned = made(tool, a="passed", b="passed", c="skipped:no card", d="passed", e="skipped:no card")
    less = made(tool, a="passed", b="skipped:too old", c="skipped:no card")
    assert tool.report({"pinned": pinned, "oldest": less}) == 0
    said = capsys.readouterr().out.split("\n\n")
    assert said[1:] == [
        "== do not run with the oldest versions alone: 2\ntoo old\n    b\nnot collected\n    d",
        "pinned: 0 fail; oldest: 0 fail alone, 2 do not run\n",
    ]
    assert said[0].split("\n")[-3:] == [
        "passed        3        1",
        "failed        0        0",
        "skipped       2        2",
    ]


def test_what_fails_with_other_versions_alone_is_listed_by_message(
    tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also tests that the pinned versions do not have, or skip. Those that fail with the pinned ones are not
    told twice."""
    pinned = made(tool, a="passed", b="passed", c="skipped:new enough", d="failed:why")
    worse = made(tool, a="failed:new", b="failed:why", c="failed:why", d="failed:why", e="failed:why")
    assert tool.report({"pinned": pinned, "newest": worse}) == 1
    said = capsys.readouterr().out.split("\n\n")
    again = "whole errors: end.xml\none of the tests: end/bin/python -m pytest TEST"
    assert said[1:] == [
        "== fail with the pinned versions: 1\nwhy\n    d",
        again,
        "== fail with the newest versions alone: 4\nwhy\n    b\n    c\n    e\nnew\n    a",
        again,
        "pinned: 1 fail; newest: 4 fail alone, 0 do not run\n",
    ]


@pytest.mark.parametrize("end", ["pinned", "oldest"])
def test_one_failure_anywhere_is_the_exit_status(tool: ModuleType, end: str) -> None:
    runs = {name: made(tool, a="failed:why" if name == end else "passed") for name in ("pinned", "oldest")}
    assert tool.report(runs) == 1


def test_few_of_many_failures_are_listed(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    tests = {f"t{number}": "failed:why" for number in range(8)}
    assert tool.report({"pinned": made(tool, **tests)}) == 1
    assert "why\n    t0\n    t1\n    t2\n    t3\n    t4\n    and 3 more\n" in capsys.readouterr().out


def test_tests_are_named_as_pytest_takes_them(tool: ModuleType) -> None:
    assert tool.node("tests.docs.test_upgrades", "test_it[1]") == "tests/docs/test_upgrades.py::test_it[1]"
    assert tool.node("tests.docs.test_upgrades.Some.Of", "t") == "tests/docs/test_upgrades.py::Some::Of::t"
    assert tool.node("", "tests.docs.test_gone") == "tests.docs.test_gone"


REPORT = '<testsuites><testsuite><testcase classname="m" name="t"/></testsuite></testsuites>'


def test_run_is_repeated_when_something_changed(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Path] = []

    def pytest_of(python: Path, options: Namespace, report: Path) -> None:
        ran.append(report)
        report.write_text(REPORT)

    state = {"versions": {"peft": "1"}, "sources": "s"}
    monkeypatch.setattr(tool, "pytest", pytest_of)
    monkeypatch.setattr(tool, "versions", lambda python: state["versions"])
    monkeypatch.setattr(tool, "sources", lambda: state["sources"])

    def runs(*words: str) -> int:
        found = tool.run(Path("python"), tool.arguments(["--cache", str(tmp_path), *words]))
        assert found.tests == {"m::t": ("passed", "")} and found.versions == state["versions"]
        return len(ran)

    assert runs() == 1 and runs() == 1
    assert runs("-k", "trl") == 2 and runs("tests/flows/trainer") == 3
    state["versions"] = {"peft": "2"}
    assert runs() == 4
    state["sources"] = "t"
    assert runs() == 5 and runs() == 5


@pytest.mark.parametrize("status,kept", [(0, True), (1, True), (2, False), (130, False)])
def test_only_a_whole_run_is_kept(tool: ModuleType, tmp_path: Path, status: int, kept: bool) -> None:
    """0: all passed, 1: some failed; others are an interruption or an error of pytest."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\ntouch {tmp_path}/run.part\nexit {status}\n")
    python.chmod(0o755)
    try:
        tool.pytest(python, tool.arguments([]), tmp_path / "run.xml")
    except SystemExit as end:
        assert str(end) == f"pytest: exit status {status}, see above" and not kept
    assert (tmp_path / "run.xml").exists() is kept


def test_sources_are_those_of_the_working_tree(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    for name in tool.SOURCES:
        (tmp_path / name).write_text(name)
    before = tool.sources()
    (tmp_path / tool.SOURCES[0]).write_text("other")
    assert before != tool.sources()
    (tmp_path / tool.SOURCES[0]).write_text(tool.SOURCES[0])
    assert before == tool.sources()


def test_environment_keeps_the_torch_below_it(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip gets a constraint on torch, and the environment imports packages of this one."""
    installed, real = [], subprocess.run

    def run(command: Any, **options: Any) -> Any:
        if "pip" in command:
            installed.append([str(word) for word in command])
            return subprocess.CompletedProcess(command, 0)
        return real(command, **options)

    monkeypatch.setattr(subprocess, "run", run)
    # Interrupted before the packages below could be seen: it is made anew.
    (tmp_path / "end" / "bin").mkdir(parents=True)
    (tmp_path / "end" / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / "end" / "half").touch()
    python = tool.environment(tmp_path / "end", ["peft==0.21"])
    assert not (tmp_path / "end" / "half").exists()
    (command,) = installed
    constraints = Path(command[command.index("-c") + 1])
    torch = tool.versions(Path(sys.executable))["torch"]
    assert command[-1] == "peft==0.21" and constraints.read_text() == f"torch=={torch.partition('+')[0]}\n"
    assert tool.versions(python)["torch"] == torch
    (tmp_path / "end" / "kept").touch()
    tool.environment(tmp_path / "end", ["peft==0.20"])
    assert (tmp_path / "end" / "kept").exists() and installed[1][-1] == "peft==0.20"

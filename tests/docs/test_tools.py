"""tools/peft_tests.py without the package index: arguments, and the comparison of runs."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from tool_modules import TOOLS, tool_module


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return tool_module("peft_tests")


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--peft", "latest"], "--peft: expected a version, oldest or newest, got latest"),
        (
            ["--peft", "0.20.0", "--peft", "newest", "--sdist", __file__],
            "--sdist: expected one --peft at most",
        ),
        (["--sdist", "nowhere.tar.gz"], "--sdist: expected a file, got nowhere.tar.gz"),
    ],
    ids=["version", "two-versions", "no-file"],
)
def test_bad_arguments_are_reported(arguments: list[str], words: str) -> None:
    done = subprocess.run(
        [sys.executable, str(TOOLS / "peft_tests.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2 and words in done.stderr


def test_figures_has_help() -> None:
    done = subprocess.run(
        [sys.executable, str(TOOLS / "figures.py"), "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "NAME=VALUE" in done.stdout and not done.stderr


def test_another_peft_is_installed_into_a_folder(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(tool, "pip", lambda *arguments: calls.append(arguments))
    assert tool.installed("0.20.0", tmp_path) == tmp_path
    (call,) = calls
    assert call[-1] == "peft==0.20.0" and "--no-deps" in call and str(tmp_path) in call


def test_only_failures_caused_by_the_patch_count(
    tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(outcome: str, other: str) -> dict[str, object]:
        outcomes = {"broken": outcome, "other": other, "same": "passed"}
        return {
            name: tool.Record(outcome, "why", 1, Counter(patched=2), Counter())
            for name, outcome in outcomes.items()
        }

    assert tool.compare(run("passed", "failed"), run("passed", "passed")) == 0
    assert tool.compare(run("passed", "failed"), run("failed", "failed")) == 1
    said = capsys.readouterr().out
    assert "== pass stock, fail patched: 1\nbroken\n    why\n" in said


def test_tests_of_peft_internals_may_fail(tool: ModuleType) -> None:
    name = f"tests/test_target_parameters.py::Class::{next(iter(tool.INTERNAL))}"
    stock, patched = (
        {name: tool.Record(outcome, "", 1, Counter(patched=2), Counter())} for outcome in ("passed", "failed")
    )
    assert tool.compare(stock, patched) == 0 and tool.compare({"a" + name[-9:]: stock[name]}, {}) == 1


def test_run_without_a_fused_call_fails(tool: ModuleType) -> None:
    record = tool.Record("passed", "", 1, Counter(patched=2), Counter({"a reason": 2}))
    assert tool.compare({"same": record}, {"same": record}) == 1

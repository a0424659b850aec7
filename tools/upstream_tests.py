"""Shared by peft_tests.py and bitsandbytes_tests.py: runs of another project's tests, with one record per
test."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
MODE, RECORDS = "UPSTREAM_TESTS_MODE", "UPSTREAM_TESTS_RECORDS"
"""Environment variables for the plugins, so that xdist's workers see them: "stock" or another mode, and a
folder."""


def run_pytest(
    plugin: str,
    mode: str,
    names: Sequence[str],
    keyword: str | None,
    folder: Path,
    records: Path,
    processes: int,
    options: Sequence[str] = (),
    path: Sequence[Path] = (),
    **variables: str,
) -> None:
    """Runs test files of `folder`; the plugin writes a line per test to `records`."""
    before = filter(None, [os.environ.get("PYTHONPATH")])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([*map(str, path), str(HERE), str(HERE.parent), *before]),
        MODE: mode,
        RECORDS: str(records),
        "HF_HUB_OFFLINE": "1",
        **variables,
    }
    if processes:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    command = [sys.executable, "-m", "pytest", "-c", "pytest.ini", "--rootdir", ".", "-p", plugin]
    command += ["-p", "no:cacheprovider", "-q", "-W", "ignore", "--tb=no", "--no-summary", *options]
    command += ["-n", str(processes)] if processes else []
    command += ["-k", keyword] if keyword else []
    command += [f"tests/{name}" for name in names]
    done = subprocess.run(command, cwd=folder, env=environment, check=False)
    if done.returncode not in (0, 1, 5):  # all passed, some failed, none found
        raise SystemExit(f"pytest, {mode}: exit status {done.returncode}, see above")


def read(records: Path) -> Iterator[dict[str, Any]]:
    for file in sorted(records.glob("*.jsonl")):
        yield from map(json.loads, file.read_text().splitlines())


def show(title: str, names: Sequence[str], messages: Mapping[str, str]) -> None:
    print(f"\n== {title}: {len(names)}")
    for name in names:
        print(f"{name}\n    {' '.join(messages.get(name, 'did not run').split())[:300]}")


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser of the options of both scripts."""
    formatter = argparse.RawDescriptionHelpFormatter
    found = argparse.ArgumentParser(description=description, formatter_class=formatter)
    found.add_argument("-n", type=int, default=2, help="processes (default 2); 0: in one, without xdist")
    return found


# In the plugins.


def records_file() -> Path:
    return Path(os.environ[RECORDS]) / f"{os.environ.get('PYTEST_XDIST_WORKER', 'main')}.jsonl"


def write(name: str, outcome: str, message: str, details: Mapping[str, Any]) -> None:
    with records_file().open("a") as file:
        file.write(json.dumps({"id": name, "outcome": outcome, "message": message, **details}) + "\n")


def recorder(details: Callable[[], Mapping[str, Any]]) -> Any:
    """A hook `pytest_runtest_makereport` that writes the outcome of each test, with `details` of it."""
    outcomes: dict[str, tuple[str, str]] = {}

    @pytest.hookimpl(wrapper=True)
    def makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Any:
        report = yield
        outcome, message = outcomes.get(item.nodeid, ("passed", ""))
        if outcome == "passed" and (not report.passed or hasattr(report, "wasxfail")):
            outcome = "xfailed" if hasattr(report, "wasxfail") else report.outcome
            message = "" if report.skipped or call.excinfo is None else call.excinfo.exconly()[:2000]
        outcomes[item.nodeid] = outcome, message
        if report.when == "teardown":
            write(item.nodeid, *outcomes.pop(item.nodeid), details())
        return report

    return makereport

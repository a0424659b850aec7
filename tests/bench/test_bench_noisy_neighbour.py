"""Busy machines: neighbours are busy and end, and slowdowns are reported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from bench_checks import TINY_BLOCK, Machine, line_of, skip_without

from bench.lib import report
from bench.lib.cases import PEFT_ON_BNB
from bench.lib.harness import Absent
from bench.lib.report import ONCE, OURS
from bench.models import model, noisy_neighbour
from bench.models.noisy_neighbour import Case

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="process groups and /proc of Linux")
TINY = Case("own", "bf16", model.ModelSizes(TINY_BLOCK, layers=1, vocabulary=200), 2, 16)


def members(group: int | None) -> list[tuple[int, int, float]]:
    """Id, session and CPU seconds of the running processes of a group."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parts = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(parts[2]) == group and parts[0] != "Z":
                ticks = int(parts[11]) + int(parts[12])
                found.append((int(entry.name), int(parts[3]), ticks / os.sysconf("SC_CLK_TCK")))
    return found


def wait_for_the_end_of(group: int | None) -> None:
    """Waits until killed processes are gone."""
    end = time.monotonic() + 30
    while members(group) and time.monotonic() < end:
        time.sleep(0.05)
    assert not members(group)


@pytest.mark.parametrize("is_other_session", [False, True], ids=["own", "other"])
def test_neighbours_are_busy_and_end(is_other_session: bool) -> None:
    with pytest.raises(KeyError), noisy_neighbour.neighbours(2, is_other_session) as group:
        assert group
        end = time.monotonic() + 30
        while len(used := [m for m in members(group) if m[2] > 0.05]) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        assert len(used) == len(members(group)) == 2
        assert {session for _, session, _ in used} == {group if is_other_session else os.getsid(0)}
        raise KeyError
    wait_for_the_end_of(group)


def test_neighbours_end_with_the_process_that_started_them() -> None:
    folder = Path(noisy_neighbour.__file__).parent.parent.parent
    code = (
        "import time\nfrom bench.models.noisy_neighbour import neighbours\nwith neighbours(2, False) as g:\n"
    )
    code += "    print(g, flush=True)\n    time.sleep(60)"
    folders = os.pathsep.join([str(folder), str(folder / "tests")])
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": folders}
    )
    assert child.stdout
    group = int(child.stdout.readline())
    child.send_signal(signal.SIGKILL)
    child.wait()
    wait_for_the_end_of(group)


def test_a_tiny_case() -> None:
    skip_without("peft", "transformers", "bitsandbytes")
    found = TINY.run(ONCE)
    assert not found.wrong and not found.absent, (found.wrong, found.absent)
    line = line_of(found)
    assert line["name"] == "busy-own-session-2x16-bf16" and line["values"].keys() == {OURS, PEFT_ON_BNB}
    assert all(row.keys() == noisy_neighbour.FORMS.keys() for row in line["values"].values())


def test_slowdowns_are_relative_to_the_median_of_quiet_steps() -> None:
    found = report.Figures(TINY, forms=noisy_neighbour.FORMS)
    noisy_neighbour.compare({OURS: [[1.0, 1.0, 9.0], [1.9], [2.6]], PEFT_ON_BNB: []}, found)
    assert [found.value(OURS, column) for column in noisy_neighbour.FORMS] == [1000.0, 1.9, 2.6]
    assert found.values.keys() == {OURS}


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(result: object) -> float:
        raise AssertionError("off")

    machine = Machine()
    ours, absent = machine.contender(OURS, 1.0), Absent(PEFT_ON_BNB, "not installed")
    ours.verify = off
    step = SimpleNamespace(build=lambda: [ours, absent])
    monkeypatch.setattr(model, "step", lambda *sizes: step)
    monkeypatch.setattr(noisy_neighbour, "neighbours", lambda count, other: pytest.fail("nobody to time"))
    found = TINY.run(ONCE)
    assert (
        found.wrong == {OURS: "off"} and found.absent == {PEFT_ON_BNB: "not installed"} and not found.values
    )

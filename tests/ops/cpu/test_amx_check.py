"""bench/amx_check.sh, the checks for a machine with AMX, as far as they run without AMX."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from skips import require

import testing
from bench.ops import dense_choice

ROOT = Path(__file__).resolve().parent.parent.parent.parent
SCRIPT = ROOT / "bench" / "amx_check.sh"
RECORD = ROOT / "csrc" / "cpu" / "isa" / "fast_dense.h"


def amx_check(*arguments: str, cwd: Path, **variables: str) -> tuple[int, str]:
    """The exit status and the output."""
    done = subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHON": sys.executable, **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.skipif(testing.unavailable("cpu-amx") is None, reason="there is AMX")
def test_without_amx_the_script_reports_it(tmp_path: Path) -> None:
    status, output = amx_check("out", cwd=tmp_path)
    assert status == 3
    assert re.fullmatch(r"amx_check: there is no usable AMX here: .+\n", output), output
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["summary.txt"]


@pytest.mark.parametrize("arguments", [[], ["--fast"], ["out", "more"]], ids=" ".join)
def test_wrong_arguments_are_reported(arguments: list[str], tmp_path: Path) -> None:
    assert amx_check(*arguments, cwd=tmp_path) == (2, "usage: bench/amx_check.sh OUT\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_rehearsal_runs_all_parts(tmp_path: Path) -> None:
    require("cpu")
    # An installed package may have kernels while the source tree has none.
    if not list((ROOT / "peft_kernels").glob("_C.*")):
        pytest.skip("the script runs the source tree, in which no kernels are compiled")
    before = RECORD.read_text(encoding="utf-8")
    status, output = amx_check("out", cwd=tmp_path, REHEARSE="1", OMP_NUM_THREADS="1")
    assert status == 0, output
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert re.findall(r"^([\w-]+): passed", summary, re.M) == ["environment", "tests", "dense", "tables"]
    assert re.search(r"\d+ passed", (tmp_path / "out" / "tests.log").read_text())
    assert "overhead-64x64" in (tmp_path / "out" / "tables" / "results.jsonl").read_text()
    written = (tmp_path / "out" / "fast_dense.h").read_text()
    assert re.search(r"^//   192x64 M=16: \d+\.\d\d$", written, re.M)
    # A rehearsal decides nothing.
    assert RECORD.read_text(encoding="utf-8") == before


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A stub interpreter of a machine with AMX that records its calls. All succeed, except pytest if FAILING
    is set."""
    stub = tmp_path / "python-stub"
    stub.write_text(
        f"""#!/usr/bin/env bash
echo "$* dense=$PEFT_KERNELS_AMX_DENSE cap=$PEFT_KERNELS_CPU_ISA" >> "{tmp_path}/calls"
case "$*" in
  -c*) echo amx ;;
  *pytest*) [ -z "$FAILING" ] || {{ echo "1 failed"; exit 1; }} ;;
  *dense_choice*) echo "geometric mean 1.10: dense products are ours" ;;
esac
"""
    )
    stub.chmod(0o755)
    return stub


@pytest.mark.parametrize("failing", ["", "1"], ids=["right", "wrong"])
def test_the_calls_on_a_machine_with_amx(tmp_path: Path, python: Path, failing: str) -> None:
    variables = {"PYTHON": str(python), "FAILING": failing, "PEFT_KERNELS_CPU_ISA": "avx2"}
    status, output = amx_check("out", cwd=tmp_path, **variables)
    assert status == int(failing or 0), output
    calls = [line for line in (tmp_path / "calls").read_text().splitlines() if " cap=" in line]
    assert calls and all(line.endswith(" cap=") for line in calls)  # else AMX would be hidden
    assert any(
        "-m pytest" in line and line.endswith(" tests -k cpu-amx or test_cpu_plan dense=1 cap=")
        for line in calls
    )
    chosen = [
        line for line in calls if "dense_choice.py --level amx --record csrc/cpu/isa/fast_dense.h" in line
    ]
    tables = [line for line in calls if "bench/run.py" in line]
    assert len(tables) == 1 and "^(forward|q?lora|quantize|dequantize|step|decode)-" in tables[0]
    if failing:
        assert not chosen and "dense: skipped, as tests failed" in output
        assert "tests: FAILED (status 1" in output and "1 failed" in output
    else:
        assert len(chosen) == 1 and "dense: geometric mean 1.10" in output
    fast = "true" in RECORD.read_text(encoding="utf-8")
    assert f"dense={int(fast)} " in tables[0]


FACTS = {"cpu": "a processor", "cores": 2, "versions": {"torch": "2.13"}}


@pytest.mark.parametrize("ratios, fast", [((1.2, 0.9), True), ((1.2, 0.8), False), ((1.0,), True)])
def test_the_recorded_choice(ratios: tuple[float, ...], fast: bool) -> None:
    text = dense_choice.record({f"shape {i}": ratio for i, ratio in enumerate(ratios)}, FACTS)
    assert f"inline constexpr bool kAmxHasFastDense = {str(fast).lower()};" in text
    # The rest equals the current file, so that it compiles in its place.
    there = RECORD.read_text(encoding="utf-8")
    without = [re.sub(r"true|false", "", re.sub(r"(?m)^//.*\n", "", part)) for part in (text, there)]
    assert without[0] == without[1]

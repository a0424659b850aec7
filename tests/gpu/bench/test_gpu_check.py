"""bench/gpu_check.sh without a GPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from machine_stub import Stub

from bench.gpu import run
from peft_kernels.core.backends import crossovers

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "bench" / "gpu_check.sh"
WHOLE = 540
"""Seconds in which either part ends: rented machines end a command after ten minutes."""

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def bash(*words: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    options = {"capture_output": True, "text": True, "timeout": WHOLE}
    return subprocess.run(["bash", *words], cwd=cwd, env=os.environ | variables, check=False, **options)


def gpu_check(
    out: Path, *arguments: str, python: str | Path = sys.executable, **variables: str
) -> tuple[int, str]:
    """Exit status and output."""
    words = str(SCRIPT), *arguments, out.name
    done = bash(*words, cwd=out.parent, PYTHON=str(python), **variables)
    return done.returncode, done.stdout + done.stderr


def results(out: Path) -> dict[str, str]:
    """Files of the archive by name."""
    with tarfile.open(out / "results.tar.gz") as archive:
        opened = {member.name.removeprefix("./"): archive.extractfile(member) for member in archive}
        return {name: file.read().decode(errors="replace") for name, file in opened.items() if file}


def outcomes(out: Path) -> dict[str, str]:
    """Result of each part according to the summary, in order."""
    lines = (out / "summary.txt").read_text().splitlines()
    found = [re.match(r"([\w-]+): ((passed|FAILED|skipped)\b.*)", line) for line in lines]
    return {match[1]: match[2] for match in found if match is not None}


def parts(out: Path) -> list[str]:
    return [name for name, outcome in outcomes(out).items() if not outcome.startswith("skipped")]


def calls(tmp_path: Path) -> str:
    return (tmp_path / "calls").read_text()


# Wrong calls, and no card.


@no_gpu
def test_without_a_gpu_the_script_says_so(tmp_path: Path) -> None:
    status, said = gpu_check(tmp_path)
    assert status == 3
    assert said.startswith("gpu_check: there is no usable GPU here: torch ") and len(said.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [[], ["--part"], ["--part", "tests"], ["--part", "all", "out"], ["--fast", "1", "out"], ["--carry", "."]],
    ids=" ".join,
)
def test_a_wrong_call_prints_the_usage(arguments: list[str], tmp_path: Path) -> None:
    done = bash(str(SCRIPT), *arguments, cwd=tmp_path)
    usage = "usage: bench/gpu_check.sh [--part tests|speed] [--carry FOLDER] OUT\n"
    assert (done.returncode, done.stderr) == (2, usage)
    assert not list(tmp_path.iterdir())


# The rehearsal.


@pytest.mark.slow
def test_a_rehearsal_goes_through_all_parts(tmp_path: Path) -> None:
    if reason := run.refusal("cpu"):
        pytest.skip(reason)
    # An installed package may have them while the source tree has none.
    if not list((ROOT / "peft_kernels").glob("_C.*")):
        pytest.skip("the script runs the source tree, in which no kernels are compiled")
    out = tmp_path / "out"
    status, said = gpu_check(out, REHEARSE="1", OMP_NUM_THREADS="1")
    assert status == 0, said
    stub = ["crossovers", "wgmma"] if run.refusal("ptx") is None else []
    assert parts(out) == [
        "environment",
        "self-test",
        "tests-cpu",
        "tests-on-card",
        *stub,
        "speed",
        "speed-eager",
    ]
    files = ["crossovers.json"] if stub else []
    assert sorted(path.name for path in out.iterdir()) == [*files, "results.tar.gz", "summary.txt"]
    found = results(out)
    if stub:
        assert found["crossovers.json"] == (out / "crossovers.json").read_text()
        assert len(crossovers.read(out / "crossovers.json")) == 1
        cells = [json.loads(line) for line in found["wgmma/results.jsonl"].splitlines()]
        assert [cell["group"] for cell in cells] == ["wgmma", "wgmma-dx"]
        contenders = {"ours", "ours by mma.sync", "cuBLAS bf16", "dequantise + cuBLAS"}
        assert all(contenders <= cell["times_ms"].keys() for cell in cells), cells
    assert found["summary.txt"] == (out / "summary.txt").read_text()
    assert {f"{name}.log" for name in parts(out)} < found.keys()
    lines = found["speed/results.jsonl"].splitlines()
    groups = {json.loads(line)["group"] for line in lines}
    steps = {group for group in groups if group.startswith("step-")}
    assert groups - steps == {"forward", "dequantize", "dx", "qlora", "adamw-one-tensor"}
    assert steps >= {"step-layer", "step-loss", "step-norm", "step-rotary"}
    assert "all is well" in found["self-test.log"] and found["self-test.log"] in said
    assert re.search(r"\d+ passed", found["tests-on-card.log"])


# On a machine with a GPU.

TESTS = ["primitives", "tests-cuda", "tests-triton", "tests-on-card"]
SPEED = ["crossovers", "wgmma", "speed", "speed-eager"]
SANITIZERS = ["memcheck", "racecheck"]


@pytest.mark.parametrize(
    "arguments,expected",
    [
        ([], [*TESTS, *SPEED, *SANITIZERS]),
        (["--part", "tests"], [*TESTS, *SANITIZERS]),
        (["--part", "speed"], SPEED),
    ],
    ids=["both", "tests", "speed"],
)
def test_parts_in_their_order(
    arguments: list[str], expected: list[str], tmp_path: Path, machine: Stub
) -> None:
    status, said = gpu_check(tmp_path, *arguments, python=machine())
    assert status == 0, said
    assert parts(tmp_path) == ["environment", "build", "self-test", *expected]
    recorded = calls(tmp_path)
    assert "python-stub setup.py build_ext --inplace" in recorded
    if "primitives" in expected:
        assert "-arch=native -Icsrc/cuda" in recorded and "\nprogram " in recorded
        assert re.search(r"-m pytest .* -n 6 --dist loadfile .* -k cuda\n", recorded)
        assert "--tool memcheck --kernel-regex kns=peft_kernels" in recorded
    if "speed" in expected:
        assert re.search(
            r"bench/gpu/run.py --backend cuda --seconds \d+ --only \^\(\?!wgmma\) --out", recorded
        )
        assert re.search(r"run.py --backend cuda --min-time .* --only \^wgmma --seconds \d+ --out", recorded)
        assert re.search(r"bench/gpu/crossovers.py \S+/crossovers.json\n", recorded)


def test_only_what_failed_fails(tmp_path: Path, machine: Stub, stubs: Stub) -> None:
    python = machine()
    stubs("compute-sanitizer", fails="*racecheck*")
    status, said = gpu_check(tmp_path, python=python)
    assert status == 1
    failed = [name for name, outcome in outcomes(tmp_path).items() if outcome.startswith("FAILED")]
    assert failed == ["racecheck"]
    assert "racecheck: FAILED (status 1" in said and "compute-sanitizer failed as asked" in said


def test_the_self_test_comes_first(tmp_path: Path, machine: Stub) -> None:
    """All of what it prints; then the other parts, which do without the wrong kernel, as users would."""
    page = "".join(f"cuda  cuda:0  op_{i}  ok\\n" for i in range(60))
    doctor = f'case "$*" in *doctor*) printf "{page}"; echo "$XDG_CACHE_HOME"; exit 1;;'
    doctor += ' *pytest*) echo "$XDG_CACHE_HOME";; esac'
    status, _ = gpu_check(tmp_path, "--part", "tests", python=machine(run=doctor))
    summary = (tmp_path / "summary.txt").read_text()
    assert status == 1 and re.search(r"self-test: FAILED \(status 1, .*:\ncuda  cuda:0  op_0  ok\n", summary)
    assert all(summary.count(f" op_{i} ") == 1 for i in range(60))
    assert outcomes(tmp_path)["tests-cuda"].startswith("passed")
    found = results(tmp_path)
    assert found["self-test.log"].splitlines()[-1] == found["tests-cuda.log"].strip() != ""


def test_a_failed_test_goes_under_memcheck_at_once(tmp_path: Path, machine: Stub) -> None:
    first = "tests/test_a.py::test_b[cuda_copied-m1]"
    log = f"FAILED {first} - RuntimeError: CUDA error - and more\\nFAILED tests/test_a.py::test_c - no"
    python = machine(run=f'case "$*" in *"-k cuda") printf "{log}\\n"; exit 1;; esac')
    status, _ = gpu_check(tmp_path, "--part", "tests", python=python)
    assert status == 1
    order = parts(tmp_path)
    assert order[order.index("tests-cuda") + 1] == "memcheck-tests-cuda"
    assert re.search(
        rf"compute-sanitizer --tool memcheck .* {re.escape(str(python))} -m pytest .* {re.escape(first)}\n",
        calls(tmp_path),
    )


@pytest.mark.parametrize("part", ["tests", "speed"])
def test_the_parts_fit_into_their_time(part: str, tmp_path: Path, machine: Stub) -> None:
    """Unused time of a part goes to the next ones: if parts take no time, the last gets all."""
    failing = 'case "$*" in *"-m pytest"*) echo "FAILED tests/test_a.py::test_b - no"; exit 1;; esac'
    _, said = gpu_check(tmp_path, "--part", part, python=machine(run=failing))
    limits = [
        int(seconds) for seconds in re.findall(r"\d+ of (\d+) s\)", (tmp_path / "summary.txt").read_text())
    ]
    assert len(limits) == len(parts(tmp_path)) >= 4, said
    killed_after = 8
    assert WHOLE - 60 < max(limits) <= WHOLE - killed_after


@pytest.mark.slow
def test_pytest_reports_its_results_when_time_is_up(tmp_path: Path, machine: Stub) -> None:
    """It is interrupted as by Ctrl-C, also if the script runs in the background, where Ctrl-C is ignored."""
    test = tmp_path / "test_slow.py"
    test.write_text(
        "import time\ndef test_wrong():\n    assert 1 == 2\ndef test_slow():\n    time.sleep(100)\n"
    )
    run = f'case "$*" in *"-k cuda") exec {sys.executable} -m pytest -q -p no:cacheprovider {test};; esac'
    command = f"bash {SCRIPT} --part tests {tmp_path}/out & wait $!"
    done = bash("-c", command, cwd=tmp_path, PYTHON=str(machine(run=run)), GPU_CHECK_SECONDS="30")
    assert done.returncode == 1, done.stdout + done.stderr
    assert outcomes(tmp_path / "out")["tests-cuda"].startswith("FAILED (status 124, out of time")
    log = results(tmp_path / "out")["tests-cuda.log"]
    assert "KeyboardInterrupt" in log and "1 failed" in log and "assert 1 == 2" in log


def test_the_archive_is_written_after_every_part(tmp_path: Path, machine: Stub) -> None:
    """While a part runs, the archive has the parts before it."""
    look = f'case "$*" in *"-k triton") tar -tzf "{tmp_path}/results.tar.gz" > "{tmp_path}/seen";; esac'
    gpu_check(tmp_path, "--part", "tests", python=machine(run=look))
    seen = (tmp_path / "seen").read_text()
    assert "./tests-cuda.log" in seen and "tests-triton.log" not in seen and "./summary.txt" in seen


def test_a_long_log_loses_its_middle(tmp_path: Path, machine: Stub) -> None:
    run = 'case "$*" in *"-k cuda") echo first; yes 0123456789 | head -c 5000000; echo last;; esac'
    assert gpu_check(tmp_path, "--part", "tests", python=machine(run=run))[0] == 0
    log = results(tmp_path)["tests-cuda.log"]
    assert log.startswith("first\n") and log.endswith("last\n")
    assert log.count("[... the middle is left out ...]") == 1 and 3_900_000 < len(log) < 4_100_000


def test_the_archive_has_a_maximum_size(tmp_path: Path, machine: Stub, stubs: Stub) -> None:
    """Results that compress badly are cut shorter."""
    python = machine()
    write = 'mkdir -p "${!#}"; for i in 1 2 3 4 5; do head -c 3500000 /dev/urandom > "${!#}/$i"; done'
    stubs("compute-sanitizer", run=f'case "$*" in *--tool*/racecheck) {write};; esac')
    assert gpu_check(tmp_path, "--part", "tests", python=python)[0] == 0
    assert (tmp_path / "results.tar.gz").stat().st_size < 15_000_000
    found = results(tmp_path)
    assert all("middle is left out" in found[f"racecheck/{i}"] for i in range(1, 6))
    assert "tests-cuda.log" in found


# What is missing.


@pytest.mark.parametrize(
    "lacking,words",
    [
        ("nvcc", "there is no nvcc"),
        ("ninja", "there is no ninja on the path or in "),
        ("g++", "there is no C++ compiler g++"),
        ("setuptools", "{python} lacks setuptools"),
    ],
)
def test_why_nothing_is_built(lacking: str, words: str, tmp_path: Path, machine: Stub) -> None:
    python = machine(fails=f"*\"'{lacking}'\"*")
    (tmp_path / "bin" / lacking).unlink(missing_ok=True)
    status, said = gpu_check(
        tmp_path, "--part", "tests", python=python, CUDA_HOME=str(tmp_path), PATH=bare_path(tmp_path)
    )
    assert f"build: skipped, {words.format(python=python, tmp_path=tmp_path)}" in said
    # A compiled library may still be there.
    assert status == 0 and {"tests-cuda", "tests-triton"} < set(parts(tmp_path)), said
    assert "setup.py" not in calls(tmp_path)


def bare_path(tmp_path: Path) -> str:
    """A PATH with the stubs and standard programs only."""
    folder = tmp_path / "usual"
    folder.mkdir()
    usual = (
        "bash cat cp dirname env find free grep gzip head ls mkdir mktemp mv nproc readlink rm sed stat tail"
    )
    for name in [*usual.split(), "tar", "tee", "timeout", "uname"]:
        if (found := shutil.which(name)) is not None:
            (folder / name).symlink_to(found)
    return f"{tmp_path}/bin:{folder}"


def test_what_is_missing_is_skipped_with_its_reason(tmp_path: Path, machine: Stub) -> None:
    python = machine(fails="*\"'hypothesis'\"*|*\"'peft'\"*")
    (tmp_path / "bin" / "compute-sanitizer").unlink()
    status, said = gpu_check(tmp_path, python=python, CUDA_HOME=str(tmp_path), PATH=bare_path(tmp_path))
    assert status == 0, said
    assert f"tests: skipped, {python} lacks pytest or hypothesis" in said
    assert "memcheck: skipped, there is no compute-sanitizer" in said
    assert "contender peft: skipped, it is not installed" in said
    assert "contender bitsandbytes" not in said


def test_without_cuda_triton_is_tested_and_timed(tmp_path: Path, machine: Stub) -> None:
    python = machine(fails="*BACKENDS[\\'cuda*|*setup.py*")
    status, said = gpu_check(tmp_path, python=python)
    assert status == 1
    assert "back end cuda: NOT USABLE: python-stub failed as asked" in said
    assert "tests-triton" in parts(tmp_path) and "tests-cuda" not in parts(tmp_path)
    assert "bench/gpu/run.py --backend triton --seconds" in calls(tmp_path)


def test_on_an_amd_card_triton_is_tested(tmp_path: Path, machine: Stub) -> None:
    python = machine(fails="*BACKENDS[\\'cuda*")
    python.write_text(python.read_text().replace("echo nvidia", "echo amd"))
    status, said = gpu_check(tmp_path, python=python)
    assert status == 0, said
    assert "build: skipped, an AMD card, which back end triton serves" in said
    assert parts(tmp_path) == ["environment", "self-test", "tests-triton", "tests-on-card", *SPEED[2:]]
    assert "crossovers: skipped, only back end cuda has them" in said


def test_without_kernels_nothing_is_measured(tmp_path: Path, machine: Stub) -> None:
    status, said = gpu_check(tmp_path, python=machine(fails="*probe*"))
    assert status == 1
    assert "no back end of ours can be used; nothing else runs" in said
    assert "bench/gpu/run.py" not in calls(tmp_path)
    assert set(results(tmp_path)) == {"summary.txt", "environment.log", "build.log"}


# What is carried along.


PREBUILT = ["_C_cuda.cpython-312-x86_64-linux-gnu.so", "_C_cuda.torch2.11.so", "libpeft_kernels_cuda.so"]


@pytest.fixture
def carried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as made by tools/carry.py, and a copy of the script with its own package folder."""
    for name in ("bench", "peft_kernels", "tests"):
        (tmp_path / "tree" / name).mkdir(parents=True)
    shutil.copy(SCRIPT, tmp_path / "tree" / "bench")
    monkeypatch.setattr(sys.modules[__name__], "SCRIPT", tmp_path / "tree" / "bench" / SCRIPT.name)
    folder = tmp_path / "carried"
    (folder / "peft_kernels").mkdir(parents=True)
    for name in PREBUILT:
        (folder / "peft_kernels" / name).write_text("built elsewhere")
    return folder


@pytest.mark.parametrize("failing", ["nothing", "*setup.py*"], ids=["built", "not-built"])
@pytest.mark.parametrize("way", ["option", "variable"])
def test_a_carried_library_is_used_where_none_is_built(
    way: str, failing: str, carried: Path, tmp_path: Path, machine: Stub
) -> None:
    option = ["--carry", str(carried)] if way == "option" else []
    variables = {} if option else {"PEFT_KERNELS_PREBUILT": str(carried / "peft_kernels")}
    python = machine(fails=failing, run='echo "path $PYTHONPATH" >&2')
    _, said = gpu_check(tmp_path, "--part", "speed", *option, python=python, **variables)
    used = failing != "nothing"
    assert (f"prebuilt: {' '.join(PREBUILT)}" in said) == used
    found = sorted(path.name for path in (tmp_path / "tree" / "peft_kernels").glob("*.so"))
    assert found == (PREBUILT if used else [])
    assert (f":{carried}/python" in results(tmp_path)["speed.log"]) == bool(option)

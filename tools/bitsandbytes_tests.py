"""Run bitsandbytes' own 4-bit tests twice, as it is and on our kernels, and compare test by test.

A test that passes stock and fails with `peft_kernels.integrations.bitsandbytes.enable()` is a fault: the exit
status is then 1, as it is when no call reached our kernels. Neither its wheels nor its source distributions
carry the tests: take the folder from a checkout of the installed version.

    git clone --depth 1 --branch 0.50.2 https://github.com/bitsandbytes-foundation/bitsandbytes
    python tools/bitsandbytes_tests.py --tests bitsandbytes/tests
    python tools/bitsandbytes_tests.py --tests bitsandbytes/tests test_linear4bit.py -k compile
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
FILES = ("test_ops.py", "test_functional.py", "test_linear4bit.py", "test_autograd.py", "test_parametrize.py")
FOUR_BITS = "4bit"
"""By default only tests with this in their names."""
MODES = ("stock", "enabled")

INI = """[pytest]
markers =
    benchmark
    deprecated
    slow
"""

Outcomes = dict[str, tuple[str, str]]
"""Of each test by name: the outcome, and why it failed."""


def main() -> int:
    options = arguments()
    with tempfile.TemporaryDirectory(prefix="bitsandbytes_tests_") as temporary:
        folder = Path(temporary)
        # Beside the checkout's own package, which nothing is compiled in, they would test that.
        shutil.copytree(options.tests, folder / "tests")
        (folder / "tests" / "__init__.py").touch()
        (folder / "pytest.ini").write_text(INI)
        names = [name for name in options.files or FILES if (folder / "tests" / name).exists()]
        runs: dict[str, Outcomes] = {}
        calls: Counter[str] = Counter()
        for mode in MODES:
            print(f"== {mode}: {' '.join(names)} -k '{options.k}'", flush=True)
            records = folder / mode
            records.mkdir()
            run_pytest(mode, names, options.k, folder, records, options.n)
            runs[mode], calls = read(records)
    return compare(runs["stock"], runs["enabled"], calls)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", metavar="test_FILE.py", help="files in that folder")
    parser.add_argument("--tests", type=Path, required=True, help="the folder tests/ of bitsandbytes")
    parser.add_argument("-k", default=FOUR_BITS, help=f"pytest's -k (default {FOUR_BITS}); '' for all")
    parser.add_argument("-n", type=int, default=2, help="processes (default 2); 0: in one, without xdist")
    options = parser.parse_args()
    if not (options.tests / "helpers.py").is_file():
        parser.error(
            f"--tests: expected bitsandbytes' folder of tests, with a helpers.py, got {options.tests}"
        )
    for name in options.files:
        if not (options.tests / name).is_file():
            parser.error(f"{name}: expected a file in {options.tests}, found none")
    return options


def run_pytest(
    mode: str, names: list[str], keyword: str, folder: Path, records: Path, processes: int
) -> None:
    """One run; `records` gets a line per test."""
    before = filter(None, [os.environ.get("PYTHONPATH")])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), *before]),
        "BITSANDBYTES_TESTS_MODE": mode,
        "BITSANDBYTES_TESTS_RECORDS": str(records),
        "HF_HUB_OFFLINE": "1",
    }
    if processes:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    command = [sys.executable, "-m", "pytest", "-c", "pytest.ini", "--rootdir", "."]
    command += ["-p", "bitsandbytes_tests_plugin", "-p", "no:cacheprovider", "-q", "-W", "ignore"]
    command += ["--tb=no", "--no-summary"]
    command += ["-n", str(processes)] if processes else []
    command += ["-k", keyword] if keyword else []
    command += [f"tests/{name}" for name in names]
    done = subprocess.run(command, cwd=folder, env=environment, check=False)
    if done.returncode not in (0, 1):  # all passed, some failed
        raise SystemExit(f"pytest, {mode}: exit status {done.returncode}, see above")


def read(records: Path) -> tuple[Outcomes, Counter[str]]:
    """The outcomes of a run, and the calls of bitsandbytes' ops by who served them."""
    outcomes: Outcomes = {}
    calls: Counter[str] = Counter()
    for file in sorted(records.glob("*.jsonl")):
        for line in file.read_text().splitlines():
            entry = json.loads(line)
            outcomes[entry["id"]] = entry["outcome"], entry["message"]
            calls.update(entry["calls"])
    return outcomes, calls


def compare(stock: Outcomes, enabled: Outcomes, calls: Counter[str]) -> int:
    """Print how the runs differ. Returns the exit status."""
    print("\n== tests")
    for mode, run in zip(MODES, (stock, enabled), strict=True):
        counts = Counter(outcome for outcome, _ in run.values())
        print(f"{mode:<8} {', '.join(f'{counts[key]} {key}' for key in sorted(counts)) or 'none'}")
    print("\n== calls of its ops in the enabled run")
    for name, count in sorted(calls.items()):
        print(f"{count:>8} {name}")
    broken = [name for name in sorted(stock) if passed(stock, name) and not passed(enabled, name)]
    mended = [name for name in sorted(enabled) if passed(enabled, name) and not passed(stock, name)]
    show("pass stock, fail enabled", broken, enabled)
    show("fail stock, pass enabled", mended, stock)
    served = sum(count for name, count in calls.items() if name.endswith(OURS))
    if not served:
        print("\nno call reached our kernels: these tests say nothing about them")
    return 1 if broken or not served else 0


OURS, THEIRS = "by ours", "left to bitsandbytes"


def passed(run: Outcomes, name: str) -> bool:
    return name in run and run[name][0] == "passed"


def show(title: str, names: list[str], failing: Outcomes) -> None:
    print(f"\n== {title}: {len(names)}")
    for name in names:
        outcome, message = failing.get(name, ("did not run", ""))
        print(f"{name}\n    {outcome} {' '.join(message.split())[:300]}")


if __name__ == "__main__":
    sys.exit(main())

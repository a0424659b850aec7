"""Runs bitsandbytes' own 4-bit tests twice, unchanged and on our kernels, and compares test by test.

Exits with 1 if a test passes stock and fails with `peft_kernels.integrations.bitsandbytes.enable()`, or if no
call reached our kernels. Neither wheels nor source distributions of bitsandbytes contain the tests: use a
checkout of the installed version.

    git clone --depth 1 --branch 0.50.2 https://github.com/bitsandbytes-foundation/bitsandbytes
    python tools/bitsandbytes_tests.py --tests bitsandbytes/tests
    python tools/bitsandbytes_tests.py --tests bitsandbytes/tests test_linear4bit.py -k compile
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import upstream_tests

FILES = ("test_ops.py", "test_functional.py", "test_linear4bit.py", "test_autograd.py", "test_parametrize.py")
FOUR_BITS = "4bit"
"""In the names of the tests that run by default."""
MODES = ("stock", "enabled")
PLUGIN = "bitsandbytes_tests_plugin"

INI = """[pytest]
markers =
    benchmark
    deprecated
    slow
"""

Outcomes = dict[str, tuple[str, str]]
"""Outcome and error message of each test by name."""


def main() -> int:
    options = arguments()
    with tempfile.TemporaryDirectory(prefix="bitsandbytes_tests_") as temporary:
        folder = Path(temporary)
        # Copied: beside the checkout's package, they would import that, which is not compiled.
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
            upstream_tests.run_pytest(PLUGIN, mode, names, options.k, folder, records, options.n)
            runs[mode], calls = read(records)
    return compare(runs["stock"], runs["enabled"], calls)


def arguments() -> argparse.Namespace:
    parser = upstream_tests.parser(__doc__)
    parser.add_argument("files", nargs="*", metavar="test_FILE.py", help="files in that folder")
    parser.add_argument("--tests", type=Path, required=True, help="folder tests/ of bitsandbytes")
    parser.add_argument("-k", default=FOUR_BITS, help=f"pytest's -k (default {FOUR_BITS}); '' for all")
    options = parser.parse_args()
    if not (options.tests / "helpers.py").is_file():
        parser.error(
            f"--tests: expected bitsandbytes' folder of tests, with a helpers.py, got {options.tests}"
        )
    for name in options.files:
        if not (options.tests / name).is_file():
            parser.error(f"{name}: expected a file in {options.tests}, found none")
    return options


def read(records: Path) -> tuple[Outcomes, Counter[str]]:
    """The outcomes of a run, and the calls of bitsandbytes' ops by the library that served them."""
    outcomes: Outcomes = {}
    calls: Counter[str] = Counter()
    for entry in upstream_tests.read(records):
        outcomes[entry["id"]] = entry["outcome"], entry["message"]
        calls.update(entry["calls"])
    return outcomes, calls


def compare(stock: Outcomes, enabled: Outcomes, calls: Counter[str]) -> int:
    """Prints how the runs differ. Returns the exit status."""
    print("\n== tests")
    for mode, run in zip(MODES, (stock, enabled), strict=True):
        counts = Counter(outcome for outcome, _ in run.values())
        print(f"{mode:<8} {', '.join(f'{counts[key]} {key}' for key in sorted(counts)) or 'none'}")
    print("\n== calls of its ops in the enabled run")
    for name, count in sorted(calls.items()):
        print(f"{count:>8} {name}")
    broken = [name for name in sorted(stock) if passed(stock, name) and not passed(enabled, name)]
    repaired = [name for name in sorted(enabled) if passed(enabled, name) and not passed(stock, name)]
    upstream_tests.show("pass stock, fail enabled", broken, messages(enabled))
    upstream_tests.show("fail stock, pass enabled", repaired, messages(stock))
    served = sum(count for name, count in calls.items() if name.endswith(OURS))
    if not served:
        print("\nno call reached our kernels: these tests say nothing about them")
    return 1 if broken or not served else 0


OURS, THEIRS = "by ours", "left to bitsandbytes"


def passed(run: Outcomes, name: str) -> bool:
    return name in run and run[name][0] == "passed"


def messages(run: Outcomes) -> dict[str, str]:
    return {name: f"{outcome} {message}" for name, (outcome, message) in run.items()}


if __name__ == "__main__":
    sys.exit(main())

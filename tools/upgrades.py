"""Runs the flows and pk.patch with old, middle and the newest versions of the libraries and says what fails.

    python tools/upgrades.py                      # pinned, oldest, middle, and newest with pre-releases
    python tools/upgrades.py --only oldest -k trl

The oldest are the lower bounds of pyproject.toml; the newest are those of pip's index, pre-releases
included. Each set has an environment of its own above this one, whose torch and other packages it uses. Exits
with 1 if a test fails. A run with the same sources, versions and tests is not repeated, so that after an
interruption only the rest runs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import versions as supported

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("transformers", "peft", "trl", "accelerate", "bitsandbytes")
SHOWN = ("torch", *LIBRARIES)
RELATED = (*SHOWN, "huggingface_hub", "tokenizers", "datasets", "safetensors", "numpy")
"""Packages whose versions tell one run from another."""
PINNED, OLDEST, MIDDLE, NEWEST = ENDS = ("pinned", "oldest", "middle", "newest")
IN_THE_MIDDLE = [
    "transformers==5.10.1",
    "peft==0.19.1",
    "trl==1.8.0",
    "accelerate==1.13.0",
    "bitsandbytes==0.49.2",
]
"""Releases of about half a year ago."""
TESTS = ("tests/flows", "tests/patch")
FEW = 5
"""Tests that are listed for one message."""
SOURCES = ("peft_kernels", "csrc", "tests", "pyproject.toml", "constraints.txt")

VERSIONS = """
import importlib.metadata as metadata, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


class Outcome(NamedTuple):
    outcome: str
    """passed, failed or skipped."""
    message: str
    """The first line of the error, or why it was skipped."""


class Run(NamedTuple):
    """The tests with one set of versions."""

    versions: dict[str, str]
    tests: dict[str, Outcome]
    python: Path
    report: Path
    """pytest's, with whole errors."""

    def count(self, outcome: str) -> int:
        return sum(test.outcome == outcome for test in self.tests.values())


def main(words: Sequence[str] | None = None) -> int:
    options = arguments(words)
    runs = {PINNED: run(Path(sys.executable), options)}
    for end in options.only or (OLDEST, MIDDLE, NEWEST):
        python = environment(options.cache / end, packages(end))
        runs[end] = run(python, options)
    return report(runs)


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--only", action="append", choices=ENDS[1:], help="compare only these versions")
    parser.add_argument("tests", nargs="*", default=TESTS, help=f"default: {' '.join(TESTS)}")
    parser.add_argument("-k", default="", help="pytest's -k")
    parser.add_argument("-n", type=int, default=2, help="processes (default 2)")
    parser.add_argument(
        "--cache", type=Path, default=ROOT / "build" / "upgrades", help="environments and results"
    )
    return parser.parse_args(words)


# Environments.


def packages(end: str) -> list[str]:
    """What pip installs: the lower bounds of pyproject.toml, those in the middle, or the newest."""
    oldest = [f"{name}=={bound}" for name, bound in supported.oldest().items() if name in LIBRARIES]
    return {NEWEST: ["--pre", "--upgrade", *LIBRARIES], MIDDLE: IN_THE_MIDDLE, OLDEST: oldest}[end]


def environment(folder: Path, wanted: Sequence[str]) -> Path:
    """The Python of an environment with these packages above those of this one."""
    python, above, below = folder / "bin" / "python", folder / "above.txt", sysconfig.get_path("purelib")
    if not list(folder.glob("lib/*/site-packages/below.pth")):  # it is new, or making it was interrupted
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        # Its own packages come first. pip sees those below, and never removes them.
        (own,) = folder.glob("lib/*/site-packages")
        (own / "below.pth").write_text(below + "\n")
    torch = versions(Path(sys.executable))["torch"].partition("+")[0]
    above.write_text(f"torch=={torch}\n")
    print(f"installing into {folder}: {' '.join(wanted)}", flush=True)
    command = [python, "-m", "pip", "install", "-q", "--no-compile", "--disable-pip-version-check"]
    if subprocess.run([*command, "-c", above, *wanted], check=False).returncode:
        raise SystemExit(f"pip install {' '.join(wanted)}: failed, see above")
    return python


def versions(python: Path) -> dict[str, str]:
    done = subprocess.run([python, "-c", VERSIONS, *RELATED], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


# Runs.


def run(python: Path, options: argparse.Namespace) -> Run:
    """The outcome of each test; that of the last run if nothing changed since."""
    found = versions(python)
    what = [found, options.tests, options.k, sources()]
    key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
    report = options.cache.resolve() / f"{key}.xml"
    print("== " + ", ".join(f"{name} {found.get(name, 'missing')}" for name in SHOWN), flush=True)
    if report.exists():
        print(f"as in {report}", flush=True)
    else:
        report.parent.mkdir(parents=True, exist_ok=True)
        pytest(python, options, report)
    return Run(found, dict(outcomes(report)), python, report)


def sources() -> str:
    """A hash of the files that a run depends on, as they are in the working tree."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *SOURCES]
    names = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    digest = hashlib.sha256()
    for path in (ROOT / name for name in sorted(filter(None, names.split("\0")))):
        digest.update(str(path).encode() + (path.read_bytes() if path.exists() else b""))
    return digest.hexdigest()


def pytest(python: Path, options: argparse.Namespace, report: Path) -> None:
    unfinished = report.with_suffix(".part")
    command = [python, "-m", "pytest", "-q", "--tb=short", "--no-summary", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors"]
    command += ["-n", str(options.n), "--dist", "loadfile"] if options.n else []
    command += ["-k", options.k] if options.k else []
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [*command, f"--junitxml={unfinished}", *options.tests],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    if done.returncode not in (0, 1):  # all passed, some failed
        raise SystemExit(f"pytest: exit status {done.returncode}, see above")
    unfinished.rename(report)


def outcomes(report: Path) -> Iterator[tuple[str, Outcome]]:
    """Name and outcome of each test of a JUnit report. A file that cannot be imported is one test."""
    for case in ElementTree.parse(report).iter("testcase"):
        name = node(case.get("classname", ""), case.get("name", ""))
        failure = next((case.find(tag) for tag in ("failure", "error") if case.find(tag) is not None), None)
        skipped = case.find("skipped")
        if failure is not None:
            yield name, Outcome("failed", first_line(failure))
        elif skipped is not None:
            yield name, Outcome("skipped", skipped.get("message", ""))
        else:
            yield name, Outcome("passed", "")


def node(dotted: str, name: str) -> str:
    """What pytest takes to run a test: `dotted` are the module, and classes in it."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        if (ROOT / (file := "/".join(parts[:end]) + ".py")).is_file():
            return "::".join([file, *parts[end:], name])
    return "::".join(filter(None, (dotted, name)))


def first_line(failure: ElementTree.Element) -> str:
    """The error that pytest shows behind E, or the message."""
    errors = re.findall(r"^E +(\S.*)$", failure.text or "", re.MULTILINE)
    whole = failure.get("message", "")
    if whole == "collection failure" and errors:
        return errors[-1]
    return next(filter(None, map(str.strip, whole.splitlines())), errors[0] if errors else "no message")


# The table.


def report(runs: dict[str, Run]) -> int:
    """Prints how the runs differ, and a summary as the last line. Returns the exit status."""
    pinned, summary = runs[PINNED], []
    rows = [["", *runs]]
    rows += [[name, *(run.versions.get(name, "missing") for run in runs.values())] for name in SHOWN]
    for outcome in ("passed", "failed", "skipped"):
        rows.append([outcome, *(str(run.count(outcome)) for run in runs.values())])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print()
    for row in rows:
        print("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip())
    for end, run in runs.items():
        if end == PINNED:
            failed = {name: test.message for name, test in run.tests.items() if test.outcome == "failed"}
            show(f"fail with the {end} versions", failed)
            summary.append(f"{end}: {len(failed)} fail")
        else:
            failed, skipped = regressions(pinned, run), left_out(pinned, run)
            show(f"do not run with the {end} versions alone", skipped)
            show(f"fail with the {end} versions alone", failed)
            summary.append(f"{end}: {len(failed)} fail alone, {len(skipped)} do not run")
        if failed:
            python, report = map(os.path.relpath, (run.python, run.report))
            print(f"\nwhole errors: {report}\none of the tests: {python} -m pytest TEST")
    print(f"\n{'; '.join(summary)}")
    return 1 if any(run.count("failed") for run in runs.values()) else 0


def regressions(pinned: Run, run: Run) -> dict[str, str]:
    """Tests that fail, and do not with the pinned versions, with their messages."""
    known = {name for name, test in pinned.tests.items() if test.outcome == "failed"}
    failed = (entry for entry in run.tests.items() if entry[1].outcome == "failed")
    return {name: test.message for name, test in failed if name not in known}


def left_out(pinned: Run, run: Run) -> dict[str, str]:
    """Tests that pass with the pinned versions and do not run, with the reasons."""
    passed = [name for name, test in pinned.tests.items() if test.outcome == "passed"]
    found = {name: run.tests.get(name, Outcome("skipped", "not collected")) for name in passed}
    return {name: test.message for name, test in found.items() if test.outcome == "skipped"}


def show(title: str, messages: dict[str, str]) -> None:
    """Prints tests by message, the most common first, and a few of each."""
    by_message = defaultdict(list)
    for name, message in sorted(messages.items()):
        by_message[message].append(name)
    if messages:
        print(f"\n== {title}: {len(messages)}")
    for message, of_it in sorted(by_message.items(), key=lambda entry: -len(entry[1])):
        print("\n    ".join([message[:200], *of_it[:FEW]]))
        if len(of_it) > FEW:
            print(f"    and {len(of_it) - FEW} more")


if __name__ == "__main__":
    sys.exit(main())

"""Checks that this commit can be released, and prints a table of what holds and what does not.

    python tools/release_check.py                     # all of it: more than an hour
    python tools/release_check.py --quick             # without the long checks
    python tools/release_check.py --only 'version|tag'
    python tools/release_check.py --list

A check goes on after the failure of another. A long check that passed is not repeated for the same commit,
if the tree was clean. Outputs of commands are in build/release. Exits with 1 if a check failed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import figures
import requirements
import versions

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "build" / "release"
DIST, PACKAGE = ROOT / "dist", "peft_kernels"
MEGABYTE = 1_000_000
BUDGETS = {
    "*.tar.gz": 3,
    "*_x86_64.whl": 10,
    "*_aarch64.whl": 8,
    "*cu*.whl": 40,
}
"""Largest size in MB of a file in dist/; the last pattern that fits counts."""


NEWEST_PYTHON = "3.14"
"""The newest that the pinned torch has wheels for."""


class Failed(Exception):
    """Why a check failed, in a sentence."""


class Check(NamedTuple):
    name: str
    function: Callable[[], str | None]
    """Returns a detail for the table."""
    is_long: bool

    @property
    def meaning(self) -> str:
        return (self.function.__doc__ or "").strip().splitlines()[0]


CHECKS: list[Check] = []


def check(name: str, is_long: bool = False) -> Callable[[Callable[[], str | None]], Callable[[], str | None]]:
    """Adds a function to the checks."""

    def add(function: Callable[[], str | None]) -> Callable[[], str | None]:
        CHECKS.append(Check(name, function, is_long))
        return function

    return add


# The commit.


def git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


@check("tree")
def tree_is_clean() -> str:
    """Everything is committed."""
    if changed := git("status", "--porcelain"):
        count = len(changed.splitlines())
        raise Failed(f"{count} files are not committed, the first one is {changed.split()[1]}")
    return git("rev-parse", "--short", "HEAD")


@check("version")
def version_is_that_of_the_changelog() -> str:
    """CHANGELOG.md begins with this version and its date."""
    version, heading = versions.current(), versions.newest_heading()
    if heading.version != version:
        raise Failed(f"the version is {version}, CHANGELOG.md begins with {heading.version}")
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", heading.date):
        raise Failed(f"CHANGELOG.md has {version} ({heading.date}): put the release's date there")
    return f"{version}, {heading.date}"


@check("tag")
def version_is_new() -> str:
    """No tag has this version."""
    tag = f"v{versions.current()}"
    if git("tag", "--list", tag):
        raise Failed(f"there is a tag {tag}: increase the version")
    return f"{tag} is free"


# The pages.


@check("figures")
def pages_have_the_figures() -> str:
    """Pages and README have the figures of docs/figures.json."""
    if lacking := figures.lacking():
        page, passages = next(iter(lacking.items()))
        raise Failed(f"{len(lacking)} pages lack figures, {page} lacks: {passages[0]}")
    return f"{len(figures.load().values)} figures"


@check("supported versions")
def pages_have_the_supported_versions() -> str:
    """Pages, `doctor` and pyproject.toml have the same oldest versions, and the pages the pinned ones."""
    if wrong := versions.disagreements():
        raise Failed(wrong[0])
    return ", ".join(f"{name} {bound}" for name, bound in versions.oldest().items())


# What takes long.


@check("extras", is_long=True)
def extras_resolve() -> str:
    """pip finds versions of all extras that fit together, on the oldest and the newest Python."""
    oldest = requirements.project()["requires-python"].removeprefix(">=")
    extras = requirements.project()["optional-dependencies"]
    wanted = sorted({"torch", "numpy", *requirements.requirements(extras, extras)})
    for python in (oldest, NEWEST_PYTHON):
        # Nothing is installed; a target folder is what pip needs to resolve for another Python.
        how = ["--dry-run", "--ignore-installed", "--only-binary=:all:", "--target", str(LOGS / "none")]
        command = [sys.executable, "-m", "pip", "install", "-q", *how, "--python-version", python]
        run([*command, "-c", "constraints.txt", *wanted], f"extras-{python}")
    return f"Python {oldest} and {NEWEST_PYTHON}"


def make(target: str) -> str:
    """Runs a target. Its output is in a file. Returns the last line."""
    return run(["make", target], target)


def run(command: Sequence[str], name: str) -> str:
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"{name}.log"
    with log.open("w") as file:
        done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False)
    lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
    if done.returncode != 0:
        raise Failed(f"{' '.join(command)} failed, see {log.relative_to(ROOT)}: {lines[-1].strip()[:120]}")
    return lines[-1].strip()[:80]


@check("ci", is_long=True)
def ci_passes() -> str:
    """.ci/run passes and skips no part: tests, style, types, the package from source."""
    return run([".ci/run", "--rerun"], "ci")


@check("seeds", is_long=True)
def numbers_do_not_depend_on_the_seed() -> str:
    """`make test-seeds`: the tests that compare numbers pass on inputs of another seed."""
    return make("test-seeds")


@check("wheels", is_long=True)
def wheels_are_built() -> str:
    """`make wheels` builds the wheel for CPUs."""
    return make("wheels")


@check("CUDA wheel", is_long=True)
def cuda_wheel_is_built() -> str:
    """`make wheels ARGS=--cuda` builds the wheel with CUDA kernels. Needs nvcc, and no GPU."""
    return run(["make", "wheels", "ARGS=--cuda"], "cuda-wheel")


def in_dist() -> list[Path]:
    return sorted(path for path in DIST.glob("*") if path.is_file())


@check("dist")
def files_are_of_this_commit() -> str:
    """The files in dist/ are of this version and commit."""
    if not in_dist():
        raise Failed("dist/ is empty: make wheels")
    here = {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in (ROOT / PACKAGE).rglob("*.py")}
    committed = int(git("log", "-1", "--format=%ct"))
    for path in in_dist():
        version = path.name.removesuffix(".tar.gz").split("-")[1] if "-" in path.name else ""
        if version.partition("+")[0] != versions.current():
            raise Failed(f"dist/{path.name}: expected version {versions.current()}")
        there = modules(path)
        if different := sorted(name for name in {*here, *there} if here.get(name) != there.get(name)):
            raise Failed(f"dist/{path.name}: {different[0]} is not as in the commit: make wheels")
        if path.stat().st_mtime < committed:
            raise Failed(f"dist/{path.name}: older than the commit, and so may be its libraries: make wheels")
    return ", ".join(path.name for path in in_dist())


def modules(archive: Path) -> dict[str, bytes]:
    """The package's Python files in a wheel or source distribution, by their names in the tree."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return {n: wheel.read(n) for n in wheel.namelist() if is_module(n)}
    with tarfile.open(archive) as tar:
        members = {member.name.partition("/")[2]: member for member in tar if member.isfile()}
        return {n: tar.extractfile(m).read() for n, m in members.items() if is_module(n)}  # type: ignore[union-attr]


def is_module(name: str) -> bool:
    return name.startswith(f"{PACKAGE}/") and name.endswith(".py")


@check("sizes")
def files_are_within_budgets() -> str:
    """The files in dist/ are below their budgets."""
    sizes = []
    for path in in_dist():
        fitting = [budget for pattern, budget in BUDGETS.items() if path.match(pattern)]
        if not fitting:
            raise Failed(f"dist/{path.name}: expected one of {', '.join(BUDGETS)}")
        size = path.stat().st_size / MEGABYTE
        if size > fitting[-1]:
            raise Failed(f"dist/{path.name} has {size:.1f} MB, the budget is {fitting[-1]} MB")
        sizes.append(f"{size:.1f} of {fitting[-1]} MB")
    return ", ".join(sizes)


@check("package", is_long=True)
def packages_install() -> str:
    """`make package` installs the packages in empty environments and uses them."""
    return make("package")


@check("hub", is_long=True)
def layout_for_the_hub_works() -> str:
    """`make hub` builds the layout for Hugging Face's kernels and runs its tests."""
    return make("hub")


@check("upgrades", is_long=True)
def flows_run_with_other_versions() -> str:
    """`make upgrades`: what passes with the pinned versions passes with the oldest and the newest."""
    return make("upgrades")


@check("families", is_long=True)
def families_are_fused_as_before() -> str:
    """tools/families.py renews docs/families.md; its last line is the last row that has changed."""
    return run([sys.executable, "tools/families.py"], "families")


@check("docs", is_long=True)
def site_is_built() -> str:
    """`make docs` builds the site without a broken link."""
    return make("docs")


@check("readme", is_long=True)
def readme_is_true() -> str:
    """The snippets and commands of the README run, and its links lead to files."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/docs/test_docs.py", "-k", "readme or README"]
    run(command, "readme")
    return make("demo")


# The table.


def main(words: Sequence[str] | None = None) -> int:
    options = arguments(words)
    chosen = [one for one in CHECKS if re.search(options.only, one.name)]
    if not chosen:
        raise SystemExit(f"--only: no check matches {options.only!r}; --list shows all")
    if options.list:
        table([(one.name, "long" if one.is_long else "", one.meaning) for one in chosen])
        return 0
    rows, failures = [], 0
    for one in chosen:
        print(f"{one.name}: {one.meaning}", flush=True)
        result, seconds, detail = outcome(one, options.quick)
        rows.append((one.name, result, seconds, detail))
        failures += result == "FAILED"
    print()
    table(rows)
    skipped = [name for name, result, *_ in rows if result == "skipped"]
    if skipped:
        print(f"\nnot checked: {', '.join(skipped)}")
    print(f"\n{failures} of {len(rows)} checks failed" if failures else "\nno check failed")
    return 1 if failures else 0


def outcome(one: Check, quick: bool) -> tuple[str, str, str]:
    """Result, seconds and a sentence."""
    if one.is_long and quick:
        return "skipped", "", one.meaning
    commit, begin = passed_key(), time.monotonic()
    if one.is_long and commit and (detail := passes().get(f"{one.name} {commit}")) is not None:
        return "passed", "", f"{detail} (before, at this commit)"
    try:
        result, detail = "passed", one.function() or ""
    except Failed as failure:
        result, detail = "FAILED", str(failure)
    except Exception as error:  # the other checks still run
        result, detail = "FAILED", f"the check itself failed: {type(error).__name__}: {error}"
    if result == "passed" and one.is_long and commit and commit == passed_key():
        LOGS.mkdir(parents=True, exist_ok=True)
        (LOGS / "passed.json").write_text(json.dumps(passes() | {f"{one.name} {commit}": detail}))
    return result, f"{time.monotonic() - begin:.0f} s", detail


def passed_key() -> str:
    """The commit, if the tree is clean."""
    return "" if git("status", "--porcelain") else git("rev-parse", "HEAD")


def passes() -> dict[str, str]:
    """Details of the long checks that passed, by name and commit."""
    path = LOGS / "passed.json"
    return json.loads(path.read_text()) if path.exists() else {}


def table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip())


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--quick", action="store_true", help="skip the long checks")
    parser.add_argument("--only", default="", metavar="REGEX", help="checks whose name matches")
    parser.add_argument("--list", action="store_true", help="list the checks and run none")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main())

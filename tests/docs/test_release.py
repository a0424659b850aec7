"""tools/release_check.py and tools/versions.py: every quick check passes on a sound tree, and fails with a
sentence for each planted fault."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tool_modules import TOOLS, tool_module

ROOT = TOOLS.parent
TAG = "py3-none-manylinux_2_28_x86_64"
FILES = (
    "pyproject.toml",
    "constraints.txt",
    "CHANGELOG.md",
    "docs/supported.md",
    "docs/figures.json",
    "docs/recipes/transformers.md",
    "peft_kernels/__init__.py",
    "peft_kernels/cli/doctor.py",
    "peft_kernels/quantize/transformers/config.py",
    "tools/build_backend.py",
)


@pytest.fixture
def versions() -> ModuleType:
    return tool_module("versions")


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, versions: ModuleType) -> ModuleType:
    """The tool on a copy of what its quick checks read: committed, with a date and one file in dist/."""
    tool, root = tool_module("release_check"), tmp_path / "tree"
    figures = tool.figures
    pages = [page for page in figures.load().passages if (ROOT / page).is_file()]
    for name in (*FILES, *pages):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    (root / ".gitignore").write_text("dist/\nbuild/\n")
    edit(
        root / "CHANGELOG.md", f"## {versions.newest_heading().version} (unreleased)", "## 9.8.7 (2030-01-31)"
    )
    edit(root / "peft_kernels/__init__.py", f'"{versions.current()}"', '"9.8.7"')
    git(root, "init", "-q")
    commit(root)
    make_dist(root)
    for module in (tool, versions, versions.requirements):
        monkeypatch.setattr(module, "ROOT", root)
    monkeypatch.setattr(tool, "LOGS", root / "build" / "release")
    monkeypatch.setattr(tool, "DIST", root / "dist")
    monkeypatch.setattr(figures, "lacking", lambda lacking=figures.lacking: lacking(root))
    return tool


def make_dist(root: Path) -> None:
    """A source distribution and a wheel, newer than any commit of the test."""
    (root / "dist").mkdir(exist_ok=True)
    (version,) = re.findall('__version__ = "(.*)"', (root / "peft_kernels/__init__.py").read_text())
    base, modules = root / "dist" / f"peft_kernels-{version}", sorted((root / "peft_kernels").rglob("*.py"))
    with tarfile.open(f"{base}.tar.gz", "w:gz") as tar:
        for path in modules:
            tar.add(path, f"{base.name}/{path.relative_to(root)}")
    with zipfile.ZipFile(f"{base}+cu13-{TAG}.whl", "w") as wheel:
        for path in modules:
            wheel.write(path, path.relative_to(root))
        wheel.writestr("peft_kernels/lib.so", b"")
    for path in (root / "dist").iterdir():
        make_new(path)


def make_new(path: Path) -> None:
    os.utime(path, (time.time() + 3600,) * 2)


def git(root: Path, *words: str) -> None:
    names = ["-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run(["git", "-C", str(root), *names, *words], check=True, capture_output=True)


def commit(root: Path) -> None:
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "x")


def edit(path: Path, before: str, after: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert before in text, f"{before} in {path.name}"
    path.write_text(text.replace(before, after, 1), encoding="utf-8")


def quick(tool: ModuleType, *words: str) -> int:
    return tool.main(["--quick", *words])


def test_sound_tree_passes_and_long_checks_are_named(
    tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quick(tool) == 0
    said = capsys.readouterr().out
    assert "FAILED" not in said and "no check failed" in said
    long = [one.name for one in tool.CHECKS if one.is_long]
    assert f"not checked: {', '.join(long)}" in said and {"ci", "wheels", "package", "upgrades"} <= {*long}


def plant_uncommitted(root: Path) -> None:
    edit(root / "CHANGELOG.md", "9.8.7", "9.8.7")
    (root / "new.txt").write_text("x")


def edited(file: str, before: str, after: str) -> Callable[[Path], None]:
    return lambda root: edit(root / file, before, after)


def made_wheel(root: Path) -> Path:
    return root / "dist" / f"peft_kernels-9.8.7+cu13-{TAG}.whl"


def add_to_wheel(root: Path, name: str, content: bytes = b"") -> None:
    with zipfile.ZipFile(made_wheel(root), "a") as wheel:
        wheel.writestr(name, content)
    make_new(made_wheel(root))


PLANTED: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "uncommitted": (plant_uncommitted, "tree", "1 files are not committed, the first one is new.txt"),
    "no date": (
        edited("CHANGELOG.md", "2030-01-31", "unreleased"),
        "version",
        "CHANGELOG.md has 9.8.7 (unreleased): put the release's date there",
    ),
    "another version": (
        edited("peft_kernels/__init__.py", "9.8.7", "9.8.8"),
        "version",
        "the version is 9.8.8, CHANGELOG.md begins with 9.8.7",
    ),
    "tag": (
        lambda root: git(root, "tag", "v9.8.7"),
        "tag",
        "there is a tag v9.8.7: increase the version",
    ),
    "figure": (
        edited("README.md", "1.88 times", "1.98 times"),
        "figures",
        "1 pages lack figures, README.md lacks: ",
    ),
    "page": (
        edited("docs/supported.md", "| PEFT         | 0", "| PEFT         | 1"),
        "supported versions",
        "docs/supported.md: expected peft 0.",
    ),
    "doctor": (
        edited(
            "peft_kernels/cli/doctor.py", '_NEEDED = {"transformers": (', '_NEEDED = {"transformers": (4, '
        ),
        "supported versions",
        "doctor.py: expected transformers 5",
    ),
    "recipe": (
        edited("docs/recipes/transformers.md", "needs transformers 5", "needs transformers 4"),
        "supported versions",
        "transformers.md: expected NF4Config 5.",
    ),
    "sentence": (
        edited("peft_kernels/quantize/transformers/config.py", ": expected 5", ": wanted 5"),
        "supported versions",
        "config.py: expected NF4Config 5.",
    ),
    "no bound": (
        edited("pyproject.toml", '"trl>=', '"trl", "other>='),
        "supported versions",
        "pyproject.toml: expected a lower bound of trl, found none",
    ),
    "large file": (
        lambda root: add_to_wheel(root, "peft_kernels/large.so", bytes(299_000_000)),
        "sizes",
        "x86_64.whl has 299.0 MB, the budget is 40 MB",
    ),
    "pure wheel": (
        lambda root: made_wheel(root).rename(root / "dist" / "peft_kernels-9.8.7-py3-none-any.whl"),
        "sizes",
        "dist/peft_kernels-9.8.7-py3-none-any.whl: expected one of ",
    ),
    "wheel of another version": (
        lambda root: made_wheel(root).rename(root / "dist" / f"peft_kernels-9.8.6-{TAG}.whl"),
        "dist",
        "dist/peft_kernels-9.8.6-py3-none-manylinux_2_28_x86_64.whl: ",
    ),
    "another module": (
        edited("peft_kernels/cli/doctor.py", "\n", "\n# changed\n"),
        "dist",
        ".whl: peft_kernels/cli/doctor.py is not as in the commit",
    ),
    "new module": (
        lambda root: (root / "peft_kernels" / "new.py").touch(),
        "dist",
        ".whl: peft_kernels/new.py is not as in the commit",
    ),
    "module that is gone": (
        lambda root: add_to_wheel(root, "peft_kernels/gone.py"),
        "dist",
        ".whl: peft_kernels/gone.py is not as in the commit",
    ),
    "old wheel": (
        lambda root: os.utime(made_wheel(root), (0, 0)),
        "dist",
        ".whl: older than the commit, and so may be its libraries: make wheels",
    ),
    "empty dist": (lambda root: shutil.rmtree(root / "dist"), "dist", "dist/ is empty: make wheels"),
}


@pytest.mark.parametrize("case", PLANTED)
def test_planted_fault_fails_its_check_alone(
    tool: ModuleType, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    plant, name, sentence = PLANTED[case]
    plant(tool.ROOT)
    if name not in ("dist", "sizes"):
        shutil.rmtree(tool.ROOT / "dist")
        make_dist(tool.ROOT)
    if name != "tree":
        git(tool.ROOT, "add", "-A")
        git(tool.ROOT, "commit", "-q", "--allow-empty", "-m", "x")
    assert quick(tool) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if "  FAILED " in line]
    assert len(failed) == 1 and failed[0].startswith(f"{name}  ".rstrip()) and sentence in failed[0], failed


@pytest.fixture
def long_check(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A long check instead of the real ones: `run` is a command, `calls` counts."""

    class Long:
        """Runs a command."""

        command, calls = ["true"], 0

        def __call__(self) -> str:
            self.calls += 1
            return tool.run(self.command, "long")

    def after() -> str:
        """Comes after."""
        return "ran"

    long = Long()
    monkeypatch.setattr(tool, "CHECKS", [tool.Check("long", long, True), tool.Check("after", after, False)])
    return long


def test_long_check_that_passed_is_not_repeated_for_the_commit(tool: ModuleType, long_check: Any) -> None:
    assert tool.main([]) == 0 and tool.main([]) == 0 and long_check.calls == 1
    (tool.ROOT / "new.txt").write_text("x")
    assert (
        tool.main([]) == 0 and tool.main([]) == 0 and long_check.calls == 3
    )  # nothing is kept of a dirty tree
    commit(tool.ROOT)
    assert tool.main([]) == 0 and long_check.calls == 4


def test_pass_is_not_kept_if_the_tree_changed_meanwhile(tool: ModuleType, long_check: Any) -> None:
    long_check.command = ["touch", str(tool.ROOT / "new.txt")]
    assert tool.main([]) == 0
    (tool.ROOT / "new.txt").unlink()
    assert tool.main([]) == 0 and long_check.calls == 2


def test_command_that_fails_is_shown_and_the_next_check_runs(
    tool: ModuleType, long_check: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    long_check.command = ["sh", "-c", "echo working; echo the reason >&2; exit 3"]
    assert tool.main([]) == 1
    said = capsys.readouterr().out
    assert "failed, see build/release/long.log: the reason" in said
    assert "after  passed  0 s  ran" in said and "1 of 2 checks failed" in said
    assert (tool.LOGS / "long.log").read_text() == "working\nthe reason\n"
    assert tool.main([]) == 1 and long_check.calls == 2


def test_check_that_raises_is_a_failure(tool: ModuleType, long_check: Any) -> None:
    long_check.command = ["/nonexistent/command"]
    row = tool.outcome(tool.CHECKS[0], False)
    assert row[0] == "FAILED" and row[2].startswith("the check itself failed: FileNotFoundError: ")


def test_extras_are_resolved_on_the_promised_pythons(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(tool, "run", lambda command, name: calls.append(list(command)))
    assert tool.extras_resolve() == "Python 3.11 and 3.14"
    for python, command in zip(("3.11", "3.14"), calls, strict=True):
        assert command[command.index("--python-version") + 1] == python and "--dry-run" in command
        assert {"torch", "kernels>=0.17", "trl>=0.26", "uvicorn", "mkdocs-material"} < {*command}


def test_list_and_only(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--list", "--only", "tag|wheels"]) == 0
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()] == ["tag", "wheels"]
    with pytest.raises(SystemExit, match="--only: no check matches 'nothing'"):
        tool.main(["--only", "nothing"])


def test_targets_of_checks_exist(tool: ModuleType) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("wheels", "package", "hub", "upgrades", "docs", "demo", "release-check"):
        assert f"\n{target}:" in makefile, target


# The versions that are written in more than one place.


def test_places_agree_on_supported_versions(versions: ModuleType) -> None:
    assert versions.disagreements() == []
    assert {*versions.oldest()} == {*versions.LIBRARIES}


def numbers(version: str) -> list[int]:
    return [int(number) for number in version.split(".")]


def test_reviewed_sources_are_those_of_supported_versions(versions: ModuleType) -> None:
    """Raising a bound leaves sources that no supported version has."""
    from peft_kernels.patch.rules.sources import KNOWN

    bounds = versions.oldest()
    for name, spans in KNOWN.items():
        for span in spans.values():
            assert numbers(span.split(" to ")[0]) >= numbers(bounds[name.partition(".")[0]]), (name, span)


def test_changelog_begins_with_this_version(versions: ModuleType) -> None:
    import peft_kernels

    assert peft_kernels.__version__ == versions.current() == versions.newest_heading().version

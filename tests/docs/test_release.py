"""tools/release_check.py and tools/versions.py: every quick check passes on a sound tree, and fails with a
sentence for each planted fault."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tool_modules import TOOLS, tool_module

ROOT = TOOLS.parent
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
    (root / "dist").mkdir()
    (root / "dist" / "peft_kernels-9.8.7.tar.gz").write_bytes(bytes(1000))
    git(root, "init", "-q")
    commit(root)
    for module in (tool, versions, versions.requirements):
        monkeypatch.setattr(module, "ROOT", root)
    monkeypatch.setattr(tool, "LOGS", root / "build" / "release")
    monkeypatch.setattr(tool, "DIST", root / "dist")
    monkeypatch.setattr(figures, "lacking", lambda lacking=figures.lacking: lacking(root))
    return tool


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


def plant_no_date(root: Path) -> None:
    edit(root / "CHANGELOG.md", "2030-01-31", "unreleased")


def plant_other_version(root: Path) -> None:
    edit(root / "peft_kernels/__init__.py", "9.8.7", "9.8.8")


def plant_tag(root: Path) -> None:
    git(root, "tag", "v9.8.7")


def plant_figure(root: Path) -> None:
    edit(root / "README.md", "1.88 times", "1.98 times")


def plant_page_with_old_versions(root: Path) -> None:
    edit(root / "docs/supported.md", "| PEFT         | 0", "| PEFT         | 1")


def plant_doctor_with_old_versions(root: Path) -> None:
    edit(
        root / "peft_kernels/cli/doctor.py", '_NEEDED = {"transformers": (', '_NEEDED = {"transformers": (4, '
    )


def plant_recipe_with_old_versions(root: Path) -> None:
    edit(root / "docs/recipes/transformers.md", "needs transformers 5", "needs transformers 4")


def plant_reworded_sentence(root: Path) -> None:
    edit(root / "peft_kernels/quantize/transformers/config.py", ": expected 5", ": wanted 5")


def plant_no_bound(root: Path) -> None:
    edit(root / "pyproject.toml", '"trl>=', '"trl", "other>=')


def plant_large_file(root: Path) -> None:
    (root / "dist" / "peft_kernels-9.8.7-cp310-abi3-manylinux_2_28_x86_64.whl").write_bytes(bytes(99_000_000))


def plant_unknown_file(root: Path) -> None:
    (root / "dist" / "peft_kernels.zip").write_bytes(b"")


def plant_empty_dist(root: Path) -> None:
    shutil.rmtree(root / "dist")


@pytest.mark.parametrize(
    "plant,name,sentence",
    [
        (plant_uncommitted, "tree", "1 files are not committed, the first one is new.txt"),
        (plant_no_date, "version", "CHANGELOG.md has 9.8.7 (unreleased): put the release's date there"),
        (plant_other_version, "version", "the version is 9.8.8, CHANGELOG.md begins with 9.8.7"),
        (plant_tag, "tag", "there is a tag v9.8.7: increase the version"),
        (plant_figure, "figures", "1 pages lack figures, README.md lacks: "),
        (plant_page_with_old_versions, "supported versions", "docs/supported.md: expected peft 0."),
        (plant_doctor_with_old_versions, "supported versions", "doctor.py: expected transformers 5"),
        (plant_recipe_with_old_versions, "supported versions", "transformers.md: expected transformers 5."),
        (plant_reworded_sentence, "supported versions", "config.py: expected (transformers): expected"),
        (plant_no_bound, "supported versions", "pyproject.toml: expected a lower bound of trl, found none"),
        (plant_large_file, "sizes", "x86_64.whl has 99.0 MB, the budget is "),
        (plant_unknown_file, "sizes", "dist/peft_kernels.zip: expected one of "),
        (plant_empty_dist, "sizes", "dist/ is empty: make wheels"),
    ],
    ids=lambda value: value.__name__.removeprefix("plant_") if callable(value) else "",
)
def test_planted_fault_fails_its_check_alone(
    tool: ModuleType, capsys: pytest.CaptureFixture[str], plant: Any, name: str, sentence: str
) -> None:
    plant(tool.ROOT)
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
    from peft_kernels.patch.sources import KNOWN

    bounds = versions.oldest()
    for name, spans in KNOWN.items():
        for span in spans.values():
            assert numbers(span.split(" to ")[0]) >= numbers(bounds[name.partition(".")[0]]), (name, span)


def test_changelog_begins_with_this_version(versions: ModuleType) -> None:
    import peft_kernels

    assert peft_kernels.__version__ == versions.current() == versions.newest_heading().version

""".ci/parts.py: a part of CI is skipped only if nothing that can change its result has changed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tool_modules import TOOLS, tool_module

sys.path.append(str(TOOLS.parent / ".ci"))
tool = tool_module("parts")
each_part = pytest.mark.parametrize("name", tool.PARTS)
NEEDED = ("Makefile", "constraints.txt", "pyproject.toml", "setup.py", ".ci/parts.py", ".ci/run")
ROOTS = ("peft_kernels/__init__.py", "peft_kernels/core/op.py")
TOY = {
    "always": (*NEEDED, "csrc/common/nf4.h"),
    "test-isa": (*ROOTS, "csrc/cpu/linear.inl", "tests/ops/test_linear.py", "tests/conftest.py"),
    "test-gpu": (*ROOTS, "csrc/cuda/linear.cu", "peft_kernels/serving/rows.py", "tests/gpu/test_sass.py"),
    "test-compiled": ("csrc/cuda/linear.cu", "tests/gpu/test_sass.py", "tests/conftest.py"),
    "test-flows": (
        *ROOTS,
        "csrc/cpu/linear.inl",
        "peft_kernels/serving/rows.py",
        "tests/flows/test_textbook.py",
    ),
    "test-dist": (*ROOTS, "csrc/cpu/linear.inl", "peft_kernels/serving/rows.py", "tests/dist/test_fsdp.py"),
    "package": (
        *ROOTS,
        "csrc/cpu/linear.inl",
        "csrc/cuda/linear.cu",
        "peft_kernels/serving/rows.py",
        "README.md",
    ),
    "never": ("docs/index.md", ".ci/passed.json"),
}


IMPORTS = "from peft_kernels.core import op\nfrom peft_kernels.serving import rows\n"


@pytest.fixture
def makes() -> list[str]:
    """The targets that were made."""
    return []


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, makes: list[str]) -> Path:
    """The tool on a toy tree, with a make that succeeds."""
    for name in {name for names in TOY.values() for name in names} - {tool.RECORD}:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n{IMPORTS if name.startswith('tests/') else ''}")
    (tmp_path / ".ci").mkdir(exist_ok=True)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(tool, "compilers", lambda: ["g++ 12"])
    monkeypatch.setattr(tool, "processor", lambda: "a processor")
    monkeypatch.setattr(tool, "make", lambda name: makes.append(name) or 0)
    return tmp_path


@each_part
def test_a_part_runs_again_after_any_change_of_an_input(name: str, tree: Path, makes: list[str]) -> None:
    assert tool.run(name, rerun=False) == 0 and makes == [name]
    assert tool.run(name, rerun=False) == 0 and makes == [name], "nothing changed"
    inputs = tool.PARTS[name].files()
    assert {*TOY["always"], *TOY[name]} <= {*inputs} and not {*TOY["never"]} & {*inputs}
    for changed in inputs:
        makes.clear()
        text = (tree / changed).read_text()
        (tree / changed).write_text(f"{text} ")
        would = tool.before(name, tool.PARTS[name].digest()) is None
        (tree / changed).write_text(text)
        assert would, changed
    assert tool.run(name, rerun=False) == 0 and makes == []
    assert tool.run(name, rerun=True) == 0 and makes == [name]


@each_part
def test_new_and_absent_files_count(name: str, tree: Path, makes: list[str]) -> None:
    tool.run(name, rerun=False)
    (tree / "csrc" / "common" / "new.h").write_text("")
    tool.run(name, rerun=False)
    (tree / "csrc" / "common" / "new.h").rename(tree / "csrc" / "common" / "renamed.h")
    tool.run(name, rerun=False)
    (tree / "csrc" / "common" / "renamed.h").unlink()
    tool.run(name, rerun=False)
    assert makes == [name] * 3, "the last tree is the first one"


@each_part
def test_compilers_and_where_it_matters_the_processor_count(
    name: str, tree: Path, makes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tool.run(name, rerun=False)
    monkeypatch.setattr(tool, "processor", lambda: "another")
    tool.run(name, rerun=False)
    assert len(makes) == (2 if name in ("test-isa", "test-flows", "test-dist") else 1)
    makes.clear()
    monkeypatch.setattr(tool, "compilers", lambda: ["g++ 13"])
    tool.run(name, rerun=False)
    assert makes == [name]


def test_the_whole_target_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Makefile").write_text("test-gpu:\n\t@printenv > seen\n")
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    chosen = ("ARGS", "TESTS", "PYTEST_ADDOPTS", "MAKEOVERRIDES", "MAKEFLAGS", "PEFT_KERNELS_CPU")
    for word in (*chosen, "OTHER"):
        monkeypatch.setenv(word, "-k dora")
    assert tool.make("test-gpu") == 0
    seen = (tmp_path / "seen").read_text()
    assert seen.count("-k dora") == 1 and "OTHER=-k dora" in seen


def test_folders_of_tests_are_those_that_are_run() -> None:
    """The Makefile names them again, and conftest.py, which chooses tests by the back end."""
    makefile = (tool.ROOT / "Makefile").read_text()
    (with_kernels,) = re.findall(r"^WITH_KERNELS := .*,tests/%,(.*)\)$", makefile, re.MULTILINE)
    assert tuple(with_kernels.split()) == tool.KERNELS
    (chosen,) = re.findall(
        r"^WITH_KERNELS = \((.*)\)$", (tool.ROOT / "tests/conftest.py").read_text(), re.MULTILINE
    )
    assert chosen.replace('"', "").split(", ") == [*tool.KERNELS, "gpu"]
    for name in tool.PARTS.keys() - {"package"}:
        commands = makefile.partition(f"\n{name}: ")[2].partition("\n\n")[0].partition("\n")[2]
        folders = re.findall(
            r"tests/(\w+) ",
            commands.replace("$(WITH_KERNELS)", " ".join(f"tests/{one} " for one in tool.KERNELS)),
        )
        assert {*folders} == {*tool.PARTS[name].tests}, name


@each_part
def test_pages_and_examples_that_tests_open_count(name: str) -> None:
    inputs = tool.PARTS[name].files()
    for test in (file for file in inputs if file.startswith("tests/") and file.endswith(".py")):
        text = (tool.ROOT / test).read_text()
        for parts in re.findall(r'/ "(docs|examples)"((?: / "[\w.]+")+)', text):
            path = "".join(parts).replace(' / "', "/").replace('"', "")
            assert path in inputs, f"{test} opens {path}"


def test_what_did_not_pass_is_not_recorded(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "make", lambda name: 2)
    assert tool.run("test-gpu", rerun=False) == 2
    assert not (tree / tool.RECORD).exists()

    def change(name: str) -> int:
        (tree / "setup.py").write_text("changed while it ran")
        return 0

    monkeypatch.setattr(tool, "make", change)
    assert tool.run("test-gpu", rerun=False) == 0
    assert not (tree / tool.RECORD).exists()


def test_the_newest_passes_are_kept(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(tool.KEPT + 2):
        tool.add("test-gpu", str(i), "2030-01-31, 5 s")
    tool.add("test-gpu", "4", "2030-02-28, 6 s")
    assert [*tool.load()["test-gpu"]] == ["2", "3", *map(str, range(5, tool.KEPT + 2)), "4"]
    assert tool.main(["--list"]) == 0
    assert re.search(r"test-gpu +\d+ files  would run", capsys.readouterr().out)
    tool.run("test-gpu", rerun=False)
    assert tool.main(["--list"]) == 0
    assert re.search(r"test-gpu +\d+ files  passed: ", capsys.readouterr().out)


# The real tree.


@each_part
def test_needed_files_are_inputs(name: str) -> None:
    there, inputs = {*tool.files()}, {*tool.PARTS[name].files()}
    python = [f"peft_kernels/{each}" for each in ("core", "ops", "nf4", "patch", "quantize")]
    folders = ["csrc/common", *(["csrc/cuda"] if name == "test-compiled" else python)]
    if tool.PARTS[name].tests:
        folders += ["tests/[a-z_]*.py", *(f"tests/{folder}" for folder in tool.PARTS[name].tests)]
    wanted = {file for file in there if any(re.match(f"{folder}(/|$)", file) for folder in folders)}
    pages = {file for file in wanted if file.endswith((".md", ".cu", ".cuh")) and name != "test-compiled"}
    assert len(wanted) > 100 and wanted - pages <= inputs and {*NEEDED} <= inputs


def test_imports_are_followed(tree: Path) -> None:
    """Also in code for other processes, through the names of `pk`, and through helpers of the tests."""
    texts = {
        "peft_kernels/__init__.py": "from . import prefix\nfrom .quantize.model import quantize_model\n",
        "peft_kernels/prefix/tuning.py": "from ..core import op",
        "peft_kernels/quantize/model.py": "",
        "peft_kernels/cli/main.py": "from ..serving import (\n    rows,\n)",
        "peft_kernels/serving/other.py": "",
        "peft_kernels/adapters/a.py": "",
        "tests/dist/test_fsdp.py": "import helper\nCODE = 'import peft_kernels as pk; pk.quantize_model()'",
        "tests/nf4/helper.py": "from ptx import machine",
        "tests/gpu/ptx/machine.py": "from peft_kernels.cli import main",
        "tests/nf4/test_nf4.py": "import peft_kernels.adapters.a",
    }
    for name, text in texts.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    unused = {"peft_kernels/prefix/tuning.py", "peft_kernels/adapters/a.py", "tests/nf4/test_nf4.py"}
    inputs = {*tool.PARTS["test-dist"].files()}
    assert {*texts} - unused <= inputs and not unused & inputs
    (tree / "tests" / "dist" / "test_fsdp.py").write_text("pk.prefix")
    inputs = {*tool.PARTS["test-dist"].files()}
    assert "peft_kernels/prefix/tuning.py" in inputs and "peft_kernels/quantize/model.py" not in inputs

"""tools/wheels.py and tools/package_check.py: a wheel is named after what it holds, and used before it is
shipped."""

from __future__ import annotations

import platform
import re
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tool_modules import tool_module

import peft_kernels as pk

ROOT = Path(__file__).resolve().parent.parent.parent
TAG = "py3-none-manylinux_2_28_x86_64"
TOOLKIT = SimpleNamespace(version=(13, 0))


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return tool_module("wheels")


def test_every_minor_version_is_compiled_once(tool: ModuleType) -> None:
    """From the oldest that pyproject.toml allows; the one of development is among them."""
    minors = [tool_module("wheel_libraries").minor(version) for version in tool.TORCHES]
    assert minors == [f"2.{minor}" for minor in range(9, 9 + len(minors))]
    pinned = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned is not None and pinned[1] in tool.TORCHES


def test_the_pure_wheel_has_no_library(tool: ModuleType, tmp_path: Path) -> None:
    wheel = tool.pure_wheel(tmp_path, "+cu13")
    assert wheel.name == f"peft_kernels-{pk.__version__}+cu13-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert "peft_kernels/core/backends/crossovers.json" in names
    assert not [name for name in names if name.endswith(".so")]
    modules = {
        f"peft_kernels/{path.relative_to(Path(pk.__file__).parent)}"
        for path in Path(pk.__file__).parent.rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == modules


@pytest.fixture
def stubbed(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Nothing is compiled; returns what compiled() and pure_wheel() were called with."""
    calls: list[Any] = []
    made = tmp_path / "_C.torch2.9.so"
    made.write_bytes(b"code")

    def pure(folder: Path, label: str) -> Path:
        calls.append(label)
        wheel = folder / "toy.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"toy-1.0{label}.dist-info/WHEEL", "Root-Is-Purelib: true\nTag: py3-none-any\n")
        return wheel

    def compiled(*arguments: Any) -> list[Path]:
        calls.append(arguments)
        return [made]

    monkeypatch.setattr(tool, "torch_files", lambda version, machine, folder: Path(version, machine))
    monkeypatch.setattr(tool, "compiled", compiled)
    monkeypatch.setattr(tool, "pure_wheel", pure)
    monkeypatch.setattr(tool, "toolkit", lambda: TOOLKIT)
    return calls


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_a_wheel_is_for_one_machine(
    tool: ModuleType, tmp_path: Path, stubbed: list[Any], machine: str
) -> None:
    tool.main(["--torch", "2.9.1", "--machine", machine, "--out", str(tmp_path), "--build", str(tmp_path)])
    assert stubbed == [(tmp_path / machine, machine, {"2.9.1": Path("2.9.1", machine)}, None), ""]
    assert (tmp_path / f"toy-1.0-py3-none-manylinux_2_28_{machine}.whl").exists()


def test_a_wheel_with_cuda_kernels_names_its_cuda(
    tool: ModuleType, tmp_path: Path, stubbed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels for cards are not cross-compiled."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    tool.main(["--cuda", "--torch", "2.9.1", "--machine", "x86_64", "--out", str(tmp_path)])
    assert stubbed[0][-1] is TOOLKIT and stubbed[1] == "+cu13"
    assert (tmp_path / f"toy-1.0+cu13-{TAG}.whl").exists()
    with pytest.raises(SystemExit, match="2"):
        tool.main(["--cuda", "--machine", "aarch64"])


def test_a_wheel_that_installs_slowly_or_does_not_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = tool_module("package_check")
    wheel = tmp_path / "toy.whl"
    wheel.touch()
    said, seconds, now = "cpu  usable: C++, instruction set avx2", 0.0, 0.0
    commands = []

    def run(command: list[str | Path], cwd: Path, **environment: str) -> str:
        nonlocal now
        commands.append(command)
        if command[-1] == wheel:
            now += seconds
        return said

    monkeypatch.setattr(check, "run", run)
    monkeypatch.setattr(check.time, "monotonic", lambda: now)
    check.check_wheel(wheel, ["torch==2.9.1"], tmp_path, lambda text: None)
    assert [str(command[-1]) for command in commands][-2:] == ["doctor", check.QLORA]
    seconds = check.SECONDS + 1
    with pytest.raises(SystemExit, match=r"toy\.whl: expected to be installed in 10 s, took 11\.0 s"):
        check.check_wheel(wheel, ["torch==2.9.1"], tmp_path, lambda text: None)
    said, seconds = "cpu  not usable: not built", 0.0
    with pytest.raises(SystemExit, match="back end cpu: expected 'usable: C"):
        check.check_wheel(wheel, ["torch==2.9.1"], tmp_path, lambda text: None)

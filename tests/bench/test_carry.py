"""tools/carry.py: files for a machine without a network."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from tool_modules import tool_module


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return tool_module("carry")


@pytest.fixture
def contender(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages with a bitsandbytes in it, which nothing else shadows."""
    site = tmp_path / "site"
    for name, text in {
        "bitsandbytes/__init__.py": "from .nn import layers\n",
        "bitsandbytes/nn/layers.py": "",
        "bitsandbytes/libbitsandbytes_cuda130.so": "13.0",
        "bitsandbytes/libbitsandbytes_cuda118.so": "11.8",
        "bitsandbytes/libbitsandbytes_cpu.so": "cpu",
        "bitsandbytes/__pycache__/__init__.pyc": "",
        "bitsandbytes-9.9.dist-info/METADATA": "Metadata-Version: 2.1\nName: bitsandbytes\nVersion: 9.9\n",
    }.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
    record = [f"{path.relative_to(site)},," for path in site.rglob("*") if path.is_file()]
    (site / "bitsandbytes-9.9.dist-info" / "RECORD").write_text("\n".join(record) + "\n")
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    return site


@pytest.mark.usefixtures("contender")
def test_bitsandbytes_comes_with_one_library(tool: ModuleType, tmp_path: Path) -> None:
    assert tool.main([str(tmp_path / "carried"), "--cuda", "130"]) == 0
    python = tmp_path / "carried" / "python"
    taken = {str(path.relative_to(python)) for path in python.rglob("*") if path.is_file()}
    assert taken >= {"bitsandbytes/__init__.py", "bitsandbytes/nn/layers.py"}
    assert [name for name in taken if name.endswith((".so", ".pyc"))] == [
        "bitsandbytes/libbitsandbytes_cuda130.so"
    ]
    code = "import bitsandbytes as b, importlib.metadata as m; print(b.__file__, m.version('bitsandbytes'))"
    command, variables = [sys.executable, "-S", "-c", code], {"PYTHONPATH": str(python)}
    said = subprocess.check_output(command, env=variables, text=True)
    assert said.split() == [str(python / "bitsandbytes" / "__init__.py"), "9.9"]


@pytest.mark.usefixtures("contender")
def test_another_cuda_is_reported(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main([str(tmp_path / "carried"), "--cuda", "999"]) == 1
    said = capsys.readouterr().err
    assert "bitsandbytes has no libbitsandbytes_cuda999.so, but libbitsandbytes_cuda118.so, libbits" in said


def test_without_bitsandbytes_there_is_a_reason(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(tool.importlib.metadata, "files", missing)
    assert tool.main([str(tmp_path), "--cuda", "130"]) == 1
    assert "carry.py: bitsandbytes is not installed" in capsys.readouterr().err


def test_our_libraries_come_from_the_newest_wheel(tool: ModuleType, tmp_path: Path) -> None:
    target = tmp_path / "carried"
    assert tool.copy_libraries(tmp_path, target) == []
    names = ("_C_cuda.torch2.9.so", "_C_cuda.torch2.10.so", "libpeft_kernels_cuda.so")
    others = ("_C.torch2.9.so", "libpeft_kernels_cpu.so", "core/backends/cuda.py")
    for seconds, (wheel, code) in enumerate({"0.9.0": "", "0.2.0+cu13": "new", "0.3.0+cu13": "old"}.items()):
        path = tmp_path / f"peft_kernels-{wheel}-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name in (*names, *others) if code else others:
                archive.writestr(f"peft_kernels/{name}", code)
        os.utime(path, (0, 10 - seconds))
    assert sorted(path.name for path in tool.copy_libraries(tmp_path, target)) == sorted(names)
    found = {path.name: path.read_text() for path in (target / "peft_kernels").iterdir()}
    assert found == dict.fromkeys(names, "new")

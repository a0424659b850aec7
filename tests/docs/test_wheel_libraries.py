"""tools/wheel_libraries.py: which file is in which library of a wheel, and a small back end that is compiled.

Only `make wheels` compiles the real ones.
"""

from __future__ import annotations

import itertools
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tool_modules import needs_compiler, tool_module


@pytest.fixture(scope="module")
def libraries() -> ModuleType:
    return tool_module("wheel_libraries")


@pytest.fixture
def toolkit() -> SimpleNamespace:
    """Of CUDA 13.0."""
    capabilities = {(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)}
    return SimpleNamespace(home="/cuda", version=(13, 0), compiles=lambda: capabilities)


@pytest.fixture
def ninja(libraries: ModuleType, tmp_path: Path) -> Any:
    return libraries.Ninja(tmp_path, "x86_64")


def compiled_by(rule: str, text: str) -> list[str]:
    return sorted(re.findall(rf"^build \S+\.o: {rule} (\S+)", text, re.M))


@needs_compiler
def test_ops_and_kernels_are_compiled_apart(libraries: ModuleType, ninja: Any, tmp_path: Path) -> None:
    """Each file of the CPU back end is in one of the two libraries, with the flags of a source build."""
    part = libraries.Cpu(ninja)
    part.ops("2.9.1", tmp_path / "torch", part.kernels())
    text, setup = "\n".join(ninja.lines), ninja.setup
    assert compiled_by("cxx", text) == sorted([*setup["CPU_SOURCES"], *setup["X86_SOURCES"]])
    for line in text.splitlines():
        if line.startswith("  flags") and "-shared" not in line and "-Wl," not in line:
            assert all(flag in line for flag in setup["HOST_FLAGS"])


@needs_compiler
def test_cuda_kernels_are_compiled_for_every_card(
    libraries: ModuleType, ninja: Any, tmp_path: Path, toolkit: SimpleNamespace
) -> None:
    """Each file of the CUDA back end is in one of the two libraries. Kernels are compiled once."""
    part, setup = libraries.Cuda(ninja, toolkit), ninja.setup
    kernels = part.kernels()
    assert kernels.endswith("/libpeft_kernels_cuda.so"), "CudaBackend hashes it"
    for version in ("2.9.1", "2.10.0"):
        part.ops(version, tmp_path / "torch", kernels)
    text = "\n".join(ninja.lines)
    assert compiled_by("nvcc", text) == sorted([*setup["CUDA_KERNELS"], *setup["HOPPER_KERNELS"]])
    ops = [source for source in setup["CUDA_OPS"] if source.endswith(("_ops.cpp", "runtime.cpp"))]
    assert len(part.with_torch) > len(ops) > 10 and {*ops} < {*part.with_torch}
    assert "csrc/cuda/linear/linear_plan.cpp" in part.without_torch, "kernels call it"
    assert sorted(part.with_torch + part.without_torch) == sorted(setup["CUDA_STARTS"] + setup["CUDA_OPS"])
    assert compiled_by("cxx", text) == sorted(part.without_torch + 2 * part.with_torch)
    lines = text.splitlines()
    every = sorted(["compute_120", *(f"sm_{number}" for number in (80, 86, 89, 90, 100, 120))])
    for line, flags in itertools.pairwise(lines):
        codes = sorted(re.findall(r",code=(\w+)", flags))
        if ": nvcc " in line:
            is_hopper = line.endswith(tuple(setup["HOPPER_KERNELS"]))
            assert codes == (["sm_90a"] if is_hopper else every), line
    assert "PEFT_KERNELS_CUDA_ARCHITECTURES=8.0:8.6:8.9:9.0:10.0:12.0+PTX" in text


@needs_compiler
def test_an_older_nvcc_compiles_for_what_it_knows(
    libraries: ModuleType, ninja: Any, toolkit: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    """12.4 knows no Blackwell."""
    toolkit.compiles = lambda: {(8, 0), (8, 6), (8, 9), (9, 0)}
    assert libraries.Cuda(ninja, toolkit).architectures == ["8.0", "8.6", "8.9", "9.0+PTX"]
    assert "compute capability 10.0 is served by PTX of 9.0" in capsys.readouterr().err


KERNELS = """
#include <cmath>
#define EXPORTED __attribute__((visibility("default")))
namespace peft_kernels::toy { EXPORTED double kernel(double x) { return std::exp(x); } }
namespace peft_kernels::other { EXPORTED int inside() { return 1; } }
"""
OPS = """
#include <ATen/ATen.h>
#include <cmath>
#include "generated.h"
namespace peft_kernels::toy { double kernel(double x); }
extern "C" {
__attribute__((visibility("default"))) double answer(double x) {
  return std::log(peft_kernels::toy::kernel(x)) + at::magic();
}
__attribute__((visibility("default"))) const char* torch_version() { return PEFT_KERNELS_TORCH; }
}
"""
CALL = """
import ctypes, sys
torch, ops = sys.argv[1:]
for name in ("libc10.so", "libtorch_cpu.so"): ctypes.CDLL(f"{torch}/lib/{name}")
try:
    library = ctypes.CDLL(ops)
except OSError as error:
    sys.exit(f"not loaded: {error}")
library.answer.restype, library.answer.argtypes = ctypes.c_double, [ctypes.c_double]
library.torch_version.restype = ctypes.c_char_p
print(library.answer(2.0), library.torch_version().decode())
"""


@pytest.fixture
def torch(tmp_path: Path) -> Callable[[str], Path]:
    """Makes a folder like torch's, of release 9.9.1, with a library of this text."""

    def make(text: str) -> Path:
        folder = tmp_path / f"torch{len(list(tmp_path.glob('torch*')))}"
        for name, content in {
            "include/ATen/ATen.h": "namespace at { int magic(); }\n",
            "include/torch/version.h": '#define TORCH_VERSION "9.9.1"\n',
            "include/torch/library.h": "#include <torch/version.h>\n",
            "torch_cpu.cpp": text,
            "c10.cpp": "",
        }.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content)
        (folder / "lib").mkdir()
        for name in ("c10", "torch_cpu"):
            made = [f"-Wl,-soname,lib{name}.so", "-o", folder / "lib" / f"lib{name}.so"]
            subprocess.run(["c++", "-shared", "-fPIC", folder / f"{name}.cpp", *made], check=True)
        return folder

    return make


@pytest.fixture
def toy(libraries: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A back end of one kernel and one op in the place of the CPU's."""
    pytest.importorskip("ninja")
    kernels, ops = tmp_path / "kernels.cpp", tmp_path / "ops.cpp"
    kernels.write_text(KERNELS)
    ops.write_text(OPS)

    class Toy(libraries.Part):  # type: ignore[name-defined, misc]
        name, library = "toy", "_C"

        def kernels(self) -> str:
            flags = ["-std=c++20", *self.ninja.host]
            return self.link_kernels(self.ninja.objects(self.name, [str(kernels)], flags))

        def ops(self, version: str, torch: Path, kernels: str) -> str:
            return self.link_ops(version, torch, [str(ops)], kernels, [])

    monkeypatch.setattr(libraries, "Cpu", Toy)


@needs_compiler
@pytest.mark.usefixtures("toy")
def test_the_libraries_of_a_wheel_work_in_any_folder(
    libraries: ModuleType, torch: Callable[[str], Path], tmp_path: Path
) -> None:
    """The ops find the kernels in their own folder, and torch in the process."""
    other = torch("namespace at { int magic() { return 40; } }")
    made = libraries.compiled(tmp_path / "build", platform.machine(), {"9.9.1": other})
    assert [path.name for path in made] == ["libpeft_kernels_toy.so", "_C.torch9.9.so"]
    assert libraries.wheel_file.exported(made[0]) == {"_ZN12peft_kernels3toy6kernelEd"}
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    ops = [Path(path.rename(folder / path.name)) for path in made][1]
    assert re.search(r"\(FLAGS\) .*BIND_NOW", libraries.wheel_file.readelf(ops, "-d"))  # whoever loads it

    def called(torch: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-S", "-c", CALL, torch, ops]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert called(other).stdout.split() == ["42.0", "9.9.1"]
    said = called(torch("")).stderr  # and not when the op is called
    assert "not loaded: " in said and "undefined symbol: _ZN2at5magicEv" in said


@needs_compiler
@pytest.mark.usefixtures("toy")
def test_a_wheel_for_a_torch_that_lacks_a_function_is_refused(
    libraries: ModuleType, torch: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(
        SystemExit, match=r"^_C\.torch9\.9\.so needs _ZN2at5magicEv, which no library exports$"
    ):
        libraries.compiled(tmp_path / "build", platform.machine(), {"9.9.1": torch("")})

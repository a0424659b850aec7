"""tools/wheels.py and tools/wheel_file.py on small libraries: what a wheel holds, and what is refused.

Only `make wheels` compiles a wheel.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import math
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from base64 import urlsafe_b64decode
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tool_modules import tool_module

import peft_kernels as pk

ROOT = Path(__file__).resolve().parent.parent.parent
OLD = ROOT / "csrc" / "common" / "old_symbols.cpp"
TAG = "py3-none-manylinux_2_28_x86_64"

needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or not (shutil.which("c++") and shutil.which("readelf")), reason="no C++ compiler"
)
Library = Callable[..., Path]


@pytest.fixture(scope="module")
def file() -> ModuleType:
    return tool_module("wheel_file")


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return tool_module("wheels")


@pytest.fixture(scope="module")
def libraries() -> ModuleType:
    return tool_module("wheel_libraries")


@pytest.fixture
def toolkit() -> SimpleNamespace:
    """Of CUDA 13.0."""
    capabilities = {(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)}
    return SimpleNamespace(home="/cuda", version=(13, 0), compiles=lambda: capabilities)


@pytest.fixture
def library(tmp_path: Path) -> Library:
    """Compiles a library from the text of one file; further arguments are the compiler's."""

    def compile_library(text: str, *arguments: str | Path) -> Path:
        source, made = tmp_path / "small.cpp", tmp_path / "small.so"
        source.write_text(text)
        command = ["c++", "-shared", "-fPIC", "-O1", "-Wl,--as-needed", str(source), *map(str, arguments)]
        subprocess.run([*command, "-o", str(made)], check=True)
        return made

    return compile_library


EXP = '#include <cmath>\nextern "C" double f(double x) { return std::exp(x); }\n'
OLD_NAMES = """
#include <cmath>
#include <condition_variable>
#include <memory>
#include <sstream>
extern "C" void __cxa_call_terminate(void*);  // which gcc calls since version 14
extern "C" __attribute__((visibility("default"))) double f(double x) {
  std::mutex mutex;
  std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
  static std::condition_variable change;
  if (x > 1e300) change.wait(lock);
  if (x < -1e300) __cxa_call_terminate(nullptr);
  const auto shared = std::make_shared<double>(x);
  const auto again = shared;
  std::string (std::stringbuf::*volatile str)() const& = &std::stringbuf::str;
  const std::stringbuf text("text");
  std::allocator<double> allocator;
  double* const one = allocator.allocate(size_t(x > 0 ? 1 : x));
  *one = 1;
  allocator.deallocate(one, 1);
  return double((text.*str)().size()) + std::exp(*again) + std::log(x) + std::pow(x, 1.5);
}
"""


def glibc() -> tuple[int, ...]:
    version = ctypes.CDLL("libc.so.6").gnu_get_libc_version
    version.restype = ctypes.c_char_p
    return tuple(int(part) for part in version().decode().split("."))


@needs_compiler
@pytest.mark.skipif(glibc() < (2, 29), reason="an old glibc has no newer symbols")
def test_symbols_newer_than_the_platform_are_named(file: ModuleType, library: Library) -> None:
    made = library(EXP)
    assert file.problems(made, (), set(), ()) == ["small.so needs GLIBC_2.29, newer than manylinux_2_28: exp"]


@needs_compiler
@pytest.mark.skipif(glibc() < (2, 36), reason="an old glibc has no such version")
def test_versions_without_a_symbol_are_refused(file: ModuleType, library: Library) -> None:
    """Of the loader: packed relocations, which some linkers write unasked."""
    text = '#include <cstdio>\nint f() { return std::puts("f"); }\nint (*table[])() = {f, f};\n'
    made = library(text, "-Wl,-z,pack-relative-relocs")
    if "RELR" not in file.readelf(made, "-d"):
        pytest.skip("this linker does not pack relocations")
    message = "small.so needs GLIBC_ABI_DT_RELR, newer than manylinux_2_28: ?"
    assert file.problems(made, (), set(), ()) == [message]


@needs_compiler
@pytest.mark.skipif(glibc() < (2, 29), reason="an old glibc has no newer symbols")
def test_the_newer_symbols_would_be_refused(file: ModuleType, library: Library) -> None:
    """What the next test links has all of them."""
    said = "\n".join(file.problems(library(OLD_NAMES, "-std=c++20", "-O2"), (), set(), ()))
    for name in ("GLIBC_2.29", "GLIBC_2.32", "GLIBC_2.34", "GLIBCXX_3.4.29", "3.4.30", "new_length"):
        assert name in said


@needs_compiler
def test_old_symbols_replace_the_newer_ones(file: ModuleType, library: Library) -> None:
    made = library(OLD_NAMES, "-std=c++20", "-O2", OLD, "-fvisibility=hidden")
    assert file.problems(made, (), set(), ()) == []
    f = ctypes.CDLL(str(made)).f
    f.restype, f.argtypes = ctypes.c_double, [ctypes.c_double]
    assert f(2.5) == pytest.approx(len("text") + math.exp(2.5) + math.log(2.5) + 2.5**1.5, rel=1e-15)


@pytest.mark.parametrize(
    "version,expected",
    [
        *(("GLIBC_2.28", False), ("GLIBC_2.2.5", False), ("GLIBC_2.29", True), ("GLIBC_2.100", True)),
        *(("GLIBCXX_3.4.24", False), ("GLIBCXX_3.4.25", True), ("CXXABI_1.3.12", True), ("GCC_3.0", False)),
        *(("GLIBC_ABI_DT_RELR", True), ("GLIBC_PRIVATE", True), ("ZLIB_1.2.0", True)),
    ],
)
def test_versions_of_the_platform(file: ModuleType, version: str, expected: bool) -> None:
    assert file.too_new(version) == expected


@needs_compiler
@pytest.mark.parametrize("name", ["PyLong_FromLong", "nobody_has_this"])
def test_functions_that_no_library_has_are_refused(file: ModuleType, library: Library, name: str) -> None:
    """Python's too: a library that calls them is for one version of Python."""
    text = f'extern "C" {{ int {name}(int); int GOMP_parallel(int); }}\n'
    made = library(text + f"int f(int x) {{ return GOMP_parallel({name}(x)); }}\n")
    assert file.problems(made, (), set(), ()) == [f"small.so needs {name}, which no library exports"]
    assert file.problems(made, (), {name}, ()) == []


@needs_compiler
def test_other_libraries_are_refused(file: ModuleType, library: Library, tmp_path: Path) -> None:
    other = tmp_path / "libother.so"
    library('extern "C" int g() { return 1; }', "-Wl,-soname,libother.so").rename(other)
    made = library('extern "C" int g(); extern "C" int f() { return g(); }', other)
    assert file.exported(other) == {"g"}
    assert file.problems(made, (), {"g"}, ()) == ["small.so needs the library libother.so"]
    assert file.problems(made, ("libother.so",), {"g"}, ()) == []


@needs_compiler
def test_a_library_beside_may_have_versions(file: ModuleType, library: Library, tmp_path: Path) -> None:
    """Those of the CUDA runtime are named after it."""
    other, script = tmp_path / "libother.so.1", tmp_path / "script"
    script.write_text("libother.so.1 { global: g; local: *; };")
    options = ("-Wl,-soname,libother.so.1", f"-Wl,--version-script={script}")
    library('extern "C" int g() { return 1; }', *options).rename(other)
    made = library('extern "C" int g(); extern "C" int f() { return g(); }', other)
    assert file.problems(made, ("libother.so.1",), {"g"}, ()) == []
    said = "\n".join(file.problems(made, (), {"g"}, ()))
    assert "needs libother.so.1, newer" in said and "needs the library libother.so.1" in said


@needs_compiler
def test_paths_are_refused(file: ModuleType, library: Library, tmp_path: Path) -> None:
    """They differ between machines."""
    made = library('extern "C" const char* f() { return __FILE__; }')
    assert file.problems(made, (), set(), (tmp_path, ROOT)) == [f"small.so contains the path {tmp_path}"]
    made = library('extern "C" const char* f() { return __FILE__; }', f"-ffile-prefix-map={tmp_path}/=")
    assert file.problems(made, (), set(), (tmp_path, ROOT)) == []


@pytest.fixture
def pure(tmp_path: Path) -> Path:
    """A pure wheel, as setuptools writes it: out of order, with the time of its making."""
    wheel = tmp_path / "toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("toy/b.py", "B = 2\n")
        archive.writestr(
            "toy-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n\n"
        )
        archive.writestr("toy-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
        archive.writestr("toy-1.0.dist-info/RECORD", "toy/b.py,,\n")
        archive.writestr("toy/__init__.py", "")
    return wheel


def test_a_wheel_is_the_same_whenever_it_is_packed(
    file: ModuleType, pure: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "_C.so"
    made.write_bytes(b"code")
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    first = file.packed(pure, {"lib.so": made, "_C.torch2.9.so": made}, TAG, tmp_path / "1")
    made.touch()
    made.chmod(0o600)
    second = file.packed(pure, {"_C.torch2.9.so": made, "lib.so": made}, TAG, tmp_path / "2")
    assert first.name == second.name == f"toy-1.0-{TAG}.whl"
    assert first.read_bytes() == second.read_bytes()
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    third = file.packed(pure, {}, TAG, tmp_path / "3")
    assert {entry.date_time for entry in zipfile.ZipFile(third).infolist()} == {(2023, 11, 14, 22, 13, 20)}
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")  # before an archive's first year
    earliest = file.packed(pure, {}, TAG, tmp_path / "4")
    assert {entry.date_time for entry in zipfile.ZipFile(earliest).infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_a_wheel_records_what_it_holds(file: ModuleType, pure: Path, tmp_path: Path) -> None:
    made = tmp_path / "_C.so"
    made.write_bytes(b"code")
    archive = zipfile.ZipFile(file.packed(pure, {"lib.so": made}, TAG, tmp_path))
    names = archive.namelist()
    info = "toy-1.0.dist-info"
    assert names == [
        "toy/__init__.py",
        "toy/b.py",
        "toy/lib.so",
        f"{info}/METADATA",
        f"{info}/RECORD",
        f"{info}/WHEEL",
    ]
    wheel = archive.read(f"{info}/WHEEL").decode()
    assert f"Tag: {TAG}\n" in wheel and "Root-Is-Purelib: false\n" in wheel and "none-any" not in wheel
    assert archive.getinfo("toy/lib.so").external_attr >> 16 == 0o100755
    lines = dict(line.split(",", 1) for line in archive.read(f"{info}/RECORD").decode().splitlines())
    assert lines.pop(f"{info}/RECORD") == "," and set(lines) == {*names} - {f"{info}/RECORD"}
    for name, said in lines.items():
        algorithm, value, size = re.split("[=,]", said)
        content = archive.read(name)
        assert (algorithm, int(size)) == ("sha256", len(content))
        assert urlsafe_b64decode(value + "=") == hashlib.sha256(content).digest()


def test_every_minor_version_is_compiled_once(tool: ModuleType, libraries: ModuleType) -> None:
    """From the oldest that pyproject.toml allows; the one of development is among them."""
    minors = [libraries.minor(version) for version in tool.TORCHES]
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
    libraries: ModuleType, file: ModuleType, torch: Callable[[str], Path], tmp_path: Path
) -> None:
    """The ops find the kernels beside them, and torch in the process."""
    other = torch("namespace at { int magic() { return 40; } }")
    made = libraries.compiled(tmp_path / "build", platform.machine(), {"9.9.1": other})
    assert [path.name for path in made] == ["libpeft_kernels_toy.so", "_C.torch9.9.so"]
    assert file.exported(made[0]) == {"_ZN12peft_kernels3toy6kernelEd"}
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    ops = [Path(path.rename(folder / path.name)) for path in made][1]
    assert re.search(r"\(FLAGS\) .*BIND_NOW", file.readelf(ops, "-d"))  # whoever loads it

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


@pytest.fixture
def stubbed(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toolkit: Any) -> list[Any]:
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
    monkeypatch.setattr(tool, "toolkit", lambda: toolkit)
    return calls


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_a_wheel_is_for_one_machine(
    tool: ModuleType, tmp_path: Path, stubbed: list[Any], machine: str
) -> None:
    tool.main(["--torch", "2.9.1", "--machine", machine, "--out", str(tmp_path), "--build", str(tmp_path)])
    assert stubbed == [(tmp_path / machine, machine, {"2.9.1": Path("2.9.1", machine)}, None), ""]
    assert (tmp_path / f"toy-1.0-py3-none-manylinux_2_28_{machine}.whl").exists()


def test_a_wheel_with_cuda_kernels_names_its_cuda(
    tool: ModuleType, tmp_path: Path, stubbed: list[Any], monkeypatch: pytest.MonkeyPatch, toolkit: Any
) -> None:
    """Kernels for cards are not cross-compiled."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    tool.main(["--cuda", "--torch", "2.9.1", "--machine", "x86_64", "--out", str(tmp_path)])
    assert stubbed[0][-1] is toolkit and stubbed[1] == "+cu13"
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

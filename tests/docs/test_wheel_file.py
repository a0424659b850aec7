"""tools/wheel_file.py on small libraries: what a wheel holds, and which libraries are refused."""

from __future__ import annotations

import ctypes
import hashlib
import math
import re
import subprocess
import zipfile
from base64 import urlsafe_b64decode
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from tool_modules import needs_compiler, tool_module

ROOT = Path(__file__).resolve().parent.parent.parent
OLD = ROOT / "csrc" / "common" / "old_symbols.cpp"
TAG = "py3-none-manylinux_2_28_x86_64"
Library = Callable[..., Path]


@pytest.fixture(scope="module")
def file() -> ModuleType:
    return tool_module("wheel_file")


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

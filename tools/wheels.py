"""Builds the binary wheel for CPUs: one file for all supported versions of torch and Python.

    python tools/wheels.py                      # into dist/
    python tools/wheels.py --torch 2.9.1 2.15.0 # for these versions of torch alone

The kernels, with all instruction sets, are one library without torch. The ops, which call torch, are compiled
once per minor version of torch, as its C++ ABI changes with each (csrc/README.md); the package loads the
library that fits. Headers and libraries of torch come from its wheels on the index, and are kept in a cache.
The same sources, compiler and SOURCE_DATE_EPOCH give the same bytes.
"""

from __future__ import annotations

import argparse
import os
import platform
import runpy
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import wheel_file

ROOT = Path(__file__).resolve().parent.parent
TORCHES = ("2.9.1", "2.10.0", "2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0")
"""The newest patch release of each minor version."""
KERNELS = "libpeft_kernels_cpu.so"
TORCH_LIBRARIES = ("libtorch_cpu.so", "libc10.so")
GENERATED_H = """#include <torch/version.h>
#define PEFT_KERNELS_SPEC_HASH "{}"
#define PEFT_KERNELS_TORCH TORCH_VERSION
"""
# The ops call torch; a version script keeps everything else of C++ inside.
EXPORTS = '{ global: extern "C++" { peft_kernels::cpu::*; }; local: *; };\n'


def run(command: Iterable[str | Path], **options: Any) -> str:
    """The output of a command. SystemExit with it if the command fails."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **options
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(words)}:\n{done.stdout[-4000:]}")
    return done.stdout


def cache() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder, "peft_kernels", "torch")


def torch_files(version: str, machine: str, folder: Path) -> Path:
    """The folder with include/ and lib/ of a release of torch, downloaded if it is not in `folder`."""
    into = folder / f"{version}-{machine}"
    if not into.exists():
        print(f"torch {version}: downloading for its headers", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as name:
            wanted = ["--python-version", "3.13", "--platform", f"manylinux_2_28_{machine}"]
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-cache-dir", "-d", name]
            command = [*pip, "--only-binary", ":all:", *wanted, f"torch=={version}"]
            run(command)
            (wheel,) = Path(name).glob("*.whl")
            needed = ("torch/include/", *(f"torch/lib/{library}" for library in TORCH_LIBRARIES))
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(name, [n for n in archive.namelist() if n.startswith(needed)])
            Path(name, "torch").rename(into)
    return into


def minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


class Compilation:
    """The rules for ninja, which compiles what changed."""

    def __init__(self, folder: Path, machine: str) -> None:
        self.folder, self.machine = folder, machine
        self.setup = runpy.run_path(str(ROOT / "setup.py"))  # for sources and flags
        cxx = self.setup["cxx"]() if machine == platform.machine() else [f"{machine}-linux-gnu-g++"]
        # Without paths of this machine, which errors would print and which would change the bytes.
        self.flags = [
            "-std=c++20",
            "-fPIC",
            *self.setup["HOST_FLAGS"],
            "-fopenmp",
            f"-ffile-prefix-map={ROOT}/=",
        ]
        self.lines = [
            f"builddir = {folder}",
            f"cxx = {' '.join(cxx)}",
            "rule cxx",
            "  command = $cxx $flags -MMD -MF $out.d -c $in -o $out",
            "  deps = gcc",
            "  depfile = $out.d",
            "rule link",
            # Bound at once: a symbol that torch lacks makes loading fail, and does not end a process later.
            "  command = $cxx -shared -s -Wl,-z,now -Wl,--as-needed $in $flags -o $out",
        ]

    def objects(self, part: str, sources: Iterable[str], flags: Sequence[str], needs: str = "") -> list[str]:
        made = []
        for source in sources:
            made.append(str(self.folder / part / f"{source}.o"))
            self.lines.append(f"build {made[-1]}: cxx {source}{f' | {needs}' if needs else ''}")
            self.lines.append(f"  flags = {' '.join([*self.flags, *flags])}")
        return made

    def link(self, library: str, objects: Sequence[str], flags: Sequence[str], needs: str = "") -> str:
        made = str(self.folder / library)
        self.lines.append(f"build {made}: link {' '.join(objects)}{f' | {needs}' if needs else ''}")
        self.lines.append(f"  flags = {' '.join(flags)}")
        return made

    def kernels(self, old: list[str]) -> str:
        """The library of kernels, which exports what core/kernel_table.h declares."""
        exports = self.folder / "exports.map"
        exports.write_text(EXPORTS)
        isas = self.setup["X86_SOURCES" if self.machine == "x86_64" else "ARM_SOURCES"]
        made = self.objects("kernels", [*isas, "csrc/cpu/isa/scalar.cpp"], [])
        made += self.objects("kernels", ["csrc/cpu/isa/dispatch.cpp"], ["-fvisibility=default"])
        flags = [f"-Wl,-soname,{KERNELS}", f"-Wl,--version-script={exports}", "-Wl,--no-undefined"]
        return self.link(KERNELS, [*made, *old], flags)

    def ops(self, version: str, torch: Path, kernels: str, old: list[str]) -> str:
        """The library of ops for a version of torch."""
        part = f"torch-{version}"
        include = self.folder / part / "include"
        (include / "ATen").mkdir(parents=True, exist_ok=True)
        write(include / "generated.h", GENERATED_H.format(self.setup["spec_hash"]()))
        # As in tools/precompiled.py: found instead of ATen/ATen.h.
        write(include / "ATen" / "ATen.h", "#include_next <ATen/ATen.h>\n")
        write(include / "torch.h", "#include <ATen/ATen.h>\n#include <torch/library.h>\n")
        headers = [f"-I{include}", f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
        flags = [*headers, f"-ffile-prefix-map={torch}/=torch/"]
        precompiled = str(include / "ATen" / "ATen.h.gch")
        self.lines.append(f"build {precompiled}: cxx {include / 'torch.h'}")
        self.lines.append(f"  flags = -x c++-header {' '.join([*self.flags, *flags])}")
        sources = [s for s in self.setup["CPU_SOURCES"] if not s.startswith("csrc/cpu/isa/")]
        made = self.objects(part, sources, flags, precompiled)
        libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10", kernels, "-Wl,-rpath,'$$ORIGIN'"]
        return self.link(f"_C.torch{minor(version)}.so", [*made, *old], libraries, kernels)

    def run(self, libraries: Sequence[str]) -> list[Path]:
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "build.ninja"
        write(file, "\n".join(self.lines) + "\n")
        jobs = os.environ.get("MAX_JOBS") or os.cpu_count()
        subprocess.run(
            [sys.executable, "-m", "ninja", "-j", str(jobs), "-f", file, *libraries], cwd=ROOT, check=True
        )
        return [Path(library) for library in libraries]


def write(file: Path, text: str) -> None:
    """Writes a file that differs, so that what depends on it is not made anew."""
    if not file.exists() or file.read_text() != text:
        file.write_text(text)


def compiled(folder: Path, machine: str, torches: dict[str, Path]) -> list[Path]:
    """The libraries of a wheel, checked."""
    folder.mkdir(parents=True, exist_ok=True)
    compilation = Compilation(folder, machine)
    old = compilation.objects("kernels", ["csrc/common/old_symbols.cpp"], [])
    kernels = compilation.kernels(old)
    ops = [compilation.ops(version, files, kernels, old) for version, files in torches.items()]
    made = compilation.run([kernels, *ops])
    paths = [ROOT, folder, *torches.values()]
    problems = wheel_file.problems(made[0], (), set(), paths)
    for library, files in zip(made[1:], torches.values(), strict=True):
        exported = [wheel_file.exported(files / "lib" / name) for name in TORCH_LIBRARIES]
        provided = set().union(wheel_file.exported(made[0]), *exported)
        problems += wheel_file.problems(library, (KERNELS, *TORCH_LIBRARIES), provided, paths)
    if problems:
        raise SystemExit("\n".join(problems))
    return made


def pure_wheel(folder: Path) -> Path:
    """A wheel of the Python files."""
    environment = os.environ | {"PEFT_KERNELS_CPU": "0", "PEFT_KERNELS_CUDA": "0"}
    within: list[str | Path] = ["egg_info", "--egg-base", folder, "build", "--build-base", folder / "build"]
    command = [sys.executable, "setup.py", "-q", *within, "bdist_wheel", "-d", folder]
    run(command, cwd=ROOT, env=environment)
    (wheel,) = folder.glob("*.whl")
    return wheel


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--torch", nargs="+", default=TORCHES, metavar="VERSION", help="releases to compile for"
    )
    parser.add_argument("--machine", choices=("x86_64", "aarch64"), default=platform.machine())
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--cache", type=Path, default=cache(), help="where torch's headers are kept")
    options = parser.parse_args(arguments)
    torches = {version: torch_files(version, options.machine, options.cache) for version in options.torch}
    libraries = compiled(ROOT / "build" / "wheels" / options.machine, options.machine, torches)
    tag = f"py3-none-manylinux_2_28_{options.machine}"
    with tempfile.TemporaryDirectory() as name:
        wheel = wheel_file.packed(
            pure_wheel(Path(name)), {file.name: file for file in libraries}, tag, options.out
        )
    print(f"{wheel}: {wheel.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

"""Compiles the libraries of a binary wheel: kernels once, without torch, and ops for each torch."""

from __future__ import annotations

import os
import platform
import re
import runpy
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import wheel_file
from cuda_toolkit import Toolkit

ROOT = Path(__file__).resolve().parent.parent
CARDS = "8.0 8.6 8.9 9.0 10.0 12.0+PTX"
"""TORCH_CUDA_ARCH_LIST of a wheel. The kernels that only 9.0 has are compiled for 9.0a."""
TORCH_LIBRARIES = ("libtorch_cpu.so", "libc10.so", "libc10_cuda.so")
GENERATED_H = """#include <torch/version.h>
#define PEFT_KERNELS_SPEC_HASH "{}"
#define PEFT_KERNELS_TORCH TORCH_VERSION
"""
# A version script keeps everything else of C++ inside.
EXPORTS = '{{ global: extern "C++" {{ peft_kernels::{}::*; }}; local: *; }};\n'


def minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def write(file: Path, text: str) -> None:
    """Writes a file that differs, so that what depends on it is not made anew."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists() or file.read_text() != text:
        file.write_text(text)


class Ninja:
    """The rules for ninja, which compiles what changed, in a folder."""

    def __init__(self, folder: Path, machine: str) -> None:
        self.folder, self.machine = folder, machine
        self.setup = runpy.run_path(str(ROOT / "setup.py"))  # for sources and flags
        cxx = self.setup["cxx"]() if machine == platform.machine() else [f"{machine}-linux-gnu-g++"]
        # Without paths of this machine, which errors would print and which would change the bytes.
        self.host = ["-fPIC", *self.setup["HOST_FLAGS"], f"-ffile-prefix-map={ROOT}/="]
        self.lines = [
            f"builddir = {folder}",
            f"cxx = {' '.join(cxx)}",
            "rule cxx",
            "  command = $cxx $flags -MMD -MF $out.d -c $in -o $out",
            "  description = $out",
            "  deps = gcc",
            "  depfile = $out.d",
            "rule link",
            # Bound at once: a symbol that torch lacks makes loading fail, and does not end a process later.
            "  command = $cxx -shared -s -Wl,-z,now -Wl,--as-needed $in $flags -o $out",
            "  description = $out",
        ]

    def objects(
        self, part: str, sources: Iterable[str], flags: Sequence[str], needs: str = "", rule: str = "cxx"
    ) -> list[str]:
        made = []
        for source in sources:
            made.append(str(self.folder / part / f"{source}.o"))
            self.lines.append(f"build {made[-1]}: {rule} {source}{f' | {needs}' if needs else ''}")
            self.lines.append(f"  flags = {' '.join(flags)}")
        return made

    def link(self, library: str, objects: Sequence[str], flags: Sequence[str], needs: str = "") -> str:
        made = str(self.folder / library)
        self.lines.append(f"build {made}: link {' '.join(objects)}{f' | {needs}' if needs else ''}")
        self.lines.append(f"  flags = {' '.join(flags)}")
        return made

    def run(self, libraries: Sequence[str]) -> None:
        file = self.folder / "build.ninja"
        write(file, "\n".join(self.lines) + "\n")
        jobs = os.environ.get("MAX_JOBS") or os.cpu_count()
        command = [sys.executable, "-m", "ninja", "-j", str(jobs), "-f", file, *libraries]
        subprocess.run(command, cwd=ROOT, check=True)


class Part:
    """A back end: its library of kernels, and its ops for each torch."""

    name: str
    library: str
    """Name of its ops, as the package looks for them."""

    def __init__(self, ninja: Ninja) -> None:
        self.ninja = ninja
        self.old = [str(ninja.folder / "common" / "csrc/common/old_symbols.cpp.o")]

    @property
    def kernels_name(self) -> str:
        return f"libpeft_kernels_{self.name}.so"

    def link_kernels(self, objects: Sequence[str], libraries: Sequence[str] = ()) -> str:
        """The library of kernels, which exports the interfaces of one namespace."""
        exports = self.ninja.folder / f"{self.name}.map"
        write(exports, EXPORTS.format(self.name))
        flags = [f"-Wl,-soname,{self.kernels_name}", f"-Wl,--version-script={exports}", "-Wl,--no-undefined"]
        return self.ninja.link(self.kernels_name, [*objects, *self.old], [*flags, *libraries])

    def link_ops(
        self, version: str, torch: Path, sources: Iterable[str], kernels: str, flags: Sequence[str],
        libraries: Sequence[str] = (),
    ) -> str:  # fmt: skip
        """The library of ops for a version of torch, of files that include its headers."""
        ninja, part = self.ninja, f"{self.name}-torch-{version}"
        include = ninja.folder / part / "include"
        write(include / "generated.h", GENERATED_H.format(ninja.setup["spec_hash"]()))
        # As in tools/precompiled.py: found instead of ATen/ATen.h.
        write(include / "ATen" / "ATen.h", "#include_next <ATen/ATen.h>\n")
        write(include / "torch.h", "#include <ATen/ATen.h>\n#include <torch/library.h>\n")
        headers = [f"-I{include}", f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
        flags = ["-std=c++20", *ninja.host, *flags, *headers, f"-ffile-prefix-map={torch}/=torch/"]
        precompiled = str(include / "ATen" / "ATen.h.gch")
        ninja.lines.append(f"build {precompiled}: cxx {include / 'torch.h'}")
        ninja.lines.append(f"  flags = -x c++-header {' '.join(flags)}")
        made = ninja.objects(part, sources, flags, precompiled)
        found = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10", *libraries, kernels, "-Wl,-rpath,'$$ORIGIN'"]
        return ninja.link(f"{self.library}.torch{minor(version)}.so", [*made, *self.old], found, kernels)


class Cpu(Part):
    name, library = "cpu", "_C"

    def kernels(self) -> str:
        """csrc/cpu/isa, whose interface core/kernel_table.h declares."""
        ninja, flags = self.ninja, ["-std=c++20", *self.ninja.host, "-fopenmp"]
        isas = ninja.setup["X86_SOURCES" if ninja.machine == "x86_64" else "ARM_SOURCES"]
        made = ninja.objects(self.name, [*isas, "csrc/cpu/isa/scalar.cpp"], flags)
        dispatch = ["csrc/cpu/isa/dispatch.cpp"]
        return self.link_kernels(
            [*made, *ninja.objects(self.name, dispatch, [*flags, "-fvisibility=default"])]
        )

    def ops(self, version: str, torch: Path, kernels: str) -> str:
        sources = [s for s in self.ninja.setup["CPU_SOURCES"] if not s.startswith("csrc/cpu/isa/")]
        return self.link_ops(version, torch, sources, kernels, ["-fopenmp"])


class Cuda(Part):
    name, library = "cuda", "_C_cuda"

    def __init__(self, ninja: Ninja, toolkit: Toolkit) -> None:
        super().__init__(ninja)
        self.toolkit = toolkit
        self.headers = [f"-isystem{toolkit.home}/include"]
        self.runtime = [f"-L{toolkit.home}/lib64", "-lcudart"]
        architectures = ninja.setup["ARCHITECTURES"]
        self.architectures, changes = architectures["chosen"](CARDS, (), toolkit.compiles())
        for change in changes:
            print(f"CUDA kernels: compute capability {change}", file=sys.stderr)
        self.has_hopper = any(word.startswith("9.0") for word in self.architectures)
        sources = [*ninja.setup["CUDA_STARTS"], *ninja.setup["CUDA_OPS"]]
        self.with_torch = [source for source in sources if self.includes_torch(source)]
        self.without_torch = [source for source in sources if not self.includes_torch(source)]
        ninja.lines += [
            "rule nvcc",
            f"  command = {toolkit.home}/bin/nvcc $flags -MMD -MF $out.d -c $in -o $out",
            "  description = $out",
            "  deps = gcc",
            "  depfile = $out.d",
        ]

    def includes_torch(self, source: str) -> bool:
        """Every file that does begins with it (tools/precompiled.py)."""
        return self.ninja.setup["PRECOMPILED"] in (ROOT / source).read_text(encoding="utf-8")

    @property
    def macros(self) -> list[str]:
        macro, _ = self.ninja.setup["HOPPER_MACRO"]
        return [f"-D{macro}"] if self.has_hopper else []

    def kernels(self) -> str:
        """The kernels, their plans and launches, whose interfaces the headers of csrc/cuda declare."""
        ninja, setup = self.ninja, self.ninja.setup
        host = ",".join([*ninja.host, "-fvisibility=default"])
        flags = ["-std=c++17", "-O3", f"-Xcompiler {host}", "-Xfatbin -compress-all", *self.macros]
        code = setup["ARCHITECTURES"]["gencode"](self.architectures)
        made = []
        if self.has_hopper:  # machine code alone: no other card may get this PTX
            only = "-gencode=arch=compute_90a,code=sm_90a"
            made += ninja.objects(self.name, setup["HOPPER_KERNELS"], [*flags, only], rule="nvcc")
        made += ninja.objects(self.name, setup["CUDA_KERNELS"], [*flags, *code], rule="nvcc")
        starts = ["-std=c++17", *ninja.host, *self.headers, *self.macros, "-fvisibility=default"]
        made += ninja.objects(self.name, self.without_torch, starts)
        return self.link_kernels(made, self.runtime)

    def ops(self, version: str, torch: Path, kernels: str) -> str:
        words = f"-DPEFT_KERNELS_CUDA_ARCHITECTURES={':'.join(self.architectures)}"
        flags = [*self.headers, *self.macros, words]
        libraries = ["-lc10_cuda", *self.runtime]
        return self.link_ops(version, torch, self.with_torch, kernels, flags, libraries)


def compiled(
    folder: Path, machine: str, torches: Mapping[str, Path], toolkit: Toolkit | None = None
) -> list[Path]:
    """The libraries of a wheel, checked.

    Parameters
    ----------
    torches : mapping of str to Path
        By version, the folder with torch's include/ and lib/.
    toolkit : Toolkit, optional
        For the libraries of the CUDA back end too.
    """
    ninja = Ninja(folder, machine)
    ninja.objects("common", ["csrc/common/old_symbols.cpp"], ["-std=c++20", *ninja.host])
    parts: list[Cpu | Cuda] = [Cpu(ninja), *([Cuda(ninja, toolkit)] if toolkit else [])]
    made = []
    for part in parts:
        kernels = part.kernels()
        made.append((kernels, [part.ops(version, torch, kernels) for version, torch in torches.items()]))
    libraries = [library for kernels, ops in made for library in (kernels, *ops)]
    ninja.run(libraries)
    runtime = [Path(toolkit.home, "lib64", "libcudart.so").resolve()] if toolkit else []
    problems = []
    for kernels, ops in made:
        problems += _problems(Path(kernels), runtime, [folder])
        for library, torch in zip(ops, torches.values(), strict=True):
            beside = [torch / "lib" / name for name in TORCH_LIBRARIES if (torch / "lib" / name).exists()]
            problems += _problems(Path(library), [Path(kernels), *runtime, *beside], [folder, torch])
    if problems:
        raise SystemExit("\n".join(problems))
    return [Path(library) for library in libraries]


def _problems(library: Path, beside: Sequence[Path], folders: Sequence[Path]) -> list[str]:
    provided = set().union(*map(wheel_file.exported, beside))
    return wheel_file.problems(library, map(_soname, beside), provided, [ROOT, *folders])


def _soname(library: Path) -> str:
    found = re.search(r"\(SONAME\).*\[(.+)\]", wheel_file.readelf(library, "-d"))
    return found[1] if found else library.name

"""Builds the compiled back ends. Everything else about the package is in pyproject.toml.

PEFT_KERNELS_CPU   unset: build the CPU back end if there is a C++ compiler and torch, otherwise install pure
                   Python with a warning; 0: do not build it; 1: fail without it
PEFT_KERNELS_CUDA  unset: build the CUDA back end if torch has CUDA and a matching nvcc is found, otherwise
                   warn; 0: do not build it; 1: fail without it
TORCH_CUDA_ARCH_LIST  compute capabilities to build for ("8.0;9.0+PTX", "Hopper"); unset or "native": those of
                   the cards of this machine, or without one all from 8.0 on. Unsupported ones are dropped
                   with a message
PEFT_KERNELS_ISA   unset: build every instruction set of this kind of processor, to choose from at run time;
                   native: only the one that this machine chooses, and scalar code
PEFT_KERNELS_EMULATE  1, for tests: also build emulated instruction sets and the tests' own ops
PEFT_KERNELS_PTX   1, for tests: also build the CUDA kernels as PTX that runs on the CPU; fail without nvcc
PEFT_KERNELS_SANITIZE  address (with undefined behaviour) or thread: a build for `make sanitize`, by gcc

A compile error is always an error: a machine with a compiler should not get the slow package by accident.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import re
import runpy
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.append(str(ROOT / "tools"))
from cuda_toolkit import Toolkit  # noqa: E402
from hopper import HOPPER_KERNELS, HOPPER_MACRO, with_hopper  # noqa: E402

PACKAGE = ROOT / "peft_kernels"
# Read as a single file: importing the package would import torch.
ARCHITECTURES = runpy.run_path(str(ROOT / "peft_kernels" / "core" / "backends" / "architectures.py"))


def sources(folder: str, suffix: str) -> list[str]:
    """Every source file in a folder and below it."""
    return [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / folder).rglob(f"*{suffix}"))]


# In ascending order, with macros that gcc defines under -march=native where the processor has the ISA.
X86_ISAS = {
    "avx2": ("AVX2", "FMA", "F16C"),
    "avx512": ("AVX512F", "AVX512BW", "AVX512DQ", "AVX512VL"),
    "avx512_bf16": ("AVX512BF16", "AVX512VBMI"),
    "amx": ("AMX_BF16", "AMX_TILE"),
}
X86_SOURCES = [f"csrc/cpu/isa/{isa}.cpp" for isa in X86_ISAS]
ARM_SOURCES = [f"csrc/cpu/isa/{isa}.cpp" for isa in ("neon", "neon_bf16")]
CPU_SOURCES = [name for name in sources("csrc/cpu", ".cpp") if name not in (*X86_SOURCES, *ARM_SOURCES)]
EMULATED_SOURCES = ["tests/ops/cpu/amx/amx_emulated.cpp", "tests/ops/cpu/threads/checks.cpp"]

# Kernels and host code are apart: kernels include nothing of torch, whose headers take nvcc minutes.
CUDA_KERNELS = [name for name in sources("csrc/cuda", ".cu") if name not in HOPPER_KERNELS]
LAUNCH = "csrc/cuda/core/launch.cpp"
# Counters and queries of the device are for a real card, and left out of the PTX library.
CUDA_STARTS = ["csrc/cuda/core/card.cpp", "csrc/cuda/core/counters.cpp", LAUNCH]
CUDA_OPS = [name for name in sources("csrc/cuda", ".cpp") if name not in CUDA_STARTS]
PTX_FOLDER, PTX_PROGRAM = "tests/gpu/ptx", "main.cu"


# The first line of files that include torch's headers; see tools/precompiled.py.
PRECOMPILED = "#include <ATen/ATen.h>\n"


def spec_files() -> list[Path]:
    """The files that define the op schemas and GROUPS."""
    return [*sorted((PACKAGE / "ops").rglob("*.py")), PACKAGE / "core" / "op.py"]


def headers(*folders: str) -> list[str]:
    """Files that a library depends on besides its sources: headers, and the op schemas."""
    suffixes = (".h", ".inl", ".cuh")
    found = [p for folder in folders for p in sorted((ROOT / folder).rglob("*")) if p.suffix in suffixes]
    return [str(p.relative_to(ROOT)) for p in (*spec_files(), *found)]


IS_X86 = platform.machine() in ("x86_64", "AMD64")
IS_ARM = platform.machine() in ("aarch64", "arm64", "ARM64")
LEVEL_SOURCES = X86_SOURCES if IS_X86 else ARM_SOURCES if IS_ARM else []
PROBE = "#include <vector>\nint main() { return int(std::vector<int>().size()); }\n"
X86_PROBE = """#include <immintrin.h>
#include <vector>
#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512vbmi,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
__m512 probe(__m512 sum, __m512bh a) { return _mm512_dpbf16_ps(sum, a, a); }
#pragma GCC pop_options
int main() { return int(std::vector<int>().size()); }
"""

# Contracting a * b + c into an FMA would round once where the NF4 format rounds twice.
HOST_FLAGS = ["-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off"]
# -fno-wrapv: Python's default flags make signed overflow defined, which would hide it from UBSan.
SANITIZE_FLAGS = {
    "": [],
    "address": [
        "-fsanitize=address,undefined,float-cast-overflow",
        "-fno-sanitize-recover=all",
        "-fno-wrapv",
    ],
    "thread": ["-fsanitize=thread"],
}


def switch(name: str) -> bool | None:
    """An environment switch: True for 1, False for 0, None if unset or empty."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name}: expected 0 or 1, got {value!r}")
    return {"": None, "0": False, "1": True}[value]


def sanitize_flags() -> list[str]:
    """Compiler and linker flags of the sanitizer that PEFT_KERNELS_SANITIZE names; none when unset."""
    value = os.environ.get("PEFT_KERNELS_SANITIZE", "")
    if value not in SANITIZE_FLAGS:
        raise SystemExit(f"PEFT_KERNELS_SANITIZE: expected address or thread, got {value!r}")
    flags = SANITIZE_FLAGS[value]
    return ["-O1", "-g1", "-fno-omit-frame-pointer", *flags] if flags else []


def spec_hash() -> str:
    """Fingerprint of the op schemas, as core/registry.py computes it, read without torch."""
    texts, groups = [], {}
    for file in spec_files():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                constants = assigned(node.body, ("name", "schema"))
                if len(constants) == 2:
                    texts.append(constants["name"] + constants["schema"])
            elif isinstance(node, ast.Module):
                groups |= assigned(node.body, ("GROUPS",))
    return hashlib.sha256("\n".join([*sorted(texts), *groups["GROUPS"].values()]).encode()).hexdigest()


def assigned(body: list[ast.stmt], names: tuple[str, ...]) -> dict[str, Any]:
    """The constants that the statements assign to those names."""
    return {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id in names
    }


def generated_headers() -> str:
    """The folder of generated.h. One file includes it: a new schema recompiles only that.

    Its name, and so every command line, has torch's version: another torch recompiles every file. ninja does
    not look at torch's headers, which it takes for the system's.
    """
    import torch

    folder = ROOT / "build" / "generated" / f"torch-{torch.__version__}"
    folder.mkdir(parents=True, exist_ok=True)
    values = {"PEFT_KERNELS_SPEC_HASH": spec_hash(), "PEFT_KERNELS_TORCH": torch.__version__}
    header, text = folder / "generated.h", "".join(f'#define {k} "{v}"\n' for k, v in values.items())
    if not header.exists() or header.read_text() != text:
        header.write_text(text)
    return str(folder)


def cxx() -> list[str]:
    """The command of the C++ compiler."""
    return shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")


def isa_sources() -> list[str]:
    """The source files of the instruction sets to build, as PEFT_KERNELS_ISA says."""
    wanted = os.environ.get("PEFT_KERNELS_ISA", "")
    if wanted not in ("", "native"):
        raise SystemExit(f"PEFT_KERNELS_ISA: expected native, or unset, got {wanted!r}")
    if not wanted or not IS_X86:
        return LEVEL_SOURCES
    told = subprocess.run(
        [*cxx(), "-march=native", "-dM", "-E", "-x", "c++", os.devnull],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    macros = set(re.findall(r"^#define __(\w+)__ 1$", told, re.M))
    found = [f"csrc/cpu/isa/{isa}.cpp" for isa, needed in X86_ISAS.items() if macros >= {*needed}]
    # Linux may refuse AMX to a process, which then takes the ISA below.
    return found[-2:] if "AMX_TILE" in macros else found[-1:]


def compiler_problem() -> str | None:
    """None if the C++ compiler of the build compiles a small file, otherwise its error.

    On x86 the file uses a target pragma, as the kernels do; clang has none.
    """
    command = cxx()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(X86_PROBE if IS_X86 else PROBE)
        try:
            result = subprocess.run(
                [*command, "-std=c++17", "-c", str(source), "-o", str(Path(folder, "probe.o"))],
                capture_output=True,
                text=True,
                check=False,
            )
        except OSError as error:
            return f"no C++ compiler ({error})"
    if result.returncode != 0:
        needed = "GCC 10 or later; not yet with clang" if IS_X86 else "a C++17 compiler"
        return f"{command[0]} does not compile a small file (needed: {needed}): {result.stderr.strip()[:400]}"
    return None


def cpu_extension(emulate: bool) -> Any:
    """`peft_kernels._C`."""
    from torch.utils.cpp_extension import CppExtension

    compile_args = [*HOST_FLAGS]
    if sys.platform == "linux":
        # at::parallel_for is a template, so it needs -fopenmp to compile. Not to link: libtorch_cpu brings
        # its own OpenMP runtime, and naming one could load a second runtime with its own thread pool.
        compile_args.append("-fopenmp")
    return CppExtension(
        name="peft_kernels._C",
        # Those that take longest come first, so that no core waits for one at the end.
        sources=(EMULATED_SOURCES if emulate else []) + isa_sources() + CPU_SOURCES,
        depends=headers("csrc/common", "csrc/cpu", *(["tests/ops/cpu/amx"] if emulate else [])),
        include_dirs=[generated_headers()],
        extra_compile_args={"cxx": compile_args + sanitize_flags()},
        extra_link_args=sanitize_flags(),
    )


def wrapped(folder: str, named: dict[str, str]) -> list[str]:
    """Files in build/FOLDER, with the given names, that include one source each.

    Objects are named after sources, and two libraries must not share one. A precompiled header only works if
    the file itself includes it first.
    """
    into = ROOT / "build" / folder
    into.mkdir(parents=True, exist_ok=True)
    for source, name in named.items():
        text = f'#include "{ROOT / source}"\n'
        if PRECOMPILED in (ROOT / source).read_text(encoding="utf-8"):
            text = PRECOMPILED + text
        if not (into / name).exists() or (into / name).read_text() != text:
            (into / name).write_text(text)
    return [str((into / name).relative_to(ROOT)) for name in named.values()]


def ptx_extension(toolkit: Toolkit) -> Any:
    """`peft_kernels._C_ptx`, for tests: the CUDA back end on CPU tensors.

    nvcc compiles its kernels to PTX for two architectures; tests/gpu/ptx executes that and replaces the
    CUDA runtime.
    """
    from torch.utils import cpp_extension

    cpp_extension.CUDA_HOME = toolkit.home
    named = {source: Path(source).name for source in CUDA_KERNELS}
    named |= {source: f"{Path(source).stem}_ops.cpp" for source in (*CUDA_OPS, LAUNCH)}
    machine = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / PTX_FOLDER).rglob("*.c*"))
        if path.suffix in (".cpp", ".cu") and path.name != PTX_PROGRAM
    ]
    # For 9.0 and 12.0 nvcc writes the same PTX again (tests/gpu/ptx/test_texts.py).
    architectures = [f"{a}{b}" for a, b in ((8, 0), (10, 0)) if (a, b) in toolkit.compiles()]
    code = [f"-gencode=arch=compute_{a},code=compute_{a}" for a in architectures]
    extension = cpp_extension.CppExtension(
        name="peft_kernels._C_ptx",
        sources=wrapped("ptx", named) + machine,
        depends=CUDA_OPS + CUDA_KERNELS + HOPPER_KERNELS + headers("csrc/common", "csrc/cuda", PTX_FOLDER),
        include_dirs=[
            *(generated_headers(), str(ROOT / PTX_FOLDER), str(ROOT / "csrc/cuda")),
            str(Path(toolkit.home, "include")),
        ],
        define_macros=[("PEFT_KERNELS_PTX", None), *([HOPPER_MACRO] if (9, 0) in toolkit.compiles() else [])],
        extra_compile_args={
            "cxx": [*HOST_FLAGS, "-march=native", "-Wno-unknown-pragmas", *sanitize_flags()],
            # The fat binary holds the PTX uncompressed, with source lines.
            "nvcc": ["-O3", "-Xcompiler", "-fvisibility=hidden", "--no-compress", "-lineinfo", *code],
        },
        extra_link_args=sanitize_flags(),
    )
    if HOPPER_MACRO in extension.define_macros:
        flags = "--no-compress", "-lineinfo", "-gencode=arch=compute_90a,code=compute_90a"
        extension.hopper_flags = flags
    return extension


def architectures_to_build(toolkit: Toolkit) -> tuple[list[str], list[str]]:
    """Compute capabilities, and a sentence for each one of those asked for that was changed or dropped."""
    import torch

    here = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    try:
        wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
        return ARCHITECTURES["chosen"](wanted, here, toolkit.compiles())
    except ValueError as error:
        raise SystemExit(str(error)) from None


def cuda_extension(toolkit: Toolkit, architectures: list[str]) -> Any:
    """`peft_kernels._C_cuda`."""
    from torch.utils import cpp_extension

    cpp_extension.CUDA_HOME = toolkit.home
    has_hopper = any(word.startswith("9.0") for word in architectures)
    if not has_hopper and (9, 0) not in toolkit.compiles():
        print("CUDA back end: without LinearWgmma, because nvcc does not compile for 9.0", file=sys.stderr)
    extension = cpp_extension.CUDAExtension(
        name="peft_kernels._C_cuda",
        sources=CUDA_KERNELS + CUDA_OPS + CUDA_STARTS,
        depends=HOPPER_KERNELS + headers("csrc/common", "csrc/cuda"),
        include_dirs=[generated_headers()],
        define_macros=[
            # Semicolons would end a shell's command, commas a macro's value for nvcc.
            ("PEFT_KERNELS_CUDA_ARCHITECTURES", ":".join(architectures)),
            *([HOPPER_MACRO] if has_hopper else []),
        ],
        extra_compile_args={
            "cxx": HOST_FLAGS,
            # torch ignores TORCH_CUDA_ARCH_LIST if there are explicit -gencode flags.
            "nvcc": [
                *("-O3", "-Xcompiler", "-fvisibility=hidden", "-Xfatbin", "-compress-all"),
                *ARCHITECTURES["gencode"](architectures),
            ],
        },
    )
    if has_hopper:  # machine code alone: no other card may get this PTX
        extension.hopper_flags = "-Xfatbin", "-compress-all", "-gencode=arch=compute_90a,code=sm_90a"
    return extension


def readme() -> str:
    """README.md for a package index, where links to files of the repository lead nowhere, which has no public
    address yet: they become names of files."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"!\[[^\]]*\]\((?!https?:)[^)]+\)\n*", "", text)
    text = re.sub(r"\[([^\]]+)\]\((?!https?:|#)([^)]+)\)", r"\1 (\2)", text)
    return f"{text}\nThe source distribution has the pages in docs/.\n"


REASONS: dict[str, str] = {}
"""Why a back end is not built, by its name."""


class WritesReasons(build_py):
    """Puts REASONS into the package, where `peft-kernels info` finds them: pip hides what a build prints."""

    def run(self) -> None:
        super().run()
        if REASONS and not self.editable_mode:
            Path(self.build_lib, "peft_kernels", "not_built.json").write_text(json.dumps(REASONS))


def left_out(name: str, what: str, problem: str, wanted: bool | None) -> None:
    """Warns that a back end is not built; exits if it was requested."""
    if wanted:
        raise SystemExit(f"{what} was requested, but cannot be built: {problem}")
    REASONS[name] = problem
    print(f"WARNING: peft_kernels is installed WITHOUT its {what}: {problem}", file=sys.stderr)


def extensions() -> tuple[list[Any], dict[str, Any]]:
    """The extensions and the build command; both empty if nothing is built."""
    cpu, cuda = switch("PEFT_KERNELS_CPU"), switch("PEFT_KERNELS_CUDA")
    problem = compiler_problem()
    try:
        from torch.utils.cpp_extension import BuildExtension
    except ImportError as error:
        problem = f"torch cannot be imported ({error})"
    if problem is not None:
        left_out("cpu", "C++ back end", problem, cpu)
        if cuda:
            left_out("cuda", "CUDA back end", problem, cuda)
        REASONS["cuda"] = problem
        return [], {"build_py": WritesReasons}

    REASONS.update(
        {
            name: f"{variable} was 0"
            for name, variable, wanted in (
                ("cpu", "PEFT_KERNELS_CPU", cpu),
                ("cuda", "PEFT_KERNELS_CUDA", cuda),
            )
            if wanted is False
        }
    )
    found: list[Any] = []
    emulate, ptx = bool(switch("PEFT_KERNELS_EMULATE")), bool(switch("PEFT_KERNELS_PTX"))
    if emulate or ptx or "PEFT_KERNELS_ISA" in os.environ:  # a developer's build
        from precompiled import Build as BuildExtension
    if cpu is not False:
        found.append(cpu_extension(emulate and IS_X86))
    if ptx or cuda is not False:
        toolkit = Toolkit()
        BuildExtension = with_hopper(BuildExtension, toolkit)
    if ptx:
        if toolkit.problem is not None:
            left_out("ptx", "library of CUDA kernels for tests", toolkit.problem, wanted=True)
        found.append(ptx_extension(toolkit))
    if cuda is not False:
        problem, architectures, changes = toolkit.problem, [], []
        if problem is None:
            architectures, changes = architectures_to_build(toolkit)
            problem = None if architectures else f"compute capability {'; '.join(changes)}"
        if problem is None:
            for change in changes:
                print(f"CUDA back end: compute capability {change}", file=sys.stderr)
            found.append(cuda_extension(toolkit, architectures))
        elif cuda or "built without CUDA" not in problem:
            left_out("cuda", "CUDA back end", problem, cuda)
    # BuildExtension chooses the C++ standard that torch's headers need (at least C++17).
    return found, {"build_ext": BuildExtension, "build_py": WritesReasons}


if __name__ == "__main__":
    ext_modules, commands = extensions()
    setup(
        ext_modules=ext_modules,
        cmdclass=commands,
        long_description=readme(),
        long_description_content_type="text/markdown",
    )

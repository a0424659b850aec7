"""Builds the compiled back ends. Everything else about the package is in pyproject.toml.

PEFT_KERNELS_CPU   unset: build the CPU back end where there is a C++ compiler and torch, else install pure
                   Python and say so; 0: leave it out; 1: fail without it
PEFT_KERNELS_CUDA  unset: build the CUDA back end where torch has CUDA and an nvcc that fits, else say so;
                   0: leave it out; 1: fail without it
TORCH_CUDA_ARCH_LIST  what it is built for ("8.0;9.0+PTX", "Hopper"); unset or "native": the cards that are
                   here, else all from compute capability 8.0 on. What the kernels do not serve is left out,
                   and the build says so
PEFT_KERNELS_EMULATE  1: for tests: emulated instruction-set levels, and, with nvcc, the CUDA kernels as PTX,
                   run on the CPU
PEFT_KERNELS_SANITIZE  address (with undefined behaviour) or thread: a build for `make sanitize`, by gcc

A compile error is always an error: a machine with a compiler should not get the slow package by accident.
"""

from __future__ import annotations

import ast
import hashlib
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

ROOT = Path(__file__).resolve().parent
PACKAGE = ROOT / "peft_kernels"
# Of one file, as the package itself imports torch.
ARCHITECTURES = runpy.run_path(str(ROOT / "peft_kernels" / "core" / "backends" / "architectures.py"))

CPU_SOURCES = [
    "csrc/cpu/optim/adamw_ops.cpp",
    "csrc/cpu/block/attention_ops.cpp",
    "csrc/cpu/core/bits_hash.cpp",
    "csrc/cpu/bottleneck/bottleneck_ops.cpp",
    "csrc/cpu/core/casts_ops.cpp",
    "csrc/cpu/loss/cross_entropy_ops.cpp",
    "csrc/cpu/lora/dora_ops.cpp",
    "csrc/cpu/lora/dropout_ops.cpp",
    "csrc/cpu/experts/experts_ops.cpp",
    "csrc/cpu/gated/gated_mlp_ops.cpp",
    "csrc/cpu/gated/gated_ops.cpp",
    "csrc/cpu/isa/isa.cpp",
    "csrc/cpu/core/library_ops.cpp",
    "csrc/cpu/linear/linear_ops.cpp",
    "csrc/cpu/lora/lora_ops.cpp",
    "csrc/cpu/bottleneck/multi_bottleneck_ops.cpp",
    "csrc/cpu/nf4/nf4_absmax.cpp",
    "csrc/cpu/nf4/nf4_ops.cpp",
    "csrc/cpu/block/rms_norm_ops.cpp",
    "csrc/cpu/block/rotary_ops.cpp",
    "csrc/cpu/isa/scalar.cpp",
    "csrc/cpu/core/sums_ops.cpp",
    "csrc/cpu/core/threads.cpp",
]
X86_SOURCES = [f"csrc/cpu/isa/{level}.cpp" for level in ("avx2", "avx512", "avx512_bf16", "amx")]
ARM_SOURCES = [f"csrc/cpu/isa/{level}.cpp" for level in ("neon", "neon_bf16")]
EMULATED_SOURCES = ["tests/ops/cpu/amx/amx_emulated.cpp", "tests/ops/cpu/threads/checks.cpp"]

# Host code; the kernels' .cu files include nothing of torch, whose headers take nvcc minutes.
CUDA_OPS = [
    "csrc/cuda/optim/adamw_ops.cpp",
    "csrc/cuda/core/bind.cpp",
    "csrc/cuda/bottleneck/bottleneck_ops.cpp",
    "csrc/cuda/lora/dora_ops.cpp",
    "csrc/cuda/lora/dropout_ops.cpp",
    "csrc/cuda/experts/experts_ops.cpp",
    "csrc/cuda/gated/gated_ops.cpp",
    "csrc/cuda/linear/linear_ops.cpp",
    "csrc/cuda/linear/linear_plan.cpp",
    "csrc/cuda/linear/linear_product.cpp",
    "csrc/cuda/lora/lora_fused.cpp",
    "csrc/cuda/lora/lora_general.cpp",
    "csrc/cuda/lora/lora_ops.cpp",
    "csrc/cuda/nf4/nf4_ops.cpp",
    "csrc/cuda/core/runtime.cpp",
]
# Counters, and questions to a device, are for a device alone.
LAUNCH = "csrc/cuda/core/launch.cpp"
CUDA_STARTS = ["csrc/cuda/core/card.cpp", "csrc/cuda/core/counters.cpp", LAUNCH]
CUDA_KERNELS = [
    "csrc/cuda/optim/adamw.cu",
    "csrc/cuda/bottleneck/bottleneck.cu",
    "csrc/cuda/lora/dora_norm.cu",
    "csrc/cuda/lora/dora_scale.cu",
    "csrc/cuda/lora/dropout.cu",
    "csrc/cuda/experts/experts_linear.cu",
    "csrc/cuda/experts/experts_linear_dx.cu",
    "csrc/cuda/experts/experts_lora.cu",
    "csrc/cuda/core/experts_rows.cu",
    "csrc/cuda/gated/gated.cu",
    "csrc/cuda/linear/linear_dx.cu",
    "csrc/cuda/linear/linear_small.cu",
    "csrc/cuda/linear/linear_tiles.cu",
    "csrc/cuda/lora/lora_expand.cu",
    "csrc/cuda/lora/lora_over_rows.cu",
    "csrc/cuda/lora/lora_shrink.cu",
    "csrc/cuda/lora/lora_slab.cu",
    "csrc/cuda/nf4/nf4_dequantize.cu",
    "csrc/cuda/nf4/nf4_quantize.cu",
]
PTX_FOLDER, PTX_PROGRAM = "tests/gpu/ptx", "main.cu"


# With it files begin that include torch's headers; see tools/precompiled.py.
PRECOMPILED = "#include <ATen/ATen.h>\n"


def spec_files() -> list[Path]:
    """Where ops' schemas and GROUPS stand."""
    return [*sorted((PACKAGE / "ops").rglob("*.py")), PACKAGE / "core" / "registry.py"]


def headers(*folders: str) -> list[str]:
    """What a change of makes a library out of date, beside its sources."""
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

# Sources are in the order of their compilation, the longest first: no core has to wait for one at the end.

# A contracted a * b + c would round once where the NF4 format rounds twice.
HOST_FLAGS = ["-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off"]
# -fno-wrapv: Python's own flags define signed overflow, which would hide it.
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
    """An environment switch: True for 1, False for 0, None when unset or empty."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name}: expected 0 or 1, got {value!r}")
    return {"": None, "0": False, "1": True}[value]


def sanitize_flags() -> list[str]:
    """Flags of the sanitizer that PEFT_KERNELS_SANITIZE names, for compiler and linker; none when unset."""
    value = os.environ.get("PEFT_KERNELS_SANITIZE", "")
    if value not in SANITIZE_FLAGS:
        raise SystemExit(f"PEFT_KERNELS_SANITIZE: expected address or thread, got {value!r}")
    flags = SANITIZE_FLAGS[value]
    return ["-O1", "-g1", "-fno-omit-frame-pointer", *flags] if flags else []


def spec_hash() -> str:
    """Fingerprint of the op schemas, as ops/registry.py has it, but from the source: that imports torch."""
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
    """What the statements assign to those names, constants all."""
    return {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id in names
    }


def generated_headers() -> str:
    """The folder of generated.h. One file includes it: a new schema compiles that again, not all kernels."""
    import torch

    folder = ROOT / "build" / "generated"
    folder.mkdir(parents=True, exist_ok=True)
    values = {"PEFT_KERNELS_SPEC_HASH": spec_hash(), "PEFT_KERNELS_TORCH": torch.__version__}
    header, text = folder / "generated.h", "".join(f'#define {k} "{v}"\n' for k, v in values.items())
    if not header.exists() or header.read_text() != text:
        header.write_text(text)
    return str(folder)


def compiler_problem() -> str | None:
    """None when the C++ compiler that the build will use compiles a small file, else what it said.

    On x86 the file is written as the kernels are, with a target pragma, which clang does not have.
    """
    command = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")
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
        kind = "GCC 10 or later is needed on x86" if IS_X86 else "a C++17 compiler is needed"
        return f"{command[0]} does not compile a small file ({kind}): {result.stderr.strip()[:400]}"
    return None


def cpu_extension(emulate: bool) -> Any:
    """`peft_kernels._C`."""
    from torch.utils.cpp_extension import CppExtension

    compile_args = [*HOST_FLAGS]
    if sys.platform == "linux":
        # at::parallel_for is a template, so it needs -fopenmp here. The link does not: libtorch_cpu brings
        # its own OpenMP runtime, and naming one could load a second, with a second pool of threads.
        compile_args.append("-fopenmp")
    return CppExtension(
        name="peft_kernels._C",
        sources=(EMULATED_SOURCES if emulate else []) + LEVEL_SOURCES + CPU_SOURCES,
        depends=headers("csrc/common", "csrc/cpu", "tests/ops/cpu/amx"),
        include_dirs=[generated_headers()],
        define_macros=[
            ("PEFT_KERNELS_EMULATE", str(int(emulate))),
        ],
        extra_compile_args={"cxx": compile_args + sanitize_flags()},
        extra_link_args=sanitize_flags(),
    )


def wrapped(folder: str, named: dict[str, str]) -> list[str]:
    """Files in build/FOLDER, by the names given, that include a source each: objects are named after sources,
    and those of two libraries must not meet. A header that is precompiled is taken in a file's own lines
    alone."""
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
    """`peft_kernels._C_ptx`, for tests: the CUDA back end for CPU tensors. Its kernels are what nvcc makes of
    them, as PTX for several architectures, which tests/gpu/ptx runs in place of a card and its runtime."""
    from torch.utils import cpp_extension

    cpp_extension.CUDA_HOME = toolkit.home
    named = {source: Path(source).name for source in CUDA_KERNELS}
    named |= {source: f"{Path(source).stem}_ops.cpp" for source in (*CUDA_OPS, LAUNCH)}
    machine = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / PTX_FOLDER).rglob("*.c*"))
        if path.suffix in (".cpp", ".cu") and path.name != PTX_PROGRAM
    ]
    architectures = [f"{a}{b}" for a, b in ARCHITECTURES["ALL"] if (a, b) in toolkit.compiles()]
    code = [f"-gencode=arch=compute_{a},code=compute_{a}" for a in architectures]
    return cpp_extension.CppExtension(
        name="peft_kernels._C_ptx",
        sources=wrapped("ptx", named) + machine,
        depends=CUDA_OPS + CUDA_KERNELS + headers("csrc/common", "csrc/cuda", PTX_FOLDER),
        include_dirs=[
            *(generated_headers(), str(ROOT / PTX_FOLDER), str(ROOT / "csrc/cuda")),
            str(Path(toolkit.home, "include")),
        ],
        define_macros=[("PEFT_KERNELS_PTX", None)],
        extra_compile_args={
            "cxx": [*HOST_FLAGS, "-march=native", "-Wno-unknown-pragmas", *sanitize_flags()],
            # The fat binary holds the text as it is, each line with where it comes from.
            "nvcc": ["-O3", "-Xcompiler", "-fvisibility=hidden", "--no-compress", "-lineinfo", *code],
        },
        extra_link_args=sanitize_flags(),
    )


class Toolkit:
    """The CUDA toolkit that the build will use, or the reason why there is none."""

    def __init__(self) -> None:
        self.home, self.version, self.problem = "", (0, 0), None
        import torch
        from torch.utils import cpp_extension

        if torch.version.cuda is None:
            self.problem = f"torch {torch.__version__} is built without CUDA"
            return
        home = cpp_extension.CUDA_HOME
        nvcc = Path(home or "/nonexistent", "bin", "nvcc")
        if not nvcc.exists():
            self.problem = (
                f"nvcc was not found{f' in {home}' if home else ''}: install the CUDA {torch.version.cuda} "
                "toolkit, and set CUDA_HOME if it is not on the path"
            )
            return
        text = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=False).stdout
        match = re.search(r"release (\d+)\.(\d+)", text)
        self.version = (int(match[1]), int(match[2])) if match else (0, 0)
        major = int(torch.version.cuda.split(".")[0])
        if self.version[0] != major or self.version < (12, 4):
            self.problem = (
                f"{nvcc} is of CUDA {self.version[0]}.{self.version[1]}, this torch needs "
                f"{'12.4 or later' if major == 12 else f'{major}.x'}: "
                "install that toolkit, and set CUDA_HOME to it"
            )
            return
        # A script on the path may stand for an nvcc elsewhere, whose headers are needed too.
        told = subprocess.run(
            [str(nvcc), "--dryrun", "probe.cu"], capture_output=True, text=True, check=False
        ).stderr
        match = re.search(r"^#\$ TOP=(.+)$", told, re.M)
        self.home = str(Path(match[1] if match else str(home)).resolve())
        self._nvcc = str(nvcc)

    def compiles(self) -> set[tuple[int, int]]:
        """The compute capabilities that this nvcc compiles for."""
        told = subprocess.run(
            [self._nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False
        ).stdout
        return {(int(major), int(minor)) for major, minor in re.findall(r"^compute_(\d+)(\d)$", told, re.M)}

    def architectures(self) -> tuple[list[str], list[str]]:
        """What TORCH_CUDA_ARCH_LIST and the cards here ask for, and what was changed of it and why."""
        import torch

        here = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        try:
            return ARCHITECTURES["chosen"](os.environ.get("TORCH_CUDA_ARCH_LIST", ""), here, self.compiles())
        except ValueError as error:
            raise SystemExit(str(error)) from None


def cuda_extension(toolkit: Toolkit, architectures: list[str]) -> Any:
    """`peft_kernels._C_cuda`."""
    from torch.utils import cpp_extension

    cpp_extension.CUDA_HOME = toolkit.home
    return cpp_extension.CUDAExtension(
        name="peft_kernels._C_cuda",
        sources=CUDA_KERNELS + CUDA_OPS + CUDA_STARTS,
        depends=headers("csrc/common", "csrc/cuda"),
        include_dirs=[generated_headers()],
        define_macros=[
            # Semicolons would end a shell's command, commas a macro's value for nvcc.
            ("PEFT_KERNELS_CUDA_ARCHITECTURES", ":".join(architectures)),
        ],
        extra_compile_args={
            "cxx": HOST_FLAGS,
            # With flags of its own, torch reads no TORCH_CUDA_ARCH_LIST.
            "nvcc": [
                *("-O3", "-Xcompiler", "-fvisibility=hidden", "-Xfatbin", "-compress-all"),
                *ARCHITECTURES["gencode"](architectures),
            ],
        },
    )


def left_out(what: str, problem: str, wanted: bool | None) -> None:
    """Says that a back end is not built; an end when it was asked for."""
    if wanted:
        raise SystemExit(f"{what} was asked for, but cannot be built: {problem}")
    print(f"WARNING: peft_kernels is installed WITHOUT its {what}: {problem}", file=sys.stderr)


def extensions() -> tuple[list[Any], dict[str, Any]]:
    """What to compile, and the command that does it; both empty where everything is left out."""
    cpu, cuda = switch("PEFT_KERNELS_CPU"), switch("PEFT_KERNELS_CUDA")
    problem = compiler_problem()
    try:
        from torch.utils.cpp_extension import BuildExtension
    except ImportError as error:
        problem = f"torch cannot be imported ({error})"
    if problem is not None:
        left_out("C++ back end", problem, cpu)
        if cuda:
            left_out("CUDA back end", problem, cuda)
        return [], {}

    found: list[Any] = []
    emulate = bool(switch("PEFT_KERNELS_EMULATE"))
    if emulate:
        sys.path.append(str(ROOT / "tools"))
        from precompiled import Build as BuildExtension
    if cpu is not False:
        found.append(cpu_extension(emulate and IS_X86))
    if emulate or cuda is not False:
        toolkit = Toolkit()
        if emulate and toolkit.problem is None:
            found.append(ptx_extension(toolkit))
    if cuda is not False:
        problem, architectures, changes = toolkit.problem, [], []
        if problem is None:
            architectures, changes = toolkit.architectures()
            problem = None if architectures else f"compute capability {'; '.join(changes)}"
        if problem is None:
            for change in changes:
                print(f"CUDA back end: compute capability {change}", file=sys.stderr)
            found.append(cuda_extension(toolkit, architectures))
        elif cuda or "built without CUDA" not in problem:
            left_out("CUDA back end", problem, cuda)
    # The C++ standard is left to BuildExtension, which knows what torch's headers ask for (at least C++17).
    return found, {"build_ext": BuildExtension}


if __name__ == "__main__":
    ext_modules, commands = extensions()
    setup(ext_modules=ext_modules, cmdclass=commands)

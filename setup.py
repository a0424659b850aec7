"""Builds the C++ back end. Everything else about the package is in pyproject.toml.

PEFT_KERNELS_CPU   unset: build the CPU back end where there is a C++ compiler and torch, else install pure
                   Python and say so; 0: leave it out; 1: fail without it
PEFT_KERNELS_EMULATE  1: add emulated instruction-set levels, for tests on machines that lack the real ones
PEFT_KERNELS_CUDA  see cuda_extensions()
PEFT_KERNELS_SANITIZE  address (with undefined behaviour) or thread: a build for `make sanitize`, by gcc

A compile error is always an error: a machine with a compiler should not get the slow package by accident.
"""

from __future__ import annotations

import ast
import hashlib
import os
import platform
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from setuptools import setup

ROOT = Path(__file__).resolve().parent

CPU_SOURCES = [
    "csrc/cpu/absmax.cpp",
    "csrc/cpu/bind.cpp",
    "csrc/cpu/elementwise_ops.cpp",
    "csrc/cpu/isa.cpp",
    "csrc/cpu/lora_ops.cpp",
    "csrc/cpu/nf4_ops.cpp",
    "csrc/cpu/scalar.cpp",
]
HEADERS = [str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("csrc/**/*")) if p.suffix in (".h", ".inl")]
X86_SOURCES = [f"csrc/cpu/{level}.cpp" for level in ("avx2", "avx512", "avx512_bf16", "amx")]
EMULATED_SOURCES = ["csrc/cpu/amx_emulated.cpp"]

IS_X86 = platform.machine() in ("x86_64", "AMD64")
PROBE = "#include <vector>\nint main() { return int(std::vector<int>().size()); }\n"
X86_PROBE = """#include <immintrin.h>
#include <vector>
#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
__m512 probe(__m512 sum, __m512bh a) { return _mm512_dpbf16_ps(sum, a, a); }
#pragma GCC pop_options
int main() { return int(std::vector<int>().size()); }
"""

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
    """Flags of the sanitizer that PEFT_KERNELS_SANITIZE names; none when unset or empty."""
    value = os.environ.get("PEFT_KERNELS_SANITIZE", "")
    if value not in SANITIZE_FLAGS:
        raise SystemExit(f"PEFT_KERNELS_SANITIZE: expected address or thread, got {value!r}")
    return SANITIZE_FLAGS[value]


def spec_hash() -> str:
    """Fingerprint of the op schemas, taken from the source: spec.py imports torch, and the package."""
    tree = ast.parse((ROOT / "peft_kernels" / "spec.py").read_text(encoding="utf-8"))
    calls = sorted(
        (node for node in ast.walk(tree) if isinstance(node, ast.Call)),
        key=lambda node: (node.lineno, node.col_offset),
    )
    schemas = [
        keyword.value.value
        for call in calls
        for keyword in call.keywords
        if keyword.arg == "schema"
        and isinstance(keyword.value, ast.Constant)
        and isinstance(keyword.value.value, str)
    ]
    return hashlib.sha256("\n".join(schemas).encode()).hexdigest()


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


def cpu_extensions() -> tuple[list[Any], dict[str, Any]]:
    """The extension `peft_kernels._C` and the command that builds it; both empty when it is left out."""
    wanted = switch("PEFT_KERNELS_CPU")
    if wanted is False:
        return [], {}
    problem = compiler_problem()
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        problem = f"torch cannot be imported ({error})"
    if problem is not None:
        if wanted:
            raise SystemExit(f"PEFT_KERNELS_CPU=1, but the C++ back end cannot be built: {problem}")
        print(f"WARNING: peft_kernels is installed WITHOUT its C++ back end: {problem}", file=sys.stderr)
        return [], {}

    compile_args = ["-O3", "-g0", "-fvisibility=hidden"]
    # A contracted a * b + c would round once where the NF4 format rounds twice.
    compile_args.append("-ffp-contract=off")
    if sys.platform == "linux":
        # at::parallel_for is a template, so it needs -fopenmp here. The link does not: libtorch_cpu brings
        # its own OpenMP runtime, and naming one could load a second, with a second pool of threads.
        compile_args.append("-fopenmp")
    emulate = bool(switch("PEFT_KERNELS_EMULATE")) and IS_X86
    sanitize = sanitize_flags()
    if sanitize:
        compile_args += ["-O1", "-g1", "-fno-omit-frame-pointer", *sanitize]
    extension = CppExtension(
        name="peft_kernels._C",
        sources=CPU_SOURCES + (X86_SOURCES if IS_X86 else []) + (EMULATED_SOURCES if emulate else []),
        depends=["peft_kernels/spec.py", *HEADERS],
        define_macros=[
            ("PEFT_KERNELS_SPEC_HASH", spec_hash()),
            ("PEFT_KERNELS_EMULATE", str(int(emulate))),
        ],
        extra_compile_args={"cxx": compile_args},
        extra_link_args=sanitize,
    )
    # The C++ standard is left to BuildExtension, which knows what torch's headers ask for (at least C++17).
    return [extension], {"build_ext": BuildExtension}


def cuda_extensions() -> list[Any]:
    """The extension `peft_kernels._C_cuda` (csrc/cuda), once there is one.

    PEFT_KERNELS_CUDA  unset: build it where torch has CUDA and nvcc is found; 0: leave it out;
                       1: fail without it
    """
    if switch("PEFT_KERNELS_CUDA"):
        raise SystemExit("PEFT_KERNELS_CUDA=1, but this version of peft_kernels has no CUDA back end")
    return []


extensions, commands = cpu_extensions()
setup(ext_modules=extensions + cuda_extensions(), cmdclass=commands)

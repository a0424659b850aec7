"""Compiles the CUDA files whose instructions only sm_90a has, beside torch's build.

torch's build compiles all files of a library for the same architectures. These are compiled before, and
their objects are linked.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from cuda_toolkit import Toolkit

ROOT = Path(__file__).resolve().parent.parent
HOPPER_KERNELS = ["csrc/cuda/experts/experts_wgmma.cu", "csrc/cuda/linear/linear_wgmma.cu"]
HOPPER_MACRO = ("PEFT_KERNELS_WGMMA", None)
"""Defined for the other files of a library that has them."""


def compiled(toolkit: Toolkit, source: str, flags: tuple[str, ...]) -> str:
    """The object of a source file, compiled unless its text, all headers and flags are the same."""
    headers = [p for folder in ("common", "cuda") for p in sorted((ROOT / "csrc" / folder).rglob("*.*h"))]
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / source, *headers)]
    key = hashlib.sha256("\0".join([*texts, *flags, str(toolkit.version)]).encode()).hexdigest()[:16]
    done = ROOT / "build" / "hopper" / f"{Path(source).stem}-{key}.o"
    if not done.exists():
        done.parent.mkdir(parents=True, exist_ok=True)
        # Renamed when complete, so that an interrupted run leaves no partial result.
        unfinished = done.with_suffix(f".{os.getpid()}.o")
        command = [str(Path(toolkit.home, "bin", "nvcc")), "-std=c++17", "-O3", "-Xcompiler"]
        command += ["-fPIC,-fvisibility=hidden", *flags, "-c", str(ROOT / source), "-o", str(unfinished)]
        print(shlex.join(command), file=sys.stderr)
        subprocess.run(command, check=True)
        unfinished.rename(done)
    return str(done)


def with_hopper(build: Any, toolkit: Toolkit) -> Any:
    """A build_ext that links the objects to the extensions that have `hopper_flags`, for nvcc."""

    class Build(build):  # type: ignore[misc]
        def build_extensions(self) -> None:
            for extension in self.extensions:
                if flags := getattr(extension, "hopper_flags", None):
                    extension.extra_objects += [compiled(toolkit, one, flags) for one in HOPPER_KERNELS]
            super().build_extensions()

    return Build

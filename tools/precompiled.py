"""Precompiles torch's headers for a developer's build, whose parsing dominates the compile time of small
files.

gcc uses a precompiled header that was made with the same flags, and otherwise reads the headers as usual. It
is found instead of ATen/ATen.h in files that include that first.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension

TEXT = "#include <ATen/ATen.h>\n#include <torch/library.h>\n"
OTHERWISE = "#include_next <ATen/ATen.h>\n"
STANDARD = "-std=c++17"  # torch's default


def compiler() -> list[str] | None:
    """The C++ compiler if it is gcc, without ccache, which hashes all included files."""
    command = cpp_extension.get_cxx_compiler().split()
    path = shutil.which(command[0])
    if path is None or len(command) > 1 or "ccache" in os.path.realpath(path):
        return None
    output = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    return [path] if "Free Software Foundation" in output else None


class Build(cpp_extension.BuildExtension):  # type: ignore[misc]
    """torch's build_ext with a precompiled header per library, in build/precompiled."""

    def build_extensions(self) -> None:
        if (command := compiler()) is not None:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                made = list(
                    pool.map(lambda extension: self._precompiled(command, extension), self.extensions)
                )
            for extension, folder in zip(self.extensions, made, strict=True):
                extension.include_dirs.insert(0, str(folder))
        super().build_extensions()

    def _precompiled(self, command: list[str], extension: Any) -> Path:
        """The folder with the header precompiled with the flags of a library."""
        macros = [
            f"-D{name}" + ("" if value is None else f"={value}") for name, value in extension.define_macros
        ]
        includes = [f"-I{Path(folder).absolute()}" for folder in extension.include_dirs]
        includes += [f"-I{folder}" for folder in self.compiler.include_dirs]
        flags = [*self.compiler.compiler_so[1:], *macros, *includes]
        flags += [*extension.extra_compile_args["cxx"], STANDARD]
        version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
        key = hashlib.sha256("\0".join([TEXT, torch.__version__, version, *flags]).encode()).hexdigest()[:16]
        folder = Path("build", "precompiled", key).absolute()
        (folder / "ATen").mkdir(parents=True, exist_ok=True)
        done = folder / "ATen" / "ATen.h.gch"
        if not done.exists():
            (folder / "ATen" / "ATen.h").write_text(OTHERWISE)
            (folder / "torch.h").write_text(TEXT)
            # Renamed when complete, so that an interrupted run leaves no partial result.
            unfinished = done.with_suffix(f".{os.getpid()}")
            wanted = ["-x", "c++-header", str(folder / "torch.h"), "-o", str(unfinished)]
            subprocess.run([*command, *flags, *wanted], check=True)
            unfinished.rename(done)
        return folder

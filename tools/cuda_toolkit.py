"""Finds the CUDA toolkit that a build uses."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path


class Toolkit:
    """The CUDA toolkit of the build, or the reason why there is none."""

    def __init__(self, home: str | None = None) -> None:
        """`home`: its folder, for any torch; by default the one that torch finds, which must fit it."""
        self.home, self.version, self.problem = "", (0, 0), None
        needed = ""
        if home is None:
            import torch
            from torch.utils import cpp_extension

            if torch.version.cuda is None:
                self.problem = f"torch {torch.__version__} is built without CUDA"
                return
            home, needed = cpp_extension.CUDA_HOME, torch.version.cuda
        nvcc = Path(home or "/nonexistent", "bin", "nvcc")
        if not nvcc.exists():
            self.problem = (
                f"nvcc was not found{f' in {home}' if home else ''}: install the CUDA {needed or '12 or 13'} "
                "toolkit, and set CUDA_HOME if it is not on the path"
            )
            return
        self._nvcc = str(nvcc)
        match = re.search(r"release (\d+)\.(\d+)", self._run("--version").stdout)
        self.version = (int(match[1]), int(match[2])) if match else (0, 0)
        major = int(needed.split(".")[0]) if needed else self.version[0]
        if self.version[0] != major or self.version < (12, 4):
            wanted = "12.4 or later" if major <= 12 else f"{major}.x"
            self.problem = (
                f"{nvcc} is of CUDA {self.version[0]}.{self.version[1]}, "
                f"{'this torch needs' if needed else 'expected'} {wanted}: "
                "install that toolkit, and set CUDA_HOME to it"
            )
            return
        # The nvcc on the path may be a script that calls another one, whose headers are needed too.
        match = re.search(r"^#\$ TOP=(.+)$", self._run("--dryrun", "probe.cu").stderr, re.M)
        self.home = str(Path(match[1] if match else str(home)).resolve())

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([self._nvcc, *arguments], capture_output=True, text=True, check=False)

    def compiles(self) -> set[tuple[int, int]]:
        """The compute capabilities that this nvcc supports."""
        told = self._run("--list-gpu-arch").stdout
        return {(int(major), int(minor)) for major, minor in re.findall(r"^compute_(\d+)(\d)$", told, re.M)}

"""Builds a binary wheel: one file for all supported versions of torch and Python.

    python tools/wheels.py                      # for CPUs, into dist/
    python tools/wheels.py --cuda               # with the CUDA kernels, for torch with the CUDA of this nvcc
    python tools/wheels.py --torch 2.9.1 2.15.0 # for these versions of torch alone

The kernels, with all instruction sets, are a library without torch. The ops, which call torch, are compiled
once per minor version of torch, as its C++ ABI changes with each (csrc/README.md); the package loads the
library that fits. Headers and libraries of torch come from its wheels on the index, and are kept in a cache.
The same sources, compilers and SOURCE_DATE_EPOCH give the same bytes; CUDA kernels only in the same folder,
whose path nvcc hashes into names.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import wheel_file
from cuda_toolkit import Toolkit
from wheel_libraries import ROOT, TORCH_LIBRARIES, compiled

TORCHES = ("2.9.1", "2.10.0", "2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0")
"""The newest patch release of each minor version."""


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


def toolkit() -> Toolkit:
    """The CUDA toolkit of CUDA_HOME or the path, of any major version."""
    nvcc = shutil.which("nvcc")
    home = os.environ.get("CUDA_HOME") or (nvcc and str(Path(nvcc).parents[1]))
    found = Toolkit(home or "/nonexistent")
    if found.problem is not None:
        raise SystemExit(f"--cuda: {found.problem}")
    return found


def pure_wheel(folder: Path, label: str = "") -> Path:
    """A wheel of the Python files, with a label behind the version."""
    environment = os.environ | {"PEFT_KERNELS_CPU": "0", "PEFT_KERNELS_CUDA": "0"}
    named: list[str | Path] = ["egg_info", "--egg-base", folder, "--tag-build", label]
    within: list[str | Path] = ["build", "--build-base", folder / "build"]
    command = [sys.executable, "setup.py", "-q", *named, *within, "bdist_wheel", "-d", folder]
    run(command, cwd=ROOT, env=environment)
    (wheel,) = folder.glob("*.whl")
    return wheel


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cuda", action="store_true", help="with the CUDA kernels, compiled by nvcc")
    parser.add_argument(
        "--torch", nargs="+", default=TORCHES, metavar="VERSION", help="releases to compile for"
    )
    parser.add_argument("--machine", choices=("x86_64", "aarch64"), default=platform.machine())
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "wheels", help="for objects")
    parser.add_argument("--cache", type=Path, default=cache(), help="where torch's headers are kept")
    options = parser.parse_args(arguments)
    if options.cuda and options.machine != platform.machine():
        parser.error(f"--cuda: expected --machine {platform.machine()}, got {options.machine}")
    cuda = toolkit() if options.cuda else None
    torches = {version: torch_files(version, options.machine, options.cache) for version in options.torch}
    libraries = compiled(options.build.resolve() / options.machine, options.machine, torches, cuda)
    tag = f"py3-none-manylinux_2_28_{options.machine}"
    label = f"+cu{cuda.version[0]}" if cuda else ""
    with tempfile.TemporaryDirectory() as name:
        pure = pure_wheel(Path(name), label)
        wheel = wheel_file.packed(pure, {file.name: file for file in libraries}, tag, options.out)
    print(f"{wheel}: {wheel.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

"""Lays the package out for Hugging Face's `kernels`, and builds the CPU variant for the installed torch.

    python tools/hub_layout.py build/hub            # build.toml, csrc/, torch-ext/, tests/
    python tools/hub_layout.py build/hub --build    # and build/torchXY-cxx11-cpu-.../, for get_local_kernel

The variant is compiled from what build.toml says and nothing else, as kernel-builder would. Its library
needs no version of Python, and its op namespaces begin with a name of its own, so several may be loaded at
once. A CUDA variant is not laid out yet.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from wheel_libraries import GENERATED_H

ROOT = Path(__file__).resolve().parent.parent
NAME, PACKAGE = "peft-kernels", "peft_kernels"
VERSION = 1
"""Of the kernel on the Hub; increases when the public API changes."""
HEADERS = ("csrc/common", "csrc/cpu")
GENERATED = "csrc/generated"
TESTS = "tests/docs/test_hub_kernel.py"
"""What kernel-builder runs, by the marker kernels_ci."""
BUILD_TOML = """[general]
name = "{name}"
version = {version}
license = "Apache-2.0"
backends = ["cpu"]

[torch]
src = {ops}

[kernel.cpu]
backend = "cpu"
depends = ["torch"]
include = ["{generated}"]
cxx-flags = {flags}
src = {sources}
"""


def lay_out(out: Path) -> None:
    """Writes build.toml, its sources and the Python package. Deletes the content of `out`."""
    setup = runpy.run_path(str(ROOT / "setup.py"))  # for sources and flags
    sources = [*setup["CPU_SOURCES"], *setup["LEVEL_SOURCES"]]
    shutil.rmtree(out, ignore_errors=True)
    for path in [*sources, *(header for header in setup["headers"](*HEADERS) if header.startswith("csrc"))]:
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, out / path)
    (out / GENERATED).mkdir()
    (out / GENERATED / "generated.h").write_text(GENERATED_H.format(setup["spec_hash"]()))
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / PACKAGE, out / "torch-ext" / PACKAGE, ignore=ignored)
    (out / "tests").mkdir()
    shutil.copy(ROOT / TESTS, out / "tests" / f"test_{PACKAGE}.py")
    # kernel-builder gives each build a name, as a macro, and its package the same.
    flags = [*setup["HOST_FLAGS"], "-fopenmp", "-DPEFT_KERNELS_PACKAGE=TORCH_EXTENSION_NAME"]
    ops = [path for path in sources if path.endswith("_ops.cpp")]
    text = BUILD_TOML.format(
        name=NAME,
        version=VERSION,
        generated=GENERATED,
        ops=listed(ops),
        flags=listed(flags),
        sources=listed([path for path in sources if path not in ops]),
    )
    (out / "build.toml").write_text(text)


def listed(items: Sequence[str]) -> str:
    """A TOML array, one item per line."""
    return "[\n" + "".join(f"  {json.dumps(item)},\n" for item in items) + "]"


def build_id(out: Path) -> str:
    """A name for the build, with a hash of the layout."""
    digest = hashlib.sha256()
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        digest.update(str(path.relative_to(out)).encode() + path.read_bytes())
    return f"_{PACKAGE}_cpu_{digest.hexdigest()[:7]}"


def variant() -> str:
    """The folder name by which `kernels` selects a variant."""
    import torch

    major, minor = torch.__version__.split(".")[:2]
    abi = "cxx11" if torch.compiled_with_cxx11_abi() else "cxx98"
    return f"torch{major}{minor}-{abi}-cpu-{platform.machine()}-{platform.system().lower()}"


def build(out: Path) -> Path:
    """Compiles the layout for the installed torch. Returns the variant's folder."""
    name = build_id(out)
    folder = out / "build" / variant()
    shutil.copytree(out / "torch-ext" / PACKAGE, folder)
    metadata: dict[str, Any] = {"id": name, "name": NAME, "version": VERSION, "license": "Apache-2.0"}
    metadata |= {"python-depends": [], "backend": {"type": "cpu"}}
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    compile_library(out, name, folder / f"{name}.abi3.so")
    return folder


def compile_library(out: Path, name: str, library: Path) -> None:
    """Compiles according to build.toml."""
    from torch.utils import cpp_extension

    config = tomllib.loads((out / "build.toml").read_text())
    kernel = config["kernel"]["cpu"]
    compiler = (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()
    includes = [*kernel["include"], *cpp_extension.include_paths()]
    flags = ["-std=c++20", "-fPIC", f"-DTORCH_EXTENSION_NAME={name}", *kernel["cxx-flags"]]
    flags += [f"-I{path}" for path in includes]
    objects = out / "objects"
    objects.mkdir()

    def compiled(source: str) -> str:
        made = objects / f"{Path(source).stem}.o"
        run([*compiler, *flags, "-c", source, "-o", str(made.relative_to(out))], out)
        return str(made.relative_to(out))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = list(pool.map(compiled, [*config["torch"]["src"], *kernel["src"]]))
    paths = [f"-L{path}" for path in cpp_extension.library_paths()]
    libraries = ["-ltorch", "-ltorch_cpu", "-lc10"]
    run([*compiler, "-shared", *made, *paths, *libraries, "-o", str(library.relative_to(out))], out)
    shutil.rmtree(objects)


def run(command: Sequence[str], folder: Path) -> None:
    """Runs a command. SystemExit with its errors if it fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}:\n{done.stderr[-4000:]}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="the folder to write; its content is deleted")
    parser.add_argument("--build", action="store_true", help="compile the CPU variant for this torch")
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    if out.exists() and any(out.iterdir()) and not (out / "build.toml").exists():
        sys.exit(f"{out}: expected an empty folder or a layout, got something else")
    lay_out(out)
    print(build(out) if options.build else out)


if __name__ == "__main__":
    main()

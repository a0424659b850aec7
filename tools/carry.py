"""Collects files that a GPU machine without a network may lack, for `bench/gpu_check.sh --carry FOLDER`.

    python tools/carry.py build/carry

FOLDER/python        the installed bitsandbytes, the main contender: its Python files, and the library for
                     this torch's CUDA (or --cuda 130)
FOLDER/peft_kernels  the CUDA libraries of the newest wheel in dist/ (`make wheels ARGS=--cuda`), for any
                     Python and every torch; used if nothing can be compiled there

Prints the files. Exits with 1 if bitsandbytes is not installed, or has no library for that CUDA.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shutil
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "bitsandbytes"


def main(arguments: Sequence[str] | None = None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cuda", metavar="VERSION", help="without the dot, as 130 (default: this torch's)")
    options = parser.parse_args(arguments)
    libraries = copy_libraries(ROOT / "dist", options.folder)
    print("\n".join(described(libraries)) or "dist/ has no wheel with CUDA kernels: make wheels ARGS=--cuda")
    try:
        contender = copy_bitsandbytes(options.folder / "python", options.cuda or version_of_cuda())
    except LookupError as error:
        print(f"carry.py: {error}", file=sys.stderr)
        return 1
    print("\n".join(described([path for path in contender if path.suffix == ".so"])))
    total = sum(path.stat().st_size for path in [*libraries, *contender])
    print(f"{len(libraries) + len(contender)} files, {total / 1e6:.1f} MB")
    return 0


def version_of_cuda() -> str:
    import torch

    return (torch.version.cuda or "").replace(".", "")


def copy_libraries(source: Path, target: Path) -> list[Path]:
    """The compiled CUDA back end, from the newest wheel of a folder."""
    wheels = sorted(source.glob("*+cu*.whl"), key=lambda path: path.stat().st_mtime)
    if not wheels:
        return []
    with zipfile.ZipFile(wheels[-1]) as archive:
        names = [name for name in archive.namelist() if "_cuda" in name and name.endswith(".so")]
        return [Path(archive.extract(name, target)) for name in names]


def copy_bitsandbytes(target: Path, cuda: str) -> list[Path]:
    """Its Python files, metadata and one library. LookupError if it is not installed or has no such
    library."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise LookupError(f"{PACKAGE} is not installed") from error
    library = f"libbitsandbytes_cuda{cuda}.so"
    if library not in {file.name for file in files}:
        found = ", ".join(sorted(file.name for file in files if "_cuda" in file.name)) or "none"
        raise LookupError(f"{PACKAGE} has no {library}, but {found}")
    wanted = [
        file
        for file in files
        if file.name == library or (file.suffix in (".py", "") and "bin" not in file.parts)
    ]
    return [copied(Path(str(file.locate())), target / file) for file in wanted]


def copied(source: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    return target


def described(paths: Sequence[Path]) -> list[str]:
    return [f"{path.name}: {path.stat().st_size / 1e6:.1f} MB" for path in paths]


if __name__ == "__main__":
    sys.exit(main())

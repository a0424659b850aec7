"""Gather what a machine with a GPU but no network may lack, for `bench/gpu_check.sh --carry FOLDER`.

    python tools/carry.py build/carry

FOLDER/python        the installed bitsandbytes, the main contender: its Python files, and of its libraries,
                     which have hundreds of MB, the one for this torch's CUDA (or --cuda 130)
FOLDER/peft_kernels  every peft_kernels/_C_cuda*.so of this tree, used there where nothing can be compiled.
                     One for another Python is made by that Python, with the torch of that machine:
                       PEFT_KERNELS_CPU=0 TORCH_CUDA_ARCH_LIST=9.0 python3.12 setup.py build_ext --inplace

Prints what it took. Exits with 1 when there is no bitsandbytes, or none for that CUDA.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "bitsandbytes"


def main(arguments: Sequence[str] | None = None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cuda", metavar="VERSION", help="without its dot: 130 (this torch's)")
    options = parser.parse_args(arguments)
    libraries = take_libraries(ROOT / "peft_kernels", options.folder / "peft_kernels")
    print("\n".join(told(libraries)) or "no peft_kernels/_C_cuda*.so is built here")
    try:
        contender = take_bitsandbytes(options.folder / "python", options.cuda or version_of_cuda())
    except LookupError as error:
        print(f"carry.py: {error}", file=sys.stderr)
        return 1
    print("\n".join(told([path for path in contender if path.suffix == ".so"])))
    total = sum(path.stat().st_size for path in [*libraries, *contender])
    print(f"{len(libraries) + len(contender)} files, {total / 1e6:.1f} MB")
    return 0


def version_of_cuda() -> str:
    import torch

    return (torch.version.cuda or "").replace(".", "")


def take_libraries(source: Path, target: Path) -> list[Path]:
    """Our compiled CUDA back ends, for whichever Python."""
    return [taken(path, target / path.name) for path in sorted(source.glob("_C_cuda*.so"))]


def take_bitsandbytes(target: Path, cuda: str) -> list[Path]:
    """Its Python files, what tells its version, and one library. LookupError where that is not installed."""
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
    return [taken(Path(str(file.locate())), target / file) for file in wanted]


def taken(source: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    return target


def told(paths: Sequence[Path]) -> list[str]:
    return [f"{path.name}: {path.stat().st_size / 1e6:.1f} MB" for path in paths]


if __name__ == "__main__":
    sys.exit(main())

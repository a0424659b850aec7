"""PTX of the CUDA kernels from the objects built for tests (back end `ptx`), which saves a minute of
compiling.

Without its debug sections the text is what nvcc writes for a card (tests/gpu/test_sass.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
_LINES = re.compile(r"^\s*\.(?:loc|file)\s.*\n|^\s*\.section\s+\.debug\w*\s*\{[^}]*\}\n?", re.MULTILINE)


def text(source: Path, architecture: int, read: Iterable[Path]) -> str | None:
    """PTX of a file in csrc/cuda, or None if it was not built since one of `read`, the file and its includes,
    changed."""
    if ROOT / "csrc" / "cuda" not in source.parents:
        return None
    changed = max(path.stat().st_mtime_ns for path in read)
    for built in sorted(ROOT.glob(f"build/temp.*/build/ptx/{source.stem}.o")):
        if built.stat().st_mtime_ns > changed and (found := in_object(built.read_bytes(), architecture)):
            return found
    return None


def in_object(data: bytes, architecture: int) -> str | None:
    """PTX in an uncompressed fat binary, where texts end with a zero byte."""
    found = re.search(rb"\.version [\d.]+\n\.target sm_%d\n[^\0]*" % architecture, data)
    return found and _LINES.sub("", found[0].decode())

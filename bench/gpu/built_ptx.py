"""The PTX of the CUDA kernels in what was built for tests (back end `ptx`): to write it anew takes a minute.

The text is what nvcc writes for a card too, once it is left out where lines come from
(tests/gpu/test_sass.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
_LINES = re.compile(r"^\s*\.(?:loc|file)\s.*\n|^\s*\.section\s+\.debug\w*\s*\{[^}]*\}\n?", re.MULTILINE)


def text(source: Path, architecture: int, read: Iterable[Path]) -> str | None:
    """Of a file in csrc/cuda; `read` are the file and all that it includes. None where none was built since
    they changed."""
    if ROOT / "csrc" / "cuda" not in source.parents:
        return None
    changed = max(path.stat().st_mtime_ns for path in read)
    for built in sorted(ROOT.glob(f"build/temp.*/build/ptx/{source.stem}.o")):
        if built.stat().st_mtime_ns > changed and (found := in_object(built.read_bytes(), architecture)):
            return found
    return None


def in_object(data: bytes, architecture: int) -> str | None:
    """In a fat binary that is not compressed; texts in it end with a zero."""
    found = re.search(rb"\.version [\d.]+\n\.target sm_%d\n[^\0]*" % architecture, data)
    return found and _LINES.sub("", found[0].decode())

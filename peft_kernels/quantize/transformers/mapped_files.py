"""A checkpoint's files as they lie in memory while transformers reads them.

safetensors maps files, and a tensor that was read stays resident with its file's pages, though nobody needs
it once it is quantised. The system takes such pages back when memory is short; here they are given back at
once.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

_MAPS = Path("/proc/self/maps")  # Linux; elsewhere nothing is given back
_DONTNEED = 4  # of Linux's madvise: a clean page of a file is read again when it is asked for


class MappedFiles:
    """Of one checkpoint, during one load. Where they are mapped is looked up once."""

    def __init__(self, files: Iterable[str] = ()) -> None:
        self._files = {os.path.realpath(file) for file in files}
        self._ranges: list[tuple[int, int]] | None = None if self._files else []

    def release(self, tensor: Tensor) -> None:
        """Give back the pages that a tensor has for itself, if it lies in one of the files, unwritten."""
        if tensor.device.type != "cpu" or self._ranges == []:
            return
        if self._ranges is None:
            self._ranges = list(_ranges(self._files))
        start = tensor.data_ptr()
        end = start + tensor.nbytes
        if not any(first <= start and end <= last for first, last in self._ranges):
            return
        start, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if start < end:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONTNEED)


def _ranges(files: set[str]) -> Iterable[tuple[int, int]]:
    """Addresses of the mappings of files."""
    with contextlib.suppress(OSError):
        for line in _MAPS.read_text(encoding="utf-8", errors="replace").splitlines():
            addresses, *_, name = line.split(maxsplit=5)
            if name in files:
                first, last = (int(address, 16) for address in addresses.split("-"))
                yield first, last

"""Releases memory of a checkpoint's mapped files while transformers reads them.

safetensors maps files, and pages that were read stay resident after their tensor is quantised. The system
reclaims them when memory is short; here they are released at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

_MAPS = Path("/proc/self/maps")  # Linux only; elsewhere nothing is released
_DONTNEED = 4  # of Linux's madvise: clean file pages are reread when accessed


class MappedFiles:
    """The files of a checkpoint during one load. Their addresses are looked up once."""

    def __init__(self, files: Iterable[str] = ()) -> None:
        self._files = {os.path.realpath(file) for file in files}
        self._ranges: list[tuple[int, int]] | None = None if self._files else []

    def release(self, tensor: Tensor) -> None:
        """Releases the pages that only this tensor occupies, if it lies in one of the files."""
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
    """Address ranges of mapped files."""
    with contextlib.suppress(OSError):
        for line in _MAPS.read_text(encoding="utf-8", errors="replace").splitlines():
            addresses, *_, name = line.split(maxsplit=5)
            if name in files:
                first, last = (int(address, 16) for address in addresses.split("-"))
                yield first, last

"""Keeps freed CPU memory in the process for the next step."""

from __future__ import annotations

import ctypes
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_NEVER = -1
_kept = False
_BLOCKS = (1 << 30, 32 << 20)  # bytes; glibc before 2.35 takes no more than the second


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory of CPU tensors instead of returning it to the system.

    glibc returns large freed blocks at the end of its heap or above 32 MiB to the system. Most of a step's
    memory is saved for backward, so the next step allocates it again and the kernel zeroes each page. How
    much is returned depends on the position of small allocations and differs from run to run.

    Applies to the whole process for the rest of its life: call it before training. The process keeps its peak
    memory, and somewhat more if batch lengths differ (in our example 2.5 GB instead of 2.2). Blocks above
    1 GiB are still returned. Results do not change.

    Returns
    -------
    False if the C library is not glibc (musl, macOS, Windows). With another allocator preloaded (jemalloc,
    tcmalloc) the call has no effect; those keep memory themselves.
    """
    global _kept
    mallopt = _mallopt()
    if mallopt is None:
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    mapped = any(mallopt(_M_MMAP_THRESHOLD, size) for size in _BLOCKS)
    _kept = mapped and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))
    return _kept


def returns_freed_memory() -> bool:
    """Whether glibc returns freed memory to the system, as `keep_freed_memory` was not called."""
    return not _kept and _mallopt() is not None


def _mallopt() -> Any:
    """glibc's function, or None with another C library."""
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018 - musl has a mallopt that does nothing
        return libc.mallopt
    except (AttributeError, OSError, TypeError):  # Windows has no library of that name
        return None

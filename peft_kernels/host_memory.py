"""Memory that tensors on the CPU free, kept for the next step."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_NEVER = -1
_BLOCKS = (1 << 30, 32 << 20)  # bytes; glibc before 2.35 takes no more than the second


def keep_freed_memory() -> bool:
    """Let the C library keep what tensors on the CPU free, for the next step to take.

    glibc gives large blocks that are freed back to the system, where they lie at the end of its heap or are
    above 32 MiB. Most of a step's memory is what it saves for backward: so the next one asks for it again,
    and the system clears it page by page. How much of it depends on where small allocations happen to lie,
    and so differs from run to run.

    It is for the whole process, and for the rest of its life: call it before training. The process keeps as
    much as it had in use at its peak, and somewhat more where batches differ in length, as what one leaves
    does not fit the next (our example: 2.5 GB in place of 2.2). Blocks above 1 GiB are given back as before.
    No number changes.

    Returns
    -------
    Whether there is such a setting: False with other C libraries than glibc (musl, macOS, Windows). With
    another allocator preloaded (jemalloc, tcmalloc) it has no effect; those keep memory by themselves.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018 - musl has a mallopt that does nothing
        mallopt = libc.mallopt
    except (AttributeError, OSError, TypeError):  # Windows has no library of that name
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    mapped = any(mallopt(_M_MMAP_THRESHOLD, size) for size in _BLOCKS)
    return mapped and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))

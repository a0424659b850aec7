"""keep_freed_memory: a step reuses the pages that the previous one freed."""

from __future__ import annotations

import ctypes
import json
import platform
from types import SimpleNamespace

import pytest
from fresh_process import Python

import peft_kernels as pk

STEPS = """
import json, resource
import torch
import peft_kernels as pk

MIB = 1 << 20

def step():
    saved = [torch.ones(size * MIB, dtype=torch.uint8) for size in (40, *[6] * 20)]
    assert all(t[0] == 1 for t in saved)

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

step()
given_back = faults()
kept = pk.keep_freed_memory()
faults()  # the heap may still grow, by a block or two
print(json.dumps([given_back, kept, faults()]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_pages_are_reused(python: Python) -> None:
    given_back, kept, faults = json.loads(python(STEPS).stdout)
    pages = 5 * (40 << 20) // 4096  # of the block that is above glibc's own limit
    assert given_back > 0.9 * pages and kept is True and faults < 0.2 * given_back


class Function:
    """A ctypes function, whose types can be set."""

    def __init__(self, most: int = 0) -> None:
        self.most, self.calls = most, list[tuple[int, int]]()

    def __call__(self, name: int, value: int) -> int:
        self.calls.append((name, value))
        return int(value <= self.most)


def test_old_glibc_and_musl(monkeypatch: pytest.MonkeyPatch) -> None:
    def kept(**functions: Function) -> bool:
        monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(**functions))
        return pk.keep_freed_memory()

    musl = Function(1 << 30)
    assert not kept() and not kept(mallopt=musl) and not musl.calls
    old = Function(32 << 20)
    assert kept(mallopt=old, gnu_get_libc_version=Function())
    assert old.calls == [(-3, 1 << 30), (-3, 32 << 20), (-1, -1)]
    assert not kept(mallopt=Function(-2), gnu_get_libc_version=Function())

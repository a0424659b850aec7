"""Runs the CUDA back end's host code without a device: launches are recorded and do nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

import ptx_backend as ptx
import testing
from peft_kernels.core import dispatch
from peft_kernels.core.backends import BACKENDS

A100, H100 = (80, 108, 163 << 10), (90, 132, 227 << 10)
FEW = (80, 4, 163 << 10)
"""The card of back end ptx."""


class Launch(NamedTuple):
    kernel: str
    blocks: int
    threads: int
    shared_bytes: int


Launches = Callable[[], list[Launch]]


@contextmanager
def stub_device(card: tuple[int, int, int] = H100) -> Iterator[Launches]:
    """Calls on CPU tensors run the code for CUDA tensors, dispatched as usual; their results are arbitrary.

    Yields a function that returns the launches since it was last called. Raises RuntimeError if a back end is
    forced, or if back end ptx, which this needs, is unavailable.
    """
    testing.register_ptx()
    extension = ptx.BACKEND.extension
    if (name := dispatch.forced()) is not None:
        raise RuntimeError(f"back end {name} is forced")
    backends, chosen = dict(BACKENDS), dict(dispatch._chosen)
    BACKENDS.clear()
    BACKENDS.update({name: backends[name] for name in ("ptx", "reference")})
    dispatch._chosen.clear()
    extension.set_card(*card)
    extension.note_launches(True)
    try:
        yield lambda: [Launch(*launch) for launch in extension.note_launches(True)]
    finally:
        extension.note_launches(False)
        extension.set_card(*FEW)
        BACKENDS.clear()
        BACKENDS.update(backends)
        dispatch._chosen.clear()
        dispatch._chosen.update(chosen)


def torch_ops(call: Callable[[], Any]) -> Counter[str]:
    """The torch functions that a call uses, including those called from C++."""
    with torch.autograd.profiler.profile() as profile:
        call()
    events: Any = profile.function_events
    return Counter(event.name for event in events if event.name.startswith("aten::"))

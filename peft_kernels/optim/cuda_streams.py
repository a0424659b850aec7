"""CUDA streams and pinned host memory for paging."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .paging import CURRENT, IN, OUT


class CudaStreams:
    """`paging.Streams` of a CUDA (or ROCm) device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._own = {queue: torch.cuda.Stream(device) for queue in (IN, OUT)}

    def host_zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        pages = PinnedPages(math.prod(shape) * dtype.itemsize, self._device)
        return torch.frombuffer(pages, dtype=dtype, count=math.prod(shape)).view(*shape)

    def is_host(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cpu" and tensor.is_pinned()

    def refuse(self) -> str | None:
        with torch.cuda.device(self._device):
            capturing = torch.cuda.is_current_stream_capturing()
        return "a step with paged states cannot be captured in a CUDA graph" if capturing else None

    def empty(self, count: int, nbytes: int) -> list[Tensor]:
        return [torch.empty(nbytes, dtype=torch.uint8, device=self._device) for _ in range(count)]

    def free(self, buffers: list[Tensor]) -> None:
        for buffer in buffers:
            buffer.record_stream(self._own[OUT])

    def enqueue(self, queue: str, work: Callable[[], Any]) -> None:
        if queue == CURRENT:
            work()
            return
        with torch.cuda.stream(self._own[queue]):
            work()

    def record(self, queue: str) -> torch.cuda.Event:
        return self._stream(queue).record_event()

    def wait(self, queue: str, event: torch.cuda.Event) -> None:
        self._stream(queue).wait_event(event)

    def synchronize(self, event: torch.cuda.Event) -> None:
        event.synchronize()

    def _stream(self, queue: str) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device) if queue == CURRENT else self._own[queue]


class PinnedPages(mmap.mmap):
    """Zeroed pages, pinned until the last tensor on them is freed.

    torch rounds pinned memory up to powers of two: for moments of 18944 x 3584 (a matrix of Qwen2.5-7B) it
    allocates twice the size. The mapping is shared with forked processes, so after a fork the host still
    writes to the pinned pages.
    """

    def __new__(cls, nbytes: int, device: torch.device) -> PinnedPages:
        return super().__new__(cls, -1, max(nbytes, 1))

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._owner, self._device, self._address = os.getpid(), device, 0
        address = torch.frombuffer(self, dtype=torch.uint8).data_ptr()
        with torch.cuda.device(device):
            error = int(torch.cuda.cudart().cudaHostRegister(address, len(self), 0))
        if error != 0:
            raise RuntimeError(
                f"{nbytes} bytes of host memory for paged states could not be pinned: "
                f"cudaHostRegister: error {error}"
            )
        self._address = address

    def __del__(self) -> None:
        if self._address == 0 or os.getpid() != self._owner or sys.is_finalizing():
            return
        # Copies may still be running. On a failed device synchronize raises, and none are.
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize(self._device)
        torch.cuda.cudart().cudaHostUnregister(self._address)

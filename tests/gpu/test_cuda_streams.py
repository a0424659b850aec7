"""Paging on a fake CUDA: the order of stream operations, and the lifetime of pinned memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch
from torch import Tensor, nn

import peft_kernels as pk
from peft_kernels.optim import pager
from peft_kernels.optim.cuda_streams import CudaStreams

STREAM_CLASS: Any = torch.cuda.Stream


class FakeCuda:
    """torch.cuda with one queue that runs everything at once. Replaces functions that need CUDA tensors."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.pinned: dict[int, int] = {}
        self.capturing = False
        self.current = "current"
        names = ["in", "out"]
        patch.setattr(torch.cuda, "Stream", lambda device: self.stream(names.pop(0)))
        patch.setattr(torch.cuda, "current_stream", lambda device: self.stream("current"))
        patch.setattr(torch.cuda, "stream", self.entered)
        patch.setattr(torch.cuda, "device", lambda device: nullcontext())
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        patch.setattr(torch.cuda, "synchronize", lambda device: self.calls.append("synchronize"))
        patch.setattr(torch.cuda, "cudart", lambda: self)
        patch.setattr(Tensor, "is_pinned", lambda t: t.untyped_storage().data_ptr() in self.pinned)
        patch.setattr(
            Tensor, "record_stream", lambda t, stream: self.calls.append(f"free after {stream.name}")
        )
        real = Tensor.copy_
        patch.setattr(Tensor, "copy_", lambda t, source, non_blocking=False: (
            non_blocking and self.calls.append(f"copy on {self.current}"), real(t, source, non_blocking))[1]
        )  # fmt: skip

    def stream(self, name: str) -> Any:
        made = create_autospec(STREAM_CLASS, instance=True)
        made.name = name
        made.record_event.side_effect = lambda: name
        made.wait_event.side_effect = lambda event: self.calls.append(f"{name} after {event}")
        return made

    @contextmanager
    def entered(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream.name
        yield
        self.current = before

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        assert address % 4096 == 0 and flags == 0 and address not in self.pinned
        if nbytes >= 10_000_000:
            return 2
        self.pinned[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        assert self.calls[-1] == "synchronize"
        del self.pinned[address]
        return 0


def test_order_of_stream_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    streams = CudaStreams(torch.device("cpu"))
    monkeypatch.setattr(pager, "streams_of", lambda device: streams)
    p = nn.Parameter(torch.zeros(150_000))
    small = nn.Parameter(torch.zeros(50_000))
    optimizer = pk.optim.PagedAdamW8bit([p, small], page_budget=300_000)
    p.grad, small.grad = torch.ones_like(p), torch.ones_like(small)
    optimizer.step()
    copied_in, copied_out = ["copy on in"] * 2, ["copy on out"] * 2
    chunk = [*copied_in, "current after in", "out after current", *copied_out]
    assert cuda.calls == ["in after current", *chunk * 3, "in after out", *chunk] + ["free after out"] * 3
    assert list(cuda.pinned.values()) == [150_000, 150_000]
    codes = optimizer.state[p]["state1"]
    assert (codes == codes[0]).all() and codes[0] > 127
    cuda.capturing = True
    with pytest.raises(RuntimeError, match="step: a step with paged states cannot be captured in a CUDA gra"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="10000000 bytes of host memory for paged states could not be pin"):
        streams.host_zeros((10_000_000,), torch.uint8)
    part = codes[5:]
    del optimizer, codes
    gc.collect()
    assert list(cuda.pinned.values()) == [150_000]
    del part
    gc.collect()
    assert not cuda.pinned


def test_nothing_stays_pinned_when_the_first_step_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    streams = CudaStreams(torch.device("cpu"))
    monkeypatch.setattr(pager, "streams_of", lambda device: streams)
    params = [nn.Parameter(torch.zeros(size, dtype=torch.bfloat16)) for size in (150_000, 10_000_000)]
    for p in params:
        p.grad = torch.ones_like(p)
    for error, options, size in (
        (RuntimeError, {}, 10_000_000),
        (ValueError, {"rounding": "stochastic"}, 9_000_000),
    ):
        params[1].data = params[1].data[:size]
        params[1].grad = torch.ones_like(params[1])
        optimizer = pk.optim.PagedAdamW8bit(params, page_budget=9216, **options)
        sentence = "could not be pinned" if error is RuntimeError else "page_budget: expected at least"
        with pytest.raises(error, match=sentence):
            optimizer.step()
        gc.collect()
        assert not cuda.pinned and not optimizer.state

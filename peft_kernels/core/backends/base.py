"""The interface of a back end, and checks that back ends share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Protocol

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Floating dtypes of the compiled and Triton kernels; the reference takes any."""


def name_of(dtype: torch.dtype) -> str:
    """ "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


class Backend(Protocol):
    """A set of kernels for all ops, in its own op namespace."""

    name: str
    namespace: str

    @property
    def device_type(self) -> str | None:
        """Device type of its tensors ("cpu", "cuda"); None for any."""

    def load(self) -> None:
        """Makes `torch.ops.<namespace>` callable. Called once, before the first op; must neither raise nor
        touch a device."""

    def probe(self) -> str | None:
        """None when usable on this machine, else why not."""

    def describe(self) -> str:
        """One line for `explain()`: version, instruction set, devices."""

    def supports(self, op: str, args: Sequence[Any]) -> str | None:
        """None when it can serve `op` with these arguments, else why not."""

    def has_kernel(self, op: str) -> bool:
        """Whether it has kernels for `op`, rather than a composition of other ops or plain torch."""


def tensors(args: Sequence[Any]) -> Iterator[torch.Tensor]:
    """All tensors among an op's arguments, also those in lists."""
    for arg in args:
        if isinstance(arg, torch.Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from tensors(arg)


def unserved_tensors(op: str, args: Sequence[Any], device_types: Collection[str]) -> str | None:
    """Why kernels for DTYPES on these device types cannot serve the arguments, or None."""
    for tensor in tensors(args):
        if tensor.device.type not in device_types:
            kinds = " or ".join(kind.upper() for kind in device_types)
            return f"{op}: a tensor is on {tensor.device}, this back end takes {kinds} tensors"
        if tensor.dtype not in DTYPES and tensor.is_floating_point():
            return f"{op}: no kernel for {tensor.dtype}"
    if op == "dequantize_nf4" and args[6] not in DTYPES:
        return f"{op}: no kernel for {args[6]}"
    return None


class Cards:
    """The CUDA devices of this machine. `judge(index)` returns why one cannot serve, or None; called once per
    device."""

    def __init__(self, judge: Callable[[int], str | None]) -> None:
        self._judge = judge
        self._refusals: dict[int, str | None] = {}

    def refusal(self, index: int) -> str | None:
        if index not in self._refusals:
            reason = self._judge(index)
            self._refusals[index] = reason and f"cuda:{index} {reason}"
        return self._refusals[index]

    def usable(self) -> list[int]:
        """The devices that can serve."""
        return [i for i in range(torch.cuda.device_count()) if self.refusal(i) is None]

    def refusal_of_all(self) -> str | None:
        """None when any device can serve, else why none can."""
        if None in self._refusals.values():  # fast path of every call
            return None
        if not torch.cuda.is_available():
            return "torch finds no CUDA device here"
        reasons = [self.refusal(i) for i in range(torch.cuda.device_count())]
        return None if None in reasons else "; ".join(filter(None, reasons))

    def refusal_of_tensors(self, op: str, args: Sequence[Any]) -> str | None:
        """Why the devices of an op's arguments cannot serve it, or None."""
        for device in {tensor.device for tensor in tensors(args) if tensor.device.type == "cuda"}:
            reason = self.refusal(device.index)
            if reason is not None:
                return f"{op}: {reason}"
        return None

    def describe(self) -> str:
        """Names of the devices that can serve, and why others cannot."""
        found = []
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            name = f"cuda:{i} {torch.cuda.get_device_name(i)}, compute capability {major}.{minor}"
            found.append(self.refusal(i) or name)
        return "; ".join(found)

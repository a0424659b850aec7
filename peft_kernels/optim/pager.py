"""Places the states of an optimizer on their parameters' devices or in host memory."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from .cuda_streams import CudaStreams
from .paging import DEFAULT_BUDGET, SMALLEST_BUDGET, Ring, Streams

logger = logging.getLogger("peft_kernels")

PAGED_FROM = 100_000
"""Parameters with at least so many elements are paged, as in bitsandbytes."""
PAGED = ("state1", "state2", "compensation")
"""Paged tensors of a state: those with an entry per element."""


def streams_of(device: torch.device) -> Streams | None:
    """The streams of a device, or None where paging has no effect."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        raise RuntimeError(f"is_paged: expected a CUDA device, got {device.type}")
    return CudaStreams(device)


class Pager:
    """Decides where each tensor of a state lives, and holds a ring per device. For DTensors, parameters are
    the local shards."""

    def __init__(self, is_paged: bool, budget: int | None) -> None:
        budget = DEFAULT_BUDGET if budget is None else budget
        if not isinstance(budget, int | Integral) or budget < SMALLEST_BUDGET:
            raise ValueError(
                f"page_budget: expected a whole number of bytes, at least {SMALLEST_BUDGET}, or None, got "
                f"{budget}"
            )
        self.is_paged, self.budget = is_paged, budget
        self._rings: dict[torch.device, Ring | None] = {}

    def ring(self, device: torch.device) -> Ring | None:
        """The ring of a device, or None if its states are not paged."""
        if not self.is_paged:
            return None
        if device not in self._rings:
            streams = streams_of(device)
            if streams is None:
                warn_once("paging has no effect on a CPU: the optimizer's states are in ordinary memory")
            self._rings[device] = None if streams is None else Ring(streams, self.budget)
        return self._rings[device]

    def check_now(self, parameters: Iterable[Tensor]) -> None:
        """Raises RuntimeError if a step with paged states of these parameters cannot run now."""
        if not self.is_paged:
            return
        for device in {p.device for p in parameters if self.is_for(p, "state1")}:
            ring = self.ring(device)
            if ring is not None and (reason := ring.streams.refuse()) is not None:
                raise RuntimeError(f"step: {reason}")

    def is_for(self, parameter: Tensor, name: str) -> bool:
        """Whether the tensor `name` of the parameter's state is paged."""
        ring = self.ring(parameter.device)
        return ring is not None and name in PAGED and parameter.numel() >= PAGED_FROM

    def zeros(self, parameter: Tensor, name: str, dtype: torch.dtype) -> Tensor:
        """Zeros of the parameter's shape, where tensor `name` of its state belongs."""
        ring = self.ring(parameter.device)
        if ring is not None and self.is_for(parameter, name):
            return ring.streams.host_zeros(parameter.shape, dtype)
        return torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)

    def home(self, parameter: Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
        """The parameter's state with each tensor moved to where it belongs, if it is not there yet."""

        def at_home(name: str, value: Any) -> Any:
            ring = self.ring(parameter.device)
            if not isinstance(value, Tensor):
                return value
            if ring is None or not self.is_for(parameter, name):
                return value.to(parameter.device)
            if ring.streams.is_host(value) and value.is_contiguous():
                return value
            return self.copied(parameter, name, value, value.dtype)

        return {name: at_home(name, value) for name, value in state.items()}

    def copied(self, parameter: Tensor, name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
        """A contiguous copy in `dtype`, where tensor `name` of the state belongs."""
        if not self.is_for(parameter, name):
            return value.to(parameter.device, dtype, copy=True).contiguous()
        there = self.zeros(parameter, name, dtype)
        return there.view(value.shape).copy_(value)

    def synchronize(self) -> None:
        """Waits for copies, before states are read or changed outside of a step."""
        for ring in self._rings.values():
            if ring is not None:
                ring.synchronize()


_warned: set[str] = set()


def warn_once(sentence: str) -> None:
    if sentence not in _warned:
        _warned.add(sentence)
        logger.warning("%s", sentence)

"""A stand-in for Triton's driver: kernels are compiled for a target, and launches recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import triton

from bench.gpu.triton_code import compiling_for, gpu_target


class Card:
    def __init__(self, target: str) -> None:
        self.target = gpu_target(target)
        self.device = 0
        self.stream = 0
        self.shared = 227 << 10
        self.capturing = False
        self.loaded: list[str] = []
        self.launched: list[tuple[Any, ...]] = []
        """Grid, stream, function and the rest of each launch."""
        self.utils = self
        self.refuse: Callable[[str], Any] = lambda name: None
        """Called with a kernel's name when it is loaded; may raise."""

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.shared}

    def load_binary(self, name: str, *_: Any) -> tuple[Any, ...]:
        self.refuse(name)
        self.loaded.append(name)
        return object(), f"{name} on {self.device}", 32, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def run(*launched: Any) -> None:
            assert launched[4] is not None, "not loaded"
            self.launched.append(launched)

        return run


@contextmanager
def stub_card(target: str) -> Iterator[Card]:
    """Replaces the machine's card in Triton by a stand-in."""
    card, cuda = Card(target), torch.cuda
    with (
        compiling_for(target),
        patch.object(cuda, "is_current_stream_capturing", lambda: card.capturing),
        patch.object(cuda, "empty_cache", lambda: None),
    ):
        triton.runtime.driver.set_active(card)
        yield card

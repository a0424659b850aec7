"""What the host spends on a Triton launch, without a GPU: `launch.launch` against Triton's `kernel[grid]`.

    python -m bench.gpu.triton_launch [--target sm90] [--rounds 20000]

Kernels are compiled for the target; a stand-in for the card takes what would be launched. So the driver's own
launch, 2 to 3 microseconds on a real machine, is in neither figure, and what Triton's C code does with the
arguments before it is not either: both are the same for the two.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import triton

from peft_kernels.triton_kernels.core import launch

from .triton_calls import BF16, Call, empty, nf4
from .triton_code import compiling_for, gpu_target, launches


class Card:
    """In place of Triton's driver: kernels are compiled for a target, and launches noted."""

    def __init__(self, target: str, keep: bool = True) -> None:
        self.target = gpu_target(target)
        self.device = 0
        self.stream = 0
        self.shared = 227 << 10
        self.capturing = False
        self.loaded: list[str] = []
        self.launched: list[tuple[Any, ...]] = []
        """Grid, stream, function, and what follows: of the launches."""
        self.keep = keep
        self.utils = self
        self.refuse: Callable[[str], None] = lambda name: None
        """Called with a kernel's name when it is loaded, to raise instead."""

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
            if self.keep:
                self.launched.append(launched)

        return run


@contextmanager
def card(target: str, keep: bool = True) -> Iterator[Card]:
    """Inside, Triton takes a stand-in for the machine's card."""
    stand_in, cuda = Card(target, keep), torch.cuda
    with (
        compiling_for(target),
        patch.object(cuda, "is_current_stream_capturing", lambda: stand_in.capturing),
        patch.object(cuda, "empty_cache", lambda: None),
    ):
        triton.runtime.driver.set_active(stand_in)
        yield stand_in


def microseconds(run: Callable[[], Any], rounds: int) -> float:
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(rounds // 5):
            run()
        best = min(best, time.perf_counter() - begin)
    return 1e6 * best / (rounds // 5)


def samples(target: str) -> list[Any]:
    """Launches of one LoRA layer at few rows and many, each kernel once."""
    seen: dict[str, Any] = {}
    for m in (1, 2048):
        x, h, a, b = empty(m, 512, dtype=BF16), empty(m, 16), empty(16, 512), empty(512, 16)
        base, rest = nf4(512, 512), (a, b, 0.5, 0.0, None, None)
        forward = Call("lora_linear", (x, *base, None, *rest))
        backward = Call("lora_linear_backward", (x, x, h, *base, *rest, True, True, True))
        for item in launches(target, [forward, backward]):
            seen.setdefault(item.kernel.__name__, item)
    return list(seen.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--target", default="sm90")
    parser.add_argument("--rounds", type=int, default=20000)
    given = parser.parse_args()
    found = samples(given.target)
    print(f"{'us per launch':<24} {'arguments':>9} {'launch':>8} {'kernel[grid]':>13}")
    with card(given.target, keep=False):
        for item in found:

            def ours(item: Any = item) -> None:
                launch.launch(item.kernel, (8,), *item.args, config=item.config, **item.constants)

            def triton_s(item: Any = item) -> None:
                item.kernel[(8,)](*item.args, **item.constants, **item.options)

            ours()
            times = [microseconds(run, given.rounds) for run in (ours, triton_s)]
            print(f"{item.kernel.__name__:<24} {len(item.args):>9} {times[0]:>8.1f} {times[1]:>13.1f}")


if __name__ == "__main__":
    main()

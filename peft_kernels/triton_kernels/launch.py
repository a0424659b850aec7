"""Launches: the one place where kernels are started, or noted instead."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import triton
from triton.language.target_info import is_cuda
from triton.runtime.errors import OutOfResources

log = logging.getLogger(__name__)

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether the kernels of this process run in numpy. Triton decides that when it sees a kernel first."""

VARYING = ("m", "rows", "first_row", "split", "splits", "stream", "threshold", "group")
"""Parameters of kernels whose values change from batch to batch, or from adapter to adapter. Kernels are not
compiled anew where they are 1 or multiples of 16, as they are for all others: features, strides and numbers
of elements, which a model has few of, and without which loads could not be wide."""

Config = dict[str, int]
"""Meta-parameters of a kernel, warps and stages. Configs are constants of modules: one that a card has too
little memory for is known again."""

_fitting: dict[tuple[int, int], Config] = {}
_recorder: Callable[..., None] | None = None


def config(warps: int, stages: int, **blocks: int) -> Config:
    return {**blocks, "num_warps": warps, "num_stages": stages}


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own, made for kernels too, costs a microsecond."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least that is n or more."""
    return 1 << (n - 1).bit_length()


def check_usable() -> None:
    """Raise when Triton cannot compile and launch on this machine."""
    if not INTERPRETED:
        _ = triton.runtime.driver.active.utils  # made with the C compiler that launches need too


def target() -> str:
    """What kernels are compiled for, "cuda" or "hip"; or "numpy" when they are interpreted."""
    return "numpy" if INTERPRETED else _target_of(triton.runtime.driver.active)


@functools.cache
def _target_of(driver: Any) -> str:
    return driver.get_current_target().backend


@triton.constexpr_function
def takes_ptx() -> bool:
    """Inside kernels: whether the target does."""
    return not INTERPRETED and is_cuda()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, config: Config, **constants: Any) -> None:
    """Run a kernel on the current device.

    Parameters
    ----------
    kernel
        A function under @triton.jit.
    grid : tuple of int
        The number of programs. 0 are none. Only the first dimension may pass 65535.
    args
        Tensors (None for one that is not there), named tuples of them, and numbers, in the kernel's order.
    config
        Of a table. Where a card has less shared memory, or fewer registers, than it takes, stages are fewer.
    constants
        The kernel's other constexpr parameters, and options of the compiler (enable_fp_fusion).
    """
    if _recorder is not None:
        _recorder(kernel, args, constants, config)
        return
    if 0 in grid:
        return
    key = id(kernel), id(config)
    if key not in _fitting:
        log.info("first launch of %s with %s, compiled for %s", kernel.__name__, config, target())
        _fitting[key] = for_target(config)
    try:
        kernel[grid](*args, **constants, **_fitting[key])
    except OutOfResources as error:
        stages = _fitting[key]["num_stages"] - 1
        if stages == 0:
            raise
        log.warning("%s with %s: %s; goes on in %d stages", kernel.__name__, config, error, stages)
        _fitting[key] = {**config, "num_stages": stages}
        launch(kernel, grid, *args, config=config, **constants)


def for_target(config: Config) -> Config:
    """On AMD's cards stages beyond two wait in registers, more than there are."""
    return {**config, "num_stages": min(config["num_stages"], 2)} if target() == "hip" else config


@contextmanager
def recording(record: Callable[..., None]) -> Iterator[None]:
    """Inside, kernels do not run: `record(kernel, args, constants, config)` gets each launch. Tensors may be
    without memory, on device "meta"."""
    global _recorder
    before, _recorder = _recorder, record
    try:
        yield
    finally:
        _recorder = before

"""Launches: what a kernel is compiled with, and which of its configs runs."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

Run = Callable[[triton.Config], None]

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether the kernels of this process run in numpy. Triton decides that when it sees a kernel first."""

ENVIRONMENT_VARIABLE = "PEFT_KERNELS_AUTOTUNE"
"""0: nothing is timed, the first config is taken."""

_fastest: dict[tuple[Any, ...], triton.Config] = {}
_recorder: Callable[..., None] | None = None


def config(warps: int, stages: int, **blocks: int) -> triton.Config:
    return triton.Config(blocks, num_warps=warps, num_stages=stages)


def check_usable() -> None:
    """Raise when Triton cannot compile and launch on this machine."""
    if not INTERPRETED:
        _ = triton.runtime.driver.active.utils  # made with the C compiler that launches need too


def target() -> str:
    """What kernels are compiled for, "cuda" or "hip"; or "numpy" when they are interpreted."""
    return "numpy" if INTERPRETED else triton.runtime.driver.active.get_current_target().backend


def launch(
    kernel: Any,
    grid: Callable[[dict[str, Any]], tuple[int, ...]],
    *args: Any,
    configs: Sequence[triton.Config],
    key: tuple[Any, ...] = (),
    **constants: Any,
) -> None:
    """Run a kernel on the current device.

    Parameters
    ----------
    kernel
        A function under @triton.jit. A parameter `PTX: tl.constexpr` gets whether the target takes PTX.
    grid : callable
        The number of programs by the meta-parameters of the config and the constants. 0 programs are none.
        Only the first dimension may pass 65535.
    args
        Tensors (None for one that is not there) and numbers, in the kernel's order.
    configs : sequence of triton.Config
        Meta-parameters, warps and stages to choose from, the best guess first. They must not differ in what
        changes the order of a sum: results are to be the same from run to run.
    key : tuple
        The class of shapes. For each, and for the dtypes of `args`, the fastest config is found once by
        timing; the kernel must not read what it writes. Under torch's deterministic algorithms, while a CUDA
        graph is captured, and with PEFT_KERNELS_AUTOTUNE=0 the first config that fits the card runs.
    constants
        The kernel's other constexpr parameters, and options of the compiler (enable_fp_fusion).
    """
    compiled_for = target()
    if "PTX" in kernel.arg_names:
        constants["PTX"] = compiled_for == "cuda"
    if compiled_for == "hip":
        configs = _in_two_stages(tuple(configs))
    if _recorder is not None:
        for config in configs:
            _recorder(kernel, args, constants, config)
        return

    def run(config: triton.Config) -> None:
        meta = {**constants, **config.all_kwargs()}
        programs = grid(meta)
        if 0 not in programs:
            kernel[programs](*args, **meta)

    if len(configs) > 1 and _may_time():
        dtypes = (arg.dtype for arg in args if isinstance(arg, Tensor))
        _run_fastest(run, configs, (kernel, torch.cuda.current_device(), *key, *dtypes))
    else:
        _run_first_that_fits(run, configs)


@functools.cache
def _in_two_stages(configs: tuple[triton.Config, ...]) -> list[triton.Config]:
    """On AMD's cards further stages wait in registers, more than there are."""
    found = []
    for config in configs:
        stages = min(config.num_stages, 2)
        found.append(triton.Config(config.kwargs, num_warps=config.num_warps, num_stages=stages))
    return list(dict.fromkeys(found))


@contextmanager
def recording(record: Callable[..., None]) -> Iterator[None]:
    """Inside, kernels do not run: `record(kernel, args, constants, config)` gets each launch, with each of
    its configs. Tensors may be without memory, on device "meta"."""
    global _recorder
    before, _recorder = _recorder, record
    try:
        yield
    finally:
        _recorder = before


def _may_time() -> bool:
    return not (
        INTERPRETED
        or torch.are_deterministic_algorithms_enabled()
        or os.environ.get(ENVIRONMENT_VARIABLE) == "0"
    )


def _run_fastest(run: Run, configs: Sequence[triton.Config], key: tuple[Any, ...]) -> None:
    if key not in _fastest:
        if torch.cuda.is_current_stream_capturing():
            return _run_first_that_fits(run, configs)
        times = [_milliseconds(run, config) for config in configs]
        _fastest[key] = configs[times.index(min(times))]
    return run(_fastest[key])


def _milliseconds(run: Run, config: triton.Config) -> float:
    try:
        return triton.testing.do_bench(lambda: run(config), warmup=5, rep=20, return_mode="median")
    except OutOfResources:
        return float("inf")


def _run_first_that_fits(run: Run, configs: Sequence[triton.Config]) -> None:
    for config in configs[:-1]:
        try:
            return run(config)
        except OutOfResources:  # of shared memory, or registers: a smaller card than the config is meant for
            continue
    return run(configs[-1])

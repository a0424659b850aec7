"""The one place that launches kernels, or records the launches."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from triton.language.target_info import is_cuda, is_hip
from triton.runtime.errors import OutOfResources, PTXASError

log = logging.getLogger(__name__)

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether kernels run in numpy. Triton decides that when it first sees a kernel."""

VARYING = ("m", "rows", "first_row", "split", "splits", "stream", "threshold", "group")
"""Kernel parameters that change from batch to batch or from adapter to adapter. Kernels are not specialised
on these being 1 or multiples of 16, as they are on all others (features, strides, numbers of elements): a
model has few of those, and wide loads need them. Inside tuples: `varying`."""

Config = dict[str, int]
"""Meta-parameters of a kernel, warps and stages. Configs are module constants, so that one that does not fit
a card is recognised by its id."""


class Fitting(NamedTuple):
    """The part of a config that fits a card. Holding config and kernel keeps their ids from being reused."""

    fitting: Config
    config: Config
    kernel: Any


_fitting: dict[tuple[Any, int, int], Fitting] = {}
"""By device, kernel and config."""
_compiled: dict[Any, Any] = {}
"""Compiled kernels that are loaded, by everything that they depend on."""
_recorder: Callable[..., None] | None = None


def config(warps: int, stages: int, **blocks: int) -> Config:
    return {**blocks, "num_warps": warps, "num_stages": stages}


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own costs a microsecond."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is n or more."""
    return 1 << (n - 1).bit_length()


def varying(n: int) -> int:
    """Encodes a number inside a tuple so that Triton does not specialise on it: it is never 1 or a multiple
    of 16. Kernels shift it right by 4."""
    return (n << 4) + 3


def check_usable() -> None:
    """Raises when Triton cannot compile and launch on this machine."""
    if not INTERPRETED:
        _ = triton.runtime.driver.active.utils  # compiled by the C compiler that launches need too


def target() -> str:
    """The target of compilation, "cuda" or "hip", or "numpy" when interpreted."""
    return "numpy" if INTERPRETED else _target_of(triton.runtime.driver.active)


@functools.cache
def _target_of(driver: Any) -> str:
    return driver.get_current_target().backend


@triton.constexpr_function
def targets_ptx() -> bool:
    """Inside kernels: whether they are compiled to PTX."""
    return not INTERPRETED and is_cuda()


@triton.constexpr_function
def targets_amd() -> bool:
    """Inside kernels: whether they are compiled for an AMD card."""
    return not INTERPRETED and is_hip()


def bypasses_cache() -> bool:
    """Whether launches are recorded or captured in a CUDA graph: results must not be cached then."""
    return _recorder is not None or (not INTERPRETED and torch.cuda.is_current_stream_capturing())


def device_and_stream() -> tuple[Any, Any]:
    """The current device and stream."""
    if INTERPRETED:
        return None, None
    driver = triton.runtime.driver.active
    device = driver.get_current_device()
    return device, driver.get_current_stream(device)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, config: Config, **constants: Any) -> None:
    """Run a kernel on the current device.

    Parameters
    ----------
    kernel
        A function under @triton.jit.
    grid : tuple of int
        The number of programs; 0 launches nothing. Only the first dimension may exceed 65535.
    args
        Tensors or None, named tuples of them, and numbers, in the kernel's order.
    config
        Where a card has too little shared memory or too few registers for it, stages are reduced.
    constants
        The kernel's other constexpr parameters, and options of the compiler (enable_fp_fusion).

    Raises
    ------
    RuntimeError
        The kernel does not fit the card even with one stage, the card's memory is used up, or it would have
        to be compiled while a CUDA graph is captured.
    """
    if _recorder is not None:
        _recorder(kernel, args, constants, config)
        return
    if 0 in grid:
        return
    if INTERPRETED:
        kernel[grid](*args, **constants, **config)
        return
    driver = triton.runtime.driver.active
    device = driver.get_current_device()
    place = device, id(kernel), id(config)
    known = _fitting.get(place)
    if known is None:
        known = _fitting[place] = Fitting(for_target(config), config, kernel)
    # Triton's own cache key would be converted to strings in each launch.
    bound, specialization, options = kernel.device_caches[device][-1](*args, **constants, **known.fitting)
    key = *place, *specialization, *options.values()
    made = _compiled.get(key)
    runtime = triton.knobs.runtime
    if made is None or kernel.pre_run_hooks or runtime.debug:
        if torch.cuda.is_current_stream_capturing() and made is None:
            raise RuntimeError(
                f"{kernel.__name__}: the first call with arguments of these types and alignments compiles "
                "it, which cannot be done while a CUDA graph is captured: run it once before the capture"
            )
        begin = time.perf_counter()
        found = _by_triton(kernel, grid, device, args, constants, known)
        if made is None and found is not None:
            seconds, (name, fitting) = time.perf_counter() - begin, (kernel.__name__, known.fitting)
            log.info(
                "%s with %s: compiled for %s, or loaded from disk, in %.2f s",
                name,
                fitting,
                target(),
                seconds,
            )
            _compiled[key] = found
        return
    stream, values = driver.get_current_stream(device), bound.values()
    enter, leave = _hook(runtime.launch_enter_hook), _hook(runtime.launch_exit_hook)
    metadata = None if enter is None else made.launch_metadata(grid, stream, *values)
    sizes = *grid, *(1, 1)[: 3 - len(grid)]
    try:
        made.run(*sizes, stream, made.function, made.packed_metadata, metadata, enter, leave, *values)
    except RuntimeError as error:
        raise _explained(kernel, error) from error


def _hook(chain: Any) -> Any:
    """None for an empty chain of hooks, which would be called otherwise."""
    return chain if getattr(chain, "calls", chain) else None


def _by_triton(
    kernel: Any,
    grid: tuple[int, ...],
    device: Any,
    args: tuple[Any, ...],
    constants: dict[str, Any],
    known: Fitting,
) -> Any:
    """Compiles a kernel if need be, loads and runs it. Returns None if it did not fit the card and ran with
    fewer stages instead."""
    name, stages = kernel.__name__, known.fitting["num_stages"]
    for freed in (False, True):
        try:
            return kernel[grid](*args, **constants, **known.fitting)
        except (OutOfResources, PTXASError) as error:
            if stages == 1:
                raise RuntimeError(f"{name} with {known.config} cannot run on this card: {error}") from error
            log.warning("%s with %s: %s; falls back to %d stages", name, known.config, error, stages - 1)
            fewer = {**known.config, "num_stages": stages - 1}
            _fitting[device, id(kernel), id(known.config)] = known._replace(fitting=fewer)
            launch(kernel, grid, *args, config=known.config, **constants)
            return None
        except RuntimeError as error:
            # Triton would treat the kernel as loaded from now on.
            kernel.device_caches.pop(device, None)
            explained = _explained(kernel, error)
            if freed or explained is error:
                raise explained from error
            torch.cuda.empty_cache()  # code needs memory outside torch's allocator
    return None


def _explained(kernel: Any, error: RuntimeError) -> RuntimeError:
    if "out of memory" not in str(error):
        return error
    return torch.OutOfMemoryError(
        f"{kernel.__name__}: the card's memory is too small for its code or its threads' stacks: {error}"
    )


def for_target(config: Config) -> Config:
    """At most two stages on AMD cards, which keep further stages in registers and run out of them."""
    return {**config, "num_stages": min(config["num_stages"], 2)} if target() == "hip" else config


@contextmanager
def recording(record: Callable[..., None]) -> Iterator[None]:
    """Inside, kernels do not run: `record(kernel, args, constants, config)` is called for each launch.
    Tensors may be on device "meta"."""
    global _recorder
    before, _recorder = _recorder, record
    try:
        yield
    finally:
        _recorder = before

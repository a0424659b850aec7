"""Launches: the one place where kernels are started, or noted instead."""

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
"""Whether the kernels of this process run in numpy. Triton decides that when it sees a kernel first."""

VARYING = ("m", "rows", "first_row", "split", "splits", "stream", "threshold", "group")
"""Parameters of kernels whose values change from batch to batch, or from adapter to adapter. Kernels are not
compiled anew where they are 1 or multiples of 16, as they are for all others: features, strides and numbers
of elements, which a model has few of, and without which loads could not be wide. Inside tuples: `varying`."""

Config = dict[str, int]
"""Meta-parameters of a kernel, warps and stages. Configs are constants of modules: one that a card has too
little memory for is known again."""


class Fitting(NamedTuple):
    """What of a config fits a card. Beside it what it is noted for: nothing else gets the ids of those."""

    fitting: Config
    config: Config
    kernel: Any


_fitting: dict[tuple[Any, int, int], Fitting] = {}
"""By device, kernel and config."""
_compiled: dict[Any, Any] = {}
"""What Triton made, and has put on the card, by all that it depends on."""
_recorder: Callable[..., None] | None = None


def config(warps: int, stages: int, **blocks: int) -> Config:
    return {**blocks, "num_warps": warps, "num_stages": stages}


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own, made for kernels too, costs a microsecond."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least that is n or more."""
    return 1 << (n - 1).bit_length()


def varying(n: int) -> int:
    """A number inside a tuple, of which Triton would know that it is 1 or a multiple of 16: no `varying(n)`
    is. Kernels shift it right by 4."""
    return (n << 4) + 3


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


@triton.constexpr_function
def on_amd() -> bool:
    """Inside kernels: whether they are compiled for one of AMD's cards."""
    return not INTERPRETED and is_hip()


def passing() -> bool:
    """Whether launches are noted, or captured in a CUDA graph: what they write is not there to be kept."""
    return _recorder is not None or (not INTERPRETED and torch.cuda.is_current_stream_capturing())


def queue() -> tuple[Any, Any]:
    """The current device and stream: what is launched there is in order."""
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
        The number of programs. 0 are none. Only the first dimension may pass 65535.
    args
        Tensors (None for one that is not there), named tuples of them, and numbers, in the kernel's order.
    config
        Of a table. Where a card has less shared memory, or fewer registers, than it takes, stages are fewer.
    constants
        The kernel's other constexpr parameters, and options of the compiler (enable_fp_fusion).

    Raises
    ------
    RuntimeError
        Where the card cannot run it: it has too little of something, in one stage too, or its memory is used
        up. And where it would have to be compiled while a CUDA graph is captured.
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
    # What Triton tells compiled code apart by. It would make strings of it in each launch.
    bound, specialization, options = kernel.device_caches[device][-1](*args, **constants, **known.fitting)
    key = *place, *specialization, *options.values()
    made = _compiled.get(key)
    runtime = triton.knobs.runtime
    if made is None or kernel.pre_run_hooks or runtime.debug:
        if torch.cuda.is_current_stream_capturing() and made is None:
            raise RuntimeError(
                f"{kernel.__name__}: its first call with arguments of these types and alignments compiles "
                "it, which cannot be done while a CUDA graph is captured. Run the same once before."
            )
        begin = time.perf_counter()
        found = _by_triton(kernel, grid, device, args, constants, known)
        if made is None and found is not None:
            seconds, (name, fitting) = time.perf_counter() - begin, (kernel.__name__, known.fitting)
            log.info(
                "%s with %s: compiled for %s, or found on disk, in %.2f s", name, fitting, target(), seconds
            )
            _compiled[key] = found
        return
    stream, values = driver.get_current_stream(device), bound.values()
    enter, leave = _hook(runtime.launch_enter_hook), _hook(runtime.launch_exit_hook)
    told = None if enter is None else made.launch_metadata(grid, stream, *values)
    sizes = *grid, *(1, 1)[: 3 - len(grid)]
    try:
        made.run(*sizes, stream, made.function, made.packed_metadata, told, enter, leave, *values)
    except RuntimeError as error:
        raise _explained(kernel, error) from error


def _hook(chain: Any) -> Any:
    """None for a chain of no hooks, which would be called all the same."""
    return chain if getattr(chain, "calls", chain) else None


def _by_triton(
    kernel: Any,
    grid: tuple[int, ...],
    device: Any,
    args: tuple[Any, ...],
    constants: dict[str, Any],
    known: Fitting,
) -> Any:
    """Compile a kernel, if that has not been done, load and run it. None where that was done otherwise: it
    did not fit the card, and has run in fewer stages."""
    name, stages = kernel.__name__, known.fitting["num_stages"]
    for freed in (False, True):
        try:
            return kernel[grid](*args, **constants, **known.fitting)
        except (OutOfResources, PTXASError) as error:
            if stages == 1:
                raise RuntimeError(f"{name} with {known.config} cannot run on this card: {error}") from error
            log.warning("%s with %s: %s; goes on in %d stages", name, known.config, error, stages - 1)
            fewer = {**known.config, "num_stages": stages - 1}
            _fitting[device, id(kernel), id(known.config)] = known._replace(fitting=fewer)
            launch(kernel, grid, *args, config=known.config, **constants)
            return None
        except RuntimeError as error:
            # What Triton could not load, it would take for loaded from now on.
            kernel.device_caches.pop(device, None)
            explained = _explained(kernel, error)
            if freed or explained is error:
                raise explained from error
            torch.cuda.empty_cache()  # code is not loaded into torch's memory
    return None


def _explained(kernel: Any, error: RuntimeError) -> RuntimeError:
    if "out of memory" not in str(error):
        return error
    return torch.OutOfMemoryError(
        f"{kernel.__name__}: the card's memory does not hold its code, or its threads' own: {error}"
    )


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

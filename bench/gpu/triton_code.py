"""Registers, spills and tensor-core use of the compiled Triton kernels, for GPUs that need not be present.

Each launch of `triton_calls.py` is compiled as it would be on the card.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget

from peft_kernels.core.op import OPS
from peft_kernels.triton_kernels import table
from peft_kernels.triton_kernels.core import launch

from . import limits, sass
from .roofline import KIB
from .triton_calls import BF16, FP16, FP32, Call, calls

CACHE = sass.ROOT / "build" / "triton"
JOBS = 2
LOCAL_DATA_SHARE = 64 * KIB  # of a workgroup on AMD's cards
TENSOR_MEMORY = 512  # columns
MATRIX = {"cuda": r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\.", "hip": r"\bv_(?:mfma|wmma)_"}
"""In PTX, where they map one to one to machine instructions, and in AMD's assembly."""
ALL, THOROUGH = (BF16, FP16, FP32), ("sm80",)
"""Dtypes of activations, and the targets for which all are compiled: more would take too long."""
KINDS = ("sm86", "sm89", "sm120"), ("gfx942", "gfx950"), ("gfx1100", "gfx1200")
"""Targets with the same matrix instructions and as much shared memory."""
SPILLING = ("gfx1100",)
"""Where spills are reported but no fault: RDNA 3 has 256 registers, and large tiles need more."""


def gpu_target(name: str) -> GPUTarget:
    """Of "sm90" or "gfx942"."""
    if name.startswith("sm"):
        return GPUTarget("cuda", int(name.removeprefix("sm")), 32)
    return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)


@dataclass(frozen=True)
class Variant:
    """A kernel specialised for argument dtypes."""

    kernel: str
    config: str
    """Block sizes, warps and stages."""
    types: str
    """Of the tensors, and the constants."""


@dataclass(frozen=True)
class Code:
    variant: Variant
    target: str
    registers: int = 0
    shared: int = 0
    """Bytes of a block."""
    warps: int = 0
    spills: int = 0
    """Bytes of a thread in local memory."""
    matrix: int = 0
    """Instructions for tensor cores."""
    faults: tuple[str, ...] = ()


class _Driver:
    """Replaces Triton's driver, which would look for a GPU."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> _Driver:
        return self  # a new device, so nothing comes from the in-memory cache

    def get_current_stream(self, device: _Driver) -> int:
        return 0


@contextmanager
def compiling_for(target: str) -> Iterator[None]:
    """Inside, Triton compiles for the target; nothing can be launched."""
    driver: Any = triton.runtime.driver
    before = driver._active  # reset_active would look for a GPU
    driver.set_active(_Driver(gpu_target(target)))
    try:
        with triton.knobs.cache.scope(), triton.knobs.runtime.scope():
            triton.knobs.cache.dir = str(CACHE)
            yield
    finally:
        driver.set_active(before)


def unsupported(target: str) -> str | None:
    """Why the installed Triton cannot compile for a target, or None."""
    with compiling_for(target):
        try:
            _nothing.warmup(grid=(1,))
        except Exception as error:
            return f"Triton {triton.__version__} cannot compile for {target}: {error}"
    return None


@triton.jit
def _nothing():
    pass


class Launched(NamedTuple):
    """Arguments of one `launch` call."""

    kernel: Any
    args: tuple[Any, ...]
    constants: dict[str, Any]
    config: launch.Config
    """In the tables."""
    options: launch.Config
    """Adapted to the target."""


def launches(target: str, calls: Iterable[Call]) -> list[Launched]:
    found: list[Launched] = []

    def note(*launched: Any) -> None:
        found.append(Launched(*launched, launch.for_target(launched[-1])))

    with compiling_for(target), launch.recording(note):
        for call in calls:
            getattr(table, call.op)(OPS[call.op].named(call.args))
    return found


def standard(target: str) -> list[Launched]:
    """Launches that cover every kernel and config."""
    on_cuda = gpu_target(target).backend == "cuda"
    return launches(target, calls(ALL if target in THOROUGH else ALL[:1], adapters_on_every_line=on_cuda))


def by_code(target: str, launched: Iterable[Launched]) -> dict[tuple[str, str], Launched]:
    """The launches with different code, by kernel and Triton's cache key."""
    found: dict[tuple[str, str], Launched] = {}
    with compiling_for(target):
        for item in launched:

            def note(*, compile: dict[str, Any], item: Launched = item, **_: Any) -> bool:
                found.setdefault((item.kernel.__name__, compile["key"]), item)
                return True  # skips the compilation

            triton.knobs.runtime.jit_cache_hook = note
            warm_up(item)
    return found


@lru_cache
def different(target: str) -> list[Launched]:
    return list(by_code(target, standard(target)).values())


def warm_up(item: Launched) -> Any:
    """Compiles a launch, inside `compiling_for`."""
    return item.kernel.warmup(*item.args, grid=(1,), **item.constants, **item.options)


def describe(config: launch.Config) -> str:
    blocks = " ".join(f"{name}={value}" for name, value in config.items() if not name.startswith("num_"))
    rest = f"{config['num_warps']} warps, {config['num_stages']} stages"
    return f"{blocks}, {rest}" if blocks else rest


def compile_all(targets: Sequence[str]) -> list[Code]:
    """Compiles every kernel for the targets, in several processes. Targets of one kind share the variants of
    a kernel among them."""
    jobs = [(target, i) for target in targets for i in _turns(target, targets)]
    with ProcessPoolExecutor(JOBS, get_context("spawn")) as pool:
        return list(pool.map(_compiled_at, *zip(*jobs, strict=True), chunksize=4))


def kind_of(target: str) -> tuple[str, ...]:
    return next((kind for kind in KINDS if target in kind), (target,))


def _turns(target: str, targets: Sequence[str]) -> list[int]:
    """Indices into `different(target)` that are compiled for this target."""
    present = [one for one in kind_of(target) if one in targets]
    variants: dict[str, list[int]] = {}
    for i, item in enumerate(different(target)):
        variants.setdefault(item.kernel.__name__, []).append(i)
    own = present.index(target)
    return [i for found in variants.values() for i in found[own :: len(present)] or found[:1]]


def _compiled_at(target: str, index: int) -> Code:
    return compiled(target, different(target)[index])


def compiled(target: str, item: Launched) -> Code:
    with compiling_for(target):
        name, config = item.kernel.__name__, describe(item.options)
        try:
            made = warm_up(item)
        except Exception as error:
            return Code(Variant(name, config, ""), target, faults=(f"does not compile: {error}",))
    read = _read_cuda if gpu_target(target).backend == "cuda" else _read_hip
    return read(Variant(name, config, _types(item, made.src)), target, made)


def _types(item: Launched, source: Any) -> str:
    names = list(source.signature)
    pointers = [kind for kind in _flat(source.signature.values()) if kind.startswith("*")]
    constants = [
        f"{'.'.join((names[at], *map(str, within)))}={value}"
        for (at, *within), value in source.constants.items()
        if names[at] not in item.config
    ]
    return " ".join((*pointers, *constants))


def _flat(kinds: Iterable[Any]) -> Iterator[str]:
    for kind in kinds:
        if isinstance(kind, str):
            yield kind
        else:
            yield from _flat(kind)


def _read_cuda(variant: Variant, target: str, made: Any) -> Code:
    cubin = Path(made.metadata_group[f"{made.name}.cubin"])
    usage = sass.run([triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]).stdout
    registers, spills = (int(re.findall(rf"\b{name}:(\d+)", usage)[-1]) for name in ("REG", "STACK"))
    matrix = len(re.findall(MATRIX["cuda"], made.asm["ptx"]))
    threads, shared = 32 * made.metadata.num_warps, made.metadata.shared
    kernel = sass.Kernel(variant.kernel, cubin, gpu_target(target).arch, threads, registers, shared)
    warps, faults = limits.resident_warps(kernel), _product_faults(variant, made, matrix)
    if spills:
        faults.append(f"{spills} bytes of local memory")
    if not warps:
        faults.append(f"does not fit: {registers} registers, {shared:,} bytes of shared memory")
    if made.metadata.tmem_size > TENSOR_MEMORY:
        faults.append(f"does not fit: {made.metadata.tmem_size} columns of tensor memory")
    return Code(variant, target, registers, shared, warps, spills, matrix, tuple(faults))


def _read_hip(variant: Variant, target: str, made: Any) -> Code:
    listing, shared = made.asm["amdgcn"], made.metadata.shared
    registers, spills = (
        int(re.findall(rf"\.{name}: +(\d+)", listing)[-1])
        for name in ("vgpr_count", "private_segment_fixed_size")
    )
    matrix = len(re.findall(MATRIX["hip"], listing))
    faults = _product_faults(variant, made, matrix)
    if spills and target not in SPILLING:
        faults.append(f"{spills} bytes of local memory")
    if shared > LOCAL_DATA_SHARE:
        faults.append(f"does not fit: {shared:,} bytes of shared memory")
    return Code(variant, target, registers, shared, 0, spills, matrix, tuple(faults))


def _product_faults(variant: Variant, made: Any, matrix: int) -> list[str]:
    """GEMMs of 16-bit operands, or with 16-bit activations, that do not use tensor cores."""
    gemms = re.findall(r"tt\.dot .*: tensor<\w+x(\w+)> \*", made.asm["ttir"])
    narrow = [kind for kind in gemms if kind in ("bf16", "f16")] or re.search("tf32|bf16x6", made.asm["ttir"])
    if narrow and not matrix:
        return ["no instructions for tensor cores"]
    if gemms and not narrow and re.search(r"\*(bf16|fp16)", variant.types):
        return ["multiplies in fp32"]
    return []

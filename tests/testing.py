"""Sample inputs, back ends under test and the numbers policy (`rounding`), for tests and benchmarks."""

from __future__ import annotations

import platform
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import combinations
from typing import Any

import torch
from rounding import assert_close as assert_close
from rounding import assert_close_together as assert_close_together
from rounding import relative_error as relative_error
from torch import Tensor

import ptx_backend as ptx
from peft_kernels import NF4Weight
from peft_kernels.core import dispatch, registry
from peft_kernels.core.backends import BACKENDS, cpu
from peft_kernels.triton_kernels import backend as triton

SEED = 0
"""Added to the seeds of all inputs: by `pytest --seed`, and where a test runs again for other inputs."""

IS_ARM = platform.machine() in ("aarch64", "arm64")
ISA_LEVELS = ("scalar", "neon", "neon_bf16") if IS_ARM else ("scalar", "avx2", "avx512", "avx512_bf16", "amx")
EMULATED = {"amx": "amx_emulated"}
"""Emulations of instruction sets that the machine lacks, in a build with PEFT_KERNELS_EMULATE=1."""


def backend_ids() -> list[str]:
    """Ids of all back ends for CPU tensors: reference, cpu-scalar, cpu-avx2, ..., and ptx where it is built.
    Only triton when Triton is interpreted."""
    register_ptx()
    if triton.BACKEND.interpreted:
        return [triton.BACKEND.name]
    built = ["ptx"] if ptx.BACKEND.probe() is None else []
    return ["reference", *(f"cpu-{_level(level)}" for level in ISA_LEVELS), *built]


def register_ptx() -> None:
    """Adds back end `ptx` to BACKENDS, after the reference, so that it serves only when forced."""
    if ptx.BACKEND.name not in BACKENDS:
        ptx.BACKEND.load()
        BACKENDS[ptx.BACKEND.name] = ptx.BACKEND


def _level(level: str) -> str:
    emulated = EMULATED.get(level)
    if emulated is None or BACKENDS["cpu"].probe() is not None:
        return level
    extension = cpu.BACKEND.extension
    stands_in = emulated in extension.emulated_levels() and level not in extension.isa_levels()
    return emulated if stands_in else level


def unavailable(backend_id: str) -> str | None:
    """Why a back end, or its instruction set, cannot run here; None if it can."""
    name, _, level = backend_id.partition("-")
    reason = BACKENDS[name].probe()
    if reason is None and level:
        extension = cpu.BACKEND.extension
        if level not in (*extension.isa_levels(), *extension.emulated_levels()):
            reason = f"this machine has no {level}"
    return reason


def sanitizer() -> str:
    """The sanitizer that the CPU back end was built with: "address", "thread", or ""."""
    library = cpu.BACKEND.extension if unavailable("cpu") is None else None
    return library.sanitizer() if hasattr(library, "sanitizer") else ""


@contextmanager
def running_on(backend_id: str) -> Iterator[None]:
    """Forces a back end and, for cpu, the instruction set. On ptx, accesses beyond tensors fault."""
    name, _, level = backend_id.partition("-")
    with dispatch.use_backend(name), ptx.BACKEND.guarding() if name == "ptx" else nullcontext():
        if level:
            with cpu.BACKEND.use_isa(level):
                yield
        else:
            yield


@contextmanager
def nan_outputs() -> Iterator[None]:
    """Inside, memory that torch allocates (also at::empty of C++ ops) is filled with NaN, or 255 for
    integers."""
    switches: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), switches.fill_uninitialized_memory
    # Not torch.use_deterministic_algorithms: it imports Inductor, for seconds.
    torch._C._set_deterministic_algorithms(True)
    switches.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(before[0])
        switches.fill_uninitialized_memory = before[1]


def pairwise(**axes: Sequence[Any]) -> list[dict[str, Any]]:
    """A small set of cases in which every pair of values of two axes occurs."""
    names = list(axes)
    missing = {
        frozenset({(a, u), (b, v)}) for a, b in combinations(names, 2) for u in axes[a] for v in axes[b]
    }
    cases: list[dict[str, Any]] = []
    while missing:
        chosen = dict(
            min(missing, key=lambda pair: sorted((names.index(n), axes[n].index(v)) for n, v in pair))
        )
        for name in names:
            if name not in chosen:
                gain = [
                    sum(frozenset({(name, value), pick}) in missing for pick in chosen.items())
                    for value in axes[name]
                ]
                # Ties rotate through the values, so that those of a short axis occur equally often.
                first = len(cases) % len(gain)
                best = max(range(len(gain)), key=lambda i: (gain[i], -((i - first) % len(gain))))
                chosen[name] = axes[name][best]
        missing -= {frozenset(pair) for pair in combinations(chosen.items(), 2)}
        cases.append({name: chosen[name] for name in names})
    return cases


LAYOUTS = ("contiguous", "3-d", "column-step", "slice", "transposed", "expanded")


def activations(rows: int, features: int, layout: str, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """(rows, features), or (1, rows, features) for "3-d", laid out in memory in one of LAYOUTS."""
    if layout == "contiguous":
        return tensor(rows, features, dtype=dtype, seed=seed)
    if layout == "3-d":
        return tensor(1, rows, features, dtype=dtype, seed=seed)
    if layout == "column-step":
        return tensor(rows, 2 * features, dtype=dtype, seed=seed)[:, ::2]
    if layout == "slice":
        return tensor(rows + 1, features + 5, dtype=dtype, seed=seed)[1:, 3 : 3 + features]
    if layout == "transposed":
        return tensor(features, rows, dtype=dtype, seed=seed).t()
    assert layout == "expanded", layout
    return tensor(1, features, dtype=dtype, seed=seed).expand(rows, features)


def tensor(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normally distributed values that depend only on shape and seed, and on SEED."""
    of_shape = sum((i + 1) * n for i, n in enumerate(shape))
    generator = torch.Generator().manual_seed(SEED * 1_000_003 + seed * 7919 + of_shape)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def nf4_weight(
    out_features: int,
    in_features: int,
    blocksize: int | None = 64,
    double_quant: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
    format: str = "nf4",
) -> NF4Weight:
    """A quantised weight, scaled as at the start of training; in other formats than NF4 unevenly."""
    dense = tensor(out_features, in_features, dtype=dtype, seed=seed, scale=max(in_features, 1) ** -0.5)
    if format != "nf4":
        dense = uneven(dense)
    with dispatch.use_backend("reference"):
        return NF4Weight.quantize(dense, blocksize, double_quant, format=format)


def uneven(weight: Tensor) -> Tensor:
    """Runs of 16 of the flat values times different powers of two: scales that are powers of two would mostly
    be equal, and a wrong one would not show."""
    runs = torch.arange(weight.numel()) // 16
    return weight * torch.exp2(runs % 5 - 2.0).view(weight.shape).to(weight.dtype)


def widen(value: Any) -> Any:
    """Casts floating activations to fp64, for the truth. Scales and packed bytes define the weight and
    stay."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    return value


def reference_op(name: str) -> Any:
    """The plain-torch reference of an op."""
    return registry.OPS[name].plain


class _Saved:
    """Held by the graph instead of a saved tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # a node that saves its own output would hold itself


def saved_bytes(run: Callable[[], Any], exclude: Iterable[Tensor]) -> int:
    """Bytes that a forward leaves saved for its backward.

    Counts the distinct storages, each in full, that the graph of `run`'s result holds when it returns. Parts
    of a graph that `run` has released do not count.

    Parameters
    ----------
    run : callable
        The forward. What it returns keeps the graph alive.
    exclude : iterable of Tensor
        Parameters, buffers and other existing tensors, whose storages do not count; of a quantised weight all
        its parts.
    """
    holders: list[weakref.ref[_Saved]] = []

    def pack(tensor: Tensor) -> _Saved:
        holder = _Saved(tensor)
        holders.append(weakref.ref(holder))
        return holder

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        result = run()
    alive = [holder.tensor for reference in holders if (holder := reference()) is not None]
    there = {storage.data_ptr() for tensor in exclude for storage in _storages(tensor)}
    found = {storage.data_ptr(): storage.nbytes() for tensor in alive for storage in _storages(tensor)}
    del result
    return sum(nbytes for address, nbytes in found.items() if address not in there)


def _storages(tensor: Tensor) -> list[torch.UntypedStorage]:
    """The storages of a tensor; several for a quantised weight, ours or bitsandbytes'."""
    if isinstance(tensor, NF4Weight):
        return [part.untyped_storage() for part in tensor._state.tensors().values()]
    parts = [tensor]
    state: Any = getattr(tensor, "quant_state", None)
    while state is not None:
        parts += [part for part in (state.absmax, state.code, state.offset) if isinstance(part, Tensor)]
        state = state.state2
    return [part.untyped_storage() for part in parts]

"""Back end `ptx`, for tests: the CUDA kernels as compiled by nvcc, run on the CPU by tests/gpu/ptx.

In the compiled library `peft_kernels._C_ptx`, which a build with PEFT_KERNELS_PTX=1 makes where there is
an nvcc. Nobody but `testing.register_emulators` puts it among the back ends, and nothing chooses it.

PEFT_KERNELS_PTX_ARCH      whose PTX runs where a test does not say: 80 (unset), 90, 100 or 120; 90a: as 90,
                           with LinearWgmma and ExpertsWgmma for any number of rows
PEFT_KERNELS_PTX_TRUNCATE  1: matrix instructions cut their sums off as tensor cores do; unset: rounded
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from peft_kernels.core.backends import crossovers
from peft_kernels.core.backends.compiled import CompiledBackend
from peft_kernels.core.backends.crossovers import Card, Rows
from peft_kernels.core.backends.cuda import CudaLibrary
from peft_kernels.core.backends.self_test import gemms

FEW = 4
"""Multiprocessors of the made-up card: a handful of tiles is more than it has, and less than a card."""
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Shared memory that a block can have at most, by compute capability."""
MMA_SYNC = {"linear_small.cuh", "linear_tiles.cuh", "linear_dx.cuh"}
"""Where the kernels for mma.sync read shared memory."""


class PtxLibrary(CudaLibrary):
    """With the functions of the machine, which tests/gpu/ptx/bind.cpp binds."""

    def __init__(self, file: str, namespace: str, name: str) -> None:
        super().__init__(file, namespace)
        self._machine = importlib.import_module(name)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._machine, name, None)
        return super().__getattr__(name) if found is None else found


class PtxBackend(CompiledBackend):
    name = "ptx"
    namespace = "peft_kernels_ptx"
    device_type = "cpu"
    library = "peft_kernels._C_ptx"
    not_built = "not built (needs nvcc, and PEFT_KERNELS_PTX=1, at installation)"
    is_wgmma_forced = False

    def _open(self) -> PtxLibrary:
        library = PtxLibrary(str(self.file), self.namespace, self.library)
        crossovers.set_estimates(library)
        return library

    def load(self) -> None:
        super().load()
        if self.probe() is None:
            self.reset()

    def reset(self) -> None:
        """Sets card and arithmetic from the environment."""
        wanted = os.environ.get("PEFT_KERNELS_PTX_ARCH") or "80"
        if wanted not in (*map(str, SHARED), "90a"):
            raise RuntimeError(f"PEFT_KERNELS_PTX_ARCH: expected 90a or one of {(*SHARED,)}, got {wanted}")
        architecture = int(wanted.removesuffix("a"))
        self.extension.set_card(architecture, FEW, SHARED[architecture])
        self.is_wgmma_forced = wanted == "90a"
        if self.is_wgmma_forced:
            self.extension.set_limits(90, 0, [gemms.WGMMA], [gemms.WGMMA])
        self.extension.set_truncate_sums(os.environ.get("PEFT_KERNELS_PTX_TRUNCATE") == "1")

    @contextmanager
    def guarding(self) -> Iterator[None]:
        """Inside, an access beyond the end of a tensor's memory is a fault, in kernels and elsewhere."""
        self.extension.set_guarded(True)
        try:
            yield
        finally:
            self.extension.set_guarded(False)

    @contextmanager
    def with_kernels(self, row: Rows) -> Iterator[None]:
        """As of back end cuda, on cards of compute capability 9.0."""
        try:
            with crossovers.forced(self.extension, Card("all", "9.0", 0), row):
                yield
        finally:
            crossovers.set_estimates(self.extension)
            self.reset()

    @contextmanager
    def asserting_wgmma(self) -> Iterator[None]:
        """Asserts that no GEMM with an NF4 weight runs by mma.sync inside, where LinearWgmma is forced."""
        if self.is_wgmma_forced:
            self.extension.reset_bank_counts()
        yield
        if self.is_wgmma_forced:
            ran = {site.split(":")[0].rpartition("/")[2] for site in self.extension.bank_counts()}
            assert not ran & MMA_SYNC, ran

    def check_order(self, seed: int, run: Callable[[], Sequence[Tensor]]) -> None:
        """Asserts bit-equal results with the thread order of `seed`, and after an earlier call."""
        self.extension.set_seed(100)
        want = run()
        self.extension.set_seed(seed)
        for got, expected in zip([*run(), *run()], [*want, *want], strict=True):
            assert torch.equal(got, expected)

    def describe(self) -> str:
        return "the CUDA kernels as PTX, run on the CPU: for tests"


BACKEND = PtxBackend()

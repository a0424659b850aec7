"""Back end `cuda`: CUDA C++ kernels, in the compiled library `peft_kernels._C_cuda`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .. import registry
from . import crossovers
from .architectures import unserved
from .base import Cards, name_of, tensors
from .compiled import CompiledBackend, Library
from .self_test import gemms, verdicts
from .self_test.verdicts import SelfTest

logger = logging.getLogger("peft_kernels")
GEMMS = "NF4 GEMMs"
"""The name of their self-test."""


class CudaLibrary(Library):
    """Its functions (csrc/cuda/library_ops.cpp) plan kernels."""

    def set_limits(
        self,
        compute_capability: int,
        sms: int,
        linear: Iterable[crossovers.Rows],
        experts: Iterable[crossovers.Rows] = (),
    ) -> None:
        """Sets the crossovers of cards: see csrc/cuda/linear/crossovers.h."""
        self._functions.set_limits(compute_capability, sms, _numbers(linear), _numbers(experts))

    def set_kernels_off(self, card: crossovers.Card, kernels: Iterable[str]) -> None:
        """Sets the kernels of GEMMs that are never used on cards like this one."""
        self._functions.set_kernels_off(card.number, card.multiprocessors, list(kernels))


def _numbers(rows: Iterable[crossovers.Rows]) -> list[int]:
    return [number for row in rows for number in (*row[:3], *row.forward_wgmma, *row.backward_wgmma)]


class CudaBackend(CompiledBackend):
    name = "cuda"
    namespace = f"{registry.NAMESPACE}_cuda"
    device_type = "cuda"
    library = f"{registry.NAMESPACE}._C_cuda"
    not_built = (
        "not built (at installation there was no nvcc that fits torch's CUDA, or PEFT_KERNELS_CUDA=0): "
        "reinstall with it"
        if torch.version.cuda
        else "this torch has no CUDA"
    )

    def __init__(self) -> None:
        super().__init__()
        self.cards = self._unprobed_cards()
        self._crossovers: dict[int, crossovers.Table] = {}
        self._in_force: set[int] = set()
        self._choosing = threading.Lock()
        self.self_test = SelfTest(self.namespace, verdicts.cuda_device, self._build)

    def _open(self) -> CudaLibrary:
        library = CudaLibrary(str(self.file), self.namespace)
        crossovers.set_estimates(library)
        return library

    def probe(self) -> str | None:
        if self._refusal is not None:
            return self._refusal
        reason = self.cards.refusal_of_all()
        built = f"built for compute capability {', '.join(self.architectures())}" if reason else ""
        return reason and f"{built}, but {reason}"

    def describe(self) -> str:
        return f"CUDA C++, built for {', '.join(self.architectures())}; {self.cards.describe()}"

    def supports(self, op: str, args: Sequence[Any]) -> str | None:
        reason = super().supports(op, args) or self.cards.refusal_of_tensors(op, args)
        if reason is None:
            for index in {tensor.device.index for tensor in tensors(args)} - self._in_force:
                self.crossovers_of(index, may_test=True)
            reason = self.self_test.refusal(op, args)
        return reason

    def architectures(self) -> list[str]:
        """The architectures of the library's code, as `architectures.chosen` returns them: "8.0",
        "9.0+PTX"."""
        return self.extension.architectures().split(":")

    def plan(self, m: int, n: int, k: int, blocksize: int, dtype: torch.dtype) -> tuple[str, str]:
        """The kernels of a GEMM with an NF4 weight on the current device, forward and backward.

        Parameters
        ----------
        m, n, k : int
            Rows of activations, out_features and in_features of the weight.

        Returns
        -------
        forward, backward : str
            The name of a fused kernel, or "pieces": the weight is dequantised piece by piece for torch's
            GEMM.
        """
        self.crossovers_of(torch.cuda.current_device())
        return self.extension.plan(m, n, k, blocksize, name_of(dtype))

    def experts_plan(
        self, rows: int, experts: int, n: int, k: int, blocksize: int, dtype: torch.dtype
    ) -> tuple[str, str]:
        """How a grouped GEMM with the NF4 weights of experts is computed on the current device, forward and
        backward.

        Parameters
        ----------
        rows : int
            Of activations, of all experts.
        experts, n, k : int
            Experts, out_features and in_features of their weights.

        Returns
        -------
        forward, backward : str
            "fused", or by ExpertsWgmma "wgmma"; "grouped": the weights are dequantised for torch's grouped
            GEMM; "composed": one GEMM per expert, for which the host waits for the device.
        """
        self.crossovers_of(torch.cuda.current_device())
        return self.extension.experts_plan(rows, experts, n, k, blocksize, name_of(dtype))

    def crossovers_of(self, index: int, may_test: bool = False) -> crossovers.Table:
        """Up to how many rows NF4 GEMMs are fused on a device; chosen and set at the first call.

        Parameters
        ----------
        may_test : bool
            Whether this call may test the kernels on the device, where that is possible now. Until then GEMMs
            do not use LinearWgmma, whatever the table says.

        Raises
        ------
        ValueError
            The file that PEFT_KERNELS_CROSSOVERS names cannot be used.
        """
        with self._choosing:
            if index not in self._in_force:
                self._choose(index, may_test)
            return self._crossovers[index]

    def _choose(self, index: int, may_test: bool) -> None:
        card = self.card(index)
        table = self._crossovers.get(index) or crossovers.choose(card)
        self._crossovers[index] = table
        faults = self._gemm_faults(index, card) if may_test else None
        limits = table.limits if faults is not None else table.limits.without_wgmma()
        crossovers.set_limits(self.extension, card, limits)
        if faults is not None:
            self.extension.set_kernels_off(card, faults)
            self._in_force.add(index)

    def _gemm_faults(self, index: int, card: crossovers.Card) -> dict[str, str] | None:
        """The kernels of GEMMs that are wrong on a device; None if they cannot be tested now."""
        ops, device = getattr(torch.ops, self.namespace), torch.device("cuda", index)
        before = set(self.self_test.found())
        faults = self.self_test.faults(
            index, GEMMS, lambda found: gemms.test(self.extension, ops, card, device, found)
        )
        for sentence in self.self_test.found():
            if faults and sentence not in before:
                logger.warning("kernel %s", sentence)
        return faults

    def has_wgmma(self, index: int) -> bool:
        """Whether LinearWgmma may be used on a device; tests it there at the first call."""
        with self._choosing:
            faults = self._gemm_faults(index, self.card(index))
        return faults is not None and not any("wgmma" in kernel for kernel in faults)

    @contextmanager
    def with_kernels(self, row: crossovers.Rows) -> Iterator[None]:
        """Inside, GEMMs on the current device use the kernels of `row` instead of those of its table."""
        index = torch.cuda.current_device()
        self.crossovers_of(index, may_test=True)  # or the first call inside would set the table
        try:
            with crossovers.forced(self.extension, self.card(index), row):
                yield
        finally:
            self._in_force.discard(index)
            self.crossovers_of(index)

    def all_crossovers(self, may_test: bool = False) -> dict[str, crossovers.Table]:
        """What applies to each device that can serve, by "cuda:0" and the name."""
        names = {i: f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in self.cards.usable()}
        return {name: self.crossovers_of(i, may_test) for i, name in names.items()}

    def card(self, index: int) -> crossovers.Card:
        found = torch.cuda.get_device_properties(index)
        return crossovers.Card(found.name, f"{found.major}.{found.minor}", found.multi_processor_count)

    def _refusal_to_load(self) -> str | None:
        return super()._refusal_to_load() if torch.version.cuda else self.not_built

    def _build(self) -> str:
        """Tells one build of the library from another."""
        assert self.file is not None
        found = self.file.stat()
        return f"{self.file.name} {found.st_size} {found.st_mtime_ns}"

    def _unprobed_cards(self) -> Cards:
        return Cards(lambda i: unserved(torch.cuda.get_device_capability(i), self.architectures()))


BACKEND = CudaBackend()

"""Back end `cuda`: CUDA C++ kernels, in the compiled library `peft_kernels._C_cuda`."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .. import registry
from . import crossovers, wgmma_check
from .architectures import unserved
from .base import Cards, tensors
from .compiled import CompiledBackend, Library

logger = logging.getLogger("peft_kernels")
WGMMA_SECONDS = 20.0
"""The check of LinearWgmma takes milliseconds, with what other processes run on the device in between."""


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
        self._cards = self._unprobed_cards()
        self._crossovers: dict[int, crossovers.Table] = {}
        self._in_force: set[int] = set()
        self._wgmma_faults: dict[crossovers.Card, str | None] = {}
        self._choosing = threading.Lock()

    def _open(self) -> CudaLibrary:
        library = CudaLibrary(str(self.file), self.namespace)
        crossovers.set_estimates(library)
        return library

    def probe(self) -> str | None:
        if self._refusal is not None:
            return self._refusal
        reason = self._cards.refusal_of_all()
        built = f"built for compute capability {', '.join(self.architectures())}" if reason else ""
        return reason and f"{built}, but {reason}"

    def describe(self) -> str:
        return f"CUDA C++, built for {', '.join(self.architectures())}; {self._cards.describe()}"

    def supports(self, op: str, args: Sequence[Any]) -> str | None:
        reason = super().supports(op, args) or self._cards.refusal_of_tensors(op, args)
        if reason is None:
            for index in {tensor.device.index for tensor in tensors(args)} - self._in_force:
                self.crossovers_of(index, may_run=True)
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
        return self.extension.plan(m, n, k, blocksize, str(dtype).removeprefix("torch."))

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
        name = str(dtype).removeprefix("torch.")
        return self.extension.experts_plan(rows, experts, n, k, blocksize, name)

    def crossovers_of(self, index: int, may_run: bool = False) -> crossovers.Table:
        """Up to how many rows NF4 GEMMs are fused on a device; chosen and set at the first call.

        Parameters
        ----------
        may_run : bool
            Whether this call may check LinearWgmma on the device, where that is possible now. Until it was
            checked GEMMs do not use it, whatever the table says.

        Raises
        ------
        ValueError
            The file that PEFT_KERNELS_CROSSOVERS names cannot be used.
        """
        with self._choosing:
            if index not in self._in_force:
                self._choose(index, may_run and _can_run())
            return self._crossovers[index]

    def _choose(self, index: int, can_run: bool) -> None:
        card = self.card(index)
        table = self._crossovers.get(index) or crossovers.choose(card)
        is_known = not table.limits.has_wgmma or can_run or card in self._wgmma_faults
        if is_known and table.limits.has_wgmma and self._wgmma_fault(index, card) is not None:
            table = table.without_wgmma()
        self._crossovers[index] = table
        crossovers.set_limits(self.extension, card, (table if is_known else table.without_wgmma()).limits)
        if is_known:
            self._in_force.add(index)

    def has_wgmma(self, index: int) -> bool:
        """Whether LinearWgmma may be used on a device; checks it there at the first call."""
        with self._choosing:
            return self._wgmma_fault(index, self.card(index)) is None

    def wgmma_faults(self) -> dict[str, str]:
        """What the checks of LinearWgmma found so far, by the name of the card."""
        return {card.name: fault for card, fault in self._wgmma_faults.items() if fault is not None}

    def _wgmma_fault(self, index: int, card: crossovers.Card) -> str | None:
        """Why LinearWgmma must not be used on a kind of card, found at the first call on one of them."""
        if card not in self._wgmma_faults:
            self._wgmma_faults[card] = fault = self._check_wgmma(index, card)
            if fault is not None:
                logger.warning(
                    "LinearWgmma is not used on %s, where it failed its check; other kernels are. Please "
                    "report this: %s",
                    card.name, fault,
                )  # fmt: skip
        return self._wgmma_faults[card]

    def _check_wgmma(self, index: int, card: crossovers.Card) -> str | None:
        ops, device = getattr(torch.ops, self.namespace), torch.device("cuda", index)
        with torch.cuda.device(device):
            torch.cuda.synchronize()  # errors of earlier kernels are not of this one
            try:
                # A stream of its own has counters of its own, which a wrong kernel may leave as they are.
                with torch.cuda.stream(torch.cuda.Stream(device)):
                    return wgmma_check.fault(self.extension, ops, card, device, _finish)
            except torch.OutOfMemoryError:
                raise  # this says nothing of the kernel
            except RuntimeError as error:
                fault = str(error)
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                raise RuntimeError(f"{_LOST}: {fault}") from error
            return fault

    @contextmanager
    def with_kernels(self, row: crossovers.Rows) -> Iterator[None]:
        """Inside, GEMMs on the current device use the kernels of `row` instead of those of its table."""
        index = torch.cuda.current_device()
        self.crossovers_of(index, may_run=True)  # or the first call inside would set the table
        try:
            with crossovers.forced(self.extension, self.card(index), row):
                yield
        finally:
            self._in_force.discard(index)
            self.crossovers_of(index)

    def all_crossovers(self) -> dict[str, crossovers.Table]:
        """What now applies to each device that can serve, by "cuda:0" and the name."""
        usable = (i for i in range(torch.cuda.device_count()) if self._cards.refusal(i) is None)
        return {f"cuda:{i} {torch.cuda.get_device_name(i)}": self.crossovers_of(i) for i in usable}

    def card(self, index: int) -> crossovers.Card:
        found = torch.cuda.get_device_properties(index)
        return crossovers.Card(found.name, f"{found.major}.{found.minor}", found.multi_processor_count)

    def _refusal_to_load(self) -> str | None:
        return super()._refusal_to_load() if torch.version.cuda else self.not_built

    def _unprobed_cards(self) -> Cards:
        return Cards(lambda i: unserved(torch.cuda.get_device_capability(i), self.architectures()))


_LOST = (
    "LinearWgmma has stopped the device while it was checked. Set "
    f"{crossovers.ENVIRONMENT_VARIABLE}={crossovers.NO_WGMMA} to run without it, and please report it"
)


def _finish() -> None:
    """Waits for the current stream, but not for ever."""
    event = torch.cuda.Event()
    event.record()
    end = time.monotonic() + WGMMA_SECONDS
    while not event.query():
        if time.monotonic() > end:
            raise TimeoutError(f"{_LOST}: it does not end")
        time.sleep(1e-5)


def _can_run() -> bool:
    """Whether GEMMs of our own can run now: not where a graph is captured, or something sees every op."""
    return not (
        torch.cuda.is_current_stream_capturing()
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
    )


BACKEND = CudaBackend()

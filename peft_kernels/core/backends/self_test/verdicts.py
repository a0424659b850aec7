"""Whether the kernels of a back end are right on a card: tested at the first use of an op there, and
remembered.

A wrong kernel is not used, with one warning; the next back end serves the op. What was found is kept in
`self_test.json` in the user's cache folder, by card, driver, torch and library: later processes test nothing.
PEFT_KERNELS_SELF_TEST=0 tests nothing at all.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from ..base import DTYPES, Cards, name_of, tensors
from . import compare
from .cases import CASES
from .compare import UNFINISHED, Faults

logger = logging.getLogger("peft_kernels")

ENVIRONMENT_VARIABLE = "PEFT_KERNELS_SELF_TEST"
SECONDS = 30.0
"""A test takes milliseconds, and what other processes run on the card in between."""


class Device(NamedTuple):
    """A card, as far as verdicts depend on it."""

    name: str
    key: str
    """Also its serial number, the driver and torch."""


class SelfTest:
    """The tests of one back end's kernels.

    Parameters
    ----------
    namespace
        Of its ops.
    device
        Describes the card of an index.
    library
        What tells one build of the kernels from another.
    seconds
        How long a test may take.
    """

    def __init__(
        self,
        namespace: str,
        device: Callable[[int], Device],
        library: Callable[[], str],
        seconds: float = SECONDS,
    ) -> None:
        self._namespace, self._device, self._library, self._seconds = namespace, device, library, seconds
        self._verdicts: dict[tuple[int, str, torch.dtype | None], str | None] = {}
        self._remembered: dict[str, dict[str, Faults]] | None = None
        self._found: dict[str, None] = {}
        self._lost: dict[int, str] = {}
        self._testing = threading.RLock()

    def refusal(self, op: str, args: Sequence[Any]) -> str | None:
        """Why the kernels of an op must not be used on the device of its arguments, or None. Tests them
        there at the first call that can."""
        first = next(tensors(args), None)
        if first is None:
            return None
        index = first.device.index or 0
        key = index, op, first.dtype
        if key not in self._verdicts:
            with self._testing:
                return self._refusal(index, op, first.dtype, first.device)
        return self._verdicts[key]

    def _refusal(self, index: int, op: str, dtype: torch.dtype, device: torch.device) -> str | None:
        tested = op if op in CASES else op.removesuffix("_backward")
        if tested not in CASES:
            self._verdicts[index, op, dtype] = None
            return None
        for kind in (dtype,) if dtype in DTYPES else DTYPES:
            try:
                reason = self.verdict(tested, kind, device)
            except Untested:
                return None  # the next call asks again
            if reason is not None:
                break
        self._verdicts[index, op, dtype] = reason
        return reason

    def verdict(self, op: str, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why the kernels of an op, one of CASES, must not be used for activations of a dtype, or None.

        Raises
        ------
        Untested
            The test cannot run now.
        RuntimeError
            The device is lost, in this test or before.
        """
        index, name = device.index or 0, f"{op} in {name_of(dtype)}"
        found = self.faults(index, name, partial(self._test, op, dtype, device))
        if found is None:
            raise Untested(f"{name}: the self-test cannot run now, for lack of memory or in a capture")
        return _sentence(name, self._device(index), found[name]) if found else None

    def _test(self, op: str, dtype: torch.dtype, device: torch.device, found: Faults) -> None:
        name = f"{op} in {name_of(dtype)}"
        found[name] = UNFINISHED
        fault = compare.fault_of(op, self._namespace, device, dtype)
        del found[name]
        if fault is not None:
            found[name] = fault

    def faults(self, index: int, name: str, test: Callable[[Faults], None]) -> Faults | None:
        """What a test finds on a device, or found earlier; None if it cannot run now. It adds what it finds
        to the dictionary that it gets.

        Raises
        ------
        RuntimeError
            The device is lost, in this test or before.
        """
        if is_off():
            return {}
        if (lost := self._lost.get(index)) is not None:
            raise RuntimeError(lost)
        device = self._device(index)
        key = f"{device.key}, {self._library()}"
        known = self._memory().get(key, {})
        if name not in known:
            if not can_run():
                return None
            found: Faults = {}
            _finish_others(index)
            try:
                self._isolated(index, test, found)
            except torch.OutOfMemoryError:
                return None  # this says nothing of the kernels
            except _DeviceLost as error:
                if found:  # otherwise plain torch has lost it
                    self._remember(key, name, found)
                reason = "; ".join(f"{kernel}: {fault}" for kernel, fault in found.items())
                self._lost[index] = (
                    f"{device.name} was lost in the self-test of {name}: {error} ({reason}). Start again: "
                    "these kernels are switched off then. Please report this"
                )
                raise RuntimeError(self._lost[index]) from error
            except Exception as error:  # of the test itself: the call would have been right without it
                sentence = (
                    f"{self._namespace}: the self-test of {name} does not run on {device.name}: {error!r}"
                )
                logger.warning("%s", sentence)
                self._found[sentence] = None
                return {}
            self._remember(key, name, found)
            known = {name: found}
        for kernel, fault in known[name].items():
            self._found[_sentence(kernel, device, fault)] = None
        return known[name]

    def found(self) -> list[str]:
        """A sentence about each kernel that is not used, and about each test that does not run."""
        return list(self._found)

    def _isolated(self, index: int, test: Callable[[Faults], None], found: Faults) -> None:
        """Runs a test in a thread of its own: outside autocast, inference mode, hooks of saved tensors and
        whatever else the caller is in. Does not wait for ever."""
        errors: list[BaseException] = []

        def run() -> None:
            try:
                _on_device(index, test, found)
            except BaseException as error:  # the caller's to raise
                errors.append(error)

        thread = threading.Thread(target=run, daemon=True, name="peft_kernels self-test")
        thread.start()
        thread.join(self._seconds)
        if thread.is_alive():
            raise _DeviceLost(f"nothing ended in {self._seconds:.0f} seconds")
        if errors:
            raise errors[0]

    # What earlier processes found.

    def _memory(self) -> dict[str, dict[str, Faults]]:
        if self._remembered is None:
            self._remembered = _read(file())
        return self._remembered

    def _remember(self, key: str, name: str, found: Faults) -> None:
        self._memory().setdefault(key, {})[name] = found
        others = _read(file())  # of processes that have tested something else meanwhile
        others.setdefault(key, {}).update(self._memory()[key])
        with suppress(OSError):  # a home that cannot be written to: the next process tests again
            _write(file(), others)


def _sentence(kernel: str, device: Device, fault: str) -> str:
    return f"{kernel} failed its self-test on {device.name} and is not used, please report this: {fault}"


@runtime_checkable
class OnCards(Protocol):
    """What a back end for cards has."""

    cards: Cards
    self_test: SelfTest


class Untested(RuntimeError):
    """A test cannot run now."""


class _DeviceLost(RuntimeError):
    """Nothing runs on a device any more."""


def cuda_device(index: int) -> Device:
    """A card. Those of a kind are told apart: one of them may be broken."""
    found = torch.cuda.get_device_properties(index)
    internals: Any = torch._C
    serial, driver = getattr(found, "uuid", index), internals._cuda_getDriverVersion()
    what = f"{found.name} {serial}, {found.multi_processor_count} multiprocessors, driver {driver}"
    return Device(found.name, f"{what}, torch {torch.__version__}")


def is_off() -> bool:
    return os.environ.get(ENVIRONMENT_VARIABLE) == "0"


def can_run() -> bool:
    """Whether kernels of our own can run now: not where a graph is captured, or something sees every op."""
    return not (
        (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
    )


def _finish_others(index: int) -> None:
    """Raises what earlier kernels have done, which is not of those under test."""
    with torch.cuda.device(index):
        torch.cuda.synchronize()


def _on_device(index: int, test: Callable[[Faults], None], found: Faults) -> None:
    """Runs a test on a stream of its own, which has counters of its own: a wrong kernel may leave them as
    they are."""
    with torch.cuda.device(index):
        try:
            with torch.cuda.stream(torch.cuda.Stream(index)):
                test(found)
        finally:
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                raise _DeviceLost(" ".join(str(error).split())) from error


def file() -> Path:
    """Where verdicts are kept."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "peft_kernels" / "self_test.json"


def _read(path: Path) -> dict[str, dict[str, Faults]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, found: Any) -> None:
    """In one step: processes of a job write at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as new:
        json.dump(found, new, indent=1)
    Path(new.name).replace(path)

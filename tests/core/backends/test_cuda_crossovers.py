"""Which crossovers back end `cuda` gives its library, and when it checks LinearWgmma. With stubs of the
library and the card."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_kernels.core.backends import crossovers, cuda, wgmma_check
from peft_kernels.core.backends.crossovers import ANY, Card, Limits, Rows

H100 = Card("NVIDIA H100 80GB HBM3", "9.0", 132)
PINNED = Limits((Rows(ANY, 320, 128),))


@pytest.fixture(autouse=True)
def pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Names a file with PINNED, which nothing does before."""
    monkeypatch.delenv(crossovers.ENVIRONMENT_VARIABLE, raising=False)
    rows = [{"weights": None, "forward": 320, "backward": 128}]
    table = {"compute_capability": "9.0", "source": "measured", "card": H100.name, "rows": rows}
    (tmp_path / "mine.json").write_text(json.dumps({"tables": [table]}))
    return lambda: monkeypatch.setenv(crossovers.ENVIRONMENT_VARIABLE, str(tmp_path / "mine.json"))


class Extension:
    """A compiled library that remembers the crossovers."""

    def __init__(self) -> None:
        self.table: dict[tuple[int, int], Any] = {}

    def set_limits(self, capability: int, sms: int, rows: Any, experts: Any) -> None:
        self.table[capability, sms] = Limits(rows, experts)

    def architectures(self) -> str:
        return "9.0"


class Properties:
    name, major, minor, multi_processor_count = H100.name, 9, 0, 132


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> cuda.CudaBackend:
    """The CUDA back end with a card."""
    made: Any = cuda.CudaBackend()
    made._extension = Extension()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for name in ("synchronize", "Stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *device: None)
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, nullcontext)
    monkeypatch.setattr(wgmma_check, "fault", lambda *args: None)
    monkeypatch.setattr(made._cards, "_judge", lambda index: None)
    return made


def estimate() -> Limits:
    return crossovers.estimate(H100).limits


class OnCard(torch.Tensor):
    """Says that it is on a card."""

    device = torch.device("cuda", 0)  # type: ignore[assignment]


def test_the_first_call_on_a_card_sets_its_table(backend: Any, pinned: Any) -> None:
    pinned()
    assert backend.extension.table == {}
    assert call(backend) == PINNED
    assert backend.crossovers_of(0).source == "measured"


@pytest.mark.parametrize("when", ["capture", "dispatch mode", "transform"])
def test_nothing_is_checked_in_the_middle_of_things(
    when: str, backend: Any, checks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    def called(t: torch.Tensor) -> torch.Tensor:
        assert call(backend) == estimate().without_wgmma()
        return t

    if when == "capture":
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            called(torch.ones(2))
    elif when == "dispatch mode":
        with FlopCounterMode(display=False):
            called(torch.ones(2))
    else:
        torch.func.vmap(called)(torch.ones(2))
    assert checks.calls == 0
    assert call(backend) == estimate() and checks.calls == 1


def test_the_tables_that_apply_are_listed(
    backend: Any, checks: Any, pinned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Listing runs nothing on a card."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: H100.name)
    backend._cards._judge = lambda index: "is too old" if index == 1 else None
    backend.crossovers_of(0)
    pinned()
    found = backend.all_crossovers()
    assert list(found) == [f"cuda:{i} {H100.name}" for i in (0, 2)]
    assert [t.source for t in found.values()] == ["estimated", "measured"]
    assert checks.calls == 0


def test_a_card_is_what_torch_says(backend: Any) -> None:
    assert backend.card(0) == H100


def test_a_bad_pin_stops_the_first_call(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(crossovers.ENVIRONMENT_VARIABLE, "nowhere.json")
    with pytest.raises(ValueError, match=r"PEFT_KERNELS_CROSSOVERS: .*nowhere\.json"):
        backend.supports("nf4_linear", (torch.ones(2, 3).as_subclass(OnCard),))


# The check of LinearWgmma.


class Checks:
    """Stands in for wgmma_check.fault: counts its calls, and returns or raises what it is given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, self.result = 0, None
        monkeypatch.setattr(wgmma_check, "fault", self)

    def __call__(self, *args: Any) -> str | None:
        self.calls += 1
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch, backend: Any) -> Any:
    """After the stubs of `backend`, which it replaces one of."""
    return Checks(monkeypatch)


def call(backend: Any) -> Limits:
    """Calls an op on a card; returns what the library has then."""
    assert backend.supports("nf4_linear", (torch.ones(2, 3).as_subclass(OnCard),)) is None
    return backend.extension.table[90, 132]


def test_a_card_is_checked_before_it_uses_wgmma(backend: Any, checks: Any) -> None:
    """Once for each kind of card, at a call. Showing the table runs nothing on the card."""
    assert backend.crossovers_of(0).limits == estimate()
    assert backend.extension.table == {(90, 132): estimate().without_wgmma()} and checks.calls == 0
    assert call(backend) == call(backend) == estimate() and checks.calls == 1
    assert backend.wgmma_faults() == {}
    assert backend.crossovers_of(1, may_run=True).limits == estimate() and checks.calls == 1
    assert backend.extension.table == {(90, 132): estimate()}


def test_a_card_that_fails_does_without(backend: Any, checks: Any, caplog: pytest.LogCaptureFixture) -> None:
    checks.result = "wgmma64 in bfloat16, 64 rows: differs by 3"
    with caplog.at_level(logging.WARNING, "peft_kernels"):
        assert call(backend) == call(backend) == estimate().without_wgmma()
        assert not backend.crossovers_of(1, may_run=True).limits.has_wgmma
    assert checks.calls == 1 and len(caplog.records) == 1
    assert caplog.messages == [
        "LinearWgmma is not used on NVIDIA H100 80GB HBM3, where it failed its check; other kernels are. "
        "Please report this: wgmma64 in bfloat16, 64 rows: differs by 3"
    ]
    assert not backend.crossovers_of(0).limits.has_wgmma, "doctor shows what applies"
    assert backend.wgmma_faults() == {H100.name: checks.result}


def test_a_launch_that_fails_is_a_fault(backend: Any, checks: Any, caplog: pytest.LogCaptureFixture) -> None:
    checks.result = RuntimeError("LinearWgmma: launch failed")
    with caplog.at_level(logging.WARNING, "peft_kernels"):
        assert not call(backend).has_wgmma
    assert "LinearWgmma: launch failed" in caplog.text


def test_too_little_memory_is_no_fault(backend: Any, checks: Any) -> None:
    checks.result = torch.OutOfMemoryError("no memory")
    with pytest.raises(torch.OutOfMemoryError):
        call(backend)
    checks.result = None
    assert call(backend) == estimate() and checks.calls == 2


def test_a_card_that_is_lost_is_an_error(backend: Any, checks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other kernel could run. The sentence says how to do without."""
    waits = iter([None, RuntimeError("an illegal instruction was encountered")])

    def synchronize() -> None:
        if error := next(waits):
            raise error

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    checks.result = RuntimeError("unspecified launch failure")
    with pytest.raises(RuntimeError, match=r"PEFT_KERNELS_CROSSOVERS=no-wgmma .*: unspecified launch"):
        call(backend)


def test_a_kernel_that_does_not_end_is_an_error(
    backend: Any, checks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Event:
        def record(self) -> None:
            pass

        def query(self) -> bool:
            return False

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(cuda, "WGMMA_SECONDS", 0.01)
    monkeypatch.setattr(wgmma_check, "fault", lambda *args: args[-1]())
    with pytest.raises(TimeoutError, match=r"PEFT_KERNELS_CROSSOVERS=no-wgmma .*: it does not end"):
        call(backend)
    monkeypatch.setattr(Event, "query", lambda self: True)
    assert call(backend).has_wgmma


def test_an_earlier_error_is_not_of_this_kernel(
    backend: Any, checks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def synchronize() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(RuntimeError, match=r"^an illegal memory access was encountered$"):
        call(backend)
    assert checks.calls == 0


def test_a_capture_does_without_a_check(backend: Any, checks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert call(backend) == estimate().without_wgmma() and checks.calls == 0
    assert call(backend) == estimate() and checks.calls == 1
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert backend.crossovers_of(1, may_run=True).limits == estimate(), "known from the other card"
    assert backend.extension.table == {(90, 132): estimate()}


def test_nothing_is_checked_that_is_not_used(
    backend: Any, checks: Any, pinned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(crossovers.ENVIRONMENT_VARIABLE, "no-wgmma")
    assert call(backend) == estimate().without_wgmma()
    backend._in_force.clear(), backend._crossovers.clear()
    pinned()
    assert call(backend) == PINNED
    assert checks.calls == 0


@pytest.mark.parametrize("fault", [None, "it is wrong"])
def test_kernels_can_be_forced(
    fault: str | None, backend: Any, checks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that failed the check, to measure them. Afterwards the table of the card applies."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    checks.result = fault
    for row in (wgmma_check.WGMMA, wgmma_check.MMA_SYNC):
        with backend.with_kernels(row):
            assert call(backend).rows == (row,)
        table = estimate().without_wgmma() if fault else estimate()
        assert call(backend) == table
    assert checks.calls == 1

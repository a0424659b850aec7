"""Which crossovers back end `cuda` gives its library, when it measures them, and when it checks LinearWgmma.
With stubs of the library and the card."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_kernels.core.backends import crossover_timing, crossovers, cuda, wgmma_check
from peft_kernels.core.backends.crossovers import ANY, Card, Limits, Rows, Table

H100 = Card("NVIDIA H100 80GB HBM3", "9.0", 132)
MEASURED = Limits((Rows(1000, 96, 64), Rows(ANY, 320, 128)), (Rows(ANY, 416, 352),))


@pytest.fixture(autouse=True)
def wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[object], None]:
    """Sets the variable; one process, and an empty cache."""
    for name in (crossovers.ENVIRONMENT_VARIABLE, "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lambda value: monkeypatch.setenv(crossovers.ENVIRONMENT_VARIABLE, str(value))


class Extension:
    """A compiled library that remembers the crossovers."""

    __file__ = __file__

    def __init__(self) -> None:
        self.table: dict[tuple[int, int], Any] = {}

    def set_limits(self, capability: int, sms: int, rows: Any, experts: Any) -> None:
        self.table[capability, sms] = Limits(rows, experts)

    def architectures(self) -> str:
        return "9.0"

    def plan(self, *problem: Any) -> tuple[str, str]:
        return "tiles256", "dx64"


class Properties:
    name, major, minor, multi_processor_count, L2_cache_size = H100.name, 9, 0, 132, 50 << 20


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> cuda.CudaBackend:
    """The CUDA back end with a card; GEMMs are faster fused up to 256 rows."""
    made: Any = cuda.CudaBackend()
    made._extension = Extension()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for name in ("synchronize", "Stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *device: None)
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, nullcontext)
    monkeypatch.setattr(wgmma_check, "fault", lambda *args: None)
    monkeypatch.setattr(made, "_measure", lambda index, card: MEASURED)
    monkeypatch.setattr(made._cards, "_judge", lambda index: None)
    return made


def estimate() -> Limits:
    return crossovers.estimate(H100).limits


def must_not_run(*args: Any) -> Any:
    raise AssertionError("it ran")


class OnCard(torch.Tensor):
    """Says that it is on a card."""

    device = torch.device("cuda", 0)  # type: ignore[assignment]


def test_the_first_call_on_a_card_sets_its_table(backend: Any, wanted: Any) -> None:
    wanted("measured")
    x = torch.ones(2, 3).as_subclass(OnCard)
    assert backend.crossovers_of(0) is None and backend.extension.table == {}
    assert backend.supports("nf4_linear", (x,)) is None
    assert backend.extension.table == {(90, 132): MEASURED}
    assert backend.crossovers_of(0).source == "measured"
    backend._measure = must_not_run
    assert backend.supports("nf4_linear", (x,)) is None


@pytest.mark.parametrize("when", ["capture", "dispatch mode", "transform"])
def test_nothing_is_measured_in_the_middle_of_things(
    when: str, backend: Any, wanted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    wanted("measured")
    x = torch.ones(2, 3).as_subclass(OnCard)

    def call(t: torch.Tensor) -> torch.Tensor:
        assert backend.supports("nf4_linear", (x,)) is None
        return t

    if when == "capture":
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            call(x)
    elif when == "dispatch mode":
        with FlopCounterMode(display=False):
            call(x)
    else:
        torch.func.vmap(call)(torch.ones(2))
    assert backend.extension.table == {}
    call(x)
    assert backend.extension.table == {(90, 132): MEASURED}


def test_the_tables_that_apply_are_listed(backend: Any, wanted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimates until a card is measured. Listing measures nothing."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: H100.name)
    backend._cards._judge = lambda index: "is too old" if index == 1 else None
    wanted("measured")
    assert [t.source for t in backend.all_crossovers().values()] == ["estimated"] * 2
    backend.crossovers_of(0, may_run=True)
    found = backend.all_crossovers()
    assert list(found) == [f"cuda:{i} {H100.name}" for i in (0, 2)]
    assert [t.source for t in found.values()] == ["measured"] * 2, "the second from the cache"


def test_a_card_is_what_torch_says_and_the_library_that_is_loaded(
    backend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "_driver", lambda: "a driver")
    seen = set()
    files = ("library.so", b"one"), ("library.so", b"two"), ("libpeft_kernels_cuda.so", b"kernels of a wheel")
    for name, content in files:
        (tmp_path / name).write_bytes(content)
        monkeypatch.setattr(Extension, "__file__", str(tmp_path / "library.so"))
        backend.__dict__.pop("_library_hash", None)
        card = backend.card(0)
        assert card[:4] == (*H100[:3], "a driver")
        seen.add(card.library)
    assert len(seen) == len(files)


def test_gemms_are_timed_on_the_device(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    device, asked = torch.device("cuda", 3), []
    monkeypatch.setattr(torch.cuda, "device", lambda entered: nullcontext(asked.append(entered)))
    monkeypatch.setattr(crossover_timing, "time_cells", lambda *args: asked.extend(args) or [])
    assert backend.time_linear(3, H100) == []
    ops, timing = torch.ops.peft_kernels_cuda, crossover_timing
    expected = (ops, H100, device, 50 << 20, timing.device_clock, timing.SHAPES, timing.FEW_ROWS, True)
    assert asked == [device, backend.extension, *expected]


def test_a_bad_pin_stops_the_first_call(backend: Any, wanted: Any) -> None:
    wanted("nowhere.json")
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


def test_nothing_is_checked_that_is_not_used(backend: Any, checks: Any, wanted: Any, tmp_path: Path) -> None:
    wanted("no-wgmma")
    assert call(backend) == estimate().without_wgmma()
    backend._in_force.clear(), backend._crossovers.clear()
    crossovers.write(tmp_path / "mine.json", [Table("9.0", MEASURED, H100.name)])
    wanted(tmp_path / "mine.json")
    assert call(backend) == MEASURED
    assert checks.calls == 0


@pytest.mark.parametrize("fault", [None, "it is wrong"])
def test_wgmma_is_timed_where_it_is_right(
    fault: str | None, backend: Any, checks: Any, wanted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check goes first, and a table that was measured without it is kept."""
    monkeypatch.setattr(backend, "_measure", partial(cuda.CudaBackend._measure, backend))
    wanted("measured")
    checks.result = fault
    asked = []

    def timed(index: int, card: Card, has_wgmma: bool) -> list[crossover_timing.Cell]:
        asked.append((checks.calls, has_wgmma))
        wgmma = 1.0 if has_wgmma else None
        return [crossover_timing.Cell(64, 64, 96, way, 2.0, 3.0, wgmma) for way in (False, True)]

    monkeypatch.setattr(backend, "time_linear", timed)
    monkeypatch.setattr(backend, "time_experts", timed)
    expected = Rows(ANY, 96, 96, (96, 96), (96, 96))
    assert call(backend) == Limits(*2 * ((expected.without_wgmma() if fault else expected,),))
    assert asked == 2 * [(1, not fault)] and checks.calls == 1
    assert crossovers.choose(backend.card(0), None).limits.has_wgmma == (not fault), "cached"


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

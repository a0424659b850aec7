"""Which crossovers back end `cuda` gives its library, and when it tests its kernels. With stubs of the
library and the card."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_kernels.core.backends import crossovers, cuda
from peft_kernels.core.backends.crossovers import ANY, Card, Limits, Rows
from peft_kernels.core.backends.self_test import cases, compare, gemms, verdicts

H100 = Card("NVIDIA H100", "9.0", 132)
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
        self.off: dict[Card, list[str]] = {}

    def set_kernels_off(self, card: Card, kernels: Any) -> None:
        self.off[card] = list(kernels)

    def set_limits(self, capability: int, sms: int, rows: Any, experts: Any) -> None:
        self.table[capability, sms] = Limits(rows, experts)

    def architectures(self) -> str:
        return "9.0"


class Properties:
    name, major, minor, multi_processor_count, uuid = H100.name, 9, 0, 132, "a card"


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> cuda.CudaBackend:
    """The CUDA back end with a card, of a user for whom nothing is remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("PEFT_KERNELS_SELF_TEST", raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)
    monkeypatch.setattr(cuda.CudaBackend, "_build", lambda self: "a build")
    made: Any = cuda.CudaBackend()
    made._extension = Extension()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for name in ("synchronize", "Stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *device: None)
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, nullcontext)
    monkeypatch.setattr(gemms, "test", lambda *args: None)
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
    when: str, backend: Any, tests: Any, monkeypatch: pytest.MonkeyPatch
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
    assert tests.calls == 0
    assert call(backend) == estimate() and tests.calls == 1


def test_the_tables_that_apply_are_listed(
    backend: Any, tests: Any, pinned: Any, monkeypatch: pytest.MonkeyPatch
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
    assert tests.calls == 0


def test_a_card_is_what_torch_says(backend: Any) -> None:
    assert backend.card(0) == H100


def test_a_bad_pin_stops_the_first_call(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(crossovers.ENVIRONMENT_VARIABLE, "nowhere.json")
    with pytest.raises(ValueError, match=r"PEFT_KERNELS_CROSSOVERS: .*nowhere\.json"):
        backend.supports("nf4_linear", (torch.ones(2, 3).as_subclass(OnCard),))


# The self-test of the GEMMs' kernels.


class Tests:
    """Stands in for gemms.test: counts its calls, and finds or raises what it is given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, self.result = 0, dict[str, str]()
        self.error: Exception | None = None
        monkeypatch.setattr(gemms, "test", self)

    def __call__(
        self, library: Any, ops: Any, card: Card, device: torch.device, found: dict[str, str]
    ) -> None:
        self.calls += 1
        found |= self.result
        if self.error is not None:
            raise self.error


@pytest.fixture
def tests(monkeypatch: pytest.MonkeyPatch, backend: Any) -> Any:
    """After the stubs of `backend`, which it replaces one of."""
    return Tests(monkeypatch)


WRONG = {"wgmma64": "bfloat16, 64 rows: differs by 3"}


def call(backend: Any) -> Limits:
    """Calls an op on a card; returns what the library has then."""
    assert backend.supports("cast", (torch.ones(2, 3).as_subclass(OnCard),)) is None
    return backend.extension.table[90, 132]


def test_a_card_is_tested_before_it_uses_wgmma(
    backend: Any, tests: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a call. Showing the table runs nothing on the card. The second card of a kind is tested too."""
    assert backend.crossovers_of(0).limits == estimate()
    assert backend.extension.table == {(90, 132): estimate().without_wgmma()} and tests.calls == 0
    assert call(backend) == call(backend) == estimate() and tests.calls == 1
    assert backend.self_test.found() == [] and backend.extension.off == {H100: []}
    monkeypatch.setattr(Properties, "uuid", "another card")
    assert backend.crossovers_of(1, may_test=True).limits == estimate() and tests.calls == 2


def test_a_wrong_kernel_is_switched_off(backend: Any, tests: Any, caplog: pytest.LogCaptureFixture) -> None:
    """With one warning, and in later processes, which test nothing."""
    tests.result = WRONG
    with caplog.at_level(logging.WARNING, "peft_kernels"):
        assert call(backend) == call(backend) == estimate()
    assert backend.extension.off == {H100: ["wgmma64"]} and not backend.has_wgmma(0) and tests.calls == 1
    assert caplog.messages[0] == (
        "kernel wgmma64 failed its self-test on NVIDIA H100 and is not used; others are. Please report this: "
        "bfloat16, 64 rows: differs by 3"
    )
    assert backend.self_test.found() == [
        "peft_kernels_cuda: wgmma64 failed its self-test on NVIDIA H100: bfloat16, 64 rows: differs by 3"
    ]
    later = cuda.CudaBackend()
    later._extension = Extension()
    later._cards._judge = lambda index: None
    tests.result = {}
    call(later)
    assert later.extension.off == {H100: ["wgmma64"]} and tests.calls == 1


def test_the_switch(backend: Any, tests: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_KERNELS_SELF_TEST", "0")
    assert call(backend) == estimate() and tests.calls == 0


@pytest.mark.parametrize(
    "what,key",
    [("uuid", "another card"), ("driver", 13010), ("torch", "2.99.0"), ("library", "another build")],
)
def test_what_verdicts_depend_on(
    what: str, key: Any, backend: Any, tests: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    call(backend)
    if what == "uuid":
        monkeypatch.setattr(Properties, "uuid", key)
    elif what == "driver":
        monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: key)
    elif what == "torch":
        monkeypatch.setattr(torch, "__version__", key)
    else:
        monkeypatch.setattr(cuda.CudaBackend, "_build", lambda self: key)
    later = cuda.CudaBackend()
    later._extension = Extension()
    later._cards._judge = lambda index: None
    call(later)
    assert tests.calls == 2


def test_a_home_that_cannot_be_written_to(
    backend: Any, tests: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert call(backend) == call(backend) == estimate() and tests.calls == 1


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1}'])
def test_a_damaged_file_is_replaced(text: str, backend: Any, tests: Any) -> None:
    verdicts.file().parent.mkdir(parents=True)
    verdicts.file().write_text(text)
    assert call(backend) == estimate() and tests.calls == 1
    assert json.loads(verdicts.file().read_text())


def test_too_little_memory_is_no_fault(backend: Any, tests: Any) -> None:
    tests.error = torch.OutOfMemoryError("no memory")
    assert call(backend) == estimate().without_wgmma() and backend.self_test.found() == []
    tests.error = None
    assert call(backend) == estimate() and tests.calls == 2


def test_a_test_that_does_not_run_is_no_fault(
    backend: Any, tests: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tests.error = KeyError("of the test itself")
    with caplog.at_level(logging.WARNING, "peft_kernels"):
        assert call(backend) == estimate()
    assert "the self-test of NF4 GEMMs does not run: KeyError" in caplog.text


def test_a_card_that_is_lost_is_an_error(backend: Any, tests: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other kernel could run. The next call raises at once, and the next process does without."""
    waits = iter([None, RuntimeError("an illegal instruction was encountered")])

    def synchronize() -> None:
        if error := next(waits):
            raise error

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    tests.result, tests.error = {"dx8": "launch failure"}, RuntimeError("of whatever came next")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"lost .*an illegal instruction.* \(dx8: launch failure\)"):
            call(backend)
    assert tests.calls == 1
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    later = cuda.CudaBackend()
    later._extension = Extension()
    later._cards._judge = lambda index: None
    call(later)
    assert later.extension.off == {H100: ["dx8"]} and tests.calls == 1


def test_a_kernel_that_does_not_end_is_an_error(
    backend: Any, tests: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()

    def endless(*args: Any) -> None:
        args[-1]["tiles256"] = compare.UNFINISHED
        ended.wait()

    monkeypatch.setattr(gemms, "test", endless)
    monkeypatch.setattr(backend.self_test, "_seconds", 0.01)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"nothing ended in .* \(tiles256: it does not end\)"):
            call(backend)
    ended.set()


def test_an_earlier_error_is_not_of_this_kernel(
    backend: Any, tests: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def synchronize() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(RuntimeError, match=r"^an illegal memory access was encountered$"):
        call(backend)
    assert tests.calls == 0


def test_a_capture_does_without_a_test(backend: Any, tests: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert call(backend) == estimate().without_wgmma() and tests.calls == 0
    assert call(backend) == estimate() and tests.calls == 1


@pytest.mark.parametrize(
    "around",
    [
        torch.inference_mode,
        torch.no_grad,
        lambda: torch.autocast("cpu"),
        lambda: torch.autograd.graph.saved_tensors_hooks(refuse, refuse),
    ],
)
def test_what_the_caller_is_in_does_not_reach_a_test(
    around: Any, backend: Any, tests: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an op. Activation checkpointing counts what it is given to keep."""
    seen: list[str | None] = []
    real = compare.fault

    def fault(op: Any, call: Any, args: Any, dtype: torch.dtype) -> str | None:
        seen.append(real(op, op.plain, args, dtype))
        return seen[-1]

    monkeypatch.setattr(compare, "fault", fault)
    monkeypatch.setattr(compare, "Values", lambda device, dtype: cases.Values(torch.device("cpu"), dtype))
    with around():
        assert backend.supports("gated_activation", (torch.ones(2, 3).as_subclass(OnCard),)) is None
    assert seen == [None] * 4


def refuse(tensor: Any) -> Any:
    raise AssertionError("the self-test's tensors are not the caller's")


def test_kernels_can_be_forced(backend: Any, tests: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Afterwards the table of the card applies."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for row in (gemms.WGMMA, gemms.MMA_SYNC):
        with backend.with_kernels(row):
            assert call(backend).rows == (row,)
        assert call(backend) == estimate()
    assert tests.calls == 1


def test_factors_that_torch_may_round() -> None:
    """Where users let matmuls in fp32 run in TF32, the self-test allows its errors, and no larger ones."""
    expected, before = torch.randn(100, dtype=torch.float64), torch.get_float32_matmul_precision()
    near, far = (expected.float() * (1 + error) for error in (1e-4, 1e-1))
    try:
        for precision, allowed in (("highest", False), ("high", True)):
            torch.set_float32_matmul_precision(precision)
            assert (compare._difference(near, expected, torch.float32) is None) == allowed
            assert compare._difference(far, expected, torch.float32) is not None
    finally:
        torch.set_float32_matmul_precision(before)

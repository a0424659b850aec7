"""When back end `cuda` tests its kernels, what it remembers, and what a wrong kernel leads to. With stubs of
the library and the card."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from card_stub import H100, OnCard, Properties, call, estimate, new_process

from peft_kernels.core.backends import cuda
from peft_kernels.core.backends.self_test import cases, compare, gemms, verdicts

WRONG = {"wgmma64": "bfloat16, 64 rows: differs by 3"}


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
    sentence = (
        "wgmma64 failed its self-test on NVIDIA H100 and is not used, please report this: bfloat16, 64 rows: "
        "differs by 3"
    )
    assert backend.self_test.found() == [sentence] and caplog.messages == [f"kernel {sentence}"]
    later = new_process()
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
    later = new_process()
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
    (sentence,) = backend.self_test.found()
    assert "the self-test of NF4 GEMMs does not run on NVIDIA H100: KeyError" in sentence
    assert caplog.messages == [sentence]


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
    later = new_process()
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

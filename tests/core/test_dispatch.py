"""The choice of a back end, and its reasons."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from skips import needs
from torch import Tensor

import peft_kernels as pk
import testing
from peft_kernels.core import dispatch, registry
from peft_kernels.core.backends import BACKENDS, cpu, cuda
from peft_kernels.core.backends.architectures import unserved
from peft_kernels.triton_kernels import backend as triton

needs_cpu = needs("cpu")


@pytest.fixture
def weight() -> pk.NF4Weight:
    return testing.nf4_weight(12, 64)


@pytest.fixture
def automatic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No forced back end, an empty log."""
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(dispatch, "_logged", set())
    yield


def served_by(op: str, *args: Any) -> str:
    return dispatch.select(op, args).name


@pytest.mark.usefixtures("automatic")
@needs_cpu
def test_automatic_choice(weight: pk.NF4Weight, caplog: pytest.LogCaptureFixture) -> None:
    group = weight._state.op_args
    x = testing.tensor(3, 64)
    assert served_by("nf4_linear", x, *group, 12, None) == "cpu"
    with caplog.at_level(logging.WARNING, logger="peft_kernels"):
        for _ in range(3):
            assert served_by("nf4_linear", x.double(), *group, 12, None) == "reference"
    assert caplog.messages == ["back end cpu skipped: nf4_linear: no kernel for torch.float64"]
    assert served_by("nf4_linear", x.to("meta"), *group, 12, None) == "reference"
    assert served_by("dequantize_nf4", *group, [12, 64], torch.float64) == "reference"
    assert served_by("dequantize_nf4", *group, [12, 64], torch.float16) == "cpu"


@pytest.mark.usefixtures("automatic")
def test_fp64_falls_back(weight: pk.NF4Weight) -> None:
    x = testing.tensor(3, 64, dtype=torch.float64)
    assert torch.allclose(pk.nf4_linear(x, weight), x @ weight.dequantize().double().t())


@needs_cpu
def test_unusable_forced_back_end_raises_with_the_reason(weight: pk.NF4Weight) -> None:
    group = weight._state.op_args
    meta = [t.to("meta") if isinstance(t, Tensor) else t for t in group]
    x = testing.tensor(3, 64)
    asked = r"^back end cpu is forced but cannot serve "
    with pk.use_backend("cpu"):
        with pytest.raises(
            RuntimeError, match=asked + r"nf4_linear: nf4_linear: no kernel for torch\.float64$"
        ):
            pk.nf4_linear(x.double(), weight)
        with pytest.raises(
            RuntimeError, match=asked + r"nf4_linear: .*a tensor is on meta, .* takes CPU tensors$"
        ):
            dispatch.kernel("nf4_linear", (x.to("meta"), *meta, 12, None))
        with pytest.raises(RuntimeError, match=asked + r"quantize_nf4: .*no kernel for torch\.float64"):
            torch.ops.peft_kernels.quantize_nf4(x.double(), 64)
        with pytest.raises(RuntimeError, match=asked + r"dequantize_nf4: .*no kernel for torch\.float64"):
            weight.dequantize(torch.float64)
        a, b = testing.tensor(4, 64), testing.tensor(12, 4)
        with pytest.raises(RuntimeError, match=asked + r"lora_linear: .*torch\.float64"):
            pk.lora_linear(x.double(), weight, a, b, 1.0)
    with pk.use_backend("reference"):
        assert pk.nf4_linear(x.double(), weight).dtype == torch.float64


@needs_cpu
def test_use_backend_nests_and_restores(weight: pk.NF4Weight) -> None:
    args = (testing.tensor(3, 64), *weight._state.op_args, 12, None)
    before = dispatch.forced()
    with pk.use_backend("reference"):
        assert served_by("nf4_linear", *args) == "reference"
        with pk.use_backend("cpu"):
            assert served_by("nf4_linear", *args) == "cpu"
        assert served_by("nf4_linear", *args) == "reference"
        with pytest.raises(KeyError), pk.use_backend("cpu"):
            raise KeyError
        assert dispatch.forced() == "reference"
    assert dispatch.forced() == before


def test_use_backend_is_thread_local() -> None:
    seen: list[str | None] = []
    before = dispatch.forced()
    with pk.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.forced()))
        thread.start()
        thread.join()
        assert dispatch.forced() == "reference"
    assert seen == [before]


@needs_cpu
def test_backward_in_another_thread_stays_on_its_back_end(weight: pk.NF4Weight) -> None:
    """Gradients call the ops of their own namespace, so the forward's choice holds."""
    x = testing.tensor(3, 64).requires_grad_()
    with pk.use_backend("reference"):
        y = pk.nf4_linear(x, weight)
    assert "peft_kernels_reference" in str(y.grad_fn)
    thread = threading.Thread(target=lambda: y.sum().backward())
    thread.start()
    thread.join()
    assert x.grad is not None


def test_unknown_names() -> None:
    with (
        pytest.raises(ValueError, match=r"^name: expected one of cuda, triton, cpu, reference.*, got 'gpu'$"),
        pk.use_backend("gpu"),
    ):
        pass


def test_environment_variable(monkeypatch: pytest.MonkeyPatch, weight: pk.NF4Weight) -> None:
    args = (testing.tensor(3, 64), *weight._state.op_args, 12, None)
    monkeypatch.setenv("PEFT_KERNELS_BACKEND", "reference")
    assert served_by("nf4_linear", *args) == "reference" and "forced: reference" in pk.explain()
    if testing.unavailable("cpu") is None:
        with pk.use_backend("cpu"):
            assert served_by("nf4_linear", *args) == "cpu"
    monkeypatch.setenv("PEFT_KERNELS_BACKEND", "")
    assert dispatch.forced() is None
    monkeypatch.setenv("PEFT_KERNELS_BACKEND", "gpu")
    with pytest.raises(
        ValueError, match=r"^PEFT_KERNELS_BACKEND: expected one of cuda, triton, cpu, reference.*, got 'gpu'$"
    ):
        pk.nf4_linear(args[0], weight)


def test_use_backend_refuses_unusable_back_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKENDS["cpu"], "_refusal", "not built")
    with (
        pytest.raises(RuntimeError, match=r"^back end cpu cannot be used here: not built$"),
        pk.use_backend("cpu"),
    ):
        pass
    assert re.search(r"^cpu +not usable: not built$", pk.explain(), re.M)


@pytest.mark.usefixtures("automatic")
@needs_cpu
def test_explain() -> None:
    lines = {line.split()[0]: line for line in pk.explain().splitlines()}
    assert list(lines)[:4] == ["cuda", "triton", "cpu", "reference"] and list(lines)[-1] == "choice"
    levels = ", ".join(cpu.BACKEND.extension.isa_levels())
    want = rf"cpu +usable: C\+\+, instruction set \w+ \(of {levels}\), {torch.get_num_threads()} threads"
    assert re.fullmatch(want, lines["cpu"])
    assert re.fullmatch(
        r"reference +usable: plain torch, any device, materialises weights", lines["reference"]
    )
    assert re.fullmatch(
        r"choice +automatic, by the device of the tensors: the first usable one with a kernel",
        lines["choice"],
    )
    with cpu.BACKEND.use_isa("scalar"):
        assert "instruction set scalar" in pk.explain()
    with pk.use_backend("cpu"):
        assert re.search(r"^choice +forced: cpu$", pk.explain(), re.M)


@needs_cpu
def test_isa_levels_are_switched_and_restored() -> None:
    extension = cpu.BACKEND.extension
    before = extension.isa_level()
    for level in extension.isa_levels():
        with cpu.BACKEND.use_isa(level):
            assert extension.isa_level() == level
    assert (
        extension.isa_level() == before == extension.isa_levels()[-1] or "PEFT_KERNELS_CPU_ISA" in os.environ
    )
    with (
        pytest.raises(ValueError, match=r"isa level: expected one of .*scalar.*, got sse9"),
        cpu.BACKEND.use_isa("sse9"),
    ):
        pass
    assert extension.isa_level() == before


@pytest.mark.parametrize(
    "capability,architectures,reason",
    [
        ((8, 0), ["8.0"], None),
        ((8, 9), ["8.0", "9.0"], None),
        ((9, 0), ["8.0"], "no code: .* TORCH_CUDA_ARCH_LIST=9.0$"),
        ((9, 0), ["8.0+PTX"], None),
        ((8, 0), ["8.6+PTX"], "no code"),
        ((12, 1), ["8.0", "12.0"], None),
        ((7, 5), ["7.5+PTX", "8.0"], "capability 7.5, the kernels need 8.0 or later"),
    ],
)
def test_cards_supported_by_code(
    capability: tuple[int, int], architectures: list[str], reason: str | None
) -> None:
    got = unserved(capability, architectures)
    assert got is None if reason is None else got is not None and re.search(reason, got)


class FakeCards:
    """Replaces torch.cuda by several cards."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"card {i}")
        monkeypatch.setattr(cuda.BACKEND, "_refusal", None)
        monkeypatch.setattr(cuda.BACKEND, "cards", cuda.BACKEND._unprobed_cards())
        monkeypatch.setattr(cuda.BACKEND, "_extension", SimpleNamespace(architectures=lambda: "8.0:9.0"))
        monkeypatch.setattr(cuda.BACKEND, "crossovers_of", lambda index, may_test: None)
        monkeypatch.setenv("PEFT_KERNELS_SELF_TEST", "0")


@pytest.mark.usefixtures("automatic")
def test_explain_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCards(monkeypatch)
    said = pk.explain().splitlines()[0]
    assert said == (
        "cuda       not usable: built for compute capability 8.0, 9.0, but torch finds no CUDA device here"
    )
    FakeCards(monkeypatch, (7, 5))
    assert (
        pk.explain()
        .splitlines()[0]
        .endswith("but cuda:0 has compute capability 7.5, the kernels need 8.0 or later")
    )
    FakeCards(monkeypatch, (9, 0), (7, 5))
    assert pk.explain().splitlines()[0] == (
        "cuda       usable: CUDA C++, built for 8.0, 9.0; cuda:0 card 0, compute capability 9.0; "
        "cuda:1 has compute capability 7.5, the kernels need 8.0 or later"
    )


class OnCard(Tensor):
    kind, index = "cuda", 0

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device(self.kind, self.index)


@pytest.mark.usefixtures("automatic")
def test_automatic_choice_by_device(
    monkeypatch: pytest.MonkeyPatch, weight: pk.NF4Weight, caplog: pytest.LogCaptureFixture
) -> None:
    def on_card(index: int, dtype: torch.dtype = torch.float32) -> list[Any]:
        tensors = [testing.tensor(3, 64, dtype=dtype), *weight._state.op_args, 12, None]
        for i, value in enumerate(tensors):
            if isinstance(value, Tensor):
                tensors[i] = value.as_subclass(OnCard)
                tensors[i].index = index
        return tensors

    x = testing.tensor(3, 64)
    with caplog.at_level(logging.WARNING, logger="peft_kernels"):
        FakeCards(monkeypatch, (9, 0), (7, 5))
        assert served_by("nf4_linear", *on_card(0)) == "cuda"
        cpu_usable = testing.unavailable("cpu") is None
        assert served_by("nf4_linear", x, *weight._state.op_args, 12, None) == (
            "cpu" if cpu_usable else "reference"
        )
        assert caplog.messages == []  # back ends for other devices are not mentioned
        monkeypatch.setattr(triton.BACKEND, "probe", lambda: "not today")
        assert served_by("nf4_linear", *on_card(1)) == "reference"
        assert served_by("nf4_linear", *on_card(0, torch.float64)) == "reference"
    assert caplog.messages == [
        "back end cuda skipped: nf4_linear: cuda:1 has compute capability 7.5, the kernels need 8.0 or later",
        "back end cuda skipped: nf4_linear: no kernel for torch.float64",
    ]


@pytest.mark.usefixtures("automatic")
@pytest.mark.parametrize("first", [0, 1])
def test_the_choice_is_cached_per_card(monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    """Cards may differ in the back ends that can serve them."""
    FakeCards(monkeypatch, (9, 0), (7, 5))
    monkeypatch.setattr(triton.BACKEND, "probe", lambda: "not today")
    monkeypatch.setattr(dispatch, "_chosen", {})
    monkeypatch.setattr(registry, "eager", lambda op: lambda *args: op.namespace)
    served = {0: "peft_kernels_cuda", 1: "peft_kernels_reference"}
    for _ in range(2):
        for index in (first, 1 - first):
            x = testing.tensor(3, 64).as_subclass(OnCard)
            x.index = index
            assert dispatch.call("dropout", x, 0.5, x) == served[index]


@pytest.mark.usefixtures("automatic")
def test_falling_back_to_plain_torch_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    x = testing.tensor(3, 64).as_subclass(OnCard)
    monkeypatch.setattr(cuda.BACKEND, "_refusal", "not built: reinstall with nvcc")
    monkeypatch.setattr(triton.BACKEND, "probe", lambda: "not installed: pip install triton")
    with pk.use_backend("reference"):
        assert served_by("dropout", x, 0.5, x) == "reference"
    assert caplog.messages == []  # the reference was requested
    for _ in range(2):
        assert served_by("dropout", x, 0.5, x) == served_by("gated_activation", x, x, "silu") == "reference"
    x.kind = "xpu"
    assert served_by("dropout", x, 0.5, x) == "reference"
    assert served_by("dropout", testing.tensor(3, 64).to("meta"), 0.5, x) == "reference"
    assert caplog.messages == [
        "cuda tensors are served by plain torch (back end reference), slowly: back end cuda: not built: "
        "reinstall with nvcc; back end triton: not installed: pip install triton",
        "xpu tensors are served by plain torch (back end reference), slowly: no back end has kernels for xpu",
    ]


@pytest.mark.usefixtures("automatic")
def test_without_the_cuda_library_triton_serves_cards(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """So is a wheel for the CPU on a machine with a card and without nvcc."""
    FakeCards(monkeypatch, (9, 0))
    missing = cuda.CudaBackend()
    monkeypatch.setattr(missing, "library", "peft_kernels._C_absent")
    monkeypatch.setattr(registry, "install", lambda namespace: object())
    missing.load()
    assert missing.probe() == missing.not_built
    monkeypatch.setattr(cuda.BACKEND, "_refusal", missing.probe())
    monkeypatch.setattr(triton.BACKEND, "probe", lambda: None)
    monkeypatch.setattr(triton.BACKEND, "supports", lambda op, args: None)
    x = testing.tensor(3, 64).as_subclass(OnCard)
    assert served_by("dropout", x, 0.5, x) == served_by("gated_activation", x, x, "silu") == "triton"
    assert caplog.messages == []


@needs_cpu
def test_forbidden_amx_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a sandbox forbids arch_prctl, the next lower ISA is used, and explain() says why."""
    reason = "amx: the kernel refuses the process its tiles"
    fake = SimpleNamespace(
        isa_levels=lambda: ["scalar", "avx512_bf16"],
        isa_level=lambda: "avx512_bf16",
        refused_isa_reason=lambda: reason,
    )
    monkeypatch.setattr(cpu.BACKEND, "_extension", fake)
    levels = "avx512_bf16 (of scalar, avx512_bf16)"
    assert f"instruction set {levels}, {torch.get_num_threads()} threads; not {reason}" in pk.explain()

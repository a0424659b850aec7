"""The self-test of a card, on the CUDA kernels as PTX: right kernels pass, wrong ones are named, and no
others."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from numbers_policy import each_dtype
from test_breaks import BREAKS, edited
from test_cuda_paths import FEW

import ptx_backend as ptx
import testing
from peft_kernels.cli import doctor
from peft_kernels.cli.main import main
from peft_kernels.core import dispatch, registry
from peft_kernels.core.backends import BACKENDS, cuda, reference
from peft_kernels.core.backends.crossovers import Card
from peft_kernels.core.backends.self_test import cases, compare, gemms, verdicts

CPU, BF16 = torch.device("cpu"), torch.bfloat16


def fault(op: str, dtype: torch.dtype = BF16) -> str | None:
    """What the self-test of an op finds."""
    return compare.fault_of(op, "peft_kernels_ptx", CPU, dtype)


@pytest.mark.parametrize("op", cases.CASES)
@each_dtype
def test_right_kernels_pass(extension: ModuleType, op: str, dtype: torch.dtype) -> None:
    assert fault(op, dtype) is None


def test_every_op_with_a_kernel_is_tested() -> None:
    """By itself, or as the gradient of one that is."""
    untested = {op for op in registry.OPS if BACKENDS["cuda"].has_kernel(op)} - cases.CASES.keys()
    assert {op for op in untested if op.removesuffix("_backward") not in cases.CASES} == set()


GROUPED = {"ClearRest", "DequantizeAnyExperts", "DequantizeExperts", "ExpertsExpand"}
"""Kernels around torch's grouped GEMM, which only runs on a card."""


def test_every_kernel_runs(extension: ModuleType) -> None:
    texts: list[str] = []
    extension.set_edit(lambda text: texts.append(text) or text)
    try:
        for op in cases.CASES:
            for args in cases.CASES[op](cases.Values(CPU, BF16)):
                registry.eager(getattr(torch.ops.peft_kernels_ptx, op).default)(*args)
    finally:
        extension.set_edit(None)
    known = {
        name for text in texts for name in re.findall(r"\.entry \w*?entryINS0_\d+([A-Z]\w*?)(?:I|EEE)", text)
    }
    assert len(known) > 30, known
    ran: set[str] = set()
    for op in cases.CASES:
        for args in cases.CASES[op](cases.Values(CPU, BF16)):
            extension.note_launches(True)
            compare.results(
                registry.OPS[op], registry.eager(getattr(torch.ops.peft_kernels_ptx, op).default), args,
                lambda t: t, registry.OPS[op].differentiable,
            )  # fmt: skip
            ran |= {launch[0].partition("<")[0] for launch in extension.note_launches(True)}
            extension.note_launches(False)
    ptx.BACKEND.reset()
    assert known - ran == GROUPED, known - ran


# ---- Wrong kernels --------------------------------------------------------------------------------------

REGISTER = r"%\w+"
MORE = r"mul.f32 \2, \2, 0f3FA00000; "


def too_large(kernel: str) -> Callable[[str], str]:
    """Makes results of a kernel 25% too large."""
    patterns = (
        rf"(cvt\.rn\.(?:bf16|f16)\.f32\s+{REGISTER}, )({REGISTER});",
        rf"(cvt\.rn\.(?:bf16|f16)x2\.f32\s+{REGISTER}, )({REGISTER}), {REGISTER};",
        r"(st\.global\.(?:f32|b32)\s+\[[^\]]+\], )(%f\d+);",
    )

    def edit(text: str) -> str:
        entries = re.split(r"(?=^\.(?:visible|weak)? ?\.?entry)", text, flags=re.MULTILINE)
        for i, entry in enumerate(entries):
            if re.match(rf"\.(visible|weak)? ?\.?entry \w*\d{kernel}", entry):
                for pattern in patterns:
                    entry = re.sub(pattern, rf"{MORE}\g<0>", entry)
                entries[i] = entry
        return "".join(entries)

    return edit


ADAPTERS = {"lora_linear", "multi_lora_linear", "gated_mlp"}
BOTTLENECKS = {"bottleneck", "multi_bottleneck"}
WRONG = {
    "Dequantize": {"dequantize_nf4", "nf4_linear", "lora_linear", "experts_linear"},
    "UnpackAbsmax": {"unpack_absmax"},
    "LoraShrink": ADAPTERS | BOTTLENECKS | {"experts_lora_linear"},
    "LoraExpand": ADAPTERS | BOTTLENECKS,
    "LoraOverRows": ADAPTERS | BOTTLENECKS,
    "PackSlab": ADAPTERS,
    "LinearTiles": {"nf4_linear", "lora_linear", "multi_lora_linear"},
    "LinearDx": {"nf4_linear_dx", "lora_linear"},
    "Gated": {"gated_activation", "gated_mlp"},
    "Dropout4": {"dropout"},
    "ScaleColumns": {"dora_scale"},
    "SumRows": {"dora_norm"},
    "BottleneckRows": {"bottleneck"},
    "RmsNorm": {"rms_norm", "add_rms_norm"},
    "Rotary": {"rotary"},
    "CrossEntropy": {"linear_cross_entropy", "linear_cross_entropy_trained"},
    "Adam": {"adamw"},
    "Experts": {"experts_linear", "experts_linear_dx", "experts_lora_linear"},
}
"""Ops that run a kernel, at least."""
OTHERS = ("gated_activation", "dora_scale", "unpack_absmax")
"""Ops with a kernel each, that no other op's kernel may spoil."""


@pytest.mark.parametrize("kernel", WRONG)
def test_wrong_kernels_are_found(extension: ModuleType, kernel: str) -> None:
    with edited(extension, too_large(kernel)) as changed:
        for op in WRONG[kernel]:
            assert fault(op) is not None, op
        for op in set(OTHERS) - WRONG[kernel]:
            assert fault(op) is None, op
        assert changed[0], "there is no such kernel"


NEITHER = {"relaxed-atomic", "high-product-is-the-low", "philox-multiplier", "philox-other-multiplier"}
"""Breaks that a run need not show, and those of what no GEMM has: long divisions, dropout."""


@pytest.mark.parametrize("name", sorted(BREAKS.keys() - NEITHER))
def test_breaks_of_gemms_are_found(extension: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """By the test of GEMMs, or by that of LoRA, whose kernels they share."""
    problems = [gemms.Problem(5, 64, 5 * 64), gemms.Problem(100, 192, 5 * 64, rank=24, is_fp32=True)]
    monkeypatch.setattr(gemms, "problems", lambda card: problems)
    monkeypatch.setattr(gemms, "EXPERTS_PROBLEMS", ())
    with edited(extension, BREAKS[name][0]) as changed:
        found: dict[str, str] = {}
        gemms.test(extension, torch.ops.peft_kernels_ptx, Card("a card", "8.0", FEW), CPU, found)
        assert found or fault("lora_linear")
        assert changed[0], "the edit changed nothing"


@pytest.mark.parametrize("architecture", [80, 90, 120])
def test_right_gemms_pass(extension: ModuleType, architecture: int) -> None:
    """With whatever dtype is the default, as transformers sets it while it loads a model."""
    before, found = torch.get_default_dtype(), dict[str, str]()
    torch.set_default_dtype(BF16)
    extension.set_card(architecture, 1, ptx.SHARED[architecture])
    card = Card("a card", f"{architecture // 10}.{architecture % 10}", 1)
    try:
        gemms.test(extension, torch.ops.peft_kernels_ptx, card, CPU, found)
    finally:
        torch.set_default_dtype(before)
        ptx.BACKEND.reset()
    assert found == {}


@pytest.mark.parametrize(
    "kernel,names",
    [
        (r"LinearSmall\w*GroupScales", "small"),
        (r"LinearSmall\w*ScaleCodes", "small_codes"),
        ("LinearTiles", "tiles"),
        ("LinearDx", "dx"),
    ],
)
def test_a_wrong_gemm_is_switched_off_alone(
    extension: ModuleType, monkeypatch: pytest.MonkeyPatch, kernel: str, names: str
) -> None:
    """Plans take the next kernel that fits, or none."""
    card, found = Card("a card", "8.0", FEW), dict[str, str]()
    monkeypatch.setattr(gemms, "EXPERTS_PROBLEMS", ())
    layouts = 64, cases.NVFP4
    problems = [gemms.Problem(rows, 192, 3 * 64, layout=of) for rows in (5, 12, 30, 64) for of in layouts]
    monkeypatch.setattr(gemms, "problems", lambda card: problems)
    with edited(extension, too_large(kernel)):
        gemms.test(extension, torch.ops.peft_kernels_ptx, card, CPU, found)
    assert found and all(re.sub(r"\d+|_narrow", "", name) == names for name in found), found

    def plans() -> set[str]:
        each = ((rows, layout) for rows in (5, 12, 30, 64) for layout in layouts)
        return {name for rows, layout in each for name in extension.plan(rows, 192, 192, layout, "bfloat16")}

    everything = plans()
    try:
        extension.set_kernels_off(card, found)
        planned = plans()
        assert not planned & found.keys() and everything - found.keys() <= planned
        extension.set_kernels_off(card, ["experts_fused"])
        assert extension.experts_plan(64, 4, 192, 192, 64, "bfloat16") == ("composed", "fused")
    finally:
        extension.set_kernels_off(card, [])


# ---- From the first use to the report --------------------------------------------------------------------


@pytest.fixture
def card(extension: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """The simulated card as a user's: its back end tests itself, and the reference is the next one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(verdicts, "_on_device", lambda index, test, found: test(found))
    monkeypatch.setattr(verdicts, "can_run", lambda: True)
    monkeypatch.setattr(verdicts, "_finish_others", lambda index: None)
    monkeypatch.setattr(dispatch, "_chosen", {})
    monkeypatch.setattr(dispatch, "_logged", set())
    nothing_is_forced, backends = dispatch._forced.set(None), dict(BACKENDS)
    BACKENDS.clear()
    BACKENDS.update({name: backends[name] for name in ("ptx", "reference")})

    def start() -> verdicts.SelfTest:
        """As a new process."""
        dispatch._chosen.clear()
        device = verdicts.Device("a card", "a card, serial number 1")
        own = verdicts.SelfTest("peft_kernels_ptx", lambda index: device, lambda: "this build")
        monkeypatch.setattr(ptx.BACKEND, "supports", own.refusal)
        return own

    yield start
    dispatch._forced.reset(nothing_is_forced)
    BACKENDS.clear()
    BACKENDS.update(backends)


def call() -> torch.Tensor:
    x = testing.tensor(45, 131, dtype=BF16)
    result: torch.Tensor = dispatch.call("gated_activation", x, x, "silu")
    return result


def test_a_wrong_kernel_from_first_use_to_report(
    card: Any, extension: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    expected = torch.ops.peft_kernels_reference.gated_activation(
        *[testing.tensor(45, 131, dtype=BF16)] * 2, "silu"
    )
    with edited(extension, too_large("Gated")), caplog.at_level(logging.WARNING, "peft_kernels"):
        for _ in range(2):
            own = card()
            for _ in range(2):
                assert torch.equal(call(), expected)
            (sentence,) = own.found()
            assert sentence.startswith(
                "gated_activation in bfloat16 failed its self-test on a card and is not"
            )
    (message,) = caplog.messages
    assert message == f"back end ptx skipped: {sentence}"
    # What was found is remembered: the kernel is right now, and stays off.
    card()
    assert torch.equal(call(), expected) and ("gated_activation", CPU, BF16) in dispatch._chosen
    kept = json.loads(verdicts.file().read_text())
    assert list(kept) == ["a card, serial number 1, this build"]
    assert list(kept["a card, serial number 1, this build"]) == ["gated_activation in bfloat16"]


def test_a_right_kernel_is_tested_once(
    card: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tested: list[str] = []
    real = compare.fault
    monkeypatch.setattr(compare, "fault", lambda op, *rest: tested.append(op.name) or real(op, *rest))
    for _ in range(2):
        own = card()
        for _ in range(3):
            call()
    assert tested == ["gated_activation"] * 4 and own.found() == [] and caplog.messages == []


@pytest.fixture
def own(card: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The self-test of the simulated card, which is the only one that `doctor` finds."""
    monkeypatch.setattr(cuda.BACKEND, "probe", lambda: "not here")
    found = {"ptx": ptx.BACKEND, "cuda": cuda.BACKEND, "cpu": reference.BACKEND}
    monkeypatch.setattr(doctor, "BACKENDS", found)
    monkeypatch.setattr(doctor, "_devices", lambda backend: [CPU])
    monkeypatch.setattr(ptx.BACKEND, "cards", None, raising=False)
    monkeypatch.setattr(ptx.BACKEND, "self_test", card(), raising=False)
    return ptx.BACKEND.self_test


def test_doctor_on_a_card_with_a_wrong_kernel(
    own: Any, extension: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first page of bench/gpu_check.sh: the wrong kernel in its dtypes, all others right."""
    monkeypatch.setattr(doctor, "CASES", ("dropout", "gated_activation", "rms_norm"))
    with edited(extension, too_large("Gated")):
        assert main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    wrong = {(check["op"], check["dtype"]) for check in report["checks"] if check["fault"]}
    assert wrong == {("gated_activation", name) for name in ("float32", "bfloat16", "float16")}
    assert len(report["checks"]) == 9 and report["problems"] == own.found()
    assert all("failed its self-test on a card and is not used" in problem for problem in own.found())
    # Remembered: the kernel is right now, and stays off.
    assert main(["doctor"]) == 1
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["ptx", "cpu", "gated_activation", "WRONG", "WRONG", "WRONG"] in lines
    assert ["ptx", "cpu", "rms_norm", "ok", "ok", "ok"] in lines


def test_doctor_on_a_card_that_is_lost(
    own: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ends, and says once which kernel it was."""

    def lose(index: int, test: Any, found: Any) -> None:
        found["dropout in float32"] = "it does not end"
        raise verdicts._DeviceLost("an illegal address")

    monkeypatch.setattr(verdicts, "_on_device", lose)
    assert main(["doctor", "--json"]) == 1
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert (
        "a card was lost in the self-test of quantize_nf4 in float32: an illegal address (dropout" in problem
    )


def test_a_choice_that_was_not_tested_is_made_again(card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a CUDA graph that is captured before the op was ever called."""
    own = card()
    with monkeypatch.context() as capture:
        capture.setattr(verdicts, "can_run", lambda: False)
        call()
        assert not dispatch._chosen and not own._verdicts
    call()
    assert dispatch._chosen and own._verdicts


def test_a_result_that_is_missing_is_a_fault(extension: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = registry.OPS["gated_activation"]
    real = kind.backward
    monkeypatch.setattr(kind, "backward", lambda *args: real(*args) | {"up": None})
    assert fault("gated_activation") == "no gradient of up (1)"

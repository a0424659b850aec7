"""Correctness checks of the benchmark suite: wrong results are not timed, and every kind of case is
correct."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bench_checks import (
    TINY,
    TINY_BLOCK,
    Machine,
    block_case,
    case_of,
    line_of,
    measure,
    model_case,
    skip_without,
)
from broken_ops import break_op
from rounding import ONE_MODEL

import peft_kernels as pk
import testing
from bench.lib import adapted, block, cases, correctness, layers, report
from bench.lib.harness import Absent, Contender, Result
from bench.lib.report import ONCE, OURS
from bench.models import model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.usefixtures("small_rotation")
def test_a_wrong_forward_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    break_op(monkeypatch, "nf4_linear", lambda y: y * 1.02)
    refused(measure(cases.forward(TINY, 4, "bf16")))


@pytest.mark.parametrize("gradient", [0, 1, 2], ids=["dx", "da", "db"])
@pytest.mark.usefixtures("small_rotation")
def test_a_wrong_gradient_is_not_timed(gradient: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")

    def change(grads: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(grad * 1.02 if i == gradient else grad for i, grad in enumerate(grads))

    autograd_grad = torch.autograd.grad
    monkeypatch.setattr(
        torch.autograd, "grad", lambda *args, **kwargs: change(autograd_grad(*args, **kwargs))
    )
    result = measure(cases.training(cases.LORA, TINY, 4, "bf16"))
    refused(result)
    assert ("dx", "da", "db")[gradient] in result.wrong[OURS]


@pytest.mark.usefixtures("small_rotation")
def test_wrong_bits_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    quantize = pk.NF4Weight.quantize

    def flipped(weight: torch.Tensor) -> pk.NF4Weight:
        result = quantize(weight)
        assert result.packed is not None
        result.packed[3, 5] ^= 1
        return result

    case = cases.quantize(TINY, "bf16")
    # The expected bits, before anything is broken.
    layers.shared(layers.Weights, cases.QUANTIZE, *TINY, torch.bfloat16).nf4  # noqa: B018
    monkeypatch.setattr(pk.NF4Weight, "quantize", flipped)
    refused(measure(case))


def fails() -> None:
    raise RuntimeError("N must be divisible by block_n\nmore")


@pytest.mark.parametrize("ours", [Contender(OURS, [fails], lambda _: 0.0), Absent(OURS, "no layer")])
def test_ours_is_wrong_when_it_cannot_be_built_or_run(ours: Contender | Absent) -> None:
    result = measure(case_of(ours, Machine().contender("peer", 0.01)))
    refused(result)
    assert result.wrong[OURS] in ("RuntimeError: N must be divisible by block_n", "no layer")


def refused(result: Result) -> None:
    """No time and no ratio, in memory or on paper."""
    assert OURS in result.wrong
    assert result.seconds == {}
    line = line_of(result)
    assert line["times_ms"] == line["ratios"] == {}
    assert line["wrong"][OURS]
    text = report.render([result])
    assert "WRONG" in text and "0 cells" in text
    assert " ms" not in result.line()


def test_a_wrong_peer_and_one_that_raises_are_not_timed_and_the_others_are() -> None:
    machine = Machine()
    expected = correctness.Expected({}, {"y": torch.ones(3)})
    rubbish = Contender("rubbish", [lambda: {"y": torch.zeros(3)}], expected.sane)
    raises, peer = Contender("raises", [fails], lambda _: 0.0), machine.contender("peer", 0.02)
    result = measure(case_of(machine.contender(OURS, 0.01), rubbish, raises, peer), machine)
    assert set(result.seconds) == {OURS, "peer"}
    cells = [result.cell(name) for name in ("rubbish", "raises", "peer")]
    assert cells == ["WRONG", "-", "2.00 (2.00-2.00)"]
    assert "- raises: RuntimeError: N must be divisible by block_n (" in report.render([result])


@pytest.mark.usefixtures("small_rotation")
def test_a_missing_library_is_a_reason_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    missing = ("bitsandbytes", "peft")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else find_spec(name)
    )
    forward = cases.forward(TINY, 4, "bf16").run(ONCE)
    assert forward.absent == dict.fromkeys(("bnb eval", "bnb train"), "bitsandbytes not installed")
    qlora = cases.training(cases.QLORA, TINY, 4, "bf16").run(ONCE)
    assert qlora.absent == {"PEFT on bnb": "peft, bitsandbytes not installed"}
    assert set(qlora.seconds) == {OURS, "frozen dense (no LoRA)"}
    overhead = cases.overhead(cases.OVERHEAD, "bf16").run(ONCE)
    assert overhead.wrong == {OURS: "peft not installed"} and not overhead.seconds


# All kinds of cases, right.


@pytest.mark.parametrize(
    ("group", "dtype"),
    [
        *((group, "bf16") for group in sorted({*cases.TITLES, *model.TITLES} - {cases.DX, "formats-nf4"})),
        *((group, dtype) for group in (cases.FORWARD, cases.QLORA, model.STEP) for dtype in ("fp32", "fp16")),
    ],
)
@pytest.mark.usefixtures("small_rotation")
def test_every_kind_of_case_runs(group: str, dtype: str) -> None:
    if group in (cases.QLORA, cases.LORA):
        skip_without("peft")
        case = cases.training(group, TINY, 4, dtype)
    elif group in cases.BLOCKS:
        case = block_case(group, dtype)
    elif group in (cases.OVERHEAD, cases.OVERHEAD_NF4):
        skip_without("peft")
        case = cases.overhead(group, dtype)
    elif group in model.TITLES:
        case = model_case(group, dtype)
    elif group in (cases.QUANTIZE, cases.DEQUANTIZE):
        case = getattr(cases, group)(TINY, dtype)
    else:
        case = cases.forward(TINY, 4, dtype, group.removeprefix("formats-").replace(cases.FORWARD, "nf4"))
    result = case.run(ONCE)
    assert result.wrong == {}
    assert OURS in result.seconds
    if importlib.util.find_spec("bitsandbytes"):
        assert result.absent == {}


@pytest.mark.parametrize("group", [*model.TITLES, *cases.BLOCKS])
@pytest.mark.usefixtures("small_rotation")
def test_a_wrong_model_is_not_timed(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One LoRA matrix is off, in one of seven layers: in a block that trains by a tenth, otherwise by more,
    as only one result shows it or all are judged together."""
    case = block_case(group) if group in cases.BLOCKS else model_case(group)
    factor = 1.1 if group in cases.BLOCKS and cases.BLOCKS[group].training else -1.0

    def off(make: Callable[..., adapted.Model]) -> Callable[..., adapted.Model]:
        def made(*arguments: Any) -> adapted.Model:
            found = make(*arguments)
            if found.report is not None:
                lora_b = next(p for n, p in found.model.named_parameters() if "up_proj.lora_B" in n)
                lora_b.data.mul_(factor)
            return found

        return made

    for owner, name in ((adapted.Adapted, "ours"), (model.Models, "textbook")):
        monkeypatch.setattr(owner, name, off(getattr(owner, name)))
    refused(case.run(ONCE))


@pytest.mark.usefixtures("small_rotation")
def test_models_of_two_groups_are_not_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tutorials' step makes its own models, though contenders have the same names."""
    made: list[str] = []
    textbook = model.Models.textbook
    monkeypatch.setattr(
        model.Models, "textbook", lambda models, base, *how: made.append(base) or textbook(models, base, *how)
    )
    for group in (model.STEP, model.TEXTBOOK):
        assert model_case(group).run(ONCE).wrong == {}
    assert made == ["bnb", "bnb", "nf4"]


# The block.


@pytest.mark.usefixtures("small_rotation")
def test_a_block_that_drops_nothing_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The patched truth then drops nothing either, so agreeing with it is not enough."""
    case, patch = block_case(cases.BLOCK_DROPOUT), pk.patch

    def without_dropout(model: torch.nn.Module) -> Any:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.eval()
        return patch(model)

    monkeypatch.setattr(pk, "patch", without_dropout)
    result = case.run(ONCE)
    refused(result)
    assert "dropout moves it by" in result.wrong[OURS]


@pytest.mark.usefixtures("small_rotation")
def test_fallbacks_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    case = block_case(cases.BLOCK_LORA)
    patch = pk.patch

    def with_hook(model: torch.nn.Module) -> Any:
        for name, module in model.named_modules():
            if name.endswith(("q_proj.base_layer", "k_proj.base_layer")):
                module.register_forward_hook(lambda *args: None)
        return patch(model)

    monkeypatch.setattr(pk, "patch", with_hook)
    result = case.run(ONCE)
    assert "original forward in 2 layers: hooks on a" in result.remarks[OURS]
    assert result.remarks[OURS] in result.line()
    assert f"{OURS}: {result.remarks[OURS]} ({case.name})" in report.render([result])
    assert line_of(result)["remarks"] == result.remarks


def test_every_sample_of_a_mixed_batch_has_its_own_adapter() -> None:
    block_case(cases.BLOCK_MIXED)
    blocks = block.Blocks(TINY_BLOCK, torch.float32)
    mixed, inputs = adapted.Variant(adapters=3, training=False), blocks.inputs(3, 8)
    model = blocks.stock(mixed)
    y = blocks.run(model, mixed, inputs)()["y"]
    for i, name in enumerate(mixed.names):
        model.model.set_adapter(name)
        alone = blocks.run(model, adapted.Variant(training=False), inputs)()["y"]
        same = [testing.relative_error(y[j], alone[j]) < ONE_MODEL for j in range(3)]
        assert same == [j == i for j in range(3)]

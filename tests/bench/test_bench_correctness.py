"""Correctness checks of the benchmark suite: wrong results are not timed, and every kind of case is
correct."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bench_checks import TINY, TINY_BLOCK, Machine, block_case, case_of, line_of, measure, model_case
from broken_ops import break_op
from rounding import ONE_MODEL

import peft_kernels as pk
import testing
from bench.lib import adapted, block, cases, correctness, layers, report
from bench.lib.harness import Absent, Contender, Result
from bench.lib.report import ONCE, OURS
from bench.models import model

pytestmark = pytest.mark.usefixtures("one_thread")


def one_element_off(y: torch.Tensor) -> torch.Tensor:
    y = y.clone()
    y.view(-1)[-1] += 1.0
    return y


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(one_element_off, id="one-element"),
        pytest.param(lambda y: y * 1.02, id="two-percent"),
        pytest.param(lambda y: torch.full_like(y, torch.nan), id="nan"),
        pytest.param(lambda y: y.float(), id="dtype"),
        pytest.param(lambda y: y[:-1], id="shape"),
    ],
)
@pytest.mark.usefixtures("small_rotation")
def test_a_wrong_forward_is_not_timed(change: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    break_op(monkeypatch, "nf4_linear", change)
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


def test_ours_is_wrong_when_it_raises() -> None:
    def fails() -> None:
        raise RuntimeError("out of luck")

    result = measure(case_of(Contender(OURS, [fails], lambda result: 0.0), Machine().contender("peer", 0.01)))
    refused(result)
    assert result.wrong[OURS] == "RuntimeError: out of luck"


def test_ours_is_wrong_when_it_cannot_be_built() -> None:
    refused(measure(case_of(Absent(OURS, "no layer"), Machine().contender("peer", 0.01))))


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


def test_a_wrong_peer_is_not_timed_and_the_others_are() -> None:
    machine = Machine()
    expected = correctness.Expected({}, {"y": torch.ones(3)})
    rubbish = Contender("rubbish", [lambda: {"y": torch.zeros(3)}], expected.sane)
    peer = machine.contender("peer", 0.02)
    result = measure(case_of(machine.contender(OURS, 0.01), rubbish, peer), machine)
    assert set(result.seconds) == {OURS, "peer"}
    assert result.cell("rubbish") == "WRONG"
    assert result.cell("peer") == "2.00 (2.00-2.00)"


def test_a_peer_that_raises_is_shown_with_its_reason() -> None:
    def fails() -> None:
        raise AssertionError("N must be divisible by block_n\nmore")

    machine = Machine()
    peer = Contender("peer", [fails], lambda result: 0.0)
    result = measure(case_of(machine.contender(OURS, 0.01), peer), machine)
    assert result.cell("peer") == "-"
    assert "- peer: AssertionError: N must be divisible by block_n (" in report.render([result])
    assert set(result.seconds) == {OURS}


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
        pytest.importorskip("peft")
        case = cases.training(group, TINY, 4, dtype)
    elif group in cases.BLOCKS:
        case = block_case(group, dtype)
    elif group in (cases.OVERHEAD, cases.OVERHEAD_NF4):
        pytest.importorskip("peft")
        case = cases.overhead(group, dtype)
    elif group in model.TITLES:
        case = model_case(group, dtype)
    elif group == cases.FORWARD:
        case = cases.forward(TINY, 4, dtype)
    elif group.startswith("formats-"):
        case = cases.forward(TINY, 4, dtype, group.removeprefix("formats-"))
    else:
        case = {cases.QUANTIZE: cases.quantize, cases.DEQUANTIZE: cases.dequantize}[group](TINY, dtype)
    result = case.run(ONCE)
    assert result.wrong == {}
    assert OURS in result.seconds
    if importlib.util.find_spec("bitsandbytes"):
        assert result.absent == {}


@pytest.mark.parametrize("group", model.TITLES)
@pytest.mark.usefixtures("small_rotation")
def test_a_wrong_model_is_not_timed(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, patch = model_case(group), pk.patch

    def off(patched: Any, **options: Any) -> Any:
        report = patch(patched, **options)
        with torch.no_grad():
            next(p for n, p in patched.named_parameters() if "layers.1" in n and "lora_B" in n).mul_(-1)
        return report

    monkeypatch.setattr(pk, "patch", off)
    result = case.run(ONCE)
    assert OURS in result.wrong and not result.seconds


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


@pytest.mark.parametrize("group", cases.BLOCKS)
@pytest.mark.usefixtures("small_rotation")
def test_a_wrong_block_is_not_timed(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One LoRA matrix is off, in one of seven layers: by a tenth, or twofold where only y shows it."""
    case, adapt = block_case(group), block.Blocks.ours

    def off(blocks: block.Blocks, variant: adapted.Variant) -> adapted.Model:
        model = adapt(blocks, variant)
        lora_b = next(p for name, p in model.model.named_parameters() if "up_proj.lora_B" in name)
        with torch.no_grad():
            lora_b *= 1.1 if variant.training else 2.0
        return model

    monkeypatch.setattr(block.Blocks, "ours", off)
    refused(case.run(ONCE))


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

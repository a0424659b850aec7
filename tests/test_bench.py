"""The benchmark suite itself: timing with a clock of our own, and the gate in front of it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_ops import break_op

import peft_kernels as pk
import testing

sys.path.append(str(Path(__file__).resolve().parent.parent))

from bench import (
    adapted,
    block,
    cases,
    chart,
    compiled,
    gate,
    harness,
    memory,
    model,
    report,
    run,
    triton_cases,
)
from bench.harness import Absent, Case, Contender, Goal, Result
from bench.report import OURS, Spread, Timing

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = (64, 128)
TINY_BLOCK = adapted.Sizes(hidden=256, intermediate=512, heads=4, kv_heads=2)
ONCE = Timing(0.0, 1)
FACTS = {"cpu": "a machine", "versions": {"torch": torch.__version__}}


class Machine:
    """A clock that only the calls move, and a record of them."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def clock(self) -> float:
        return self.now

    def call(self, label: str, *seconds: float) -> Callable[[], str]:
        """A call that takes each of the durations in turn, and the last one from then on."""
        left = list(seconds)

        def run() -> str:
            self.calls.append(label)
            self.now += left.pop(0) if len(left) > 1 else left[0]
            return label

        return run

    def contender(self, name: str, *seconds: float, copies: int = 1) -> Contender:
        return Contender(name, [self.call(f"{name}{i}", *seconds) for i in range(copies)], lambda result: 0.0)


def case_of(*contenders: Contender | Absent) -> Case:
    return Case(cases.FORWARD, *TINY, 4, "bf16", lambda: contenders)


def measure(case: Case, machine: Machine | None = None, rounds: int = 2) -> Result:
    machine = machine or Machine()
    return case.run(Timing(0.0, rounds), clock=machine.clock)


def line_of(outcome: report.Outcome) -> Any:
    return json.loads(json.dumps(report.json_data(outcome, FACTS)))


@pytest.fixture
def small_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two copies of a tiny weight instead of thousands."""
    monkeypatch.setattr(cases, "copies", lambda nbytes, contenders: 2)
    cases._weights.cache_clear()
    cases._blocks.cache_clear()
    cases._models.cache_clear()


# Timing.


def test_contenders_take_turns() -> None:
    machine = Machine()
    contenders = [machine.contender(name, 0.01) for name in "ABC"]
    harness.interleave(contenders, Timing(0.0, 3), machine.clock)
    assert "".join(call[0] for call in machine.calls[-9:]) == "ABCABCABC"


def test_calls_rotate_through_the_copies() -> None:
    machine = Machine()
    harness.interleave([machine.contender("A", 0.01, copies=3)], Timing(0.0, 4), machine.clock)
    assert machine.calls == [f"A{i % 3}" for i in range(len(machine.calls))]


def test_short_calls_share_a_turn_and_seconds_are_per_call() -> None:
    machine = Machine()
    seconds = harness.interleave([machine.contender("A", 2**-13, copies=4)], Timing(0.0, 1), machine.clock)
    assert seconds["A"] == [2**-13]
    warm_up, settling = 4, 1
    assert len(machine.calls) == warm_up + settling + 9  # 9 / 2**13 s is the first turn of a millisecond


def test_warm_up_is_not_timed() -> None:
    machine = Machine()
    seconds = harness.interleave([machine.contender("A", 5.0, 0.01)], Timing(0.0, 3), machine.clock)
    assert seconds["A"] == pytest.approx([0.01] * 3)


def test_rounds_go_on_until_both_minima_are_reached() -> None:
    for seconds, rounds, expected in ((0.0, 7, 7), (0.625, 2, 5)):
        machine = Machine()
        got = harness.interleave([machine.contender("A", 0.125)], Timing(seconds, rounds), machine.clock)
        assert len(got["A"]) == expected


def test_ratio_is_the_median_of_the_ratios_of_the_rounds() -> None:
    result = Result(
        case_of(), contenders=[OURS, "peer"], seconds={OURS: [1.0, 10.0, 2.0], "peer": [2.0, 30.0, 1.0]}
    )
    assert result.against("peer") == Spread(2.0, 1.25, 2.5)  # of 2, 3 and 0.5; the ratio of the medians is 1
    assert result.against("absent") is None


def test_a_slow_second_of_the_machine_leaves_the_ratio_alone() -> None:
    machine = Machine()
    slow_then_quick = [0.01] * 4 + [0.08, 0.08, 0.01]
    ours = machine.contender(OURS, *slow_then_quick)
    peer = machine.contender("peer", *(2 * seconds for seconds in slow_then_quick))
    result = measure(case_of(ours, peer), machine, 6)
    assert result.against("peer") == pytest.approx((2.0, 2.0, 2.0))


@pytest.mark.parametrize(
    ("nbytes", "contenders", "expected"),
    [
        pytest.param(8 * harness.MIB, 4, 8, id="twice-the-cache"),
        pytest.param(65 * harness.MIB, 4, 1, id="one-copy-exceeds-it"),
        pytest.param(2000 * harness.MIB, 4, 1, id="never-none"),
    ],
)
def test_copies(nbytes: int, contenders: int, expected: int) -> None:
    assert harness.copies(nbytes, contenders, cache=32 * harness.MIB) == expected


def test_copies_stay_within_the_memory_limit() -> None:
    count = harness.copies(harness.MIB, 4, cache=10_000 * harness.MIB)
    assert count * harness.MIB * 4 == harness.ROTATION_LIMIT


def test_last_level_cache_is_the_largest(tmp_path: Path) -> None:
    for index, size in enumerate(("32K", "1024K", "48M")):
        folder = tmp_path / "cpu0" / "cache" / f"index{index}"
        folder.mkdir(parents=True)
        (folder / "size").write_text(size + "\n")
    assert harness.last_level_cache(tmp_path) == 48 * harness.MIB
    assert harness.last_level_cache(tmp_path / "nowhere") == 32 * harness.MIB


# The gate.


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
    cases._weights(cases.QUANTIZE, TINY, "bf16").nf4  # noqa: B018 the truth, before anything is broken
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
    expected = gate.Expected({}, {"y": torch.ones(3)})
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


# All kinds of cases, right.


@pytest.mark.parametrize(
    ("group", "dtype"),
    [
        *((group, "bf16") for group in sorted(cases.TITLES.keys() - {cases.DX})),
        *((group, dtype) for group in (cases.FORWARD, cases.QLORA, cases.STEP) for dtype in ("fp32", "fp16")),
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
    elif group in (cases.STEP, cases.TEXTBOOK, cases.DECODE):
        case = model_case(group, dtype)
    elif group == cases.FORWARD:
        case = cases.forward(TINY, 4, dtype)
    else:
        case = {cases.QUANTIZE: cases.quantize, cases.DEQUANTIZE: cases.dequantize}[group](TINY, dtype)
    result = case.run(ONCE)
    assert result.wrong == {}
    assert OURS in result.seconds
    if importlib.util.find_spec("bitsandbytes"):
        assert result.absent == {}


def model_case(group: str, dtype: str = "bf16") -> Case:
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    sizes = model.ModelSizes(TINY_BLOCK, layers=2, vocabulary=500)
    if group == cases.DECODE:
        return cases.decode(8, 4, dtype, sizes)
    return (cases.step if group == cases.STEP else cases.textbook)(2, 16, dtype, sizes)


@pytest.mark.parametrize("group", [cases.STEP, cases.DECODE])
def test_a_wrong_model_is_not_timed(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, make = model_case(group), model.Models.ours

    def off(models: model.Models) -> adapted.Model:
        ours = make(models)
        with torch.no_grad():
            next(p for n, p in ours.model.named_parameters() if "layers.1" in n and "lora_B" in n).mul_(-1)
        return ours

    monkeypatch.setattr(model.Models, "ours", off)
    result = case.run(ONCE)
    assert OURS in result.wrong and not result.seconds


def block_case(group: str, dtype: str = "bf16") -> Case:
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    batch = max(2, cases.BLOCKS[group].adapters)
    # Smaller ones leave gradients of few roundings, whose largest error says little.
    return cases.block(group, batch, 16, dtype, TINY_BLOCK)


def test_names_of_cases_are_unique() -> None:
    names = [case.name for case in (*cases.standard("bf16"), *memory.standard("bf16"))]
    assert len(names) == len(set(names))
    assert "forward-14336x4096-m2048-bf16" in names
    assert {"block-lora-576x1536-4x256-bf16", "block-mixed-576x1536-8x128-bf16"} <= set(names)


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
    """The patched truth, which then drops nothing either, agrees with it: that is not enough."""
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
def test_fallbacks_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    case = block_case(cases.BLOCK_LORA)
    patch = pk.patch

    def with_hook(model: torch.nn.Module) -> Any:
        for name, module in model.named_modules():
            if name.endswith(("q_proj.base_layer", "k_proj.base_layer")):
                module.register_forward_hook(lambda *args: None)
        return patch(model)

    monkeypatch.setattr(pk, "patch", with_hook)
    result = case.run(ONCE)
    assert "original forward in 2 layers: hooks on the base layer" in result.remarks[OURS]
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
        same = [testing.relative_error(y[j], alone[j]) < 1e-5 for j in range(3)]
        assert same == [j == i for j in range(3)]


# Goals.


@pytest.mark.parametrize(
    ("goal", "seconds", "met"),
    [
        pytest.param(Goal("other", 1.9), 0.02, True, id="fast"),
        pytest.param(Goal("other", 3.0), 0.02, False, id="not-fast-enough"),
        pytest.param(Goal("other", 1.3, cost=True), 0.008, True, id="cheap"),
        pytest.param(Goal("other", 1.2, cost=True), 0.008, False, id="dear"),
    ],
)
def test_goals_stand_beside_what_was_measured(goal: Goal, seconds: float, met: bool) -> None:
    machine = Machine()
    contenders = machine.contender(OURS, 0.01), machine.contender("other", seconds)
    case = Case(cases.BLOCK_LORA, *TINY, 8, "bf16", lambda: contenders, 2, (goal,))
    result = measure(case, machine)
    text = report.render([result])
    quotient, value = ("ours / other", "1.25") if goal.cost else ("other / ours", "2.00")
    verdict = report.MET if met else report.MISSED
    assert f"block-lora-64x128-2x4-bf16, {quotient}: {goal}, measured {value}: {verdict}" in text
    # What costs more than a cheaper job of ours has not lost against a peer.
    assert ("0 lose" in text) is not goal.cost and report.LOSES not in text
    line = line_of(result)
    assert ("other" in line["costs"], "other" in line["ratios"]) == (goal.cost, not goal.cost)
    assert line["goals"]["other"]["limit"] == goal.limit and line["batch"] == 2


# Saved bytes.


@pytest.mark.parametrize("case", memory.standard("bf16"), ids=lambda case: case.name)
def test_every_kind_of_saved_bytes(case: memory.Case) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    if case.base == "nf4":
        pytest.importorskip("bitsandbytes")
    saved = dataclasses.replace(case, sizes=TINY_BLOCK).run()
    assert saved.absent == {} and saved.ratio is not None and saved.ratio <= 1.0
    assert f"{saved.ratio:.1%}" in report.render([saved])
    line = line_of(saved)
    assert line["bytes_per_token"].keys() == {OURS, case.peer} and line["ratio"] == saved.ratio


def test_saved_bytes_without_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "missing", lambda needs: "peft not installed")
    saved = memory.standard("bf16")[0].run()
    assert saved.ratio is None and not list(saved.goals())
    text = report.render([saved])
    assert "- PEFT on dense: peft not installed (memory-layer-dense-lora-bf16)" in text


# What comes out.


def test_losing_cells_are_marked_and_listed() -> None:
    machine = Machine()
    result = measure(case_of(machine.contender(OURS, 0.02), machine.contender("peer", 0.01)), machine)
    text = report.render([result])
    assert "0.50 (0.50-0.50) LOSES" in text and "peer 0.50" in result.line()
    assert "1 cells: 0 win, 1 lose" in text
    assert "LOSES forward-64x128-m4-bf16 against peer: 0.50 (0.50-0.50)" in text


def test_table_has_shapes_as_rows_and_m_as_columns() -> None:
    def result(shape: tuple[int, int], m: int, ratio: float) -> Result:
        case = Case(cases.FORWARD, *shape, m, "bf16", list)
        return Result(case, contenders=[OURS, "peer"], seconds={OURS: [1.0], "peer": [ratio]})

    results = [result((8, 4), 16, 1.5), result((8, 4), 2, 2.0), result((4, 8), 16, 0.75)]
    found = harness.ratio_table(results, "peer")
    lines = [re.split(r" {2,}", line) for line in found.splitlines()]
    assert lines[0] == ["", "M=2", "M=16"]
    assert lines[1] == ["8x4", "2.00 (2.00-2.00)", "1.50 (1.50-1.50)"]
    assert re.search(r"^4x8 +0\.75 \(0\.75-0\.75\) LOSES$", found, re.MULTILINE)


# The run.


def run_of(
    monkeypatch: pytest.MonkeyPatch, output: Path, *found: Any, arguments: Sequence[str] = ("--full",)
) -> tuple[int, list[Any], str]:
    """Status, JSON lines and table of a run of these cases."""
    timed = [case for case in found if isinstance(case, Case)]
    monkeypatch.setattr(cases, "standard", lambda dtype: timed)
    monkeypatch.setattr(memory, "standard", lambda dtype: [case for case in found if case not in timed])
    status = run.main([*arguments, "--repeats", "2", "--min-time", "1e-9", "--output", str(output)])
    lines = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    return status, lines, (output / "table.txt").read_text()


@pytest.mark.usefixtures("small_rotation")
def test_run_writes_json_lines_table_and_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    tiny = [cases.forward(TINY, m, "bf16") for m in (1, 3)]
    saved = memory.Case(memory.BLOCK, "dense", "lora", "bf16", TINY_BLOCK)
    status, lines, table = run_of(monkeypatch, tmp_path, *tiny, block_case(cases.BLOCK_DORA), saved)
    assert status == 0
    assert [line["name"] for line in lines] == [
        "forward-64x128-m1-bf16",
        "forward-64x128-m3-bf16",
        "block-dora-256x512-2x16-bf16",
        "memory-block-dense-lora-bf16",
    ]
    for line in lines[:2]:
        assert line["times_ms"][OURS]["median"] > 0
        assert line["errors"][OURS] < 0.01
        assert line["ratios"]["torch dense"].keys() == {"median", "q1", "q3"}
        assert line["versions"]["torch"] and line["shape"] == [64, 128] and line["dtype"] == "bf16"
    assert lines[2]["ratios"].keys() == {cases.PEFT_ON_DENSE} and lines[2]["costs"].keys() == {
        cases.PLAIN_LORA
    }
    for text in (
        "NF4 linear, forward without grad, bf16: time of torch dense / ours",
        torch.__version__.partition("+")[0],
        "2x16",
        "cost, time of ours / ours, plain LoRA",
        "bytes per token",
        "at most 1.35, measured",
    ):
        assert text in table
    assert (tmp_path / "ratios.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "4 cases, about" in said and "[4/4]" in said

    break_op(monkeypatch, "nf4_linear", one_element_off)
    cases._weights.cache_clear()
    status, _, table = run_of(monkeypatch, tmp_path, tiny[1])
    assert status == 1 and "WRONG" in table


def test_run_ends_in_time_and_names_what_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    found = [Case(cases.FORWARD, *TINY, m, "bf16", lambda: [machine.contender(OURS, 0.01)]) for m in (1, 2)]
    status, lines, table = run_of(monkeypatch, tmp_path, *found, arguments=["--full", "--seconds", "1e-9"])
    assert (status, lines) == (0, [])
    assert f"left out, 2 cases: {found[0].name}, {found[1].name}" in table


def test_ctrl_c_leaves_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop() -> Any:
        raise KeyboardInterrupt

    builds = (lambda: [Machine().contender(OURS, 0.01)], stop)
    found = [Case(cases.FORWARD, *TINY, m, "bf16", build) for m, build in enumerate(builds, 1)]
    status, lines, table = run_of(monkeypatch, tmp_path, *found)
    assert status == 130
    assert [line["name"] for line in lines] == [found[0].name]
    assert f"left out, 1 cases: {found[1].name}" in table


def test_run_refuses_what_it_does_not_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--only", "nothing-like-this", "--output", str(tmp_path / "a")]) == 2
    assert run.main(["--isa", "sse9", "--output", str(tmp_path / "b")]) == 2
    assert "sse9" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_runs_by_default_fits_in_five_minutes(capsys: pytest.CaptureFixture[str]) -> None:
    """By the estimates; and all kinds are in it, but for those that run by name."""

    def listed(*arguments: str) -> set[str]:
        assert run.main(["--list", *arguments]) == 0
        return set(capsys.readouterr().out.split())

    every, default, full = listed(), listed("--only", "|".join(cases.DEFAULT)), listed("--full")
    quick = listed("--quick")
    assert default < full < every and quick < full
    assert every - full == {case.name for case in (*compiled.standard(), *triton_cases.standard())}
    kinds = {name.rpartition("-")[0] if "memory" in name else re.split(r"-\d", name)[0] for name in full}
    for chosen in (default, quick):
        assert {kind for kind in kinds if any(name.startswith(kind) for name in chosen)} >= kinds - {
            "textbook", "step", "decode", *(kind for kind in kinds if "memory-block" in kind),
        }  # fmt: skip
    seconds = {case.name: case.seconds for case in (*cases.standard("bf16"), *memory.standard("bf16"))}
    assert sum(seconds[name] + 1.0 for name in default) < 240
    assert sum(seconds[name] + 1.0 for name in quick) < 70
    assert {"step-576x1536-4x256-bf16", "qlora-1536x576-m4096-bf16", "forward-4096x4096-m512-bf16"} < default


@pytest.mark.usefixtures("small_rotation")
def test_isa_option_holds_our_kernels_to_a_level(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := testing.unavailable("cpu-scalar"):
        pytest.skip(reason)
    arguments = ["--full", "--isa", "scalar"]
    _, (line,), _ = run_of(monkeypatch, tmp_path, cases.dequantize(TINY, "bf16"), arguments=arguments)
    assert line["isa"] == "scalar"


def test_no_picture_of_nothing(tmp_path: Path) -> None:
    assert chart.draw([], tmp_path / "ratios.png", "") is not None

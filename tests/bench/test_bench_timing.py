"""The benchmark suite's timing, with a clock of our own."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench_checks import Machine, case_of, measure

from bench.lib import harness
from bench.lib.harness import Result
from bench.lib.report import OURS, Spread, Timing

pytestmark = pytest.mark.usefixtures("one_thread")


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
    ("nbytes", "cache", "expected"),
    [
        pytest.param(8 * harness.MIB, 32, 8, id="twice-the-cache"),
        pytest.param(65 * harness.MIB, 32, 1, id="one-copy-exceeds-it"),
        pytest.param(2000 * harness.MIB, 32, 1, id="never-none"),
        pytest.param(harness.MIB, 10_000, 256, id="within-the-memory-limit"),
    ],
)
def test_copies(nbytes: int, cache: int, expected: int) -> None:
    assert harness.copies(nbytes, 4, cache=cache * harness.MIB) == expected


def test_last_level_cache_is_the_largest(tmp_path: Path) -> None:
    for index, size in enumerate(("32K", "1024K", "48M")):
        folder = tmp_path / "cpu0" / "cache" / f"index{index}"
        folder.mkdir(parents=True)
        (folder / "size").write_text(size + "\n")
    assert harness.last_level_cache(tmp_path) == 48 * harness.MIB
    assert harness.last_level_cache(tmp_path / "nowhere") == 32 * harness.MIB

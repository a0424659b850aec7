"""The study of many cards: bytes against the format's, the pipeline against cases told by hand."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent.parent))

import testing
from bench.gpu import scaling
from bench.gpu.scaling import BITSANDBYTES, DENSE, MODELS, NETWORKS, OURS, WAYS, Network, pipeline, step
from peft_kernels import NF4Weight
from peft_kernels.cli.sizes import Linear, Run

ROOT = Path(__file__).resolve().parent.parent.parent
RUN = Run("qlora", 1, 2048, 16)
WAY = {way.name: way for way in WAYS}


@pytest.mark.parametrize("shape", [(64, 128), (96, 576), (192, 200)])
def test_bytes_are_those_of_real_weights(shape: tuple[int, int]) -> None:
    weight = NF4Weight.quantize(testing.tensor(*shape))
    packed, absmax, absmax2, offset = (
        part.nbytes
        for part in (weight.packed, weight.absmax, weight.absmax2, weight.offset)
        if part is not None
    )
    linear = Linear("x", *shape, quantised=True)
    assert WAY[OURS].base_bytes(linear, RUN) == (packed + absmax, absmax2 + offset)
    assert WAY[BITSANDBYTES].base_bytes(linear, RUN) == (packed, absmax + absmax2 + offset)
    assert WAY[DENSE].base_bytes(linear, RUN) == (2 * linear.numel, 0)
    assert WAY[OURS].base_bytes(replace(linear, quantised=False), RUN) == (2 * linear.numel, 0)


def test_sizes_of_the_models() -> None:
    """The published numbers of parameters: 8,030,261,248 and 70,553,706,496."""
    counts = [sum(prod(shape) for shape in MODELS[name].parameters) for name in ("8B", "70B")]
    assert counts == [8_030_261_248, 70_553_706_496]


@pytest.mark.parametrize(
    ("work", "ends"),
    [
        ([(0, 5, 0)] * 3, 15),  # nothing to wait for
        ([(1, 5, 0)] * 3, 16),  # the first gather alone shows
        ([(5, 1, 0)] * 3, 16),  # and here the last computation alone
        ([(5, 5, 0)] * 2, 15),
        ([(2, 6, 1)] * 2, 15),  # the last reduction shows
        ([(8, 2, 0), (1, 2, 0), (1, 2, 0)], 14),
    ],
)
def test_pipeline(work: list[tuple[float, float, float]], ends: float) -> None:
    assert pipeline(0.0, work) == ends
    assert pipeline(3.0, work) == ends + 3


def test_one_layer_ahead_and_no_more() -> None:
    """The third is not gathered before the second has begun, however idle the network is."""
    assert pipeline(0.0, [(1, 10, 0), (1, 1, 0), (5, 1, 0)]) == 1 + 10 + 5 + 1


def test_bytes_of_a_step() -> None:
    """By hand for 8B on 8 cards: twice the layers, once the root, once the adapters' gradients."""
    layers, numel, norms = 32, 218_103_808, 2 * 4096 * 2
    numbers = 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    blocks = numel // 64
    layer = numel // 2 + blocks + norms + 4 * numbers
    root = (2 * 128256 * 4096 + 4096) * 2
    want = (2 * layers * layer + root + layers * 4 * numbers) * 7 / 8
    assert step("8B", NETWORKS[0], WAY[OURS], 8, RUN).received == want


def test_what_more_cards_and_replicas_change() -> None:
    network = NETWORKS[1]
    by_cards = [step("70B", network, WAY[OURS], cards, RUN) for cards in (8, 16, 64)]
    assert [one.memory for one in by_cards] == sorted((one.memory for one in by_cards), reverse=True)
    assert by_cards[0].seconds < by_cards[1].seconds < by_cards[2].seconds
    replicas = step("70B", network, WAY[OURS], 64, RUN, shards=8)
    assert replicas.memory == by_cards[0].memory
    assert by_cards[0].seconds <= replicas.seconds < by_cards[2].seconds
    assert by_cards[0].received < replicas.received < by_cards[2].received


@pytest.mark.parametrize("name", MODELS)
def test_ways_beside_each_other(name: str) -> None:
    ours, theirs, dense = (step(name, NETWORKS[1], way, 16, RUN) for way in WAYS)
    assert theirs.received < ours.received < dense.received / 2
    assert ours.memory < dense.memory
    assert ours.compute == theirs.compute == dense.compute <= ours.seconds < dense.seconds


def test_a_network_without_limits_hides_all() -> None:
    network = Network("ideal", NETWORKS[0].card, 8, 1e30, 1e30, 0.0)
    assert step("8B", network, WAY[DENSE], 64, RUN).slowdown == pytest.approx(1.0)


def test_one_card_gathers_nothing() -> None:
    one = step("8B", NETWORKS[0], WAY[OURS], 1, RUN)
    assert one.received == 0 and one.slowdown == pytest.approx(1.0)
    assert one.memory > 8_030_261_248 / 2


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling.main(["--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(found) == len(NETWORKS) * len(MODELS) * (4 * len(WAYS) + 3)
    assert scaling.main(["--tokens", "512"]) == 0
    text = capsys.readouterr().out
    assert "45% of 989 TFLOP/s" in text
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if re.match(r"\| \d", line)]
    assert [row[0] for row in rows] == 4 * ["8", "16", "32", "64"]
    assert all(len(row) == len(scaling.HEADINGS) and float(row[-2]) >= 1 for row in rows)
    with pytest.raises(SystemExit):
        scaling.main(["--rank", "0"])
    assert "--rank take positive numbers" in capsys.readouterr().err


def test_the_documentation_has_this_table() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for title, rows in scaling.tables(list(scaling.outcomes(RUN))):
        model, card = title.split(" on ")
        for row in (rows[0], rows[-1]):
            assert f"| {model}, {row[0]} x {card.split(',')[0]} | {' | '.join(row[1:])} |" in page, title

"""Which table of crossovers a card gets: packaged or pinned, with broken files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peft_kernels.core.backends import crossovers
from peft_kernels.core.backends.crossovers import ANY, Card, Limits, RowRange, Rows, choose, read

H100 = Card("NVIDIA H100 80GB HBM3", "9.0", 132)
ROW = {"weights": None, "forward": 7, "backward": 8}
GOOD: dict[str, Any] = {
    "compute_capability": "9.0",
    "source": "measured",
    "card": H100.name,
    "measured_with": {"driver": "a driver"},
    "rows": [ROW],
}
PINNED = Limits((Rows(ANY, 7, 8),))
OF_WGMMA = GOOD | {
    "rows": [
        {"weights": 1000, "forward": 96, "backward": 64, "forward_wgmma": [97, None]},
        ROW | {"forward_wgmma": [64, 512], "backward_wgmma": [65, 4096]},
    ],
    "experts": [{"weights": None, "forward": 416, "backward": 352}],
}
WGMMA = Limits(
    (Rows(1000, 96, 64, RowRange(97, ANY)), Rows(ANY, 7, 8, RowRange(64, 512), RowRange(65, 4096))),
    (Rows(ANY, 416, 352),),
)


@pytest.fixture(autouse=True)
def wanted(monkeypatch: pytest.MonkeyPatch) -> Callable[[object], None]:
    """Sets the variable, which is unset before."""
    monkeypatch.delenv(crossovers.ENVIRONMENT_VARIABLE, raising=False)
    return lambda value: monkeypatch.setenv(crossovers.ENVIRONMENT_VARIABLE, str(value))


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], None]:
    """Adds a measured table to those of the package."""

    def add(entry: dict[str, Any]) -> None:
        tables = json.loads(crossovers.PACKAGED.read_text())["tables"]
        monkeypatch.setattr(crossovers, "PACKAGED", write(tmp_path / "packaged.json", *tables, entry))

    return add


def write(path: Path, *entries: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"tables": entries}))
    return path


def estimate(capability: str) -> Limits:
    (found,) = [t for t in read(crossovers.PACKAGED) if t.compute_capability == capability and not t.card]
    return found.limits


# The package's tables.


def test_every_kind_of_card_has_one_estimate() -> None:
    tables = read(crossovers.PACKAGED)
    estimated = [t.compute_capability for t in tables if t.source == "estimated"]
    assert estimated == ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]
    for found in tables:
        for rows in found.limits:
            for row in rows:
                limits = row.forward, row.backward
                assert {n % 32 for n in limits} == {0} and 32 <= min(limits) <= max(limits) <= 1024
            # The fixed cost of another launch counts for more with a small weight.
            assert [row.forward for row in rows] == sorted((r.forward for r in rows), reverse=True)
    # torch has no grouped GEMM for the others.
    assert [t.compute_capability for t in tables if t.limits.experts] == ["9.0", "10.0"]


@pytest.mark.parametrize(
    "capability,like", [("8.7", "8.6"), ("9.0", "9.0"), ("10.3", "10.0"), ("11.0", "10.0"), ("12.1", "12.0")]
)
def test_an_unknown_card_is_as_the_one_before(capability: str, like: str) -> None:
    found = choose(H100._replace(compute_capability=capability))
    assert (found.source, found.limits) == ("estimated", estimate(like))


def test_a_packaged_measured_table_goes_first(packaged: Any, wanted: Any) -> None:
    packaged(OF_WGMMA)
    found = choose(H100)
    assert (found.source, found.limits) == ("measured", WGMMA)
    assert choose(H100._replace(name="NVIDIA H200")).source == "estimated"
    wanted("estimated")
    found = choose(H100)
    assert (found.source, found.limits) == ("estimated", estimate("9.0"))


# Files.


BROKEN = {
    "empty": "",
    "cut": json.dumps({"tables": [GOOD]})[:-9],
    "no tables": "{}",
    "a list": "[]",
    "an entry that is none": json.dumps({"tables": [3]}),
    "no rows": json.dumps({"tables": [GOOD | {"rows": []}]}),
    "no card": json.dumps({"tables": [GOOD | {"card": ""}]}),
    "another source": json.dumps({"tables": [GOOD | {"source": "guessed"}]}),
    "no number": json.dumps(
        {"tables": [GOOD | {"rows": [{"weights": None, "forward": "7", "backward": 8}]}]}
    ),
    "negative": json.dumps({"tables": [GOOD | {"rows": [{"weights": None, "forward": 7, "backward": -8}]}]}),
    "a truth": json.dumps({"tables": [GOOD | {"rows": [{"weights": None, "forward": True, "backward": 8}]}]}),
    "no last": json.dumps({"tables": [GOOD | {"rows": [{"weights": 9, "forward": 7, "backward": 8}]}]}),
    "twice": json.dumps({"tables": [GOOD | {"rows": [ROW, ROW]}]}),
    "a range of three": json.dumps({"tables": [GOOD | {"rows": [ROW | {"forward_wgmma": [1, 2, 3]}]}]}),
    "a range without rows": json.dumps({"tables": [GOOD | {"rows": [ROW | {"backward_wgmma": [65, 64]}]}]}),
    "a range without a start": json.dumps(
        {"tables": [GOOD | {"rows": [ROW | {"forward_wgmma": [None, 9]}]}]}
    ),
    "a range from zero": json.dumps({"tables": [GOOD | {"rows": [ROW | {"forward_wgmma": [0, 9]}]}]}),
    "no capability": json.dumps({"tables": [GOOD | {"compute_capability": "90"}]}),
    "a number": json.dumps({"tables": [GOOD | {"compute_capability": 9.0}]}),
    "not text": b"\xff\xfe{}",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_pin_is_an_error(name: str, tmp_path: Path, wanted: Any) -> None:
    content = BROKEN[name]
    (tmp_path / "pinned.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    wanted(tmp_path / "pinned.json")
    with pytest.raises(ValueError, match=r"PEFT_KERNELS_CROSSOVERS: .*pinned\.json: expected tables"):
        choose(H100)


def test_a_file_pins_the_choice(tmp_path: Path, wanted: Any, packaged: Any) -> None:
    packaged(OF_WGMMA)
    wanted(write(tmp_path / "mine.json", OF_WGMMA | {"card": "another"}, GOOD))
    assert choose(H100).limits == PINNED


def test_a_pin_without_the_card_is_an_error(tmp_path: Path, wanted: Any) -> None:
    wanted(tmp_path / "missing.json")
    with pytest.raises(ValueError, match=r"PEFT_KERNELS_CROSSOVERS: .*missing\.json"):
        choose(H100)
    tables = json.loads(crossovers.PACKAGED.read_text())["tables"]
    wanted(write(tmp_path / "other.json", *tables, GOOD | {"card": "H200"}))
    with pytest.raises(ValueError, match=r"other\.json has no table for NVIDIA H100"):
        choose(H100)


@pytest.mark.parametrize("word", ["measured", "guessed"])
def test_another_word_is_an_error_that_says_what_measures(
    word: str, wanted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wanted(word)
    with pytest.raises(ValueError, match=rf"expected estimated, .*crossovers\.py FILE measures: .*{word}"):
        choose(H100)


def test_a_file_of_an_earlier_version_keeps_wgmma_off(tmp_path: Path, wanted: Any) -> None:
    """It was measured without wgmma, and says nothing of it."""
    assert estimate("9.0").has_wgmma
    wanted(write(tmp_path / "old.json", GOOD))
    found = choose(H100)
    assert not found.limits.has_wgmma and found.limits == PINNED


def test_wgmma_can_be_kept_off(wanted: Any, packaged: Any) -> None:
    """On a card with estimates, and on one with a measured table."""
    wanted("no-wgmma")
    found = choose(H100)
    assert found.source == "estimated"
    assert found.limits == estimate("9.0").without_wgmma() and not found.limits.has_wgmma
    packaged(OF_WGMMA)
    found = choose(H100)
    assert found.source == "measured" and found.limits == WGMMA.without_wgmma()

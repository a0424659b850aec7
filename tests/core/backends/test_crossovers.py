"""Which table of crossovers a card gets: packaged, cached, measured or pinned, with broken files."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_kernels.core.backends import crossovers
from peft_kernels.core.backends.crossovers import (
    ANY,
    Card,
    Limits,
    RowRange,
    Rows,
    Table,
    choose,
    read,
    write,
)

H100 = Card("NVIDIA H100 80GB HBM3", "9.0", 132, "a driver", "0123")
MEASURED = Limits((Rows(1000, 96, 64), Rows(ANY, 320, 128)), (Rows(ANY, 416, 352),))
PINNED = Limits((Rows(ANY, 7, 8),))
WGMMA = Limits(
    (Rows(1000, 96, 64, RowRange(97, ANY)), Rows(ANY, 320, 128, RowRange(64, 512), RowRange(65, 4096)))
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; one process and no variables."""
    for name in (crossovers.ENVIRONMENT_VARIABLE, "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wanted(monkeypatch: pytest.MonkeyPatch) -> Callable[[object], None]:
    return lambda value: monkeypatch.setenv(crossovers.ENVIRONMENT_VARIABLE, str(value))


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Limits], None]:
    """Adds a measured table of H100 to those of the package."""

    def add(limits: Limits) -> None:
        tables = read(crossovers.PACKAGED)
        monkeypatch.setattr(crossovers, "PACKAGED", tmp_path / "packaged.json")
        write(crossovers.PACKAGED, [*tables, table(limits)])

    return add


def table(limits: Limits, card: Card = H100) -> Table:
    return Table(card.compute_capability, limits, card.name, {"driver": "a driver"})


def measure() -> Limits:
    return MEASURED


def must_not_measure() -> Limits:
    raise AssertionError("it was measured")


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
    found = choose(H100._replace(compute_capability=capability), must_not_measure)
    assert found is not None and found.source == "estimated" and found.limits == estimate(like)


def test_a_packaged_measured_table_goes_first(packaged: Any, wanted: Any) -> None:
    packaged(MEASURED)
    for value in ("", "measured"):
        wanted(value)
        found = choose(H100, must_not_measure)
        assert found is not None and (found.source, found.limits) == ("measured", MEASURED)
        other = choose(H100._replace(name="NVIDIA H200"), measure if value else must_not_measure)
        assert other is not None and (other.card == "NVIDIA H200") == bool(value)
    wanted("estimated")
    found = choose(H100, must_not_measure)
    assert found is not None and (found.source, found.limits) == ("estimated", estimate("9.0"))


# Files.


def test_a_file_is_read_as_written(tmp_path: Path) -> None:
    tables = [*read(crossovers.PACKAGED), table(MEASURED), table(WGMMA)]
    write(tmp_path / "some" / "folder" / "file.json", tables)
    assert read(tmp_path / "some" / "folder" / "file.json") == tables
    assert [path.name for path in (tmp_path / "some" / "folder").iterdir()] == ["file.json"]


def test_a_file_that_cannot_be_written_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(value: Any, file: Any, **options: Any) -> None:
        file.write('{"tables":')
        raise OSError("disk full")

    write(tmp_path / "file.json", [table(MEASURED)])
    monkeypatch.setattr(json, "dump", fails)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / "file.json", [table(PINNED)])
    assert read(tmp_path / "file.json") == [table(MEASURED)]
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]


ROW = {"weights": None, "forward": 7, "backward": 8}
GOOD: dict[str, Any] = {
    "compute_capability": "9.0",
    "source": "measured",
    "card": H100.name,
    "rows": [ROW],
}
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
def test_a_broken_cache_is_replaced_and_a_broken_pin_is_an_error(
    name: str, tmp_path: Path, wanted: Any, caplog: pytest.LogCaptureFixture
) -> None:
    content = BROKEN[name]
    for path in (crossovers.cache_path(H100), tmp_path / "pinned.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    wanted("measured")
    with caplog.at_level(logging.WARNING, "peft_kernels"):
        found = choose(H100, measure)
    assert found is not None and found.limits == MEASURED
    assert f"a cache of measured crossovers is ignored: {crossovers.cache_path(H100)}" in caplog.text
    assert read(crossovers.cache_path(H100)) == [found]
    wanted(tmp_path / "pinned.json")
    with pytest.raises(ValueError, match=r"PEFT_KERNELS_CROSSOVERS: .*pinned\.json: expected tables"):
        choose(H100, must_not_measure)


# Pins.


def test_a_file_pins_the_choice(tmp_path: Path, wanted: Any, packaged: Any) -> None:
    packaged(MEASURED)
    write(tmp_path / "mine.json", [table(MEASURED, H100._replace(name="another")), table(PINNED)])
    wanted(tmp_path / "mine.json")
    found = choose(H100, must_not_measure)
    assert found is not None and found.limits == PINNED


def test_a_pin_without_the_card_is_an_error(tmp_path: Path, wanted: Any) -> None:
    wanted(tmp_path / "missing.json")
    with pytest.raises(ValueError, match=r"PEFT_KERNELS_CROSSOVERS: .*missing\.json"):
        choose(H100, must_not_measure)
    write(tmp_path / "other.json", [*read(crossovers.PACKAGED), table(PINNED, H100._replace(name="H200"))])
    wanted(tmp_path / "other.json")
    with pytest.raises(ValueError, match=r"other\.json has no table for NVIDIA H100"):
        choose(H100, must_not_measure)


def test_a_file_of_an_earlier_version_keeps_wgmma_off(tmp_path: Path, wanted: Any) -> None:
    """It was measured without wgmma, and says nothing of it."""
    assert estimate("9.0").has_wgmma
    (tmp_path / "old.json").write_text(json.dumps({"tables": [GOOD]}))
    wanted(tmp_path / "old.json")
    found = choose(H100, must_not_measure)
    assert found is not None and not found.limits.has_wgmma and found.limits == PINNED


def test_wgmma_can_be_kept_off(wanted: Any, packaged: Any) -> None:
    """On a card with estimates, and on one with a measured table."""
    wanted("no-wgmma")
    found = choose(H100, must_not_measure)
    assert found is not None and found.source == "estimated"
    assert found.limits == estimate("9.0").without_wgmma() and not found.limits.has_wgmma
    packaged(WGMMA)
    found = choose(H100, must_not_measure)
    assert found is not None and found.source == "measured" and found.limits == WGMMA.without_wgmma()


# The cache.


def test_a_card_is_measured_once(wanted: Any) -> None:
    wanted("measured")
    first = choose(H100, measure)
    assert first is not None and (first.source, first.limits) == ("measured", MEASURED)
    assert first.measured_with == {"driver": "a driver", "library": "0123", "torch": torch.__version__}
    assert choose(H100, must_not_measure) == first


def test_nothing_is_measured_unless_wanted(cache: Path, wanted: Any) -> None:
    for value in ("", "estimated"):
        wanted(value)
        found = choose(H100, must_not_measure)
        assert found is not None and found.limits == estimate("9.0")
    assert not cache.exists()
    wanted("measured")
    choose(H100, measure)
    wanted("")
    found = choose(H100, must_not_measure)
    assert found is not None and found.source == "estimated"


@pytest.mark.parametrize("field", Card._fields)
def test_another_card_driver_or_library_is_measured_anew(field: str, wanted: Any) -> None:
    wanted("measured")
    choose(H100, measure)
    other = H100._replace(**{field: 84 if field == "multiprocessors" else "9.1"})
    found = choose(other, lambda: PINNED)
    assert found is not None and found.limits == PINNED
    assert found.card == other.name


def test_a_card_that_cannot_be_measured_now_is_measured_later(wanted: Any) -> None:
    wanted("measured")
    assert choose(H100, None) is None
    choose(H100, measure)
    found = choose(H100, None)
    assert found is not None and found.source == "measured"


def test_without_memory_the_estimates_are_used(wanted: Any, caplog: pytest.LogCaptureFixture) -> None:
    def fails() -> Limits:
        raise torch.OutOfMemoryError("no memory")

    wanted("measured")
    found = choose(H100, fails)
    assert found is not None and found.limits == estimate("9.0")
    assert "cannot be measured on NVIDIA H100 80GB HBM3, the estimates are used: no memory" in caplog.text
    assert not crossovers.cache_path(H100).exists()


def test_without_a_place_for_the_cache_a_measured_table_is_used(
    cache: Path, wanted: Any, caplog: pytest.LogCaptureFixture
) -> None:
    cache.write_text("a file where the folder would be")
    wanted("measured")
    found = choose(H100, measure)
    assert found is not None and found.limits == MEASURED
    assert "measured crossovers cannot be cached" in caplog.text


# Several processes.


def test_a_job_of_several_processes_measures_nothing(
    wanted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor does it read the cache, which its other machines may not have."""
    wanted("measured")
    choose(H100, measure)
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = choose(H100, must_not_measure)
    assert found is not None and found.limits == estimate("9.0")
    assert "in a job of several processes nothing is measured" in caplog.text
    write(tmp_path / "pinned.json", [table(PINNED)])
    wanted(tmp_path / "pinned.json")
    found = choose(H100, must_not_measure)
    assert found is not None and found.limits == PINNED

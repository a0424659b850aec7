"""Up to how many rows of activations back end `cuda` fuses an NF4 GEMM, by card and size of the weight, and
for which rows it does so with `wgmma`, which compute capability 9.0 has. With more rows the weight is
dequantised for cuBLAS. The same for experts, by the mean of their rows: with more, their weights are
dequantised for torch's grouped GEMM, on cards for which that has a kernel.

`crossovers.json` has estimates by compute capability, and tables of cards on which both ways were timed.
PEFT_KERNELS_CROSSOVERS selects:

- unset: the table of the card, otherwise that of its compute capability.
- "estimated": the table of its compute capability.
- "no-wgmma": as unset, without wgmma.
- a path: the table of the card in that file, which bench/gpu/crossovers.py writes.

A table without ranges for wgmma, as files of earlier versions are, does not use it. No device does before it
has passed its self-test (self_test/gemms.py).

The choice changes the last bits of results, so all processes of a job must make the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

ENVIRONMENT_VARIABLE = "PEFT_KERNELS_CROSSOVERS"
ESTIMATED, MEASURED, NO_WGMMA = "estimated", "measured", "no-wgmma"
PACKAGED = Path(__file__).with_suffix(".json")
ANY = 2**62
"""More weights and rows than there are."""


class RowRange(NamedTuple):
    """Numbers of rows from `least` to `most`; none by default."""

    least: int = 1
    most: int = 0


NO_ROWS, ALL_ROWS = RowRange(), RowRange(1, ANY)


class Rows(NamedTuple):
    """The most rows of activations that are fused, for weights of at most `weights` elements, and the rows
    for which wgmma is used, which go before these limits."""

    weights: int
    forward: int
    backward: int
    forward_wgmma: RowRange = NO_ROWS
    backward_wgmma: RowRange = NO_ROWS

    def without_wgmma(self) -> Rows:
        return self._replace(forward_wgmma=NO_ROWS, backward_wgmma=NO_ROWS)


WGMMA_RANGES = Rows._fields[3:]
"""The fields of `Rows` that are for wgmma."""


class Limits(NamedTuple):
    """Crossovers in ascending order of weights, the last for any weight."""

    rows: tuple[Rows, ...]
    """Of GEMMs with one weight."""
    experts: tuple[Rows, ...] = ()
    """Of grouped GEMMs: of an expert, whose rows are the mean. Empty: the estimate, if there is one."""

    @property
    def has_wgmma(self) -> bool:
        return self != self.without_wgmma()

    def without_wgmma(self) -> Limits:
        return Limits(*(tuple(row.without_wgmma() for row in rows) for rows in self))


class Card(NamedTuple):
    """A GPU: what decides which way is faster on it."""

    name: str
    compute_capability: str  # "9.0"
    multiprocessors: int

    @property
    def number(self) -> int:
        """The compute capability: 90."""
        return _number(self.compute_capability)


class Table(NamedTuple):
    """The crossovers of a card, or estimates for a compute capability."""

    compute_capability: str
    limits: Limits
    card: str = ""

    @property
    def source(self) -> str:
        return MEASURED if self.card else ESTIMATED

    def without_wgmma(self) -> Table:
        return self._replace(limits=self.limits.without_wgmma())


def read(path: Path) -> list[Table]:
    """The tables of a file. Raises OSError, or ValueError when it is none of tables."""
    try:
        return [_table(entry) for entry in json.loads(path.read_text(encoding="utf-8"))["tables"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected tables as in {PACKAGED.name}: {error!r}") from None


def _table(entry: dict[str, Any]) -> Table:
    limits = Limits(_rows(entry["rows"]), _rows(entry["experts"]) if "experts" in entry else ())
    card, capability = entry.get("card", ""), entry["compute_capability"]
    _number(capability)
    if entry["source"] != (MEASURED if card else ESTIMATED):
        raise ValueError(f"expected a card where the source is measured, got {entry['source']!r}, {card!r}")
    return Table(capability, limits, card)


def _rows(entries: list[dict[str, Any]]) -> tuple[Rows, ...]:
    rows = []
    for row in entries:
        ranges = (_range(row[name]) if name in row else NO_ROWS for name in WGMMA_RANGES)
        rows.append(Rows(_number_or_any(row["weights"]), row["forward"], row["backward"], *ranges))
    sizes = [row.weights for row in rows]
    if not all(type(n) is int and 0 <= n <= ANY for row in rows for n in row[:3]):
        raise ValueError(f"expected whole numbers, got {rows}")
    if sizes != sorted(set(sizes)) or sizes[-1:] != [ANY]:
        raise ValueError(f"expected ascending weights that end with null, got {sizes}")
    return tuple(rows)


def _range(entry: list[Any]) -> RowRange:
    least, most = entry
    found = RowRange(least, _number_or_any(most))
    if not all(type(n) is int for n in found) or not 0 < found.least <= found.most <= ANY:
        raise ValueError(f"expected the least and the most rows, or null for any, got {entry}")
    return found


def _number_or_any(number: Any) -> Any:
    return ANY if number is None else number


def set_estimates(extension: Any) -> None:
    """Gives a compiled library the estimates for all cards, without wgmma, which no device has checked."""
    for table in read(PACKAGED):
        if not table.card:
            limits = table.limits.without_wgmma()
            extension.set_limits(_number(table.compute_capability), 0, *limits)


def set_limits(extension: Any, card: Card, limits: Limits) -> None:
    """Sets what a compiled library uses for all cards like this one; where it is empty, the estimates."""
    extension.set_limits(card.number, card.multiprocessors, *limits)


@contextmanager
def forced(extension: Any, card: Card, row: Rows) -> Iterator[None]:
    """Sets the same for weights of any size inside, and the estimates afterwards."""
    set_limits(extension, card, Limits((row,), (row,)))
    try:
        yield
    finally:
        set_limits(extension, card, Limits(()))


def choose(card: Card) -> Table:
    """The table to use for a card. Raises ValueError when the file that PEFT_KERNELS_CROSSOVERS names cannot
    be used."""
    wanted = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if wanted not in ("", ESTIMATED, NO_WGMMA):
        return _pinned(card, Path(wanted))
    own = None if wanted == ESTIMATED else _of_card(card, read(PACKAGED))
    found = own or estimate(card)
    return found.without_wgmma() if wanted == NO_WGMMA else found


def estimate(card: Card) -> Table:
    """Of the highest compute capability up to the card's, as the compiled library chooses."""
    own = card.number
    known = {_number(table.compute_capability): table for table in read(PACKAGED) if not table.card}
    return known[max(number for number in known if number <= own)]


def _pinned(card: Card, path: Path) -> Table:
    try:
        found = _of_card(card, read(path))
        reason = f"{path} has no table for {card.name}"
    except (OSError, ValueError) as error:
        found, reason = None, str(error)
    if found is None:
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE}: expected {ESTIMATED}, {NO_WGMMA} or a file with a table for this card, "
            f"as python bench/gpu/crossovers.py FILE measures: {reason}"
        )
    return found


def _of_card(card: Card, tables: Iterable[Table]) -> Table | None:
    return next((table for table in tables if table.card == card.name), None)


def _number(compute_capability: str) -> int:
    major, minor = compute_capability.split(".")
    return 10 * int(major) + int(minor)

"""Up to how many rows of activations back end `cuda` fuses an NF4 GEMM, by card and size of the weight, and
for which rows it does so with `wgmma`, which compute capability 9.0 has. With more rows the weight is
dequantised for cuBLAS. The same for experts, by the mean of their rows: with more, their weights are
dequantised for torch's grouped GEMM, on cards for which that has a kernel.

`crossovers.json` has estimates by compute capability, and tables of cards on which both ways were timed
(bench/gpu/crossovers.py). PEFT_KERNELS_CROSSOVERS selects:

- unset: the table of the card, otherwise that of its compute capability.
- "estimated": the table of its compute capability.
- "no-wgmma": as unset, without wgmma.
- "measured": the table of the card, otherwise one that is timed at its first use and cached.
- a path: the table of the card in that file.

A table without ranges for wgmma, as files of earlier versions are, does not use it. No device does before it
has passed wgmma_check.py.

The choice changes the last bits of results, so all processes of a job must make the same. No choice depends
on another process: with several, "measured" is as unset.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

ENVIRONMENT_VARIABLE = "PEFT_KERNELS_CROSSOVERS"
ESTIMATED, MEASURED, NO_WGMMA = "estimated", "measured", "no-wgmma"
PACKAGED = Path(__file__).with_suffix(".json")
ANY = 2**62
"""More weights and rows than there are."""

logger = logging.getLogger("peft_kernels")


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

    @property
    def has_wgmma(self) -> bool:
        return (self.forward_wgmma, self.backward_wgmma) != (NO_ROWS, NO_ROWS)

    def without_wgmma(self) -> Rows:
        return self._replace(forward_wgmma=NO_ROWS, backward_wgmma=NO_ROWS)


class Limits(NamedTuple):
    """Crossovers in ascending order of weights, the last for any weight."""

    rows: tuple[Rows, ...]
    """Of GEMMs with one weight."""
    experts: tuple[Rows, ...] = ()
    """Of grouped GEMMs: of an expert, whose rows are the mean. Empty: the estimate, if there is one."""

    @property
    def has_wgmma(self) -> bool:
        return any(row.has_wgmma for rows in self for row in rows)

    def without_wgmma(self) -> Limits:
        return Limits(*(tuple(row.without_wgmma() for row in rows) for rows in self))


class Card(NamedTuple):
    """A GPU, and what else decides which way is faster on it."""

    name: str
    compute_capability: str  # "9.0"
    multiprocessors: int
    driver: str = ""
    library: str = ""
    """A hash of the compiled kernels."""


@dataclass(frozen=True)
class Table:
    """The crossovers of a card, or estimates for a compute capability."""

    compute_capability: str
    limits: Limits
    card: str = ""
    measured_with: dict[str, str] = field(default_factory=dict)

    @property
    def source(self) -> str:
        return MEASURED if self.card else ESTIMATED

    def without_wgmma(self) -> Table:
        return replace(self, limits=self.limits.without_wgmma())


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
    return Table(capability, limits, card, entry.get("measured_with", {}))


def _rows(entries: list[dict[str, Any]]) -> tuple[Rows, ...]:
    rows = []
    for row in entries:
        ranges = (_range(row[name]) if name in row else NO_ROWS for name in WGMMA)
        rows.append(Rows(_number_or_any(row["weights"]), row["forward"], row["backward"], *ranges))
    sizes = [row.weights for row in rows]
    if not all(type(n) is int and 0 <= n <= ANY for row in rows for n in row[:3]):
        raise ValueError(f"expected whole numbers, got {rows}")
    if sizes != sorted(set(sizes)) or sizes[-1:] != [ANY]:
        raise ValueError(f"expected ascending weights that end with null, got {sizes}")
    return tuple(rows)


WGMMA = "forward_wgmma", "backward_wgmma"


def _range(entry: list[Any]) -> RowRange:
    least, most = entry
    found = RowRange(least, _number_or_any(most))
    if not all(type(n) is int for n in found) or not 0 < found.least <= found.most <= ANY:
        raise ValueError(f"expected the least and the most rows, or null for any, got {entry}")
    return found


def _number_or_any(number: Any) -> Any:
    return ANY if number is None else number


def _row_entry(row: Rows) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "weights": _any_is_none(row.weights),
        "forward": row.forward,
        "backward": row.backward,
    }
    for name in WGMMA:
        if (found := getattr(row, name)) != NO_ROWS:
            entry[name] = [found.least, _any_is_none(found.most)]
    return entry


def _any_is_none(number: int) -> int | None:
    return None if number == ANY else number


def write(path: Path, tables: Iterable[Table]) -> None:
    """Writes a file of tables; readers see all of it or what was there before."""
    entries = []
    for table in tables:
        entry: dict[str, Any] = {"compute_capability": table.compute_capability, "source": table.source}
        if table.card:
            entry |= {"card": table.card, "measured_with": table.measured_with}
        for name, rows in table.limits._asdict().items():
            if rows:
                entry[name] = [_row_entry(row) for row in rows]
        entries.append(entry)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump({"tables": entries}, file, indent=2)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def set_estimates(extension: Any) -> None:
    """Gives a compiled library the estimates for all cards, without wgmma, which no device has checked."""
    for table in read(PACKAGED):
        if not table.card:
            limits = table.limits.without_wgmma()
            extension.set_limits(_number(table.compute_capability), 0, *limits)


def set_limits(extension: Any, card: Card, limits: Limits) -> None:
    """Sets what a compiled library uses for all cards like this one; where it is empty, the estimates."""
    extension.set_limits(_number(card.compute_capability), card.multiprocessors, *limits)


@contextmanager
def forced(extension: Any, card: Card, row: Rows) -> Iterator[None]:
    """Sets the same for weights of any size inside, and the estimates afterwards."""
    set_limits(extension, card, Limits((row,), (row,)))
    try:
        yield
    finally:
        set_limits(extension, card, Limits(()))


def choose(card: Card, measure: Callable[[], Limits] | None) -> Table | None:
    """The table to use for a card.

    Parameters
    ----------
    card : Card
    measure : callable
        Times GEMMs on the card; may raise RuntimeError. None where nothing can be timed now.

    Returns
    -------
    Table or None
        None if the card must be measured, and cannot be now.

    Raises
    ------
    ValueError
        The file that PEFT_KERNELS_CROSSOVERS names cannot be used.
    """
    wanted = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if wanted not in ("", ESTIMATED, MEASURED, NO_WGMMA):
        return _pinned(card, Path(wanted))
    own = None if wanted == ESTIMATED else _of_card(card, read(PACKAGED))
    if own is not None or wanted != MEASURED:
        found = own or estimate(card)
        return found.without_wgmma() if wanted == NO_WGMMA else found
    if _has_several_processes():
        logger.warning(
            "%s=%s: in a job of several processes nothing is measured, and the estimates are used. To use a "
            "measured table, set it to the same file for all of them",
            ENVIRONMENT_VARIABLE, MEASURED,
        )  # fmt: skip
        return estimate(card)
    return _cached(card) or (None if measure is None else _measured(card, measure) or estimate(card))


def estimate(card: Card) -> Table:
    """Of the highest compute capability up to the card's, as the compiled library chooses."""
    own = _number(card.compute_capability)
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
            f"{ENVIRONMENT_VARIABLE}: expected {ESTIMATED}, {MEASURED}, {NO_WGMMA} or a file with a table "
            f"for this card: {reason}"
        )
    return found


def _of_card(card: Card, tables: Iterable[Table]) -> Table | None:
    return next((table for table in tables if table.card == card.name), None)


def _number(compute_capability: str) -> int:
    major, minor = compute_capability.split(".")
    return 10 * int(major) + int(minor)


def _has_several_processes() -> bool:
    size = os.environ.get("WORLD_SIZE", "")  # set by launchers, before there is a process group
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        return True
    return size.isdigit() and int(size) > 1


def cache_path(card: Card) -> Path:
    """The file that has the table measured on this card. Raises RuntimeError without a home folder."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    key = hashlib.sha256("\0".join(map(str, card)).encode()).hexdigest()[:16]
    return folder / "peft_kernels" / f"crossovers-{key}.json"


def _cached(card: Card) -> Table | None:
    try:
        path = cache_path(card)
        return _of_card(card, read(path)) if path.exists() else None
    except (OSError, ValueError, RuntimeError) as error:
        logger.warning("a cache of measured crossovers is ignored: %s", error)
        return None


def _measured(card: Card, measure: Callable[[], Limits]) -> Table | None:
    """Measures, and fills the cache. None if that fails."""
    try:
        table = Table(card.compute_capability, measure(), card.name, conditions(card))
    except RuntimeError as error:  # such as torch.OutOfMemoryError
        logger.warning("crossovers cannot be measured on %s, the estimates are used: %s", card.name, error)
        return None
    try:
        path = cache_path(card)
        write(path, [table])
    except (OSError, RuntimeError) as error:
        logger.warning("measured crossovers cannot be cached: %s", error)
    else:
        logger.info("crossovers of %s measured and written to %s", card.name, path)
    return table


def conditions(card: Card) -> dict[str, str]:
    """What a measured table depends on beside the card."""
    return {"driver": card.driver, "library": card.library, "torch": torch.__version__}

"""The contenders of a case, built from entries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from .correctness import Expected
from .harness import Absent, Contender, Contenders, first_line
from .layers import LayerCache
from .report import OURS, missing


@dataclass
class Entry:
    """A contender to build: `make` returns its layers (or calls), one per copy of the weights."""

    name: str
    make: Callable[[], Sequence[Any]]
    verify: Callable[[Any], float]
    needs: str = ""
    """Import names of the libraries it needs, separated by spaces."""
    call: Callable[[Any], Callable[[], Any]] | None = None
    """How one of its layers is called, if not as those of the other entries."""
    remark: Callable[[Any], str] = lambda layer: ""


def contenders(
    entries: Sequence[Entry],
    call: Callable[[Any], Callable[[], Any]] = lambda layer: layer,
    cache: LayerCache | None = None,
) -> Contenders:
    """Builds the entries; an entry that cannot be built is absent. `cache` keeps layers for later cases."""
    built: Contenders = []
    for entry in entries:
        if reason := missing(entry.needs):
            built.append(Absent(entry.name, reason))
            continue
        try:
            layers = entry.make() if cache is None else cache.get(entry.name, entry.make)
        except Exception as error:  # the others still run
            built.append(Absent(entry.name, f"{type(error).__name__}: {first_line(error)}"))
            continue
        calls = [(entry.call or call)(layer) for layer in layers]
        built.append(Contender(entry.name, calls, entry.verify, partial(entry.remark, layers[0])))
    return built


def compared(wanted: Expected, makes: Mapping[str, Callable[[], Any]], needs: str = "") -> Contenders:
    """Contenders of one call each, which `makes` makes. Ours is held to the bounds of the tests."""
    return contenders(
        [
            Entry(name, lambda make=make: [make()], wanted.strict if name == OURS else wanted.sane, needs)
            for name, make in makes.items()
        ]
    )

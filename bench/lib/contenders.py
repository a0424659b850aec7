"""Who competes in a case, and why somebody is absent."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from .harness import Absent, Contender, first_line
from .layers import Kept


@dataclass
class Entry:
    """A contender to be built: `make` gives its layers (or calls), one for each copy of the weights."""

    name: str
    make: Callable[[], Sequence[Any]]
    verify: Callable[[Any], float]
    needs: str = ""
    """Libraries, by import name, without which it is absent."""
    call: Callable[[Any], Callable[[], Any]] | None = None
    """How one of its layers is called, where that is not the same for all entries."""
    remark: Callable[[Any], str] = lambda layer: ""


def missing(needs: str) -> str:
    """Which of the libraries are not installed, or nothing."""
    absent = [library for library in needs.split() if importlib.util.find_spec(library) is None]
    return f"{', '.join(absent)} not installed" if absent else ""


def contenders(
    weights: Kept, entries: Sequence[Entry], call: Callable[[Any], Callable[[], Any]] = lambda layer: layer
) -> list[Contender | Absent]:
    built: list[Contender | Absent] = []
    for entry in entries:
        if reason := missing(entry.needs):
            built.append(Absent(entry.name, reason))
            continue
        try:
            kept = weights.keep(entry.name, entry.make)
        except Exception as error:  # whatever a peer raises, the others go on
            built.append(Absent(entry.name, f"{type(error).__name__}: {first_line(error)}"))
            continue
        calls = [(entry.call or call)(layer) for layer in kept]
        built.append(Contender(entry.name, calls, entry.verify, partial(entry.remark, kept[0])))
    return built

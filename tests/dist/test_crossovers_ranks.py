"""Processes of a job choose the same crossovers, whatever each would measure or has in its cache. Two
processes."""

from __future__ import annotations

import os
from pathlib import Path

import torch.distributed as dist
from ranks import MARKS, rank_tests

from peft_kernels.core.backends import crossovers
from peft_kernels.core.backends.crossovers import ANY, Card, Limits, Rows, Table, choose

pytestmark = MARKS
CARD = Card("NVIDIA H100 80GB HBM3", "9.0", 132)


def chosen(folder: Path, wanted: str) -> Limits:
    """What this process chooses, with a cache of its own and measuring something else than the others."""
    rank = dist.get_rank()
    os.environ |= {"XDG_CACHE_HOME": str(folder / str(rank)), crossovers.ENVIRONMENT_VARIABLE: wanted}
    mine = Limits((Rows(ANY, 64 + rank, 64),), (Rows(ANY, 96 + rank, 96),))
    crossovers.write(crossovers.cache_path(CARD), [Table("9.0", mine, CARD.name)])
    table = choose(CARD, lambda: mine)
    assert table is not None
    return table.limits


def check_equal(limits: Limits) -> None:
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, limits)
    assert found == [limits] * len(found)


def a_launcher_says_that_there_are_several(folder: Path) -> None:
    check_equal(chosen(folder, "measured"))


def a_process_group_says_it(folder: Path) -> None:
    launched = os.environ.pop("WORLD_SIZE")
    try:
        check_equal(chosen(folder, "measured"))
    finally:
        os.environ["WORLD_SIZE"] = launched


def a_file_is_the_same_for_all(folder: Path) -> None:
    pinned = Table("9.0", Limits((Rows(ANY, 7, 8),), (Rows(ANY, 9, 10),)), CARD.name)
    path = folder / "pinned.json"
    if dist.get_rank() == 0:
        crossovers.write(path, [pinned])
    dist.barrier()
    limits = chosen(folder, str(path))
    check_equal(limits)
    assert limits == pinned.limits


errors, test_cases = rank_tests(
    2, [a_launcher_says_that_there_are_several, a_process_group_says_it, a_file_is_the_same_for_all]
)

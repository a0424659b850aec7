"""Processes of torch.distributed that tests start, and what they found."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.context import BaseContext
from typing import Any


def found_by_rank(context: BaseContext, ranks: int, work: Callable[..., None], *args: Any) -> dict[int, Any]:
    """What `work(rank, *args, queue)` puts into the queue, pairs of its rank and anything."""
    queue = context.Queue()
    processes: list[Any] = [
        context.Process(target=work, args=(rank, *args, queue), daemon=True)  # type: ignore[attr-defined]
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    found = dict(queue.get(timeout=240) for _ in processes)
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    return found

"""Processes of torch.distributed that tests start, and what they found."""

from __future__ import annotations

import multiprocessing as mp
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

Case = Callable[[Path], None]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


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


def told_by_rank(ranks: int, cases: Sequence[Case], preload: Sequence[str]) -> dict[int, dict[str, str]]:
    """What went wrong in each of some cases, by process: they run one after the other in processes that are
    started once. `preload`: modules that are imported once, in the process that these are forked from."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "torch.distributed", *preload])
    with tempfile.TemporaryDirectory() as folder:
        return found_by_rank(context, ranks, _run_cases, ranks, free_port(), folder, cases)


def assert_nothing_told(told: dict[int, dict[str, str]], case: str) -> None:
    for rank, by_case in told.items():
        assert not by_case[case], f"process {rank}: {by_case[case]}"


def enter(rank: int, ranks: int, port: int) -> None:
    """Make this process one of several, as torchrun does: libraries look at the environment."""
    torch.set_num_threads(1)
    place: dict[str, Any] = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(value) for name, value in place.items()})
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the name of the machine may resolve to nothing


def _run_cases(rank: int, ranks: int, port: int, folder: str, cases: Sequence[Case], queue: Any) -> None:
    enter(rank, ranks, port)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    told = {case.__name__: "not run: an earlier case failed" for case in cases}
    for case in cases:
        try:
            case(Path(folder) / case.__name__)
        except BaseException:
            told[case.__name__] = traceback.format_exc()
            break  # the processes may be at different places now
        told[case.__name__] = ""
    queue.put((rank, told))
    dist.destroy_process_group()


class Sent(TorchDispatchMode):
    """Counts the bytes that this process gives to collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [t for t in args[0] if isinstance(t, torch.Tensor)]
            if any(type(t) is not torch.Tensor for t in tensors):
                return NotImplemented  # is asked itself, and gives something else
            self.nbytes += sum(t.nbytes for t in tensors)
        return func(*args, **(kwargs or {}))

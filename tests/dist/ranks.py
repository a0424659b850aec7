"""Runs tests in processes of torch.distributed and collects their results."""

from __future__ import annotations

import multiprocessing as mp
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest
import small_models  # noqa: F401
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

Case = Callable[[Path], None]
MARKS = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed"),
]
"""For modules whose tests start processes."""

PRELOADED = [
    *("pytest", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "torch._dynamo"),
    *("transformers.models.llama.modeling_llama", "transformers.distributed", "transformers.trainer"),
    *("peft", "datasets", "trl.trainer.sft_trainer", "peft_kernels"),
]
"""Slow imports of tests in several processes. Those not installed are skipped."""


def forked() -> BaseContext:
    """Forks processes from one that has imported modules once, started once per test run: it must not import
    only what the first test needs."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def found_by_rank(ranks: int, work: Callable[..., None], *args: Any) -> dict[int, Any]:
    """Values that `work(rank, *args, queue)` puts into the queue as (rank, value), by rank."""
    context = forked()
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


def ended(processes: Sequence[Any], seconds: float = 300.0) -> list[int]:
    """Exit codes. After one failure the other processes are killed, as torchrun does, as they would wait."""
    left = {process.sentinel: process for process in processes}
    end = time.monotonic() + seconds
    while left:
        done = wait(list(left), timeout=max(1.0, end - time.monotonic()))
        for sentinel in done:
            left[sentinel].join()
        failed = not done or any(left[sentinel].exitcode for sentinel in done)
        left = {sentinel: process for sentinel, process in left.items() if sentinel not in done}
        for process in left.values() if failed else ():
            process.kill()
    return [process.exitcode for process in processes]


def errors_by_rank(ranks: int, cases: Sequence[Case]) -> dict[int, dict[str, str]]:
    """Runs cases in order in processes started once. Returns tracebacks by rank and case."""
    with tempfile.TemporaryDirectory() as folder:
        return found_by_rank(ranks, _run_cases, ranks, free_port(), folder, cases)


def rank_tests(ranks: int, cases: Sequence[Case]) -> tuple[Any, Any]:
    """A module's fixture that runs `cases` in processes, and a test of each: `errors, test_cases = ...`."""

    @pytest.fixture(scope="module")
    def errors() -> dict[int, dict[str, str]]:
        return errors_by_rank(ranks, cases)

    @pytest.mark.parametrize("case", [case.__name__ for case in cases])
    def test(errors: dict[int, dict[str, str]], case: str) -> None:
        assert_no_errors(errors, case)

    return errors, test


def assert_no_errors(errors: dict[int, dict[str, str]], case: str) -> None:
    for rank, by_case in errors.items():
        assert not by_case[case], f"process {rank}: {by_case[case]}"


def enter(rank: int, ranks: int, port: int) -> None:
    """Sets the environment of a rank, as torchrun does."""
    torch.set_num_threads(1)
    place: dict[str, Any] = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(value) for name, value in place.items()})
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the host name may not resolve


def _run_cases(rank: int, ranks: int, port: int, folder: str, cases: Sequence[Case], queue: Any) -> None:
    enter(rank, ranks, port)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    errors = {case.__name__: "not run: an earlier case failed" for case in cases}
    for case in cases:
        try:
            case(Path(folder) / case.__name__)
            dist.barrier()
        except BaseException:
            errors[case.__name__] = traceback.format_exc()
            break  # processes may be out of step now
        errors[case.__name__] = ""
    queue.put((rank, errors))
    dist.destroy_process_group()


def whole(tensors: dict[str, Any]) -> dict[str, Any]:
    """Gathers those that are sharded."""
    return {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in tensors.items()}


class Sent(TorchDispatchMode):
    """Counts the bytes that this process sends to collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [t for t in args[0] if isinstance(t, torch.Tensor)]
            if any(type(t) is not torch.Tensor for t in tensors):
                return NotImplemented  # lets the subclass handle it
            self.nbytes += sum(t.nbytes for t in tensors)
        return func(*args, **(kwargs or {}))

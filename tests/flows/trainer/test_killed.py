"""When a process of a Trainer run is killed or hangs, the others end with an error, and a run resumed from
the last checkpoint gives the results of an uninterrupted one."""

from __future__ import annotations

import os
import queue as queues
import re
import signal
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import transformers
from flow_models import adapted, llama, logged, rows_of, trainer
from installed import before
from ranks import MARKS, enter, forked, free_port
from rounding import ONE_LAYER

import peft_kernels as pk

pytest.importorskip("accelerate", reason="accelerate is not installed")
pytestmark = MARKS

STEPS, SAVED, KILLED = 8, 4, 6
RANKS, TIMEOUT = 2, 15
"""Timeout of collectives in seconds."""
OPTIMIZERS = ("AdamW", "AdamW8bit")


class Killer(transformers.TrainerCallback):
    """Sends its own process a signal that cannot be caught."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == KILLED:
            os.kill(os.getpid(), self.number)


def work(rank: int, port: int, folder: str, optimizer: str, doomed: dict[int, int], queue: Any) -> None:
    """Trains, from the last checkpoint if there is one. Reports the losses or the error."""
    enter(rank, RANKS, port)
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))  # `ddp_timeout` applies to GPUs only
    model = adapted(llama("nf4", num_hidden_layers=1), r=4)
    pk.patch(model)
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": SAVED, "optim": "adamw_torch"}
    given: dict[str, Any] = {"callbacks": [Killer(doomed[rank])] if rank in doomed else []}
    if optimizer == "AdamW8bit":
        given["optimizer_cls_and_kwargs"] = pk.optim.AdamW8bit, {"lr": 5e-3, "min_8bit_size": 64}
    made = trainer(model, Path(folder), STEPS, rows_of(STEPS), given, **options)
    code = 0
    try:
        made.train(resume_from_checkpoint=any(Path(folder).glob("checkpoint-*")) or None)
        queue.put((rank, logged(made)))
    except Exception:
        queue.put((rank, traceback.format_exc()))
        code = 1
    queue.close()
    queue.join_thread()
    os._exit(code)  # torch 2.11 may deadlock if DDP is freed after the process group


def run(folder: Path, optimizer: str, doomed: dict[int, int]) -> tuple[list[int | None], dict[int, Any]]:
    """Exit codes (None: still running), and the reports of the processes that sent one."""
    context: Any = forked()
    queue = context.Queue()
    arguments = free_port(), str(folder), optimizer, doomed, queue
    processes = [context.Process(target=work, args=(rank, *arguments), daemon=True) for rank in range(RANKS)]
    for process in processes:
        process.start()
    end = time.monotonic() + 8 * TIMEOUT
    for rank, process in enumerate(processes):
        if doomed.get(rank) != signal.SIGSTOP:
            process.join(timeout=max(0.0, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    assert None not in [code for rank, code in enumerate(codes) if doomed.get(rank) != signal.SIGSTOP], codes
    by_rank: dict[int, Any] = {}
    while True:
        try:
            rank, what = queue.get(timeout=0.2)
        except queues.Empty:
            return codes, by_rank
        by_rank[rank] = what


@pytest.fixture(scope="module", params=OPTIMIZERS)
def baseline(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, list[float]]:
    """An optimizer, and the losses of an uninterrupted run."""
    codes, by_rank = run(tmp_path_factory.mktemp(request.param), request.param, {})
    assert codes == [0, 0] and by_rank[0] == by_rank[1] and len(by_rank[0]) == STEPS, by_rank
    return request.param, by_rank[0]


def assert_connection_error(by_rank: str) -> None:
    last = by_rank.strip().splitlines()[-1]
    assert re.match(r"(\w+\.)*\w*Error: .*(closed by peer|Timed out|reset by peer)", last), by_rank


@pytest.mark.skipif(
    before("transformers", "5.23"), reason="this transformers resumes no run of several CPU processes"
)
@pytest.mark.parametrize("doomed", [[1], [0], [0, 1]], ids=["second", "first", "all"])
def test_resumed_run_equals_an_uninterrupted_one(
    baseline: tuple[str, list[float]], doomed: list[int], tmp_path: Path
) -> None:
    optimizer, losses = baseline
    codes, by_rank = run(tmp_path, optimizer, dict.fromkeys(doomed, signal.SIGKILL))
    for rank in range(RANKS):
        assert codes[rank] == (-signal.SIGKILL if rank in doomed else 1)
        if rank not in doomed:
            assert_connection_error(by_rank[rank])
    assert [path.name for path in tmp_path.iterdir()] == [f"checkpoint-{SAVED}"]
    codes, by_rank = run(tmp_path, optimizer, {})
    assert codes == [0, 0], by_rank
    assert by_rank[0] == pytest.approx(losses, rel=ONE_LAYER)  # those before the interruption are saved


def test_hanging_process_ends_the_others(tmp_path: Path) -> None:
    codes, by_rank = run(tmp_path, "AdamW", {1: signal.SIGSTOP})
    assert codes == [1, None]
    assert_connection_error(by_rank[0])

"""Two runs of finetune.py that take turns, so that a busy minute of the machine slows both.

Each run is a process. A token goes back and forth between them through two pipes; who has it computes.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress

STEPS = 5
"""Training steps before the other run has its turn."""
VARIABLE = "FINETUNE_TURNS"  # the child's two file descriptors


class Turns:
    """A run's two ends of the pipes."""

    def __init__(self, take: int, give: int) -> None:
        self._take, self._give = take, give

    def wait(self) -> None:
        """Returns when it is this run's turn, or when the other run has ended."""
        os.read(self._take, 1)

    def swap(self) -> None:
        """Lets the other run have its turn."""
        with suppress(BrokenPipeError):  # it has ended
            os.write(self._give, b".")
        self.wait()


def inherited() -> Turns | None:
    """The ends that `run_in_turns` gave to this process, if it started it."""
    ends = os.environ.get(VARIABLE)
    return Turns(*map(int, ends.split(","))) if ends else None


def run_in_turns(commands: Sequence[Sequence[str]]) -> int:
    """Runs two commands in turns. Returns 0, or the exit status of the first that failed, which stops the
    other."""
    (take_0, give_1), (take_1, give_0) = os.pipe(), os.pipe()
    os.write(give_1, b".")  # the first command begins
    running = []
    for command, ends in zip(commands, ((take_0, give_0), (take_1, give_1)), strict=True):
        environment = {**os.environ, VARIABLE: "{},{}".format(*ends)}
        running.append(subprocess.Popen(command, env=environment, pass_fds=ends))
    for end in (take_0, give_0, take_1, give_1):
        os.close(end)  # a run sees the end of the other only if nobody else holds its pipe
    try:
        while running:
            for process in [process for process in running if process.poll() is not None]:
                running.remove(process)
                if process.returncode:
                    return process.returncode
            time.sleep(0.1)
    finally:
        for process in running:
            process.terminate()
            process.wait()
    return 0

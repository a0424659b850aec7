"""Processes that have imported only torch, forked from one, because importing torch takes seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft_kernels as pk

ROOT = Path(pk.__file__).parent.parent

SERVER = """
import gc, json, os, signal, sys, tempfile
import torch
gc.freeze()  # else the collection at exit copies all pages of torch

for line in sys.stdin:
    code, path, environment = json.loads(line)
    files = [tempfile.TemporaryFile() for _ in range(2)]
    child = os.fork()
    if child == 0:
        signal.alarm(300)
        for number, file in zip((1, 2), files):
            os.dup2(file.fileno(), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(environment)
        os.chdir(path)
        sys.path.insert(0, path)
        break
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for file in files:
        file.seek(0)
    print(json.dumps([code, *(file.read().decode() for file in files)]), flush=True)
else:
    sys.exit()
exec(code, {"__name__": "__main__"})
"""


@dataclass(frozen=True)
class Result:
    returncode: int
    stdout: str
    stderr: str


class Processes:
    """Runs code in sequential processes, each fresh after `import torch`."""

    def __init__(self) -> None:
        env = {k: v for k, v in os.environ.items() if not k.startswith("PEFT_KERNELS_")}
        self._server: Any = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env | {"PYTHONDONTWRITEBYTECODE": "1"},
        )

    def run(self, code: str, path: Path, environment: dict[str, str]) -> Result:
        """`path`: working directory and first entry of sys.path. Killed after 300 seconds."""
        self._server.stdin.write(json.dumps([code, str(path), environment]) + "\n")
        self._server.stdin.flush()
        return Result(*json.loads(self._server.stdout.readline()))

    def close(self) -> None:
        self._server.communicate()


class Python:
    """Runs code in a process that has imported only torch, and asserts that it succeeds."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes

    def __call__(self, code: str, path: Path = ROOT, **environment: str) -> Result:
        result = self._processes.run(code, path, environment)
        assert result.returncode == 0, f"{code}\n{result.stdout}\n{result.stderr}"
        return result

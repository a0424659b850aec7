"""Peak memory and time of loading a checkpoint in 4 bits.

A checkpoint of random bf16 or fp32 weights is written to a temporary folder, and each contender loads it as
bf16 in a fresh process. Memory is sampled every millisecond from outside, as the increase over the process
before loading. The peak is the resident memory plus tensors that are still in the mapped file, as if none of
these were resident. From fp32 it is anonymous memory instead: transformers casts before a quantiser sees a
tensor, and the pages of the file that it has read stay until the system reclaims them.

transformers maps weights whose dtype does not change: plain loading in bf16 reads nothing ("bf16, mapped").
So time is compared with loading into memory ("bf16, in memory").
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import peft_kernels

from ..lib import report
from ..lib.layers import BNB
from ..lib.machine import status_bytes
from ..lib.report import OURS, Spread, megabytes, missing

MAPPED, IN_MEMORY, THEIRS = "bf16, mapped", "bf16, in memory", "bnb, 4 bits"
HOW = {OURS: "ours", IN_MEMORY: "in-memory", MAPPED: "mapped", THEIRS: "bnb"}
TIME_GOAL = 1.3
"""Our time / that of loading bf16 into memory, at most."""
SLACK = 1.5
"""Memory beyond the model at most, as a multiple of the largest tensor."""
CHILD = Path(__file__).with_name("loading_child.py")

SIZES = {"tinyllama": (32000, 2048, 5632, 22, 32, 4), "small": (8192, 1024, 2816, 4, 16, 4)}
TINY = (128, 64, 128, 1, 4, 2)
FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads",
)  # fmt: skip
"""Of LlamaConfig, in the order of the sizes."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """A model size and the dtype of its checkpoint."""

    size: str
    stored: str

    @property
    def name(self) -> str:
        return f"loading-{self.size}-{self.stored}"

    @property
    def seconds(self) -> float:
        return 240.0 if self.size == "tinyllama" else 90.0

    def run(
        self,
        timing: report.Timing = report.ONCE,
        progress: report.Progress = report.silent,
        contenders: Mapping[str, str] = HOW,
    ) -> Loaded:
        """Three interleaved rounds of one load each."""
        loaded = Loaded(self)
        if reason := missing("transformers safetensors"):
            loaded.absent[OURS] = reason
            return loaded
        chosen = dict(contenders)
        if THEIRS in chosen and (reason := missing(BNB)):
            loaded.absent[THEIRS] = reason
            del chosen[THEIRS]
        with tempfile.TemporaryDirectory() as folder:
            progress("checkpoint")
            loaded.largest = write(Path(folder) / "model", SIZES[self.size], DTYPES[self.stored])
            write(Path(folder) / "tiny", TINY, DTYPES[self.stored])
            for _ in range(3):
                for name in list(chosen):
                    progress(name)
                    try:
                        found = load(chosen[name], Path(folder))
                    except RuntimeError as error:
                        loaded.wrong[name] = str(error)
                        del chosen[name]
                    else:
                        loaded.loads.setdefault(name, []).append(found)
        return loaded


@dataclass(frozen=True)
class Load:
    """Seconds and bytes of one load."""

    seconds: float
    nf4: int
    dense: int
    mapped: int
    """Dense tensors that are still in the file."""
    anonymous: int
    """Peak increase of anonymous memory."""
    resident: int
    """Peak increase of resident memory, pages of files included."""
    floor: int
    """Resident before."""

    def peak(self, stored: str) -> int:
        return self.mapped + (self.resident if stored == "bf16" else self.anonymous)

    def limit(self, largest: int) -> int:
        return int(self.nf4 + self.dense + SLACK * largest)


@dataclass
class Loaded(report.Outcome):
    case: Case
    loads: dict[str, list[Load]] = field(default_factory=dict)
    largest: int = 0
    """Bytes of the largest stored tensor."""

    def time(self, name: str) -> float | None:
        loads = self.loads.get(name)
        return None if not loads else statistics.median(load.seconds for load in loads)

    def worst(self, name: str) -> Load | None:
        return max(self.loads.get(name, ()), key=self.peak, default=None)

    def peak(self, load: Load) -> int:
        return load.peak(self.case.stored)

    def goals(self) -> Iterator[tuple[str, bool | None]]:
        worst, ours, plain = self.worst(OURS), self.time(OURS), self.time(IN_MEMORY)
        if worst is not None:
            limit, peak = worst.limit(self.largest), self.peak(worst)
            what = "resident" if self.case.stored == "bf16" else "anonymous"
            text = f"peak of {what} memory above the floor: at most {megabytes(limit)}"
            yield f"{text}, measured {megabytes(peak)}", peak <= limit
        if ours is not None and plain is not None:
            text = f"time: at most {TIME_GOAL} times {IN_MEMORY}, measured {ours / plain:.2f}"
            yield text, ours <= TIME_GOAL * plain

    def ratios(self) -> dict[str, Spread]:
        ours = [load.seconds for load in self.loads.get(OURS, ())]
        theirs = [load.seconds for load in self.loads.get(THEIRS, ())]
        if not ours or not theirs:
            return {}
        return {THEIRS: Spread.of([b / a for a, b in zip(ours, theirs, strict=False)])}

    def parts(self) -> list[str]:
        return [
            f"{name} {self.time(name):.2f} s, {megabytes(max(map(self.peak, loads)))}"
            for name, loads in self.loads.items()
        ]

    def data(self) -> dict[str, Any]:
        loads = {name: [vars(load) for load in loads] for name, loads in self.loads.items()}
        return {"group": "loading", "largest": self.largest, "loads": loads}

    @classmethod
    def tables(cls, outcomes: Sequence[Loaded], unit: str) -> Iterator[tuple[str, str]]:
        titles = ["", "", "s", "peak", "model", "anonymous", "resident", "floor"]
        rows = []
        for outcome in outcomes:
            for name in outcome.loads:
                worst = outcome.worst(name)
                assert worst is not None
                model = worst.nf4 + worst.dense
                sizes = (outcome.peak(worst), model, worst.anonymous, worst.resident, worst.floor)
                cells = [f"{outcome.time(name):.2f}", *map(megabytes, sizes)]
                rows.append([outcome.case.name.removeprefix("loading-"), name, *cells])
        yield "loading a checkpoint as bf16 or 4 bits; peak is above the floor", report.table(titles, rows)


def standard(dtype: str) -> list[Case]:
    return [Case(size, stored) for size in SIZES for stored in DTYPES]


def write(folder: Path, sizes: Sequence[int], dtype: torch.dtype) -> int:
    """Writes a Llama of random weights in two files. Returns the largest tensor's bytes."""
    import transformers
    from safetensors.torch import save_file

    folder.mkdir()
    named: dict[str, Any] = dict(zip(FIELDS, sizes, strict=True))
    config = transformers.LlamaConfig(**named, dtype=dtype, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in transformers.LlamaForCausalLM(config).named_parameters()}
    names, index, generator = sorted(shapes), {}, torch.Generator().manual_seed(0)
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        tensors = {
            name: torch.empty(shapes[name], dtype=dtype).normal_(0, 0.02, generator=generator)
            for name in part
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(part, file))
        del tensors
    total = sum(shape.numel() for shape in shapes.values()) * dtype.itemsize
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return max(shape.numel() for shape in shapes.values()) * dtype.itemsize


def load(how: str, folder: Path) -> Load:
    """Loads in a fresh process. RuntimeError with its last line of output if that fails."""
    command = [sys.executable, str(CHILD), how, str(folder / "model"), str(folder / "tiny")]
    # This process's package, not an installed one.
    paths = [str(Path(peft_kernels.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, text=True, stderr=errors, env=environment, **pipes) as child,
    ):
        assert child.stdin is not None and child.stdout is not None

        def line() -> str:
            text = child.stdout.readline().strip()
            if not text:
                child.wait()
                errors.seek(0)
                *_, last = ["it ended without output", *errors.read().strip().splitlines()]
                raise RuntimeError(last)
            return text

        line()
        before = _memory(child.pid)
        with _peak_memory(child.pid) as peak:
            print(file=child.stdin, flush=True)
            found = json.loads(line())
        print(file=child.stdin, flush=True)
    above = {name: peak[name] - before[name] for name in before}
    return Load(**found, **above, floor=before["resident"])


@contextmanager
def _peak_memory(pid: int) -> Iterator[dict[str, int]]:
    """Yields the peak memory of another process while the context is open."""
    peak, over = {"anonymous": 0, "resident": 0}, threading.Event()

    def sample() -> None:
        while not over.is_set():
            peak.update({name: max(peak[name], now) for name, now in _memory(pid).items()})
            time.sleep(0.001)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def _memory(pid: int) -> dict[str, int]:
    return {"anonymous": status_bytes("RssAnon", pid), "resident": status_bytes("VmRSS", pid)}

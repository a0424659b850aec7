"""Loading a checkpoint in 4 bits: the memory that it takes at its peak, and the time.

A checkpoint of random bf16 or fp32 weights is made in a temporary folder, and each contender loads it in a
fresh process, as bf16. Memory is looked at every millisecond from outside, and is told above what the process
had before. What is judged is all that is resident, plus what of the model is left in the mapped file, as if
none of it were resident yet. Out of fp32 it is anonymous memory instead: transformers casts before a
quantiser sees a tensor, and pages of the file that it has read stay until the system takes them back.

transformers leaves weights whose type need not change in the file: plain loading in bf16 reads nothing
("bf16, mapped"). So time is put beside loading them into memory ("bf16, in memory").
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import peft_kernels

from ..lib import report
from ..lib.contenders import missing
from ..lib.layers import BNB
from ..lib.report import OURS, Spread

MAPPED, IN_MEMORY, THEIRS = "bf16, mapped", "bf16, in memory", "bnb, 4 bits"
HOW = {OURS: "ours", IN_MEMORY: "in-memory", MAPPED: "mapped", THEIRS: "bnb"}
TIME_GOAL = 1.3
"""What our time is to come to at most, as a multiple of loading bf16 into memory."""
SLACK = 1.5
"""Of the largest tensor, may be in memory beside the model."""
CHILD = Path(__file__).with_name("loading_child.py")

SIZES: dict[str, dict[str, int]] = {
    "tinyllama": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "small": {
        "vocab_size": 8192,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    },
}
TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """A size of model, and the type that its checkpoint is stored in."""

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
        """Three rounds of one load each, interleaved; more do not fit."""
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
    """One load: seconds, and bytes."""

    seconds: float
    nf4: int
    dense: int
    mapped: int
    """Of the dense ones, what is still in the file."""
    anonymous: int
    """At the peak, above what the process had."""
    resident: int
    """The same of all memory, pages of files included."""
    floor: int
    """All that was resident before."""

    def peak(self, stored: str) -> int:
        """What is judged."""
        return self.mapped + (self.resident if stored == "bf16" else self.anonymous)

    def limit(self, largest: int) -> int:
        return int(self.nf4 + self.dense + SLACK * largest)


@dataclass
class Loaded(report.Outcome):
    """What came of a case."""

    case: Case
    loads: dict[str, list[Load]] = field(default_factory=dict)
    largest: int = 0
    """Bytes of the largest tensor, as it is stored."""

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
            text = f"peak of {what} memory above the floor: at most {mb(limit)}, measured {mb(peak)}"
            yield text, peak <= limit
        if ours is not None and plain is not None:
            text = f"time: at most {TIME_GOAL} times {IN_MEMORY}, measured {ours / plain:.2f}"
            yield text, ours <= TIME_GOAL * plain

    def ratios(self) -> dict[str, Spread]:
        ours = [load.seconds for load in self.loads.get(OURS, ())]
        theirs = [load.seconds for load in self.loads.get(THEIRS, ())]
        if not ours or not theirs:
            return {}
        return {THEIRS: Spread.of([b / a for a, b in zip(ours, theirs, strict=False)])}

    def line(self) -> str:
        parts = [
            f"{name} {self.time(name):.2f} s, {mb(max(map(self.peak, loads)))}"
            for name, loads in self.loads.items()
        ]
        return "; ".join([*parts, *(f"{name}: {why}" for name, why in (self.absent | self.wrong).items())])

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
                cells = [f"{outcome.time(name):.2f}", *map(mb, sizes)]
                rows.append([outcome.case.name.removeprefix("loading-"), name, *cells])
        yield "loading a checkpoint as bf16 or 4 bits; peak is above the floor", report.table(titles, rows)


def standard(dtype: str) -> list[Case]:
    return [Case(size, stored) for size in SIZES for stored in DTYPES]


def mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:.0f} MB"


def write(folder: Path, sizes: Mapping[str, int], dtype: torch.dtype) -> int:
    """A Llama of random weights in two files, made one file at a time. Returns the largest tensor's bytes."""
    import transformers
    from safetensors.torch import save_file

    folder.mkdir()
    config = transformers.LlamaConfig(**sizes, dtype=dtype, architectures=["LlamaForCausalLM"])
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
    """In a fresh process. RuntimeError with the last line that it wrote when it fails."""
    command = [sys.executable, str(CHILD), how, str(folder / "model"), str(folder / "tiny")]
    # The package that this process has, and not one that is installed.
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
                *_, last = ["it ended without a word", *errors.read().strip().splitlines()]
                raise RuntimeError(last)
            return text

        line()
        anonymous, resident = _memory(child.pid)
        with _Watch(child.pid) as watch:
            print(file=child.stdin, flush=True)
            found = json.loads(line())
        print(file=child.stdin, flush=True)
    above = {"anonymous": watch.anonymous - anonymous, "resident": watch.resident - resident}
    return Load(**found, **above, floor=resident)


class _Watch:
    """The most that another process has in memory while this is open."""

    def __init__(self, pid: int) -> None:
        self.anonymous = self.resident = 0
        self._pid, self._over = pid, threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.is_set():
            anonymous, resident = _memory(self._pid)
            self.anonymous, self.resident = max(self.anonymous, anonymous), max(self.resident, resident)
            time.sleep(0.001)


def _memory(pid: int) -> tuple[int, int]:
    """Anonymous and all resident bytes, by what Linux says of a process; zeros when it is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0, 0
    found = [re.search(rf"^{field}:\s+(\d+) kB$", text, re.MULTILINE) for field in ("RssAnon", "VmRSS")]
    anonymous, resident = (0 if match is None else int(match[1]) * 1024 for match in found)
    return anonymous, resident

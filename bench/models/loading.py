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
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import peft_kernels as pk

from ..lib import report
from ..lib.harness import first_line
from ..lib.layers import BNB
from ..lib.machine import status_bytes
from ..lib.report import OURS, Progress, Timing, missing

MAPPED, IN_MEMORY, THEIRS = "bf16, mapped", "bf16, in memory", "bnb, 4 bits"
WHOLE = "bf16, then quantised"
"""What `NF4Config` must not do; for tests."""
CONTENDERS = OURS, IN_MEMORY, MAPPED, THEIRS
TITLE = "loading a checkpoint as bf16 or 4 bits, in MB; the peak is above the floor"
FORMS = {"s": ".2f"} | dict.fromkeys(("peak", "model", "anonymous", "resident", "floor"), ",.0f")

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

    def run(self, timing: Timing = report.ONCE, progress: Progress = report.silent) -> report.Figures:
        """Three interleaved rounds of one load each."""
        found = report.Figures(self, title=TITLE, forms=FORMS, label=self.name.removeprefix("loading-"))
        if reason := missing("transformers safetensors"):
            found.absent[OURS] = reason
            return found
        loads: dict[str, list[Load]] = {name: [] for name in CONTENDERS}
        if reason := missing(BNB):
            found.absent[THEIRS] = reason
            del loads[THEIRS]
        with tempfile.TemporaryDirectory() as folder:
            progress("checkpoint")
            write(Path(folder) / "model", SIZES[self.size], DTYPES[self.stored])
            write(Path(folder) / "tiny", TINY, DTYPES[self.stored])
            for _ in range(3):
                for name in list(loads):
                    progress(name)
                    try:
                        loads[name].append(load(name, Path(folder)))
                    except Exception as error:  # the others still run
                        found.wrong[name] = f"{type(error).__name__}: {first_line(error)}"
                        del loads[name]
        compare(self.stored, loads, found)
        return found


def compare(stored: str, loads: Mapping[str, Sequence[Load]], found: report.Figures) -> None:
    """Adds the median time and the worst peak of each contender."""
    for name, some in loads.items():
        worst = max(some, key=lambda load: load.peak(stored))
        sizes = worst.peak(stored), worst.nf4 + worst.dense, worst.anonymous, worst.resident, worst.floor
        seconds = statistics.median(load.seconds for load in some)
        found.values[name] = dict(zip(FORMS, (seconds, *(size / 1e6 for size in sizes)), strict=True))


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


def load(name: str, folder: Path) -> Load:
    """Loads the checkpoint of a folder in a fresh process, after a tiny one in the same way."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pid = pool.submit(warm_up, name, str(folder / "tiny")).result()
        before = _memory(pid)
        with _peak_memory(pid) as peak:
            found = pool.submit(timed, name, str(folder / "model")).result()
    above = {kind: peak[kind] - before[kind] for kind in before}
    return Load(**found, **above, floor=before["resident"])


def warm_up(name: str, folder: str) -> int:
    """Imports all that loading needs. Returns this process's id."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    loaded(name, folder)
    return os.getpid()


def timed(name: str, folder: str) -> dict[str, float]:
    """Seconds, and bytes of NF4 weights, of dense tensors, and of those still in the file."""
    start = time.perf_counter()
    model = loaded(name, folder)
    seconds = time.perf_counter() - start
    packed = [p for p in model.parameters() if isinstance(p, pk.NF4Weight)]
    dense = [p for p in model.parameters() if not isinstance(p, pk.NF4Weight)]
    ranges = _mapped_files()
    mapped = [p for p in dense if any(start <= p.data_ptr() < end for start, end in ranges)]
    parts = {"nf4": packed, "dense": dense, "mapped": mapped}
    return {"seconds": seconds} | {kind: sum(p.nbytes for p in part) for kind, part in parts.items()}


def loaded(name: str, folder: str) -> Any:
    import transformers

    from peft_kernels.integrations.transformers import NF4Config

    options: dict[str, Any] = {"dtype": torch.bfloat16}
    if name == OURS:
        options["quantization_config"] = NF4Config()
    if name == THEIRS:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    if name == IN_MEMORY:
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    if name == WHOLE:
        pk.quantize_model(model, progress=False)
    return model


def _mapped_files() -> list[tuple[int, int]]:
    """Address ranges of checkpoints."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, *_, name = line.split(maxsplit=5)
        if name.endswith(".safetensors"):
            start, end = (int(address, 16) for address in addresses.split("-"))
            found.append((start, end))
    return found


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

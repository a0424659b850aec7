"""Packed formats side by side: GEMMs, and QLoRA of SmolLM2-135M-Instruct as in `examples/finetune.py`.

GEMM cases time one layer's forward and input gradient: formats of 4 bits against NF4, FP8 against torch's
GEMM of a dense weight in the activations' dtype; interleaved, with weights outside the cache. The case of the
model has bits per weight of the packed layers, the held-out loss before training and after equal steps, and
the time of a step relative to NF4's.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import peft_kernels as pk
from peft_kernels.core.formats import FORMATS
from peft_kernels.core.registry import public_ops as ops

from ..lib import examples, harness, report
from ..lib.report import Spread, missing

DENSE, NF4 = "dense", "nf4"
ROWS = (1, 4, 16, 64, 512)
SHAPE = 4096, 4096
BATCH, TOKENS = 1, 128
STEPS, BATCH_SIZE, MAX_LENGTH, HELD_OUT, SEED = 30, 4, 128, 32, 0
COLUMNS = {
    "bits": "bits per weight",
    "before": "held-out loss",
    "after": "after QLoRA",
    "step": f"step by that of {NF4}",
}


def beside(format: str) -> str:
    """What a format is compared with."""
    return NF4 if FORMATS[format].bits == 4 else DENSE


@dataclass(frozen=True)
class GemmCase:
    rows: int
    dtype: str
    shape: tuple[int, int] = SHAPE

    @property
    def name(self) -> str:
        return f"formats-{self.shape[0]}x{self.shape[1]}-m{self.rows}-{self.dtype}"

    @property
    def seconds(self) -> float:
        return 15.0

    def run(self, timing: report.Timing = report.ONCE, progress: report.Progress = report.silent) -> Gemms:
        found, (n, k) = Gemms(self), self.shape
        dtype = getattr(torch, self.dtype)
        generator = torch.Generator().manual_seed(SEED)
        dense = torch.randn(n, k, generator=generator) * 0.02
        x, dy = (torch.randn(self.rows, size, generator=generator).to(dtype) for size in (k, n))
        count = harness.copies(n * k // 2, len(FORMATS))
        weights = [dense.to(dtype).clone() for _ in range(harness.copies(n * k * dtype.itemsize, 1))]
        bases = {
            name: [
                weight._state.map(torch.clone).op_args
                for weight in [pk.NF4Weight.quantize(dense, format=name)] * count
            ]
            for name in FORMATS
        }
        calls = {
            "forward": (lambda base: ops.nf4_linear(x, *base, n, None), lambda weight: F.linear(x, weight)),
            "dx": (lambda base: ops.nf4_linear_dx(dy, *base, k), lambda weight: dy @ weight),
        }
        for what, (call, torch_call) in calls.items():
            progress(what)
            runners = [
                harness.Contender(name, [partial(call, base) for base in copies], lambda _: 0.0)
                for name, copies in bases.items()
            ]
            dense_calls = [partial(torch_call, weight) for weight in weights]
            runners.append(harness.Contender(DENSE, dense_calls, lambda _: 0.0))
            seconds = harness.interleave(runners, timing)
            found.spreads[what] = {
                name: Spread.of_ratios(seconds[beside(name)], seconds[name])
                for name in FORMATS
                if name != NF4
            }
        return found


@dataclass
class Gemms(report.Outcome):
    case: GemmCase
    spreads: dict[str, dict[str, Spread]] = field(default_factory=dict)
    """The time of what it is compared with / the format's, by what and format."""

    def parts(self) -> list[str]:
        return [
            f"{what} {', '.join(f'{name} {report.cell(ratio)}' for name, ratio in by_format.items())}"
            for what, by_format in self.spreads.items()
        ]

    def data(self) -> dict[str, Any]:
        spreads = {
            what: {name: report.rounded(ratio) for name, ratio in by_format.items()}
            for what, by_format in self.spreads.items()
        }
        return {"group": "formats", "spreads": spreads}

    def ratios(self) -> dict[str, Spread]:
        return {
            f"{beside(name)}, {what} of {name}": ratio
            for what, by_format in self.spreads.items()
            for name, ratio in by_format.items()
        }

    @classmethod
    def tables(cls, outcomes: Sequence[Gemms], unit: str) -> Iterator[tuple[str, str]]:
        names = [name for name in FORMATS if name != NF4]
        rows = [
            [f"{one.case.name}, {what}", *(report.cell(by_format[name]) for name in names)]
            for one in outcomes
            for what, by_format in one.spreads.items()
        ]
        yield (
            "NF4's time / the format's; FP8: torch's with a dense weight / FP8's",
            report.table(["", *names], rows),
        )


@dataclass(frozen=True)
class ModelCase:
    """`model` and `data`: paths instead of the demo's, as options of finetune.py."""

    steps: int = STEPS
    model: Path | None = None
    data: Path | None = None
    name = "formats-model"

    @property
    def seconds(self) -> float:
        return 60.0 + (len(FORMATS) + 1) * (1.0 * self.steps + 15)

    def run(self, timing: report.Timing = report.ONCE, progress: report.Progress = report.silent) -> Models:
        found = Models(self)
        if reason := missing("transformers peft accelerate rich tqdm" + ("" if self.model else " gguf")):
            found.absent["model"] = reason
            return found
        lib = examples.module("finetune_model")
        folder = examples.module("demo_model").model_folder(self.model, examples.MODELS)
        batches, validation = examples.batches(
            self.data, lib.load_tokenizer(folder), MAX_LENGTH, BATCH_SIZE, self.steps, SEED, HELD_OUT
        )
        ids = torch.randint(3, 1000, (BATCH, TOKENS), generator=torch.Generator().manual_seed(SEED))
        runners = []
        for name in (DENSE, *FORMATS):
            progress(name)
            model = _base(lib, folder, name)
            values = found.values[name] = {"bits": _bits(model), "before": lib.loss_of(model, validation)}
            model = lib.add_lora(model, 16, SEED)
            pk.patch(model)
            losses = lib.train(model, batches, 5e-4, name)
            values["after"] = lib.loss_of(model, validation)
            if not all(map(math.isfinite, (*losses, values["after"]))):
                found.wrong[name] = f"losses: {losses}, held out {values['after']}"
            runners.append(harness.Contender(name, [partial(_step, model.train(), ids)], lambda _: 0.0))
            gc.collect()
        progress("time")
        seconds = harness.interleave(runners, timing)
        for name, times in seconds.items():
            found.values[name]["step"] = Spread.of_ratios(times, seconds[NF4]).median
        return found


@dataclass
class Models(report.Outcome):
    case: ModelCase
    values: dict[str, dict[str, float]] = field(default_factory=dict)

    def parts(self) -> list[str]:
        return [
            f"{name}: {', '.join(f'{COLUMNS[key]} {value:.3f}' for key, value in row.items())}"
            for name, row in self.values.items()
        ]

    def data(self) -> dict[str, Any]:
        return {"group": "formats", "values": self.values}

    @classmethod
    def tables(cls, outcomes: Sequence[Models], unit: str) -> Iterator[tuple[str, str]]:
        rows = [
            [name, *(f"{row[key]:.3f}" if key in row else "-" for key in COLUMNS)]
            for one in outcomes
            for name, row in one.values.items()
        ]
        yield "formats on SmolLM2-135M", report.table(["", *COLUMNS.values()], rows)


def _base(lib: Any, folder: Path, name: str) -> Any:
    """The base model by finetune.py's recipe, with its linear layers in a format."""
    model = lib.AutoModelForCausalLM.from_pretrained(folder, dtype=lib.DTYPE)
    if name == DENSE:
        model.requires_grad_(False)
    else:
        pk.quantize_model(model, format=name)
        model = lib.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model.forward = torch.autocast(lib.DEVICE, dtype=lib.DTYPE)(model.forward)
    return model


def _bits(model: nn.Module) -> float:
    """Bits per weight of the linear layers but the head."""
    layers = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.endswith("lm_head")]
    return 8 * sum(m.weight.nbytes for m in layers) / sum(m.weight.numel() for m in layers)


def _step(model: Any, ids: torch.Tensor) -> None:
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def standard(dtype: str) -> list[Any]:
    return [*(GemmCase(rows, kind) for kind in ("bfloat16", "float32") for rows in ROWS), ModelCase()]

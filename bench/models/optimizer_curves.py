"""Held-out loss of QLoRA trained with 8-bit and 32-bit optimizer states. Nothing is timed.

Model, task and training are those of `examples/finetune.py`: SmolLM2-135M-Instruct on NF4 weights, LoRA r=16
on all linear layers, patched, under autocast. All contenders start from the same adapter and use the same
batches and schedule.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import peft_kernels as pk

from ..lib import examples, layers, report
from ..lib.layers import BNB, RANK
from ..lib.report import OURS, Progress, Timing, missing

TORCH, BNB_8BIT, ALL_8BIT = "torch AdamW", "bnb AdamW8bit", "ours, all in 8 bits"
STEPS, EVERY = 300, 100
IN_8BIT = "in 8 bits"
LR, DECAY, WARMUP = 5e-4, 0.01, 10
BATCH_SIZE, MAX_LENGTH, HELD_OUT, SEED = 2, 128, 64, 0


@dataclass(frozen=True)
class Case:
    """`model` and `data`: paths instead of the demo's, as options of finetune.py."""

    steps: int = STEPS
    every: int = EVERY
    model: Path | None = None
    data: Path | None = None

    @property
    def name(self) -> str:
        return f"optimizer-curves-{self.steps}"

    @property
    def seconds(self) -> float:
        return 60.0 + len(self.contenders()) * (1.0 * self.steps + 10.0 * self.steps / self.every)

    def contenders(self) -> dict[str, tuple[str, Callable[[list[Tensor]], Any]]]:
        """For each, the libraries it needs and the optimizer's constructor."""
        options: dict[str, Any] = {"lr": LR, "weight_decay": DECAY}

        def bnb(params: list[Tensor]) -> Any:
            import bitsandbytes

            return bitsandbytes.optim.AdamW8bit(params, **options)

        return {
            TORCH: ("", partial(torch.optim.AdamW, **options)),
            OURS: ("", partial(pk.optim.AdamW8bit, **options)),
            BNB_8BIT: (BNB, bnb),
            ALL_8BIT: ("", partial(pk.optim.AdamW8bit, **options, min_8bit_size=1)),
        }

    def run(self, timing: Timing = report.ONCE, progress: Progress = report.silent) -> report.Figures:
        forms = {f"{step} steps": ".4f" for step in (*range(0, self.steps, self.every), self.steps)}
        title = "QLoRA of SmolLM2-135M: held-out loss"
        found = report.Figures(self, title=title, forms={**forms, IN_8BIT: ".1%"})
        if reason := missing("transformers peft accelerate rich" + ("" if self.model else " gguf")):
            found.absent[OURS] = reason
            return found
        progress("model and data")
        with tempfile.TemporaryDirectory() as folder:
            training = Training(self, Path(folder))
        for name, (needs, make) in self.contenders().items():
            if reason := missing(needs):
                found.absent[name] = reason
                continue
            optimizer = make(training.restart())
            row = found.values[name] = {}
            for step, loss in training.losses(optimizer, lambda text, n=name: progress(f"{n}: {text}")):
                row[f"{step} steps"] = loss
                progress(f"{name}: held-out loss {loss:.4f} after {step} steps")
            if not all(map(math.isfinite, row.values())):
                found.wrong[name] = f"held-out losses: {row}"
            row[IN_8BIT] = share_in_8bit(optimizer)
        return found


class Training:
    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.lib = case, examples.module("finetune_model")
        source = examples.module("demo_model").model_folder(case.model, folder)
        self.batches, self.held_out = examples.batches(
            case.data, self.lib.load_tokenizer(source), MAX_LENGTH, BATCH_SIZE, case.steps, SEED, HELD_OUT
        )
        self.model = self.lib.add_lora(self.lib.load_base(source, "peft_kernels"), RANK, SEED)
        layers.patched(self.model)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.start = [p.detach().clone() for p in self.trained]
        self.before = self.held_out_loss()

    def restart(self) -> list[Tensor]:
        """The trained parameters, reset."""
        with torch.no_grad():
            for p, start in zip(self.trained, self.start, strict=True):
                p.copy_(start)
                p.grad = None
        self.model.train()
        return list(self.trained)

    def losses(self, optimizer: Any, progress: Progress) -> Iterator[tuple[int, float]]:
        """Trains, and yields (steps, held-out loss) before the first step and after every few."""
        steps = self.case.steps
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(rate, steps=steps))
        yield 0, self.before
        for step, batch in enumerate(self.batches, 1):
            loss = F.cross_entropy(*self.lib.response_logits(self.model, batch))
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            progress(f"step {step} of {steps}, loss {loss.item():.3f}")
            if step % self.case.every == 0 or step == steps:
                yield step, self.held_out_loss()

    def held_out_loss(self) -> float:
        return self.lib.loss_of(self.model, self.held_out)


def rate(step: int, steps: int) -> float:
    """Factor of the learning rate: warm-up, then cosine decay to 0."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / max(1, steps - WARMUP)))


def share_in_8bit(optimizer: Any) -> float:
    """Share of elements whose moments are in 8 bits."""
    held = [(p.numel(), state.get("state1")) for p, state in optimizer.state.items()]
    in_8bit = sum(numel for numel, moment in held if moment is not None and moment.dtype == torch.uint8)
    return in_8bit / sum(numel for numel, _ in held)


def standard(dtype: str) -> list[Case]:
    return [Case()]

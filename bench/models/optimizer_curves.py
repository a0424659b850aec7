"""Held-out loss of QLoRA trained with 8-bit and 32-bit optimizer states. Nothing is timed.

Model and task are those of QLoRA in methods.py. All contenders start from the same adapter and use the same
batches and schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import peft_kernels as pk

from ..lib import examples, report
from ..lib.layers import BNB
from ..lib.report import OURS, Figures, Progress, Timing, missing
from .methods import LORA, NEEDS, Models

TORCH, BNB_8BIT, ALL_8BIT = "torch AdamW", "bnb AdamW8bit", "ours, all in 8 bits"
STEPS, EVERY = 300, 100
OPTIONS: dict[str, Any] = {"lr": 5e-4, "weight_decay": 0.01}
WARMUP, BATCH_SIZE, HELD_OUT = 10, 2, 64
IN_8BIT = "in 8 bits"


def bnb(params: list[Tensor], **options: Any) -> Any:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(params, **options)


OPTIMIZERS: dict[str, tuple[Callable[..., Any], str]] = {
    TORCH: (torch.optim.AdamW, ""),
    OURS: (pk.optim.AdamW8bit, ""),
    BNB_8BIT: (bnb, BNB),
    ALL_8BIT: (partial(pk.optim.AdamW8bit, min_8bit_size=1), ""),
}
"""Each with the libraries that it needs."""


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
        return 60.0 + len(OPTIMIZERS) * (1.0 * self.steps + 10.0 * self.steps / self.every)

    def run(self, timing: Timing = report.ONCE, progress: Progress = report.silent) -> Figures:
        forms = {f"{step} steps": ".4f" for step in (*range(0, self.steps, self.every), self.steps)}
        title = "QLoRA of SmolLM2-135M: held-out loss"
        found = Figures(self, title=title, forms={**forms, IN_8BIT: ".1%"})
        if reason := missing(NEEDS + ("" if self.model else " gguf")):
            found.absent[OURS] = reason
            return found
        progress("model and data")
        models = Models(self, examples.MODELS)
        batches, held_out = models.batches(BATCH_SIZE, HELD_OUT)
        for name, (make, needs) in OPTIMIZERS.items():
            if reason := missing(needs):
                found.absent[name] = reason
                continue
            model = models.make(LORA).train()
            optimizer = make([p for p in model.parameters() if p.requires_grad], **OPTIONS)
            row = found.values[name] = {}
            for step in self.trained(models.lib, model, optimizer, batches):
                row[f"{step} steps"] = loss = models.lib.loss_of(model, held_out)
                progress(f"{name}: held-out loss {loss:.4f} after {step} steps")
            if not all(map(math.isfinite, row.values())):
                found.wrong[name] = f"held-out losses: {row}"
            row[IN_8BIT] = share_in_8bit(optimizer)
        return found

    def trained(self, lib: Any, model: Any, optimizer: Any, batches: list[Any]) -> Iterator[int]:
        """Trains, and yields the number of steps taken: 0, and then after every few."""
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(rate, steps=self.steps))
        yield 0
        for step, batch in enumerate(batches, 1):
            F.cross_entropy(*lib.response_logits(model, batch)).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % self.every == 0 or step == self.steps:
                yield step


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

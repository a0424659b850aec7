"""Held-out loss of QLoRA trained with 8-bit and 32-bit optimizer states. Nothing is timed.

Model, task and training are those of `examples/finetune.py`: SmolLM2-135M-Instruct on NF4 weights, LoRA r=16
on all linear layers, patched, under autocast. All contenders start from the same adapter and use the same
batches and schedule.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import peft_kernels as pk

from ..lib import examples, layers, report
from ..lib.layers import BNB, RANK
from ..lib.report import OURS, missing

TORCH, BNB_8BIT, ALL_8BIT = "torch AdamW", "bnb AdamW8bit", "ours, all in 8 bits"
GOAL = 0.01
"""Relative distance from a peer's loss at most."""
STEPS, EVERY = 300, 100
LR, DECAY, WARMUP = 5e-4, 0.01, 10
BATCH_SIZE, MAX_LENGTH, HELD_OUT, SEED = 2, 128, 64, 0


@dataclass(frozen=True)
class Case:
    """`clip`: maximum gradient norm, 0 for none. `model` and `data`: paths instead of the demo's, as options
    of finetune.py."""

    clip: float = 0.0
    steps: int = STEPS
    every: int = EVERY
    model: Path | None = None
    data: Path | None = None

    @property
    def name(self) -> str:
        return f"optimizer-curves{'-clipped' if self.clip else ''}-{self.steps}"

    @property
    def seconds(self) -> float:
        return 60.0 + len(self.contenders()) * (1.0 * self.steps + 10.0 * self.steps / self.every)

    def contenders(self) -> dict[str, tuple[str, Callable[[list[Tensor]], Any]]]:
        """For each, the libraries it needs and the optimizer's constructor."""
        options: dict[str, Any] = {"lr": LR, "weight_decay": DECAY}
        norm = {"max_grad_norm": self.clip} if self.clip else {}

        def bnb(params: list[Tensor]) -> Any:
            import bitsandbytes

            return bitsandbytes.optim.AdamW8bit(params, **options)

        found: dict[str, tuple[str, Callable[[list[Tensor]], Any]]] = {
            TORCH: ("", partial(torch.optim.AdamW, **options)),
            OURS: ("", partial(pk.optim.AdamW8bit, **options, **norm)),
        }
        if not self.clip:
            found[BNB_8BIT] = BNB, bnb
            found[ALL_8BIT] = "", partial(pk.optim.AdamW8bit, **options, min_8bit_size=1)
        return found

    def run(self, timing: report.Timing = report.ONCE, progress: report.Progress = report.silent) -> Curves:
        curves = Curves(self)
        if reason := missing("transformers peft accelerate rich" + ("" if self.model else " gguf")):
            curves.absent[OURS] = reason
            return curves
        progress("model and data")
        with tempfile.TemporaryDirectory() as folder:
            training = Training(self, Path(folder))
        for name, (needs, make) in self.contenders().items():
            if reason := missing(needs):
                curves.absent[name] = reason
                continue
            optimizer = make(training.restart())
            found = curves.losses[name] = {}
            clip = 0.0 if name == OURS else self.clip  # ours clips itself
            for step, loss in training.losses(optimizer, clip, lambda text, n=name: progress(f"{n}: {text}")):
                found[step] = loss
                progress(f"{name}: held-out loss {loss:.4f} after {step} steps")
            if not all(map(math.isfinite, found.values())):
                curves.wrong[name] = f"held-out losses: {found}"
            curves.shares[name] = share_in_8bit(optimizer)
        return curves


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

    def losses(self, optimizer: Any, clip: float, progress: report.Progress) -> Iterator[tuple[int, float]]:
        """Trains, and yields (steps, held-out loss) before the first step and after every few."""
        steps = self.case.steps
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(rate, steps=steps))
        yield 0, self.before
        for step, batch in enumerate(self.batches, 1):
            loss = F.cross_entropy(*self.lib.response_logits(self.model, batch))
            loss.backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(self.trained, clip)
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


@dataclass
class Curves(report.Outcome):
    case: Case
    losses: dict[str, dict[int, float]] = field(default_factory=dict)
    """Held-out loss by contender and step."""
    shares: dict[str, float] = field(default_factory=dict)
    """Of elements whose moments are in 8 bits."""

    def last(self, name: str) -> float:
        return self.losses[name][self.case.steps]

    def goals(self) -> Iterator[tuple[str, bool]]:
        for ours in (OURS, ALL_8BIT):
            for peer in (TORCH, BNB_8BIT):
                if {ours, peer} <= self.losses.keys():
                    off = abs(self.last(ours) / self.last(peer) - 1)
                    text = f"held-out loss, {ours} by {peer}: within {GOAL:.0%}, measured {off:.2%}"
                    yield text, off <= GOAL

    def parts(self) -> list[str]:
        return [", ".join(f"{name} {self.last(name):.4f}" for name in self.losses)]

    def data(self) -> dict[str, Any]:
        return {"group": "optimizer-curves", "losses": self.losses, "in_8bit": self.shares}

    @classmethod
    def tables(cls, outcomes: Sequence[Curves], unit: str) -> Iterator[tuple[str, str]]:
        for one in outcomes:
            steps = report.unique(step for found in one.losses.values() for step in found)
            rows = [
                [name, *(f"{found[step]:.4f}" for step in steps), f"{one.shares[name]:.1%}"]
                for name, found in one.losses.items()
            ]
            clipped = f", gradients no longer than {one.case.clip:g}" if one.case.clip else ""
            titles = ["", *(f"{step} steps" for step in steps), "in 8 bits"]
            yield f"QLoRA of SmolLM2-135M: held-out loss{clipped}", report.table(titles, rows)


def standard(dtype: str) -> list[Case]:
    return [Case(), Case(clip=1.0)]

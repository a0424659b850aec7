"""Checks and measurements of finetune.py: the forms of one adapter, a sample, peak memory."""

from __future__ import annotations

import hashlib
import math
import resource
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from finetune_model import trainable_parameters
from finetune_train import Batch, evaluation_mode, prompt_text, response_logits
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

# Bounds on the relative RMS difference of logits.
# The trained and the reloaded model hold the same numbers and run the same kernels: 0 is expected. Roundings
# to bf16 that go the other way show as about 1e-2 after thirty layers, so this is as good as equality.
RELOAD_LIMIT = 1e-3
# Merging rounds the sum of weight and update once more to bf16, by up to 2^-9 of its value. SmolLM2-135M
# measured 0.014 to 0.03 for that, and 0.43 to 0.52 for the base without its adapter: far from both.
MERGE_LIMIT = 0.08


@dataclass(frozen=True)
class LogitError:
    """How far one model's logits are from another's."""

    relative_rms: float
    max_abs: float
    argmax_agreement: float

    def __str__(self) -> str:
        return (
            f"relative RMS {self.relative_rms:.2e}, largest {self.max_abs:.3f}, "
            f"same top token {self.argmax_agreement:.1%}"
        )


def logit_error(expected: Tensor, got: Tensor) -> LogitError:
    """Compare logits (tokens, vocabulary). A row's mean is taken off first: softmax does not see it."""
    expected = expected - expected.mean(dim=-1, keepdim=True)
    got = got - got.mean(dim=-1, keepdim=True)
    difference = got - expected
    return LogitError(
        relative_rms=float(difference.pow(2).mean().sqrt() / expected.pow(2).mean().sqrt()),
        max_abs=float(difference.abs().max()),
        argmax_agreement=float((expected.argmax(-1) == got.argmax(-1)).float().mean()),
    )


@torch.no_grad()
def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    with evaluation_mode(model):
        return response_logits(model, batch)[0]


@dataclass(frozen=True)
class ThreeWayCheck:
    """The trained model against its adapter reloaded, and merged into dense layers (bf16) and back into NF4.

    For scale also against the base alone. Packing into NF4 again costs what 4 bits cannot hold: that is told
    and not limited.
    """

    reloaded: LogitError
    merged: LogitError
    merged_nf4: LogitError
    base_only: LogitError
    losses: dict[str, float]  # validation loss: "trained", "merged", "merged_nf4"

    @property
    def problems(self) -> list[str]:
        """One line for each bound that is exceeded. NaN exceeds every bound."""
        found = []
        if not self.reloaded.relative_rms <= RELOAD_LIMIT:
            found.append(
                f"the reloaded adapter differs from the trained one: {self.reloaded} (limit {RELOAD_LIMIT})"
            )
        if not self.merged.relative_rms <= MERGE_LIMIT:
            found.append(
                f"the merged model differs from the trained one: {self.merged} (limit {MERGE_LIMIT})"
            )
        if not math.isfinite(self.merged_nf4.relative_rms + self.losses["merged_nf4"]):
            found.append(f"the model merged back into NF4 is broken: {self.merged_nf4}")
        return found

    def as_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "reload_limit": RELOAD_LIMIT,
            "merge_limit": MERGE_LIMIT,
            "problems": self.problems,
        }


@torch.no_grad()
def generate(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int) -> str:
    """The model's greedy answer on one line."""
    inputs = tokenizer(prompt_text(prompt, tokenizer), add_special_tokens=False, return_tensors="pt").to(
        model.device
    )
    with evaluation_mode(model):
        ids = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
        )
    answer = tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return " ".join(str(answer).split())


def fingerprint(model: nn.Module, batches: list[Batch]) -> str:
    """A hash of the adapter's weights and the batches: runs to be compared must start with the same."""
    digest = hashlib.sha256()
    for name, parameter in sorted(trainable_parameters(model).items()):
        digest.update(name.encode())
        digest.update(parameter.detach().float().cpu().numpy().tobytes())
    for batch in batches:
        digest.update(batch.ids.cpu().numpy().tobytes())
        digest.update(batch.labels.cpu().numpy().tobytes())
    return digest.hexdigest()


class PeakMemory:
    """The peak from `reset` on: of the GPU's allocator, or of the whole process on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Where Linux lets a process reset its own high-water mark, loading the model does not count.
        self._can_reset = False

    def reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self._can_reset = True
        except OSError:
            self._can_reset = False

    def megabytes(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e6
        if self._can_reset:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024 / 1e6
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6

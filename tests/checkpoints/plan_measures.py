"""Runs `peft-kernels plan`, and measures the memory of training a small model, for its tests."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import testing
from peft_kernels.cli import memory
from peft_kernels.cli.main import main
from peft_kernels.cli.sizes import Model, Run

SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
BATCH, SEQ, RANK = 2, 48, 8
CPU_PARTS = ("attention",)
"""Parts of `patch` that the plan leaves out: they are for CPUs."""


def planned(capsys: pytest.CaptureFixture[str], path: Path | str, *options: str) -> Any:
    """What `peft-kernels plan` prints as JSON."""
    capsys.readouterr()
    assert main(["plan", str(path), *options, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def nbytes(model: Any) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def loss_of(model: Any, batch: int = BATCH, seq: int = SEQ) -> Any:
    ids = torch.arange(batch * seq).reshape(batch, seq) % SIZES["vocab_size"]
    return model(input_ids=ids, labels=ids)


def measured_activations(model: Any) -> int:
    """Bytes saved for backward."""
    return testing.saved_bytes(lambda: loss_of(model), [*model.parameters(), *model.buffers()])


def planned_activations(model: Model, run: Run) -> int:
    return memory.activations(model, run) + memory.loss(model, run)


def enable_checkpointing(model: Any) -> None:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if base is not model:
        model.enable_input_require_grads()


def relative_difference(planned: float, measured: float) -> float:
    return abs(planned / measured - 1)


class Live(TorchDispatchMode):
    """Counts the bytes of live storages that ops allocated, and their peak."""

    def __init__(self, there: list[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen = weakref.WeakKeyDictionary({s: True for t in there for s in testing._storages(t)})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta:  # no logits that are lazy
                storage = tensor.untyped_storage()
                if storage not in self._seen:
                    self._seen[storage] = True
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._gone, storage.nbytes())
        return out

    def _gone(self, nbytes: int) -> None:
        self.now -= nbytes


def planned_to_measured_peak(real: Any, model: Model, run: Run, checkpointing: bool) -> float:
    """Planned / measured peak of a step's backward, without weights, adapters and optimizer states."""
    loss_of(real, run.batch, run.seq).loss.backward()
    gradients = [p.grad for p in real.parameters() if p.grad is not None]
    with Live([*real.parameters(), *real.buffers(), *gradients]) as live:
        loss_of(real, run.batch, run.seq).loss.backward()
    fixed = memory.weights(model, run) + memory.adapters(model, run) + memory.optimiser(model, run)
    planned = memory.total(model, run, checkpointing) - fixed
    return planned / (live.most + sum(g.nbytes for g in gradients))

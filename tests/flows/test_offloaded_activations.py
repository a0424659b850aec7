"""Activations offloaded until backward, by torch's `save_on_cpu` and TRL's OffloadActivations: tensors saved
by fused layers pass through the hooks like all others."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from flow_checks import language_loss
from flow_models import adapted, ids, llama
from installed import before
from peft_models import gradients
from test_moe import mixture
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import peft_kernels as pk

BASES: dict[str, Callable[[], Any]] = {
    "nf4": lambda: llama("nf4"),
    "experts": lambda: pk.quantize_model(mixture(), experts=True),
}


class CopiedTensors(saved_tensors_hooks):
    """Copies saved tensors; `save_on_cpu` would keep those on the CPU as they are."""

    def __init__(self) -> None:
        self.count = 0
        super().__init__(self._copy, lambda copied: copied)

    def _copy(self, saved: Tensor) -> Tensor:
        self.count += 1
        return saved.detach().clone()


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
@pytest.mark.parametrize("base", BASES)
def test_gradients_are_the_same_to_the_bit(base: str, patched: bool) -> None:
    trl = pytest.importorskip("trl.models.activation_offloading", reason="TRL is not installed")
    if before("trl", "1.10"):
        pytest.skip("TRL before 1.10 offloads activations of GPUs only")
    model = adapted(BASES[base]())
    if patched:
        pk.patch(model, without=() if base == "nf4" else "loss")
    copied = CopiedTensors()
    ways = nullcontext(), copied, trl.OffloadActivations(use_streams=False, min_offload_size=0)
    found = []
    for way in ways:
        model.zero_grad()
        with way:
            loss = language_loss(model, ids(0))
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    for loss, got in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert all(torch.equal(gradient, found[0][1][name]) for name, gradient in got.items())
    assert copied.count > 14, "layers save nothing?"

"""Pipelines of torch over NF4 layers: stages made by hand run in two processes over gloo; `pipeline()`, which
splits a traced graph, raises an explanation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import assert_no_errors, errors_by_rank
from rounding import ONE_LAYER, ONE_MODEL, ONE_STEP
from torch import Tensor, nn

import peft_kernels as pk
import testing

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed")


class Blocks(nn.Module):
    """Two layers of LoRA over NF4 with an activation between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(pk.nn.NF4LoRALinear(nn.Linear(64, 64), r=4) for _ in range(2))
        for layer in self.layers:
            nn.init.normal_(layer.lora_B, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def stages_by_hand(folder: Path) -> None:
    """Each process has one layer: losses and gradients equal those of one process."""
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    rank, whole = dist.get_rank(), Blocks()
    x, want = testing.tensor(4, 64), testing.tensor(4, 64, seed=1)
    loss = nn.functional.mse_loss(whole(x), want)
    loss.backward()

    mine = Blocks()
    mine.layers = mine.layers[rank : rank + 1]
    stage = PipelineStage(mine, rank, 2, torch.device("cpu"))
    losses: list[Any] = []
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=nn.functional.mse_loss)
    if rank == 0:
        schedule.step(x)
    else:
        schedule.step(target=want, losses=losses)
        torch.testing.assert_close(torch.stack(losses).mean(), loss, rtol=ONE_MODEL, atol=ONE_LAYER)
    for got, its in zip(mine.layers[0].parameters(), whole.layers[rank].parameters(), strict=True):
        if its.requires_grad:
            torch.testing.assert_close(got.grad, its.grad, rtol=ONE_STEP, atol=ONE_LAYER)


def test_stages_by_hand() -> None:
    assert_no_errors(errors_by_rank(2, [stages_by_hand]), "stages_by_hand")


def test_split_backward() -> None:
    """Schedules without bubbles (ScheduleInterleavedZeroBubble) compute gradients of weights later."""
    from torch.distributed.pipelining._backward import stage_backward_input

    model, x = Blocks(), testing.tensor(4, 64).requires_grad_()
    y = model(x)
    sentence = r"_lora_linear_: expected a schedule with whole backwards \(ScheduleGPipe, .*zero bubble"
    with pytest.raises(RuntimeError, match=sentence):
        stage_backward_input([y], [torch.ones_like(y)], [x], model.parameters())
    seen: list[Any] = []
    y = model.layers[0](x)
    y.grad_fn.register_prehook(seen.append)  # by anyone else
    y.sum().backward()
    assert len(seen) == 1


def test_traced_model() -> None:
    from torch.distributed.pipelining import SplitPoint, pipeline

    split = {"layers.1": SplitPoint.BEGINNING}
    with pytest.raises(RuntimeError) as error:
        pipeline(Blocks(), (testing.tensor(4, 64),), split_spec=split)
    chain, problem = [], error.value
    while problem is not None:
        chain.append(str(problem))
        problem = problem.__cause__
    expected = "expected stages made by hand, PipelineStage(module, ...), got pipeline()"
    assert any(expected in message for message in chain), chain
    torch.export.export(Blocks(), (testing.tensor(4, 64),))  # tracing alone works

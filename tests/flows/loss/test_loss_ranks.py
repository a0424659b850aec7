"""The loss without logits under DistributedDataParallel and FSDP2: two gloo processes must give stock's
losses and gradients for the whole batch in one process."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch.distributed as dist
from flow_checks import Calls, assert_near, language_loss
from flow_models import ids
from loss_models import VOCABULARY, with_head
from peft_models import gradients
from ranks import MARKS, rank_tests, whole
from rounding import ONE_STEP
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import peft_kernels as pk

pytestmark = MARKS

HEADS = ("frozen", "tied", "saved", "nf4", "lora")


def compare(head: str, wrap: Any) -> None:
    """Two steps: the second shows state left by the first."""
    stock = with_head(head)
    model = copy.deepcopy(stock)
    report = pk.patch(model)
    wrapped = wrap(model)
    for step in range(2):
        model.zero_grad()
        stock.zero_grad()
        batch = ids(step, rows=4, vocabulary=VOCABULARY)
        parts = batch.chunk(2)
        with Calls() as calls:
            loss = language_loss(wrapped, parts[dist.get_rank()])
        ran = sum(count for name, count in calls.counts.items() if name.startswith("linear_cross_entropy"))
        assert ran == 1, (head, dict(calls.counts), str(report))
        loss.backward()
        for rank, part in enumerate(parts):
            wanted = language_loss(stock, part)
            if rank == dist.get_rank():
                assert_near({"loss": loss.detach()}, {"loss": wanted.detach()}, ONE_STEP)
            (wanted / 2).backward()
        assert_near(whole(gradients(model)), gradients(stock), ONE_STEP)


# Cases: each runs in both processes.


def ddp(folder: Path) -> None:
    for head in HEADS:
        compare(head, DistributedDataParallel)


def fsdp2(folder: Path) -> None:
    """Shards blocks, and the rest with the head as one unit, which is gathered again for backward or stays
    gathered."""
    for head, reshard in ((head, reshard) for head in HEADS for reshard in (False, True)):

        def wrap(model: Any, reshard: bool = reshard) -> Any:
            for layer in model.base_model.model.model.layers:
                fully_shard(layer)
            return fully_shard(model, reshard_after_forward=reshard)

        compare(head, wrap)


def fsdp2_head(folder: Path) -> None:
    """A head that is a unit of its own is freed before the loss: its logits are computed."""
    stock = with_head("frozen")
    model = copy.deepcopy(stock)
    report = pk.patch(model)
    fully_shard(model.get_output_embeddings())
    fully_shard(model)
    batch = ids(0, rows=2, vocabulary=VOCABULARY)
    loss = language_loss(model, batch)
    loss.backward()
    wanted = language_loss(stock, batch)
    wanted.backward()
    assert_near({"loss": loss.detach()}, {"loss": wanted.detach()}, ONE_STEP)
    assert_near(whole(gradients(model)), gradients(stock), ONE_STEP)
    assert "FSDP2 shards the head as a unit of its own" in str(report)


CASES = [ddp, fsdp2, fsdp2_head]

errors, test_on_two_processes = rank_tests(2, CASES)

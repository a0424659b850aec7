"""Norms and attention modules under DistributedDataParallel and FSDP2: two gloo processes must give stock's
gradients for the whole batch in one process."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch.distributed as dist
from flow_checks import Calls, assert_near, block_fallbacks, language_loss
from flow_models import adapted, ids, llama
from peft_models import gradients
from ranks import MARKS, rank_tests, whole
from rounding import ONE_STEP
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import peft_kernels as pk

pytestmark = MARKS


def compare(wrap: Any, wrapped_first: bool) -> None:
    """With trained norms, whose weights are sharded and whose gradients are reduced."""
    stock = adapted(llama("nf4"))
    for name, parameter in stock.named_parameters():
        if "norm" in name:
            parameter.requires_grad_()
    model = copy.deepcopy(stock)
    if wrapped_first:
        wrapped, report = wrap(model), pk.patch(model)
    else:
        report, wrapped = pk.patch(model), wrap(model)
    assert all(entry.fused for entry in report.blocks) and len(report.blocks) == 11, report.details()
    parts = ids(rows=4).chunk(2)
    with Calls() as calls:
        loss = language_loss(wrapped, parts[dist.get_rank()])
    assert calls.counts["add_rms_norm"] == calls.counts["rotary"] == 2, dict(calls.counts)
    loss.backward()
    for part in parts:
        (language_loss(stock, part) / 2).backward()
    want, got = gradients(stock), whole(gradients(model))
    assert want.keys() == got.keys() and sum("norm" in name for name in want) == 5
    assert_near(got, want, ONE_STEP)
    assert not block_fallbacks(report)


# Cases: each runs in both processes.


def ddp(folder: Path) -> None:
    for wrapped_first in (False, True):
        compare(DistributedDataParallel, wrapped_first)


def fsdp2(folder: Path) -> None:
    def wrap(model: Any) -> Any:
        for layer in model.base_model.model.model.layers:
            fully_shard(layer)
        return fully_shard(model)

    for wrapped_first in (False, True):
        compare(wrap, wrapped_first)


CASES = [ddp, fsdp2]

errors, test_on_two_processes = rank_tests(2, CASES)

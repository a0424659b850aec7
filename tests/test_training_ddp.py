"""A patched model in two processes under DDP."""

from __future__ import annotations

import importlib.util
import sys
from datetime import timedelta
from pathlib import Path

import models
import pytest
import torch
from models import inputs
from peft_models import gradients
from torch import nn
from training_models import ROWS, assert_close, assert_no_fallback, labels, net, net_loss, patched_copy

import peft_kernels as pk

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning"),
    pytest.mark.usefixtures("one_thread"),
]


WORLD = 2


def ddp_worker(rank: int, folder: str, bases: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=300),
    )
    for base in bases:
        model = net(base)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(rank)  # DDP sends everybody the numbers of rank 0
        report = pk.patch(model)
        ddp = nn.parallel.DistributedDataParallel(model)
        rows = slice(rank * ROWS // WORLD, (rank + 1) * ROWS // WORLD)
        for _ in range(2):  # a parameter without gradient would raise in the second step
            ddp.zero_grad()
            nn.functional.cross_entropy(ddp(inputs(ROWS)[rows]), labels()[rows]).backward()
        assert_no_fallback(report)
        torch.save(gradients(model), f"{folder}/{base}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture
def _gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("torch is built without gloo")
    if sys.platform == "linux":
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # the name of the machine may resolve to nothing


@pytest.mark.slow
@pytest.mark.usefixtures("_gloo")
def test_ddp_gives_the_gradients_of_the_whole_batch(tmp_path: Path) -> None:
    bases = tuple(base for base in models.BASES if base != "bnb" or importlib.util.find_spec("bitsandbytes"))
    torch.multiprocessing.spawn(ddp_worker, args=(str(tmp_path), bases), nprocs=WORLD)
    for base in bases:
        stock = net(base)
        model, _ = patched_copy(stock)
        for whole in (model, stock):
            net_loss(whole, inputs(ROWS)).backward()
            for rank in range(WORLD):
                assert_close(torch.load(tmp_path / f"{base}-{rank}.pt"), gradients(whole))

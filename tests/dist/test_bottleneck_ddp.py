"""Bottleneck adapters in DistributedDataParallel: two processes over gloo."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from bottleneck_models import FAMILIES, stir
from ranks import MARKS, found_by_rank, free_port
from rounding import CURVE, ONE_LAYER
from torch import nn

import peft_kernels as pk

adapters = pk.adapters
pytestmark = MARKS
NAMES = ["a", "b", "a", "b"]


def make() -> Any:
    model = FAMILIES["llama"].make()
    for seed, (name, config) in enumerate({"a": "houlsby", "b": "parallel"}.items()):
        adapters.add(model, name, config)
        stir(model, name, 100 * seed)
    adapters.train(model, ["a", "b"])
    return model


def trained(model: Any, wrapped: Any, rows: slice, names: Sequence[str] | None) -> dict[str, Any]:
    """The adapters after three steps on these rows of each batch of four."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for step in range(3):
        ids = torch.randint(3, 100, (4, 7), generator=torch.Generator().manual_seed(step))[rows]
        if names is None:
            loss = wrapped(input_ids=ids, labels=ids).loss
        else:
            with adapters.rows(wrapped, names[rows]):
                loss = wrapped(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: p.detach().numpy() for name, p in model.named_parameters() if p.requires_grad}


CASES: dict[str, Sequence[str] | None] = {"stack": None, "rows": NAMES, "apart": sorted(NAMES)}
"""Adapter names of the rows: both adapters in each process, or one in each."""


def work(rank: int, port: int, queue: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        found = {}
        for case, names in CASES.items():
            model = make()
            ddp = nn.parallel.DistributedDataParallel(model, find_unused_parameters=case == "apart")
            found[case] = trained(model, ddp, slice(2 * rank, 2 * rank + 2), names)
        queue.put((rank, found))
    finally:
        dist.destroy_process_group()


def test_two_ranks_equal_one_process() -> None:
    ranks = found_by_rank(2, work, free_port())
    for case, names in CASES.items():
        model = make()
        before = {name: p.detach().clone().numpy() for name, p in model.named_parameters()}
        want = trained(model, model, slice(0, 4), names)
        for name, value in want.items():
            moved = abs(value - before[name]).max()
            assert moved > 1e-4, name
            for rank in (0, 1):
                error = abs(ranks[rank][case][name] - value).max()
                assert error < CURVE * moved + ONE_LAYER, (case, rank, name)
            assert (ranks[0][case][name] == ranks[1][case][name]).all()

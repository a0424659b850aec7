"""NF4 models in DistributedDataParallel: two processes over gloo."""

from __future__ import annotations

import socket
import warnings
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ranks import found_by_rank
from torch import nn

import peft_kernels as pk
import testing

peft = pytest.importorskip("peft", reason="PEFT is not installed")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed"),
]


class Wrapper(nn.Module):
    """Names no NF4 weight to DDP, as a trainer's module around the model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def build(case: str) -> Any:
    model = pk.quantize_model(models.base_model("dense"))
    if case == "bare":
        return model
    torch.manual_seed(3)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q", "o"], init_lora_weights=False))
    return Wrapper(model) if case == "different" else model


def one(case: str, rank: int) -> tuple[dict[str, float], list[str], Any]:
    """Gradients, the weights that are dense afterwards, and outputs."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore" if case == "different" else "error", ".*NF4 weight.*")
        model = build(case)
        if case == "different" and rank == 1:
            model.inner.base_model.model.q.base_layer.weight.copy_(
                pk.NF4Weight.quantize(testing.tensor(128, 64, seed=8))
            )
        ddp = nn.parallel.DistributedDataParallel(model)
        if case == "patched after":
            pk.patch(model)
        y = ddp(testing.tensor(5, 64, seed=rank))
        y.square().sum().backward()
    grads = {n: p.grad.sum().item() for n, p in model.named_parameters() if p.grad is not None}
    dense = [n for n, p in model.named_parameters() if isinstance(p, pk.NF4Weight) and p.is_dense]
    return grads, dense, model(testing.tensor(5, 64)).detach().numpy()


CASES = ("bare", "plain", "patched after", "different")


def work(rank: int, port: int, queue: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        queue.put((rank, {case: one(case, rank) for case in CASES}))
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results() -> dict[int, Any]:
    """Of every case, by process: two processes are started once, for it takes them seconds."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return found_by_rank(mp.get_context("spawn"), 2, work, port)


@pytest.mark.parametrize("case", CASES)
def test_ddp(results: dict[int, Any], case: str) -> None:
    (grads, dense, out), (other_grads, other_dense, other_out) = results[0][case], results[1][case]
    assert grads and grads == other_grads, "gradients are averaged"
    assert abs(out - other_out).max() < 1e-5, "the weights of the first process are everybody's"
    assert dense == [] and bool(other_dense) == (case == "different"), "4 bits stay where they agree"

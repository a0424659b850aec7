"""Models of DTensors and equal ones of plain tensors, for optimizers in several processes."""

from __future__ import annotations

from typing import Any

import torch
from rounding import ONE_STEP
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._pytree import tree_flatten

import testing
from peft_kernels.optim.sharded import part_of, whole_of

RANKS = 4
SHAPES = {
    "rows": (64, 512),  # shards end at block boundaries on any number of processes
    "narrow": (512, 16),  # and here on two and four
    "vector": (4096,),
    "odd": (70, 100),  # shards end inside blocks
    "few": (2, 2500),  # two processes have no rows
    "small": (6, 5),  # moments in fp32
}
ROWS = (Shard(0),)
CUT_ALIKE = ("rows", "narrow", "vector", "small")


class Model(nn.Module):
    def __init__(self, names: Any = tuple(SHAPES), mesh: Any = None, placements: Any = ROWS) -> None:
        super().__init__()
        for i, name in enumerate(names):
            value = testing.tensor(*SHAPES[name], seed=i)
            value = distributed(value, mesh, placements) if mesh is not None else value
            setattr(self, name, nn.Parameter(value))

    def give_gradients(self, step: int) -> None:
        for name, p in self.named_parameters():
            grad = testing.tensor(*SHAPES[name], dtype=p.dtype, seed=100 * step + len(name))
            p.grad = distributed(grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else grad


def distributed(value: Tensor, mesh: Any, placements: Any) -> DTensor:
    return distribute_tensor(value, mesh, placements, src_data_rank=None)


def train(model: Model, optimizer: Any, steps: range) -> None:
    for step in steps:
        model.give_gradients(step)
        optimizer.step()


def assert_same(got: nn.Module, want: nn.Module, moved: float = 0.0, names: Any = None) -> None:
    """Equal, or after steps of AdamW that differ by rounding: a step moves an element by its lr, all of them
    by `moved`, and rounds it."""
    other = dict(want.named_parameters())
    for name, p in got.named_parameters():
        if names is None or name in names:
            torch.testing.assert_close(
                whole_of(p),
                whole_of(other[name]),
                rtol=4 * torch.finfo(torch.float32).eps if moved else 0.0,
                atol=ONE_STEP * moved,
                msg=lambda text, name=name: f"{name}: {text}",
            )


def assert_same_tree(got: Any, want: Any) -> None:
    """Compares this process's shards, bit for bit."""
    (leaves, tree), (others, other) = map(tree_flatten, (got, want))
    assert tree == other
    for a, b in zip(leaves, others, strict=True):
        assert torch.equal(part_of(a), part_of(b)) if isinstance(a, Tensor) else a == b


def line() -> Any:
    return init_device_mesh("cpu", (RANKS,))


def square() -> Any:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "parts"))

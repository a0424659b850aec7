"""What must hold while adapters are trained over packed weights, in any format. Shared by tests."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from flow_checks import language_loss, train
from flow_models import ids
from rounding import BF16, BF16_STEP, CURVE, ONE_MODEL
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import peft_kernels as pk
import testing
from peft_kernels.checkpoints.checks import nf4_weights
from peft_kernels.checkpoints.folder import Checkpoint
from peft_kernels.checkpoints.names import Names
from peft_kernels.checkpoints.owned import owned_weights

STEPS = 10
TABLES = 4096
"""Bytes of tables of codes, which ops may keep for all weights together."""

Adapt = Callable[[Any, torch.dtype | None], Any]
"""Gives a model its adapters, always the same, and perhaps another dtype."""


def assert_trains_as_dense(packed: Any, adapt: Adapt) -> None:
    """Steps over packed weights, patched, have the losses of PEFT in fp64 over those that `dequantize()`
    gives: the first to a rounding, and the curve."""
    dense = copy.deepcopy(packed).dequantize()
    assert packed_weights(packed) and not packed_weights(dense)
    truth = losses(adapt(dense.double(), torch.float64))
    assert truth[-1] < 0.9 * truth[0], f"these losses could be anything's: {truth}"
    mine = adapt(packed, None)
    pk.patch(mine)
    off = (losses(mine) - truth).abs() / truth
    in_fp32 = packed_weights(packed)[0].dtype == torch.float32
    first, curve = (ONE_MODEL, CURVE) if in_fp32 else (BF16, BF16_STEP)
    assert off[0] < first and off.max() < curve, off


def losses(model: Any) -> Tensor:
    found = train(model, lambda m, i: language_loss(m, ids(i % 2)), STEPS, 3e-3)
    return torch.tensor(found, dtype=torch.float64)


def packed_weights(model: nn.Module) -> list[Any]:
    return [weight for weight in model.parameters() if isinstance(weight, pk.NF4Weight)]


def assert_only_packed_bytes(model: Any, folder: Path, adapt: Adapt) -> None:
    """After two steps of a patched model, with gradients alive.

    The storages of its packed weights, each in full and with tables of scales, have at most 1.02 of the bytes
    that `folder` has for these weights. Of what ops have made, nothing is alive but gradients and states of
    the optimizer: no dense weight.
    """
    checkpoint = Checkpoint.open(folder)
    items = nf4_weights(checkpoint.entries) | owned_weights(checkpoint)
    in_file = sum(checkpoint.entries[name].nbytes for names in items.values() for name in names)
    names = Names(model)  # of which several in the files may make one weight
    count = len({names.in_model(name)[0] for name in items})
    tuned = adapt(model, None)
    pk.patch(tuned)
    weights = packed_weights(tuned)
    adapters = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=1e-3)
    with Alive() as alive:
        for step in range(2):
            optimizer.zero_grad()
            language_loss(tuned, ids(step)).backward()
            optimizer.step()
    assert len(weights) == count and not any(weight.is_dense for weight in weights)
    assert 0.9 * in_file < sum(storages(weights).values()) <= 1.02 * in_file
    states = [value for state in optimizer.state.values() for value in state.values()]
    known = storages([*tuned.parameters(), *tuned.buffers(), *(p.grad for p in adapters), *states])
    left = {address: nbytes for address, nbytes in alive.storages().items() if address not in known}
    assert sum(left.values()) <= TABLES, f"alive other than gradients and states: {left}"


def storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Bytes of storages by address."""
    return {
        storage.data_ptr(): storage.nbytes() for tensor in tensors for storage in testing._storages(tensor)
    }


class Alive(TorchDispatchMode):
    """Storages that ops made and that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self._found: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and not isinstance(tensor, pk.NF4Weight):
                self._found.add(tensor.untyped_storage())
        return out

    def storages(self) -> dict[int, int]:
        return {storage.data_ptr(): storage.nbytes() for storage in self._found}

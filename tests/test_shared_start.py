"""Where a block's shared memory starts is the card's to say: kernels work, or stop, wherever it does."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from stub_device import FEW

import ptx_backend as ptx
import testing

NARROW = (86, 4, 99 << 10)
CALLS = {"small8": (1, 0), "tiles256": (40, 0), "dx8": (1, 1)}
"""Rows of x, and whether it is the gradient."""


@pytest.fixture
def extension() -> Iterator[ModuleType]:
    if (reason := testing.unavailable("ptx")) is not None:
        pytest.skip(f"ptx: {reason}")
    extension = ptx.BACKEND.extension
    yield extension
    ptx.BACKEND.reset()


def product(extension: ModuleType, way: str, card: tuple[int, int, int], start: int) -> torch.Tensor:
    n, k = 128, 64
    extension.set_card(*card)
    extension.set_shared_start(start)
    m, direction = CALLS[way]
    planned = extension.plan_for(m, n, k, 64, "bfloat16", *card)[direction]
    assert planned in (way, f"{way}_narrow"), planned
    group = testing.nf4_weight(n, k)._state.op_args
    x = testing.tensor(m, k if direction == 0 else n, dtype=torch.bfloat16)
    with testing.running_on("ptx"):
        if direction == 0:
            return torch.ops.peft_kernels.nf4_linear(x, *group, n, None)
        return torch.ops.peft_kernels.nf4_linear_dx(x, *group, k)


@pytest.mark.parametrize("way", CALLS)
def test_starts_that_leave_room(extension: ModuleType, way: str) -> None:
    for card, starts in ((FEW, (0, 512)), (NARROW, (0, 2048))):
        want = product(extension, way, card, 1024)
        for start in starts:
            assert torch.equal(product(extension, way, card, start), want)


@pytest.mark.parametrize("way", CALLS)
def test_a_start_that_does_not(extension: ModuleType, way: str) -> None:
    """The wide table has its place, and would lie over what is before it."""
    with pytest.raises(RuntimeError, match="trap"):
        product(extension, way, FEW, 1024 + 16)

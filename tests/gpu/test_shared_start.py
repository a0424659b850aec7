"""Where a block's shared memory starts is the card's to say: kernels work, or stop, wherever it does."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from lora_cases import check_nf4_linear, check_nf4_linear_dx
from stub_device import FEW
from test_experts_cuda import check, layer

import testing

NARROW = (86, 4, 99 << 10)
CALLS = {"small8": (1, 0), "tiles256": (40, 0), "dx8": (1, 1)}
"""Rows of x, and whether it is the gradient."""


def product(extension: ModuleType, way: str, card: tuple[int, ...], start: int) -> torch.Tensor:
    n, k = 128, 64
    extension.set_card(*card)
    extension.set_shared_start(start)
    m, direction = CALLS[way]
    planned = extension.plan_for(m, n, k, 64, "bfloat16", *card)[direction]
    assert planned in (way, f"{way}_narrow"), planned
    group = testing.nf4_weight(n, k)._state.op_args
    x = testing.tensor(m, k if direction == 0 else n, dtype=torch.bfloat16)
    if direction == 0:
        return torch.ops.peft_kernels.nf4_linear(x, *group, n, None)
    return torch.ops.peft_kernels.nf4_linear_dx(x, *group, k)


@pytest.mark.parametrize("way", CALLS)
def test_starts_that_leave_room(extension: ModuleType, way: str) -> None:
    for card, starts in ((FEW, (0, 512)), (NARROW, (0, 2048))):
        want = product(extension, way, card, 1024)
        for start in starts:
            assert torch.equal(product(extension, way, card, start), want)


RESERVED = (1024, 2048, 4096, 8192, 9216, 40 << 10)
"""Bytes of shared memory that the system has, more than any card so far; with the last two, the wide table
has no room."""
SIZES = {"A100": 163 << 10, "H100": 227 << 10, "RTX-5090": 99 << 10}


@pytest.mark.parametrize("reserved", RESERVED)
@pytest.mark.parametrize("card", SIZES)
def test_products_are_planned_for_where_it_starts(extension: ModuleType, card: str, reserved: int) -> None:
    """For what the card says that it reserves, of all shapes that take another kernel or cut."""
    capability = 120 if card == "RTX-5090" else 90
    extension.set_card(capability, 4, SIZES[card], reserved)
    taken = set()
    for i, m in enumerate((1, 8, 16, 32, 40, 70)):
        for n, k in ((72, 320), (136, 2560)):
            plans = extension.plan(m, n, k, 64, "bfloat16")
            taken.update(plans)
            case = {"m": m, "n": n, "k": k, "r": 8, "bs": 64, "base": "nested", "nested": True}
            case |= {"dtype": torch.bfloat16, "adapter": "same", "bias": ("fp32", "none")[i % 2]}
            case |= {"layout": "contiguous", "needs": "xab"}
            check_nf4_linear(case)
            check_nf4_linear_dx(case)
    assert "pieces" not in taken
    is_narrow = card == "RTX-5090" or reserved > 8192
    assert is_narrow == all(way.endswith("_narrow") or way == "dx64" for way in taken), taken


@pytest.mark.parametrize("reserved", RESERVED)
@pytest.mark.parametrize("op", ["experts_linear", "experts_linear_dx"])
def test_experts_too(extension: ModuleType, op: str, reserved: int) -> None:
    extension.set_card(90, 4, SIZES["H100"], reserved)
    ends = [0, 3, 3, 90, 91]
    check(op, layer(72, 320, torch.bfloat16, ends, rows=ends[-1])[op])


@pytest.mark.parametrize("way", CALLS)
def test_a_start_later_than_the_card_says(extension: ModuleType, way: str) -> None:
    """The wide table has its place: what is before it still has room there, or the kernel stops."""
    want = product(extension, way, FEW, 1024)
    latest = 0x10000 - {"small8": (64 + 8) * 2, "tiles256": 28688, "dx8": 55680}[way]
    assert torch.equal(product(extension, way, FEW, latest), want)
    with pytest.raises(RuntimeError, match="trap"):
        product(extension, way, FEW, latest + 16)

"""Damaged state dicts of int4 and FP8 weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import peft_kernels as pk
import testing

Items = dict[str, Tensor]


def filled(name: str, value: float) -> Callable[[Items], Items]:
    """One element of an item set to a value."""

    def change(items: Items) -> Items:
        changed = items[name].clone()
        changed.view(-1)[3] = value
        return {name: changed}

    return change


DAMAGE: dict[str, tuple[str, str, Callable[[Items], Items]]] = {
    "int4-nan-scale": (
        "int4",
        r"^weight\.absmax: expected finite scales, got 1 NaN, Inf among \d+$",
        filled("weight.absmax", float("nan")),
    ),
    "int4-wide-scales": (
        "int4",
        r"^weight\.absmax: expected float16 or bfloat16, got torch.float32$",
        lambda items: {"weight.absmax": items["weight.absmax"].float()},
    ),
    "int4-zero-point": (
        "int4",
        r"^weight\.zero_points: expected 0 to 16, got 1 larger ones$",
        filled("weight.zero_points", 17),
    ),
    "int4-few-zero-points": (
        "int4",
        r"^weight\.zero_points: expected number of blocks \d+, got \d+$",
        lambda items: {"weight.zero_points": items["weight.zero_points"][..., :-1]},
    ),
    "int4-zero-points-dtype": (
        "int4",
        r"^weight\.zero_points: expected dtype torch.uint8, got torch.int32$",
        lambda items: {"weight.zero_points": items["weight.zero_points"].int()},
    ),
    "int4-table": (
        "int4",
        r"^weight\.scale_values: expected weight, weight.absmax, weight.zero_points of int4, got",
        lambda items: {"weight.scale_values": torch.ones(256)},
    ),
    "fp8-nan": ("fp8", r"^weight: expected codes of finite values, got 1 NaN", filled("weight", 0x7F)),
    "fp8-minus-nan": ("fp8", r"^weight: expected codes of finite values, got 1 NaN", filled("weight", 0xFF)),
    "fp8-inf-scale": (
        "fp8",
        r"^weight\.absmax: expected finite scales, got 1 NaN, Inf among \d+$",
        filled("weight.absmax", float("inf")),
    ),
    "fp8-large-scale": (
        "fp8",
        r"^weight\.absmax: expected scales up to 7.6e\+35, got 1 larger ones$",
        filled("weight.absmax", 1e36),
    ),
    "int8-large-scale": (
        "int8",
        r"^weight\.absmax: expected scales up to 2.66e\+36, got 1 larger ones$",
        filled("weight.absmax", 3e36),
    ),
    "fp8-zero-points": (
        "fp8",
        r"^weight\.zero_points: expected weight, weight.absmax of fp8, got this key too$",
        lambda items: {"weight.zero_points": torch.ones(4)},
    ),
    "fp8-few-codes": (
        "fp8",
        r"^weight: expected \d+ bytes for shape \(\d+, \d+\), got \d+$",
        lambda items: {"weight": items["weight"][..., :-1]},
    ),
}


@pytest.mark.parametrize("shape", [(300, 256), (3, 300, 256)], ids=["layer", "experts"])
@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_refused(case: str, shape: tuple[int, ...]) -> None:
    format, message, change = DAMAGE[case]
    items = pk.NF4Weight.quantize(testing.tensor(*shape), format=format).state_dict()
    pk.NF4Weight.from_state_dict(items)
    with pytest.raises(ValueError, match=message):
        pk.NF4Weight.from_state_dict(items | change(items))

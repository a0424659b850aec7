"""Damaged state dicts of weights whose scales are codes: MXFP4 and NVFP4."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_formats_weight import BY_CODE, SHAPES, each_shape, make
from torch import Tensor

import peft_kernels as pk

Change = Callable[[dict[str, Tensor], str], object]


def shorten(item: str) -> Change:
    return lambda items, _: items.update({item: items[item][..., :-1].contiguous()})


def drop(item: str) -> Change:
    return lambda items, _: items.pop(item)


def cast(item: str, dtype: torch.dtype) -> Change:
    return lambda items, _: items.update({item: items[item].to(dtype)})


def described(**changes: Any) -> Change:
    def change(items: dict[str, Tensor], state: str) -> None:
        numbers = json.loads(bytes(items[state].tolist())) | changes
        items[state] = torch.tensor(list(json.dumps(numbers).encode()), dtype=torch.uint8)

    return change


def nan_scale(items: dict[str, Tensor], _: str) -> None:
    is_nan = items["weight.scale_values"].reshape(-1, 256)[0].isnan()
    items["weight.absmax"].view(-1)[3] = int(is_nan.nonzero()[-1])


def negative_scale(items: dict[str, Tensor], _: str) -> None:
    items["weight.scale_values"] = -items["weight.scale_values"]


DAMAGE: dict[str, tuple[str, Change]] = {
    "codes-short": (r"^weight: expected \d+ bytes for shape .*, got \d+$", shorten("weight")),
    "codes-missing": (r"^weight: expected a dense tensor in the state dict, got NoneType$", drop("weight")),
    "codes-dtype": (r"^weight: expected dtype torch.uint8, got torch.int32$", cast("weight", torch.int32)),
    "scales-short": (r"^weight\.absmax: expected number of blocks \d+, got \d+$", shorten("weight.absmax")),
    "scales-missing": (r"^weight\.absmax: expected a dense tensor", drop("weight.absmax")),
    "scales-dtype": (
        r"^weight\.absmax: expected dtype torch.uint8, got torch.float32$",
        cast("weight.absmax", torch.float32),
    ),
    "scales-nan": (r"^weight\.absmax: expected finite scales of 0 or more, got \d+ NaN", nan_scale),
    "scales-negative": (r"^weight\.absmax: expected finite scales of 0 or more, got \d+ NaN", negative_scale),
    "table-short": (
        r"^weight\.scale_values: expected number of values 256, got 255$",
        shorten("weight.scale_values"),
    ),
    "table-missing": (r"^weight\.scale_values: expected a dense tensor", drop("weight.scale_values")),
    "table-dtype": (
        r"^weight\.scale_values: expected dtype torch.float32, got torch.float64$",
        cast("weight.scale_values", torch.float64),
    ),
    "unknown-item": (
        r"^weight\.zeros: expected the items of a packed weight alone",
        lambda items, _: items.update({"weight.zeros": torch.ones(1)}),
    ),
    "blocksize": (r"^weight: expected blocksize one of \(\d+,\), got 64$", described(blocksize=64)),
    "format": (r"expected quant_type .*, got 'int3'$", described(quant_type="int3")),
    "nf4": (r"expected quant_type .*, got 'nf4'$", described(quant_type="nf4")),
    "shape": (r"^weight: expected a shape \(", described(shape=[96])),
    "dtype": (
        r"^weight: expected dtype float32, bfloat16 or float16, got torch.int8",
        described(dtype="int8"),
    ),
    "json": (
        r"expected bitsandbytes' JSON",
        lambda items, state: items.update({state: items[state][:-3]}),
    ),
}


@BY_CODE
@each_shape
@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_refused(case: str, shape: tuple[int, ...], form: str) -> None:
    message, change = DAMAGE[case]
    items = copy.deepcopy(make(form, shape).state_dict())
    change(items, next(name for name in items if ".quant_state." in name))
    with pytest.raises(ValueError, match=message):
        pk.NF4Weight.from_state_dict(items)


@BY_CODE
def test_experts_of_unequal_number_are_refused(form: str) -> None:
    items = make(form, SHAPES["experts"]).state_dict()
    for name in ("weight.absmax", "weight.scale_values"):
        with pytest.raises(ValueError, match=rf"^{name}: expected number of experts 3, got 2$"):
            pk.NF4Weight.from_state_dict(items | {name: items[name][:2]})

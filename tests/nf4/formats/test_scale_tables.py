"""One table for the scales of two layers in NVFP4: each layer comes back as it was, to the bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from peft_kernels.core.packed_state import PackedState
from peft_kernels.nf4.owners import OWNERS
from peft_kernels.nf4.owners.stacked import apart, joined

ALL = torch.tensor([*range(127), 128], dtype=torch.uint8)
CODES = {"all": ALL, "reversed": ALL.flip(0)}
CODES |= {f"{name} alone": torch.full((128,), code) for name, code in {"0": 0, "-0": 128, "1": 0x38}.items()}
"""Codes of the scales of a layer, in E4M3."""


def after(number: float) -> float:
    """The next number in fp32."""
    return float(torch.nextafter(torch.tensor(number), torch.tensor(math.inf)))


WHOLES = {
    "one": ("modelopt", 0.0004, 0.0004),
    "two": ("modelopt", 0.0004, 0.0007),
    "neighbours": ("modelopt", 0.0004, after(0.0004)),
    "with one reciprocal": ("compressed-tensors", 1900.0, after(1900.0)),
}
"""Owners, and the scales of both whole layers."""


def layer(codes: str, owner: str, whole: float) -> PackedState:
    tensors = {
        "weight": torch.arange(128 * 8).mul(37).to(torch.uint8).view(-1, 8),
        "weight_scale": CODES[codes].to(torch.uint8).view(torch.float8_e4m3fn).view(-1, 1),
        "weight_scale_2": torch.tensor(whole),
    }
    if owner != "modelopt":
        tensors["weight_packed"] = tensors.pop("weight")
        tensors["weight_global_scale"] = tensors.pop("weight_scale_2")
    return OWNERS[owner].read(tensors, "weight")[0]


def bits(values: Tensor | None) -> Tensor:
    assert values is not None
    return values.nan_to_num(math.inf).view(torch.int32)  # the bits of NaN do not matter


@pytest.mark.parametrize("wholes", WHOLES)
@pytest.mark.parametrize("first", CODES)
@pytest.mark.parametrize("second", CODES)
def test_layers_come_back(first: str, second: str, wholes: str) -> None:
    owner, *both = WHOLES[wholes]
    layers = [layer(codes, owner, whole) for codes, whole in zip((first, second), both, strict=True)]
    whole = joined([layers, layers[::-1]], 2, "weight")
    for e, parts in enumerate(apart(whole, [128, 128])):
        expected = layers[::-1] if e else layers
        rows = torch.cat([each.dequantize(torch.float32) for each in expected])
        assert torch.equal(bits(whole.expert(e).dequantize(torch.float32)), bits(rows))
        for part, each in zip(parts, expected, strict=True):
            assert torch.equal(part.absmax, each.absmax)
            assert torch.equal(bits(part.absmax2), bits(each.absmax2))
            assert torch.equal(part.packed, each.packed)


def test_reciprocals_of_neighbours() -> None:
    """Those above have tables that differ, but not in the value of 1."""
    tables = [OWNERS["compressed-tensors"].values(torch.tensor(w)) for w in WHOLES["with one reciprocal"][1:]]
    assert tables[0][0x38] == tables[1][0x38] and not torch.equal(*map(bits, tables))

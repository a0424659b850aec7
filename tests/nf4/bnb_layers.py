"""NF4 weights and layers of bitsandbytes and the same of this package."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft_kernels as pk

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
bnb_functional = bnb.functional
CPU = torch.device("cpu")


def quantized(
    dense: Tensor,
    nested: bool = True,
    blocksize: int = 64,
    storage: torch.dtype = torch.uint8,
    kind: str = "nf4",
) -> Any:
    params = bnb.nn.Params4bit(
        dense.clone(), requires_grad=False, quant_type=kind, blocksize=blocksize,
        compress_statistics=nested, quant_storage=storage,
    )  # fmt: skip
    return params.to("cpu")


def their_layer(dense: Tensor, bias: bool = True, kind: str = "nf4", **options: Any) -> Any:
    layer = bnb.nn.Linear4bit(dense.shape[1], dense.shape[0], bias=bias, quant_type=kind)
    layer.weight = quantized(dense, kind=kind, **options)
    layer.weight.module, layer.quant_state = layer, layer.weight.quant_state
    return layer


def our_layer(out_features: int, in_features: int, bias: bool = True, **options: Any) -> Any:
    return pk.nn.NF4Linear.from_linear(nn.Linear(in_features, out_features, bias=bias), **options)


def same_state(got: Any, want: Any) -> None:
    """Asserts equal state dicts: tensors bit for bit, JSON by value, as key order is free."""
    assert got.keys() == want.keys()
    for name in want:
        if "quant_state" in name:
            assert json.loads(bytes(got[name].tolist())) == json.loads(bytes(want[name].tolist()))
        else:
            assert got[name].dtype == want[name].dtype and torch.equal(got[name], want[name]), name


SHAPES = {"even": (40, 64), "odd": (7, 33), "crossing": (33, 96)}

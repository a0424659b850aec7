"""Errors of the compiled multi_lora_linear, and of lora_linear's dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import testing


def good_arguments() -> dict[str, Any]:
    """Valid arguments: a dense and an NF4 layer with an adapter each."""
    nf4 = testing.nf4_weight(5, 8, 32, double_quant=False)._state.op_args
    return {
        "x": torch.ones(3, 8),
        "weight": [torch.ones(4, 8), nf4[0]],
        "absmax": [None, nf4[1]],
        "absmax2": [None, None],
        "offset": [None, None],
        "blocksize": [0, 32],
        "out_features": [4, 5],
        "bias": [torch.ones(4), torch.empty(0)],
        "lora_a": [torch.ones(2, 8), torch.ones(3, 8)],
        "lora_b": [torch.ones(4, 2), torch.ones(5, 3)],
        "layer": [0, 1],
        "scaling": [1.0, 2.0],
        "dropout_p": [0.5, 0.0],
        "seed": torch.tensor(3),
        "group": [0, 1],
        "row_group": torch.tensor([0, 1, 0]),
        "compute_dtype": None,
    }


def good_backward_arguments() -> dict[str, Any]:
    extra = {"dy": [torch.ones(3, 4), torch.ones(3, 5)], "x": torch.ones(3, 8), "h": torch.ones(3, 5)}
    rest = {name: value for name, value in good_arguments().items() if name not in ("out_features", "bias")}
    return extra | rest | {"need_dx": True, "need_da": [True, True], "need_db": [True, True]}


A, B, TWO, ones = "lora_a", "lora_b", "expected 2 of each like", torch.ones
COMPUTE_64 = {"compute_dtype": torch.float64}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "lora_b-list": (f"{TWO} lora_a", {B: [ones(4, 2)]}),
    "layer-list": (f"{TWO} lora_a", {"layer": [0]}),
    "scaling-list": (f"{TWO} lora_a", {"scaling": [1.0, 2.0, 3.0]}),
    "list-dropout_p": (f"{TWO} lora_a", {"dropout_p": []}),
    "group-list": (f"{TWO} lora_a", {"group": [0]}),
    "absmax-list": (f"{TWO} weight", {"absmax": [None]}),
    "absmax2-list": (f"{TWO} weight", {"absmax2": [None] * 3}),
    "offset-list": (f"{TWO} weight", {"offset": []}),
    "blocksize-list": (f"{TWO} weight", {"blocksize": [0]}),
    "layer-high": ("layer: expected 0 to 1, got 2", {"layer": [0, 2]}),
    "layer-negative": ("layer: expected 0 to 1, got -1", {"layer": [-1, 1]}),
    "seed-none": ("seed: expected an int64 tensor of one element with dropout_p 0.5", {"seed": None}),
    "seed-dtype": ("seed: expected Long, got Float", {"seed": torch.tensor(3.0)}),
    "seed-int32": ("seed: expected Long, got Int", {"seed": torch.tensor(3, dtype=torch.int32)}),
    "seed-elements": ("seed: expected 1 elements, got 2", {"seed": torch.tensor([3, 4])}),
    "dropout_p-high": ("dropout_p: expected 0 to 1, got 1.5", {"dropout_p": [0.5, 1.5]}),
    "dropout_p-negative": ("dropout_p: expected 0 to 1, got -0.1", {"dropout_p": [-0.1, 0.0]}),
    "dropout_p-nan": ("dropout_p: expected 0 to 1, got nan", {"dropout_p": [0.0, float("nan")]}),
    "row_group-dtype": ("row_group: expected Long, got Int", {"row_group": torch.zeros(3).int()}),
    "row_group-long": (r"row_group: expected shape \[3\], got \[4\]", {"row_group": torch.zeros(4).long()}),
    "row_group-2d": (
        r"row_group: expected shape \[3\], got \[3, 1\]",
        {"row_group": torch.zeros(3, 1).long()},
    ),
    "lora_a-features": (r"lora_a: expected shape \[3, 8\], got \[3, 7\]", {A: [ones(2, 8), ones(3, 7)]}),
    "lora_a-1d": ("lora_a: expected 2 dimensions, got 1", {A: [ones(8), ones(3, 8)]}),
    "lora_a-bf16": ("lora_a: expected Float", {A: [ones(2, 8).bfloat16(), ones(3, 8)]}),
    "lora_a-fp64": ("lora_a: expected float32, bfloat16", {A: [ones(2, 8).double(), ones(3, 8)]}),
    "lora_b-rows": ("lora_b: expected ", {B: [ones(6, 2), ones(5, 3)]}),
    "lora_b-rows-few": ("lora_b: expected ", {B: [ones(4, 2), ones(4, 3)]}),
    "lora_b-rank": (r"lora_b: expected shape \[4, 2\], got \[4, 3\]", {B: [ones(4, 3), ones(5, 3)]}),
    "layer-swapped": ("lora_b: expected ", {"layer": [1, 0]}),
    "weight-features": ("weight: expected shape", {"weight": [ones(4, 9), ones(20).byte()]}),
    "weight-dtype": ("weight: expected Float", {"weight": [ones(4, 8).half(), ones(20).byte()]}),
    "packed-short": ("packed: expected 20 bytes, got 19", {"weight": [ones(4, 8), ones(19).byte()]}),
    "absmax-short": ("absmax: expected 2 elements, got 1", {"absmax": [None, ones(1)]}),
    "compute_dtype": ("compute_dtype: expected float32, bfloat16 or float16, got Double", COMPUTE_64),
    "compute_dtype-weight": ("weight: expected BFloat16, got Float", {"compute_dtype": torch.bfloat16}),
    "x-features": ("lora_a: expected shape", {"x": ones(3, 9)}),
    "x-scalar": ("x: expected at least 1 dimension", {"x": ones(())}),
    "x-fp64": ("expected", {"x": ones(3, 8).double()}),
}
FORWARD_REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "bias-list": ("bias: expected 2 like weight, got 1", {"bias": [torch.empty(0)]}),
    "out_features-list": (f"{TWO} weight", {"out_features": [4]}),
    "out_features": ("weight: expected shape", {"out_features": [3, 5]}),
    "out_features-nf4": ("packed: expected 24 bytes, got 20", {"out_features": [4, 6]}),
    "bias-nf4": (r"bias: expected shape \[5\], got \[4\]", {"bias": [torch.empty(0), ones(4)]}),
    "bias-nf4-dtype": ("bias: expected Float", {"bias": [torch.empty(0), ones(5).bfloat16()]}),
    "bias-dense": (r"bias: expected shape \[4\], got \[3\]", {"bias": [ones(3), torch.empty(0)]}),
    "bias-dense-one": (r"bias: expected shape \[4\], got \[1\]", {"bias": [ones(1), torch.empty(0)]}),
}
BACKWARD_REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "dy-list": ("dy: expected 2 like weight, got 1", {"dy": [ones(3, 4)]}),
    "dy-rows": (r"dy: expected shape \[3, 5\], got \[2, 5\]", {"dy": [ones(3, 4), ones(2, 5)]}),
    "dy-features": ("expected", {"dy": [ones(3, 3), ones(3, 5)]}),
    "dy-dimensions": ("dy: expected 2 dimensions like x, got 3", {"dy": [ones(1, 3, 4), ones(3, 5)]}),
    "dy-scalar": ("dy: expected 2 dimensions like x, got 0", {"dy": [ones(()), ones(3, 5)]}),
    "dy-dtype": ("dy: expected Float, got Half", {"dy": [ones(3, 4).half(), ones(3, 5)]}),
    "h-columns": (r"h: expected shape \[3, 5\], got \[3, 4\]", {"h": ones(3, 4)}),
    "h-dtype": ("h: expected Float, got BFloat16", {"h": ones(3, 5).bfloat16()}),
    "need_da-list": ("need_da, need_db: expected 2 of each like lora_a, got 1, 2", {"need_da": [True]}),
    "need_db-list": ("need_da, need_db: expected 2 of each like lora_a, got 2, 3", {"need_db": [True] * 3}),
}


@pytest.mark.parametrize("name", [*REFUSED, *FORWARD_REFUSED])
def test_forward_refuses(compiled_ops: Any, name: str) -> None:
    message, change = (REFUSED | FORWARD_REFUSED)[name]
    op, good = compiled_ops.multi_lora_linear, good_arguments()
    op(*good.values())
    with pytest.raises(RuntimeError, match=message):
        op(*(good | change).values())


@pytest.mark.parametrize("name", [*REFUSED, *BACKWARD_REFUSED])
def test_backward_refuses(compiled_ops: Any, name: str) -> None:
    message, change = (REFUSED | BACKWARD_REFUSED)[name]
    op, good = compiled_ops.multi_lora_linear_backward, good_backward_arguments()
    op(*good.values())
    with pytest.raises(RuntimeError, match=message):
        op(*(good | change).values())


@pytest.mark.parametrize("name", [name for name in REFUSED if name.startswith(("seed-", "dropout_p-"))])
def test_lora_linear_refuses(compiled_ops: Any, name: str) -> None:
    message, change = REFUSED[name]
    p = max(change.get("dropout_p", [0.5]), key=lambda p: not 0 <= p <= 1)
    rest = (p, change.get("seed", torch.tensor(3)), None)
    x, dy, h, w = ones(3, 8), ones(3, 4), ones(3, 2), ones(4, 8)
    adapter, dense, flags = (ones(2, 8), ones(4, 2), 1.0), (w, None, None, None, 0), (True,) * 3
    with pytest.raises(RuntimeError, match=message):
        compiled_ops.lora_linear(x, *dense, None, *adapter, *rest)
    with pytest.raises(RuntimeError, match=message):
        compiled_ops.lora_linear_backward(dy, x, h, *dense, *adapter, *rest, *flags)

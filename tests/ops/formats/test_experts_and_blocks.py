"""Experts, gated MLPs and the loss of a head in each format, by the numbers policy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from experts_cases import (
    check_experts_linear,
    check_experts_linear_dx,
    check_experts_lora_linear,
    check_experts_lora_linear_backward,
    ends_of,
    experts_weight,
)
from forms import FORMS, cases, full
from loss_cases import results_of
from numbers_policy import DTYPES, case_id, dense64, each_dtype
from torch import Tensor

import testing
from peft_kernels.core.formats import FORMATS
from peft_kernels.core.op import columns

ops = torch.ops.peft_kernels

pytestmark = pytest.mark.usefixtures("nan_outputs")

EXPERTS = cases(
    split=("gaps", "decode", "uneven", "one-of-all", "no-rows"),
    n=(12, 33, 100),
    k=(48, 96, 160, 192, 1056),
    r=(3, 16),
    dtype=DTYPES,
    adapter=("fp32", "same"),
    strides=("contiguous", "peft"),
    bias=("none", "same"),
    layout=("contiguous",),
    needs=("xab", "x"),
)
each_case = pytest.mark.parametrize("case", EXPERTS, ids=case_id)


@each_case
def test_experts(backend: str, case: dict[str, Any]) -> None:
    check_experts_linear(full(case))


@each_case
def test_experts_dx(backend: str, case: dict[str, Any]) -> None:
    check_experts_linear_dx(full(case))


@each_case
def test_experts_lora(backend: str, case: dict[str, Any]) -> None:
    check_experts_lora_linear(full(case))


@each_case
def test_experts_lora_backward(backend: str, case: dict[str, Any]) -> None:
    check_experts_lora_linear_backward(full(case))


MLPS = ("mxfp4", "nvfp4", "fp4"), ("int4", "fp8", "fp8")
"""Formats of gate, up and down."""
SHAPES = (256, 128), (256, 128), (128, 256)


def mlp_results(mlp: Any, bases: list[Any], leaves: list[Tensor]) -> dict[str, Tensor]:
    """The output of `mlp` and its gradients."""
    x, *adapters = (leaf.clone().requires_grad_() for leaf in leaves)
    sizes, biases = [n for n, _ in SHAPES], [torch.empty(0)] * 3
    rest = [0, 1, 2], [0.5, 0.7, 0.9], [0.0] * 3, None, "silu"
    y = mlp(x, *columns(bases), sizes, biases, adapters[:3], adapters[3:], *rest)[0]
    gradients = torch.autograd.grad(y, [x, *adapters], testing.tensor(*y.shape, seed=8).to(y.dtype))
    names = ("y", "dx", *(f"d{name}{i}" for name in "ab" for i in range(3)))
    return dict(zip(names, (y.detach(), *gradients), strict=True))


@each_dtype
@pytest.mark.parametrize("rows", [1, 7, 70])
@pytest.mark.parametrize("formats", MLPS, ids="-".join)
def test_a_gated_mlp_of_several_formats(
    backend: str, formats: tuple[str, ...], rows: int, dtype: torch.dtype
) -> None:
    weights = [
        testing.nf4_weight(*shape, None, format=name, seed=seed)
        for seed, (name, shape) in enumerate(zip(formats, SHAPES, strict=True), start=3)
    ]
    packed = [weight._state.op_args for weight in weights]
    dense = [(dense64(weight), None, None, None, 0) for weight in weights]
    reference = torch.ops.peft_kernels_reference.gated_mlp
    leaves = [testing.tensor(rows, 128, dtype=dtype)]
    leaves += [testing.tensor(4, k, dtype=dtype, seed=i, scale=k**-0.5) for i, (_, k) in enumerate(SHAPES)]
    leaves += [testing.tensor(n, 4, dtype=dtype, seed=9 + i) for i, (n, _) in enumerate(SHAPES)]
    got, plain = (mlp_results(mlp, packed, leaves) for mlp in (ops.gated_mlp, reference))
    truth = mlp_results(reference, dense, [leaf.double() for leaf in leaves])
    for name, value in got.items():
        testing.assert_close(value, plain[name], truth[name], name)


def has_blocks(format: str, k: int) -> bool:
    form = FORMATS[format]
    return not form.rows_have_blocks or k % form.default_blocksize == 0


HEADS = testing.pairwise(
    size=((64, 5, 48), (64, 1030, 96), (7, 700, 160), (1, 513, 128), (70, 1500, 128), (300, 1030, 64)),
    dtype=DTYPES,
    base=("fp4", "mxfp4", "nvfp4", "int4", "fp8"),
    bias=("none", "same"),
    options=("plain", "capped", "smoothed", "all"),
)


@pytest.mark.parametrize("case", [c for c in HEADS if has_blocks(c["base"], c["size"][2])], ids=case_id)
def test_the_loss_of_a_head(backend: str, case: dict[str, Any]) -> None:
    rows, vocabulary, _ = case["size"]
    if backend in ("ptx", "triton") and rows * vocabulary > 10_000:
        pytest.skip(f"{backend}: made of products that have their tests")
    for name, results in results_of(case).items():
        testing.assert_close(*results, name)


@pytest.mark.parametrize("form", FORMS)
def test_an_expert_is_a_layer_to_the_bit(backend: str, form: str) -> None:
    """Each expert has its own scales, of blocks and of the whole."""
    kind = FORMS[form]
    weight = experts_weight(4, 33, 128, kind["bs"], kind["nested"], form=kind["format"])
    x = testing.tensor(12, 128, dtype=torch.bfloat16)
    y = ops.experts_linear(x, ends_of((3, 3, 3, 3, 0)), *weight._state.op_args, 33, None)
    for e in range(4):
        rows = slice(3 * e, 3 * e + 3)
        one = ops.nf4_linear(x[rows].contiguous(), *weight._state.expert(e).op_args, 33, None)
        if backend in ("reference", "triton"):  # other numbers of rows may round differently
            torch.testing.assert_close(y[rows], one)
        else:
            assert torch.equal(y[rows], one)

"""Weights in int4 and FP8 on back end triton: any part of any of them, and ops that take them by pieces."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from numbers_policy import dense64, each_dtype
from torch import Tensor

import testing
from peft_kernels.core.formats import FORMATS, SCALE_DTYPES

if testing.unavailable("triton") is not None:
    pytest.skip("for Triton's interpreter (make triton)", allow_module_level=True)

from peft_kernels.core.op import Base
from peft_kernels.ops.nf4 import dense_weight
from peft_kernels.triton_kernels.linear import linear, linear_pieces
from peft_kernels.triton_kernels.lora import dora_norm
from peft_kernels.triton_kernels.nf4.nf4_groups import dequantize_groups
from peft_kernels.triton_kernels.nf4.nf4_weight import many_nf4, nf4

pytestmark = pytest.mark.usefixtures("nan_outputs", "triton_alone")

KINDS = {"int4": 32, "int4-symmetric": 64, "int4-256": 256, "fp8": 128, "fp8-rows": 0, "int8": 64}
KINDS |= {"int8-rows": 0}
"""And their blocksizes."""
each_kind = pytest.mark.parametrize("kind", KINDS)

PARTS = (
    (range(0, 140), range(0, 320)),
    (range(125, 133), range(256, 320)),
    (range(128, 129), range(64, 65)),
    (range(120, 140), range(33, 319)),
    (range(5, 5), range(0, 320)),
    (range(0, 140), range(64, 64)),
)


@pytest.fixture
def triton_alone(backend: str) -> None:
    assert backend == "triton"


def random_bases(kind: str, n: int, k: int, count: int) -> tuple[Base, list[Base]]:
    """`count` weights (n, k), together and one by one: random codes, scales of both signs, zero points."""
    form, made = FORMATS[kind.partition("-")[0]], torch.Generator().manual_seed(n * k)
    blocks = form.scales((n, k), KINDS[kind])
    codes = torch.randint(256, (count, form.nbytes(n * k)), generator=made, dtype=torch.uint8)
    scales = torch.randn(count, blocks, generator=made) * torch.exp2(torch.arange(blocks) % 20 - 12.0)
    zeros = None
    if form.has_nan:
        codes[codes & 0x7F == 0x7F] = 5
    if form.bits == 4:
        scales = scales.to(SCALE_DTYPES[kind == "int4-256"])
        if kind != "int4-symmetric":
            zeros = torch.randint(17, (count, blocks), generator=made, dtype=torch.uint8)
    layout = form.layout(KINDS[kind])
    of_one = zip(codes, scales, [None] * count if zeros is None else zeros, strict=True)
    return (
        Base(codes, scales, None, zeros, layout),
        [Base(c, s, None, z, layout) for c, s, z in of_one],
    )


@each_dtype
@each_kind
@pytest.mark.parametrize("k", [320, 321])
def test_any_part_of_a_weight(kind: str, k: int, dtype: torch.dtype) -> None:
    base, (one,) = random_bases(kind, 140, k, 1)
    weight, want = nf4(base, 140, k), dense_weight(one, (140, k), dtype)
    for rows, cols in PARTS:
        room = torch.full((len(rows), len(cols) + 3), torch.nan, dtype=dtype)
        linear_pieces.dequantize_part(weight, k, rows, cols, room[:, : len(cols)])
        part = want[rows.start : rows.stop, cols.start : cols.stop]
        assert torch.equal(room[:, : len(cols)], part), (rows, cols)
        assert room[:, len(cols) :].isnan().all(), "wrote beyond its columns"


@each_kind
@pytest.mark.parametrize("n, k", [(40, 64), (130, 129), (3, 5), (1, 1)])
def test_several_weights(kind: str, n: int, k: int) -> None:
    """Experts whose blocks and bytes are their own, also where the last ones are not full."""
    base, each = random_bases(kind, n, k, 3)
    out = torch.empty(3, n, k)
    dequantize_groups(many_nf4(base, n, k, 3), k, range(n), range(k), out)
    assert torch.equal(out, torch.stack([dense_weight(one, (n, k), torch.float32) for one in each]))


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Pieces of 32 rows or columns, and the sizes of those that were dequantised."""
    found: list[tuple[int, int]] = []
    original = linear_pieces.dequantize_part

    def noted(weight: Any, k: int, rows: range, cols: range, out: Tensor) -> None:
        found.append((len(rows), len(cols)))
        original(weight, k, rows, cols, out)

    def pieces_of_32(count: int, *_: int) -> Iterator[range]:
        return (range(i, min(i + 32, count)) for i in range(0, count, 32))

    for module in (linear_pieces, dora_norm):
        monkeypatch.setattr(module, "dequantize_part", noted)
        monkeypatch.setattr(module, "pieces", pieces_of_32)
    yield found


@each_kind
def test_ops_by_pieces(kind: str, small_pieces: list[tuple[int, int]]) -> None:
    """Of x for which NF4 has a kernel."""
    dtype = torch.bfloat16
    weight = testing.nf4_weight(40, 256, KINDS[kind], kind != "int4-symmetric", format=kind.partition("-")[0])
    base, dense, truth = weight._state.op_args, weight.dequantize().to(dtype), dense64(weight)
    x, dy = testing.tensor(5, 256, dtype=dtype), testing.tensor(5, 40, dtype=dtype, seed=2)
    ops = torch.ops.peft_kernels
    y = ops.nf4_linear(x, *base, 40, None)
    testing.assert_close(y, x @ dense.t(), x.double() @ truth.t())
    assert small_pieces == [(32, 256), (8, 256)]
    small_pieces.clear()
    dx = ops.nf4_linear_dx(dy, *base, 256)
    testing.assert_close(dx, dy @ dense, dy.double() @ truth)
    assert small_pieces == [(40, 32)] * 8
    small_pieces.clear()
    a, b = testing.tensor(8, 256, seed=3, scale=0.05), testing.tensor(40, 8, seed=4, scale=0.3)
    want = (truth + 1.7 * b.double() @ a.double()).norm(dim=1)
    norms = ops.dora_norm(*base, a, b, 1.7)
    testing.assert_close(norms, testing.reference_op("dora_norm")(*base, a, b, 1.7), want)
    assert small_pieces == [(32, 256), (8, 256)]


def test_no_rows_of_a_weight() -> None:
    base, _ = random_bases("fp8", 0, 128, 1)
    ops = torch.ops.peft_kernels
    assert ops.dora_norm(*base, torch.ones(2, 128), torch.ones(0, 2), 1.0).shape == (0,)
    assert ops.nf4_linear(torch.ones(3, 128), *base, 0, None).shape == (3, 0)
    assert torch.equal(ops.nf4_linear_dx(torch.ones(3, 0), *base, 128), torch.zeros(3, 128))


def test_a_gemm_reads_none_of_them_packed() -> None:
    base, _ = random_bases("int4", 64, 64, 1)
    assert linear.fused_gemm(torch.ones(1, 64), nf4(base, 64, 64), 64, False) is None

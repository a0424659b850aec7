"""Linear layers, LoRA and DoRA over a base in each format, by the numbers policy."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forms import DEPTHS, FORMS, ROWS, cases, fits, full, weight_of
from lora_cases import check_lora_linear, check_lora_linear_backward, check_nf4_linear, check_nf4_linear_dx
from lora_multi_cases import check_backward, check_forward
from numbers_policy import DTYPES, case_id, dense64, each_dtype, same_with_any_threads, short
from torch import Tensor

import testing
from peft_kernels import NF4Weight
from peft_kernels.core.formats import FORMATS, e4m3_values, e8m0_values

ops = torch.ops.peft_kernels
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("nan_outputs")

LINEAR = cases(
    m=ROWS,
    k=DEPTHS,
    n=(12, 33, 100),
    dtype=DTYPES,
    bias=("none", "same", "fp32"),
    layout=("contiguous", "slice"),
)
# Few rows in bf16 over rows of whole blocks of 64 or 128, which some ISAs multiply in another way; and rows
# that are longer than a running sum of theirs.
SMALL = {"n": 101, "dtype": torch.bfloat16, "bias": "none", "layout": "contiguous"}
LINEAR += [
    {"form": form, "m": m, "k": k, **SMALL}
    for form, m, k in [*product(FORMS, (1, 3, 4, 9), (128, 192)), *product(FORMS, (1, 9), (1152,))]
    if fits(form, k)
]
LORA = cases(
    m=(1, 3, 8, 9, 17, 70),
    k=DEPTHS,
    n=(12, 100),
    r=(3, 16),
    dtype=DTYPES,
    adapter=("fp32", "same"),
    bias=("none", "same"),
    layout=("contiguous", "3-d"),
    needs=("xab", "x", "ab"),
)
MULTI = cases(
    m=(1, 5, 17, 70),
    k=DEPTHS,
    n=(100,),
    r=(8,),
    layers=(2, 3),
    adapters=("010", "", "2"),
    dtype=DTYPES,
    adapter=("fp32", "same"),
    bias=("various",),
    layout=("contiguous",),
    p=(0.0, 0.5),
    groups=("none", "runs", "nobody"),
    needs=("xab",),
)


def each(found: list[dict[str, Any]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", found, ids=case_id)


@each(LINEAR)
def test_linear(backend: str, case: dict[str, Any]) -> None:
    check_nf4_linear(full(case))


@each(LINEAR)
def test_linear_dx(backend: str, case: dict[str, Any]) -> None:
    check_nf4_linear_dx(full(case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("blocksize", [32, 64, 128])
@pytest.mark.parametrize("rows", [1, 5, 17])
def test_every_zero_point(backend: str, rows: int, blocksize: int, dtype: torch.dtype) -> None:
    """From 0 to 16; quantising makes few of them."""
    n, k = 51, 384
    blocks = n * k // blocksize
    codes, zeros = ((torch.arange(size) * 37).to(torch.uint8) for size in (n * k // 2, blocks))
    scales = testing.tensor(blocks, dtype=torch.float16, scale=k**-0.5)
    base = codes, scales, None, zeros % 17, FORMATS["int4"].layout(blocksize)
    dense = testing.reference_op("dequantize_nf4")(*base, [n, k], torch.float32)
    x, dy = (testing.tensor(rows, size, dtype=dtype, seed=size) for size in (k, n))
    y, dx = ops.nf4_linear(x, *base, n, None), ops.nf4_linear_dx(dy, *base, k)
    testing.assert_close(y, x @ dense.to(dtype).t(), x.double() @ dense.double().t())
    testing.assert_close(dx, dy @ dense.to(dtype), dy.double() @ dense.double())


def check_values_alone(base: tuple[Any, ...], n: int, k: int, rows: int, dtype: torch.dtype) -> None:
    """Rows of one 1 give values of the weight to the bit: in other sums small ones are lost."""
    dense = testing.reference_op("dequantize_nf4")(*base, [n, k], dtype)
    cols, features = torch.arange(rows) * 37 % k, torch.arange(rows) * 37 % n
    x, dy = (F.one_hot(at, size).to(dtype) for at, size in ((cols, k), (features, n)))
    assert torch.equal(ops.nf4_linear(x, *base, n, None), dense[:, cols].t())
    assert torch.equal(ops.nf4_linear_dx(dy, *base, k), dense[features])


@each_dtype
@pytest.mark.parametrize(("format", "blocksize"), [("fp8", 0), ("fp8", 128), ("int8", 0), ("int8", 64)])
@pytest.mark.parametrize("rows", [4, 16, 40])
def test_every_code_of_a_byte(
    backend: str, rows: int, format: str, blocksize: int, dtype: torch.dtype
) -> None:
    form, size = FORMATS[format], 256
    codes = (torch.arange(size)[:, None] + torch.arange(size)).to(torch.uint8)
    if form.has_nan:
        codes[codes & 0x7F == 0x7F] = 3
    scales = testing.tensor(form.scales((size, size), blocksize))
    base = codes.view(-1), scales, None, None, form.layout(blocksize)
    check_values_alone(base, size, size, rows, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("rows", [4, 40])
def test_every_scale_code(backend: str, rows: int, format: str, dtype: torch.dtype) -> None:
    """But for NaN, and with values that are normal numbers."""
    (blocksize,), n, k = FORMATS[format].blocksizes, 64, 128
    blocks = n * k // blocksize
    scales = torch.arange(blocks) * 256 // blocks
    scales[scales & 0x7F == 0x7F if format == "nvfp4" else scales == 0xFF] = 1
    codes = torch.arange(n * k) % 3 + torch.where(scales < 2, 4, 1).repeat_interleave(blocksize)
    packed = (codes[0::2] << 4 | codes[1::2]).to(torch.uint8)
    values = e8m0_values(CPU) if format == "mxfp4" else e4m3_values(CPU) * 0.0137
    base = packed, scales.to(torch.uint8), values, None, FORMATS[format].layout(blocksize)
    check_values_alone(base, n, k, rows, dtype)


@each(LORA)
def test_lora(backend: str, case: dict[str, Any]) -> None:
    check_lora_linear(full(case))


@each(LORA)
def test_lora_backward(backend: str, case: dict[str, Any]) -> None:
    check_lora_linear_backward(full(case))


@each(MULTI)
def test_multi_lora(backend: str, case: dict[str, Any]) -> None:
    check_forward(full(case))


@each(MULTI)
def test_multi_lora_backward(backend: str, case: dict[str, Any]) -> None:
    check_backward(full(case))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("k", [96, 384, 1056])
def test_dora_norm(backend: str, k: int, form: str) -> None:
    if not fits(form, k):
        pytest.skip(f"{form}: rows of {k} are no whole blocks")
    weight = weight_of(form, 100, k)
    a, b = testing.tensor(8, k, seed=3, scale=k**-0.5), testing.tensor(100, 8, seed=4, scale=0.3)
    args = (*weight._state.op_args, a, b, 1.7)
    truth = (dense64(weight) + 1.7 * b.double() @ a.double()).norm(dim=1)
    testing.assert_close(ops.dora_norm(*args), testing.reference_op("dora_norm")(*args), truth)


def weight_and_sizes(form: str) -> tuple[NF4Weight, int, int]:
    """A weight in one of FORMS, or in NF4, where blocks may cross rows."""
    return (testing.nf4_weight(33, 71), 33, 71) if form == "nf4" else (weight_of(form, 33, 384), 33, 384)


@pytest.mark.parametrize("form", [*FORMS, "nf4"])
def test_any_leading_dimensions_and_no_rows(backend: str, form: str) -> None:
    weight, n, k = weight_and_sizes(form)
    for shape in ((k,), (0, k), (2, 0, k), (2, 1, 3, k)):
        x = testing.tensor(*shape)
        y = ops.nf4_linear(x, *weight._state.op_args, n, None)
        assert y.shape == (*shape[:-1], n)
        testing.assert_close(y, x @ weight.dequantize().t(), x.double() @ dense64(weight).t())
        dx = ops.nf4_linear_dx(y, *weight._state.op_args, k)
        assert dx.shape == shape
        testing.assert_close(dx, y @ weight.dequantize(), y.double() @ dense64(weight))


@pytest.mark.parametrize(
    ("form", "dtype"), [*((form, torch.bfloat16) for form in FORMS), *(("nf4", dtype) for dtype in DTYPES)]
)
def test_a_bad_row_stays_in_its_row(backend: str, form: str, dtype: torch.dtype) -> None:
    weight, n, k = weight_and_sizes(form)

    def both(x: Tensor, dy: Tensor) -> list[Tensor]:
        args = weight._state.op_args
        return [ops.nf4_linear(x, *args, n, None), ops.nf4_linear_dx(dy, *args, k)]

    x, dy = (testing.tensor(9, size, dtype=dtype) for size in (k, n))
    clean = both(x, dy)
    for row in (0, 4, 8):
        bad = x.clone(), dy.clone()
        bad[0][row], bad[1][row] = float("inf"), float("nan")
        others = [i for i in range(9) if i != row]
        for got, want in zip(both(*bad), clean, strict=True):
            assert not got[row].isfinite().any() and got[others].isfinite().all()
            if backend != "reference":  # torch's matmul may round differently
                assert torch.equal(got[others], want[others])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [1, 9, 70])
def test_threads_do_not_change_a_bit(backend: str, rows: int, form: str) -> None:
    if backend in ("ptx", "triton"):
        pytest.skip(f"{backend}: too many elements for an interpreter")
    if backend == "reference":
        pytest.skip("reference: torch's own functions may split their work by threads")
    weight = weight_of(form, 200, 1152)
    x, dy = (testing.tensor(rows, size, dtype=torch.bfloat16, seed=size) for size in (1152, 200))

    def run() -> list[Tensor]:
        y = ops.nf4_linear(x, *weight._state.op_args, 200, None)
        dx = ops.nf4_linear_dx(dy, *weight._state.op_args, 1152)
        return [y, dx, ops.dequantize_nf4(*weight._state.op_args, [200, 1152], torch.bfloat16)]

    same_with_any_threads(run)

"""RMS norms on CUDA: every kernel at the limits of its rows, as PTX, what a call launches, and the compiled
code."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from numbers_policy import DTYPES, at_odd_address, each_dtype
from skips import needs
from stub_device import H100, stub_device, torch_ops
from torch import Tensor

import ptx_backend as ptx
import testing

needs_stub = needs("ptx")
EPS = 1e-5
FLOAT = torch.float32

LIMITS = {128: 400, 256: 200, 1024: 60, 4096: 20, 8192: 9}
"""The longest rows of each kernel that keeps them in registers, and so many rows that the blocks of back end
ptx have several."""
SHORT = {features: rows for features, rows in LIMITS.items() if features < 4096}
LENGTHS = {
    8: 400, **LIMITS, **{length + 8: rows for length, rows in SHORT.items()}, 4104: 9,
    8200: 9, 12296: 17, 7: 20, 129: 20, 1025: 17,
}  # fmt: skip
"""Features and rows: also of the loops over vectors and over elements, in their last lines."""


def tensors(features: int, dtype: torch.dtype, of_weight: torch.dtype = FLOAT) -> tuple[Tensor, Tensor]:
    x = testing.tensor(LENGTHS[features], features, dtype=dtype, scale=3.0)
    return x, (1 + 0.3 * testing.tensor(features, seed=2)).to(of_weight)


def check(op: str, args: tuple[Any, ...], results: tuple[Tensor, ...]) -> None:
    """Against the reference at this precision, and in fp64."""
    wide = tuple(torch.double if isinstance(arg, torch.dtype) else testing.widen(arg) for arg in args)
    plain, truth = testing.reference_op(op)(*args), testing.reference_op(op)(*wide)
    for i, (got, beside, exact) in enumerate(zip(results, plain, truth, strict=True)):
        assert got.shape == beside.shape and got.is_contiguous()
        testing.assert_close(got, beside, exact, f"{op}, result {i}")


@each_dtype
@pytest.mark.parametrize("features", LENGTHS)
def test_every_kernel_is_correct(extension: ModuleType, features: int, dtype: torch.dtype) -> None:
    """With all dtypes of weights, results and addends that it takes."""
    ops = torch.ops.peft_kernels_ptx
    others = DTYPES if dtype == FLOAT else (dtype, FLOAT, dtype)
    turn = list(LENGTHS).index(features) % 3
    for i, (of_weight, other) in enumerate(zip(DTYPES, others[turn:] + others[:turn], strict=True)):
        x, weight = tensors(features, dtype, of_weight)
        rounds, offset = i != 1, float(i == 1)
        args: tuple[Any, ...] = (x, weight, EPS, offset, rounds, other)
        check("rms_norm", args, ops.rms_norm(*args))

        addend = testing.tensor(*x.shape, dtype=other if dtype == FLOAT else dtype, seed=3)
        want = addend + x
        for pair in ((addend, x), (x, addend)):
            y, total, rstd = ops.add_rms_norm(*pair, *args[1:])
            assert torch.equal(total, want) and total.dtype == want.dtype
            check("rms_norm", (want, *args[1:]), (y, rstd))

        dy = testing.tensor(*x.shape, dtype=other, seed=4)
        rstd = (x.double().square().mean(-1) + EPS).rsqrt().float()
        add = testing.tensor(*x.shape, dtype=dtype, seed=5) if i else None
        for needs_both in ((True, True), (True, False), (False, True)):
            args = (dy, x, weight, rstd, add, offset, rounds, *needs_both)
            check("rms_norm_backward", args, ops.rms_norm_backward(*args))


@pytest.mark.parametrize("features", [7, 128, 4096, 8200])
def test_no_rows(extension: ModuleType, features: int) -> None:
    ops = torch.ops.peft_kernels_ptx
    x, weight = torch.empty(0, features), torch.ones(features, dtype=torch.bfloat16)
    y, rstd = ops.rms_norm(x, weight, EPS, 0.0, True, FLOAT)
    assert y.shape == x.shape and rstd.shape == (0,)
    dx, dweight = ops.rms_norm_backward(x, x, weight, rstd, None, 0.0, True, True, True)
    assert dx.shape == x.shape and dweight.dtype == weight.dtype and torch.equal(dweight, 0 * weight)


@each_dtype
def test_the_weight_gradient_of_many_blocks(extension: ModuleType, dtype: torch.dtype) -> None:
    extension.set_card(80, 50, 163 << 10)
    x, dy = (testing.tensor(3000, 40, dtype=torch.bfloat16, seed=i) for i in range(2))
    args = dy, x, torch.ones(40, dtype=dtype), torch.ones(3000), None, 0.0, True, False, True
    check("rms_norm_backward", args, torch.ops.peft_kernels_ptx.rms_norm_backward(*args))


@pytest.mark.parametrize("features", LENGTHS)
def test_order_of_threads_changes_no_bit(extension: ModuleType, features: int) -> None:
    ops, (x, weight) = torch.ops.peft_kernels_ptx, tensors(features, torch.bfloat16)

    def run() -> list[Tensor]:
        y, total, rstd = ops.add_rms_norm(x, x, weight, EPS, 0.0, True, torch.bfloat16)
        return [y, total, rstd, *ops.rms_norm_backward(y, total, weight, rstd, x, 0.0, True, True, True)]

    ptx.BACKEND.check_order(3, run)


@each_dtype
@pytest.mark.parametrize("features", SHORT)
def test_rows_of_a_warp_or_block_do_not_mix(extension: ModuleType, features: int, dtype: torch.dtype) -> None:
    """Nor does a row depend on how many there are."""
    x, weight = tensors(features, dtype)
    clean = torch.ops.peft_kernels_ptx.rms_norm(x, weight, EPS, 0.0, True, dtype)
    x[5] = float("nan")
    y, rstd = torch.ops.peft_kernels_ptx.rms_norm(x[:-3], weight, EPS, 0.0, True, dtype)
    assert y[5].isnan().all() and rstd[5].isnan()
    for got, want in ((y, clean[0]), (rstd, clean[1])):
        assert torch.equal(got[6:], want[6:-3]) and torch.equal(got[:5], want[:5])


def test_squares_below_the_normal_numbers(extension: ModuleType) -> None:
    """A mean square that is subnormal has a root, as in torch."""
    x = testing.tensor(3, 128, scale=1e-21)
    y, rstd = torch.ops.peft_kernels_ptx.rms_norm(x, torch.ones(128), 0.0, 0.0, True, FLOAT)
    assert bool((rstd > 1e20).all()) and rstd.isfinite().all()
    torch.testing.assert_close(y.square().mean(-1), torch.ones(3), rtol=1e-2, atol=0)


def test_a_misaligned_tensor_is_copied(extension: ModuleType) -> None:
    x, weight = testing.tensor(5, 256, dtype=torch.bfloat16), testing.tensor(256, seed=1)
    for moved, copies in ((x, 0), (at_odd_address(x), 1)):
        called = torch_ops(
            lambda x=moved: torch.ops.peft_kernels_ptx.rms_norm(x, weight, EPS, 0.0, True, x.dtype)
        )
        assert called["aten::clone"] == copies


LAYOUTS = {
    8: "16, 8", 128: "16, 8", 136: "32, 8", 256: "32, 8", 264: "128, 8", 1024: "128, 8", 1032: "256, 16",
    4096: "256, 16", 4104: "512, 16", 8192: "512, 16",
}  # fmt: skip


@needs_stub
@each_dtype
def test_launches(dtype: torch.dtype) -> None:
    """One, and one more for the weight's gradient."""
    name = {FLOAT: "float", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    kernels = {features: ("", f"{layout}>") for features, layout in LAYOUTS.items()}
    kernels |= {8200: ("Loop", f"{16 // dtype.itemsize}>"), 7: ("Loop", "1>"), 129: ("Loop", "1>")}
    ops = torch.ops.peft_kernels_ptx

    def launched(op: Any, *args: Any) -> list[str]:
        with stub_device(H100) as launches:
            op(*args)
            return [launch.kernel for launch in launches()]

    for features, (loop, layout) in kernels.items():
        x, weight, rstd = torch.ones(3, features, dtype=dtype), torch.ones(features), torch.ones(3)
        how = EPS, 0.0, True, dtype
        assert launched(ops.rms_norm, x, weight, *how) == [f"RmsNorm{loop}<{name}, false, {layout}"]
        assert launched(ops.add_rms_norm, x, x, weight, *how) == [f"RmsNorm{loop}<{name}, true, {layout}"]
        given = x, x, weight, rstd, x, 0.0, True
        backward = f"RmsNormBackward{loop}<{name}, {{}}, {layout}"
        assert launched(ops.rms_norm_backward, *given, True, False) == [backward.format("false")]
        for need_dx in (True, False):
            assert launched(ops.rms_norm_backward, *given, need_dx, True) == [
                backward.format("true"),
                "SumParts<float>",
            ]
        assert launched(ops.rms_norm_backward, *given, False, False) == []


@needs_stub
def test_only_allocations_of_torch() -> None:
    """Nothing that a captured graph could not hold, also with three dtypes."""
    ops = torch.ops.peft_kernels_ptx
    x, weight, rstd = torch.ones(3, 64), torch.ones(64, dtype=torch.float16), torch.ones(3)
    with stub_device(H100):
        called = torch_ops(
            lambda: (
                ops.add_rms_norm(x.bfloat16(), x, weight, EPS, 0.0, True, torch.bfloat16),
                ops.rms_norm_backward(x, x, weight, rstd, x, 1.0, True, True, True),
            )
        )
    assert called.keys() <= {
        "aten::empty",
        "aten::to",
        "aten::_to_copy",
        "aten::empty_strided",
        "aten::copy_",
    }
    assert called["aten::copy_"] == 1, "x.bfloat16()"


@needs_stub
def test_the_grid_fills_a_card_once() -> None:
    for features, rows_of_block, most in ((128, 8, 132 * 12), (256, 4, 132 * 12), (4096, 1, 132 * 4)):
        for rows, blocks in ((1, 1), (9, -(-9 // rows_of_block)), (100_000, most)):
            x = torch.empty(rows, features, dtype=torch.bfloat16)
            with stub_device(H100) as launches:
                torch.ops.peft_kernels_ptx.rms_norm(x, torch.ones(features), EPS, 0.0, True, x.dtype)
                (found,) = launches()
            assert found.blocks == blocks, (features, rows)

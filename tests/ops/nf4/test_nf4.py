"""quantize_nf4 and dequantize_nf4, bit for bit, on every back end."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nf4_oracle import assert_same, distinguishing_absmax, oracle_dequantize, oracle_quantize
from numbers_policy import DTYPES, each_dtype, same_with_any_threads, short
from torch import Tensor

import testing
from peft_kernels.core.code_tables import BLOCKSIZES, NF4_CODE, NF4_THRESHOLDS

ops = torch.ops.peft_kernels
reference = torch.ops.peft_kernels_reference

pytestmark = pytest.mark.usefixtures("nan_outputs")


def assert_quantizes(weight: Tensor, blocksize: int, what: str) -> None:
    packed, absmax = ops.quantize_nf4(weight, blocksize)
    want_packed, want_absmax = oracle_quantize(weight, blocksize)
    assert_same(absmax, want_absmax, f"absmax, {what}")
    assert_same(packed, want_packed, f"packed, {what}")


def test_every_instruction_set_is_tested() -> None:
    from peft_kernels.core.backends import cpu

    if cpu.BACKEND.probe() is not None:
        pytest.skip(f"cpu: {cpu.BACKEND.probe()}")
    assert set(cpu.BACKEND.extension.isa_levels()) <= set(testing.ISA_LEVELS)


def test_nan_outputs_reach_empty_tensors() -> None:
    assert torch.empty(5).isnan().all()
    assert torch.zeros(1).new_empty(3, dtype=torch.bfloat16).isnan().all()
    assert (torch.empty(3, dtype=torch.uint8) == 255).all()


@each_dtype
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_quantize(backend: str, blocksize: int, dtype: torch.dtype) -> None:
    sizes = {0, 1, 2, 31, 33, 64, 65, 101, blocksize - 1, blocksize, blocksize + 1, 3 * blocksize + 7, 8195}
    for numel in sorted(sizes):
        assert_quantizes(testing.tensor(numel, dtype=dtype, scale=0.02), blocksize, f"numel {numel}")


@each_dtype
def test_quantize_reads_views(backend: str, dtype: torch.dtype) -> None:
    base = testing.tensor(70, 97, dtype=dtype)
    views = {
        "transposed": base.t(),
        "row step": base[::3],
        "column step": base[:, ::2],
        "column slice": base[:, 5:38],
        "odd storage offset": base.view(-1)[1:],
        "expanded": base[:1].expand(9, 97),
        "3-d permuted": base[:, :96].unflatten(1, (4, 24)).permute(2, 0, 1),
    }
    for what, view in views.items():
        before = view.clone()
        packed, absmax = ops.quantize_nf4(view, 64)
        want_packed, want_absmax = oracle_quantize(before.contiguous(), 64)
        assert_same(packed, want_packed, what)
        assert_same(absmax, want_absmax, what)
        assert torch.equal(view, before), f"{what}: the input was changed"


@pytest.mark.parametrize("scale", [1.0, -1.0, 0.25, 2.0**-100], ids="scale{}".format)
@pytest.mark.parametrize("nibble", ["high", "low"])
def test_quantize_ties_take_the_lower_code(backend: str, nibble: str, scale: float) -> None:
    thresholds = torch.tensor(NF4_THRESHOLDS)
    inf = torch.tensor(float("inf"))
    below, above = torch.nextafter(thresholds, -inf), torch.nextafter(thresholds, inf)
    values = torch.stack((below, thresholds, above), 1).view(-1)
    # Scaling by a power of two is exact. One +-absmax per block of 64 fixes the scale.
    block = torch.zeros(128)
    block[nibble == "low" :: 2][: values.numel()] = values
    block[127 - (nibble == "low")] = 1.0 if scale > 0 else -1.0
    packed, absmax = ops.quantize_nf4(block * abs(scale), 128)
    assert absmax.tolist() == [abs(scale)]
    codes = (packed >> 4 if nibble == "high" else packed & 15)[: values.numel()].tolist()
    assert codes == [code for i in range(15) for code in (i, i, i + 1)]


def test_quantize_multiplies_by_the_inverse(backend: str) -> None:
    weight = torch.zeros(200, 64)
    for row, (absmax, x) in zip(
        weight, distinguishing_absmax(np.array(NF4_THRESHOLDS, np.float32)), strict=True
    ):
        row[0], row[1 : 1 + len(x)] = float(absmax), torch.from_numpy(x)
    assert_quantizes(weight, 64, "next to thresholds")


@each_dtype
def test_quantize_zero_blocks(backend: str, dtype: torch.dtype) -> None:
    weight = torch.zeros(5, 64, dtype=dtype)
    weight[2] = testing.tensor(64, dtype=dtype)
    weight[3] = -0.0
    packed, absmax = ops.quantize_nf4(weight, 64)
    rows = packed.view(5, 32)
    assert absmax.tolist() == [0.0, 0.0, weight[2].abs().max().item(), 0.0, 0.0]
    assert not torch.signbit(absmax).any()
    assert all((rows[i] == 0x77).all() for i in (0, 1, 3, 4)) and not (rows[2] == 0x77).all()
    for out_dtype in DTYPES:
        back = ops.dequantize_nf4(packed, absmax, None, None, 64, [5, 64], out_dtype)
        assert all((back[i] == 0).all() for i in (0, 1, 3, 4))


@pytest.mark.parametrize("magnitude", [3e-39, 1.1e-38, 2.9387e-39, 1e-42, 1.4e-45], ids="{:g}".format)
def test_quantize_subnormal_blocks(backend: str, magnitude: float) -> None:
    """1 / absmax overflows below 2^-128: such blocks take the code of zero and keep their absmax."""
    weight = (testing.tensor(3, 64).double() * magnitude).float()
    assert_quantizes(weight, 64, f"{magnitude}")
    packed, absmax = ops.quantize_nf4(weight, 64)
    assert torch.equal(absmax, weight.abs().amax(1))
    assert ops.dequantize_nf4(packed, absmax, None, None, 64, [3, 64], torch.float32).isfinite().all()


@each_dtype
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_quantize_shows_nonfinite_values_in_absmax(backend: str, bad: float, dtype: torch.dtype) -> None:
    for position in (0, 1, 63, 77, 191, 200):
        weight = testing.tensor(201, dtype=dtype)
        weight[position] = bad
        packed, absmax = ops.quantize_nf4(weight, 64)
        hit = position // 64
        assert (~absmax.isfinite()).nonzero().view(-1).tolist() == [hit]
        want_packed, want_absmax = reference.quantize_nf4(weight, 64)
        assert_same(absmax, want_absmax, f"absmax, {bad} at {position}")
        whole = [i for i in range(packed.numel()) if i // 32 != hit]
        assert_same(packed[whole], want_packed[whole], f"the blocks without it, {bad} at {position}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
@pytest.mark.parametrize("order", ["ascending bits", "shuffled", "one scale"])
def test_quantize_every_16_bit_value(backend: str, order: str, dtype: torch.dtype) -> None:
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = every[every.isfinite()]
    if order == "shuffled":
        finite = finite[torch.randperm(finite.numel(), generator=torch.Generator().manual_seed(3))]
    elif order == "one scale":
        # Every value against absmax 1.5, whose reciprocal is inexact: each block starts with it.
        small = finite[finite.abs() <= 1.5]
        small = small[: small.numel() // 63 * 63].view(-1, 63)
        finite = torch.cat((torch.full((small.shape[0], 1), 1.5, dtype=dtype), small), 1).view(-1)
    assert_quantizes(finite, 64, order)
    packed, _ = ops.quantize_nf4(finite, 64)
    assert torch.cat((packed >> 4, packed & 15)).unique().numel() == 16


@given(
    shape=st.tuples(st.integers(0, 40), st.integers(0, 70)),
    blocksize=st.sampled_from(BLOCKSIZES),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(testing.LAYOUTS),
    seed=st.integers(0, 1000),
)
def test_round_trip(
    backend: str, shape: tuple[int, int], blocksize: int, dtype: torch.dtype, layout: str, seed: int
) -> None:
    """Within half a gap of the code table; 4-bit values round-trip bit-equal."""
    weight = testing.activations(*shape, layout, dtype, seed)
    packed, absmax = ops.quantize_nf4(weight, blocksize)
    back = ops.dequantize_nf4(packed, absmax, None, None, blocksize, list(weight.shape), torch.float32)
    scale = absmax.repeat_interleave(blocksize)[: weight.numel()].view(weight.shape)
    half_gap = max(b - a for a, b in itertools.pairwise(NF4_CODE)) / 2
    assert ((back - weight.float()).abs() <= scale * (half_gap + 1e-6)).all()
    packed_again, absmax_again = ops.quantize_nf4(back, blocksize)
    assert_same(packed_again, packed, "packed")
    assert_same(absmax_again, absmax, "absmax")


@each_dtype
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_dequantize(backend: str, blocksize: int, nested: bool, dtype: torch.dtype) -> None:
    for numel in sorted(
        {0, 1, 2, 3, 31, 64, 65, 101, blocksize - 1, blocksize, blocksize + 1, 3 * blocksize + 7}
    ):
        packed = torch.arange((numel + 1) // 2).mul(61).add(numel).to(torch.uint8)
        absmax = testing.tensor(-(-numel // blocksize)).abs()
        if nested:
            q8, absmax2, offset = reference.quantize_absmax(absmax)
            absmax = reference.unpack_absmax(q8, absmax2, offset)
            group = (q8, absmax2, offset)
        else:
            group = (absmax, None, None)
        got = ops.dequantize_nf4(packed, *group, blocksize, [numel], dtype)
        assert_same(got, oracle_dequantize(packed, absmax, blocksize, numel, dtype), f"numel {numel}")


@each_dtype
def test_dequantize_extreme_scales(backend: str, dtype: torch.dtype) -> None:
    """One rounding to the output dtype, also with overflow, subnormals, or a NaN scale."""
    scales = [0.0, 1e-45, 1e-39, 6e-8, 1e-5, 65519.0, 65520.0, 3e38, float("inf"), float("nan")]
    absmax = torch.tensor(scales)
    packed = torch.arange(256).to(torch.uint8)[:32].repeat(len(scales))
    got = ops.dequantize_nf4(packed, absmax, None, None, 64, [len(scales), 64], dtype)
    assert_same(got.view(-1), oracle_dequantize(packed, absmax, 64, 64 * len(scales), dtype), "values")


@each_dtype
def test_dequantize_every_byte_and_rounding(backend: str, dtype: torch.dtype) -> None:
    packed = torch.arange(256).to(torch.uint8).repeat(200)
    absmax = testing.tensor(packed.numel() * 2 // 32).abs()
    got = ops.dequantize_nf4(packed, absmax, None, None, 32, [packed.numel() * 2], dtype)
    assert_same(got, oracle_dequantize(packed, absmax, 32, packed.numel() * 2, dtype), "values")


def test_dequantize_shapes_and_views(backend: str) -> None:
    packed, absmax = reference.quantize_nf4(testing.tensor(6, 35), 32)
    want = oracle_dequantize(packed, absmax, 32, 210, torch.float32)
    shifted = torch.cat((torch.zeros(3, dtype=torch.uint8), packed))[3:]
    wide, wide_absmax = torch.zeros(105, 2, dtype=torch.uint8), torch.zeros(7, 3)
    wide[:, 1], wide_absmax[:, 2] = packed, absmax
    for what, bytes_, scales in (
        ("plain", packed, absmax),
        ("2-d bytes", packed.view(7, 15), absmax),
        ("odd address", shifted, absmax),
        ("strided", wide[:, 1], wide_absmax[:, 2]),
    ):
        for shape in ([210], [6, 35], [2, 3, 35], [1, 210]):
            got = ops.dequantize_nf4(bytes_, scales, None, None, 32, shape, torch.float32)
            assert list(got.shape) == shape and got.is_contiguous()
            assert_same(got.view(-1), want, what)


def test_threads_do_not_change_a_bit(backend: str) -> None:
    weight = testing.tensor(300, 1001)

    def run() -> tuple[Tensor, ...]:
        packed, absmax = ops.quantize_nf4(weight, 64)
        q8, absmax2, offset = ops.quantize_absmax(absmax)
        back = ops.dequantize_nf4(packed, q8, absmax2, offset, 64, [300, 1001], torch.bfloat16)
        return packed, absmax, q8, absmax2, back

    assert_same(same_with_any_threads(run)[0], oracle_quantize(weight, 64)[0], "packed")


BAD_WEIGHTS = {
    "packed-short": ("packed: expected 32 bytes, got 31", {"packed": torch.zeros(31, dtype=torch.uint8)}),
    "packed-long": ("packed: expected 32 bytes, got 33", {"packed": torch.zeros(33, dtype=torch.uint8)}),
    "packed-dtype": ("packed: expected Byte", {"packed": torch.zeros(32)}),
    "absmax-short": ("absmax: expected 2 elements, got 1", {"absmax": torch.ones(1)}),
    "absmax-dtype": ("absmax: expected Float", {"absmax": torch.ones(2, dtype=torch.float64)}),
    "absmax-nested-dtype": ("absmax: expected Byte", {"absmax2": torch.ones(1), "offset": torch.ones(())}),
    "absmax2-missing": ("both or neither", {"offset": torch.ones(())}),
    "by-table-dtype": ("absmax: expected Byte", {"absmax2": torch.ones(256)}),
    "table-short": (
        "absmax2: expected 256 values of scale codes without an offset, got 255",
        {"absmax": torch.zeros(2, dtype=torch.uint8), "absmax2": torch.ones(255)},
    ),
    "table-dtype": (
        "absmax2: expected Float",
        {"absmax": torch.zeros(2, dtype=torch.uint8), "absmax2": torch.ones(256).half()},
    ),
    "codes-7": ("(blocksize|format): expected .* codes 7", {"blocksize": 7 << 16 | 32}),
    "e2m1-8": ("blocksize: expected .* got 8 for codes 2", {"blocksize": 2 << 16 | 8}),
    "fp4-16": ("blocksize: expected .* got 16 for codes 1", {"blocksize": 1 << 16 | 16}),
    "absmax2-long": (
        "absmax2: expected 1 elements, got 2",
        {"absmax": torch.zeros(2, dtype=torch.uint8), "absmax2": torch.ones(2), "offset": torch.ones(())},
    ),
    "blocksize-48": ("blocksize: expected a power of two", {"blocksize": 48}),
    "blocksize-16": ("blocksize: expected a power of two", {"blocksize": 16}),
    "blocksize-0": ("blocksize: expected a power of two", {"blocksize": 0}),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_compiled_ops_refuse_a_mismatched_weight(compiled_ops: Any, name: str) -> None:
    message, change = BAD_WEIGHTS[name]
    good = {
        "packed": torch.zeros(32, dtype=torch.uint8),
        "absmax": torch.ones(2),
        "absmax2": None,
        "offset": None,
        "blocksize": 32,
    }
    group = tuple((good | change).values())
    x, a, b = torch.ones(1, 16), torch.ones(2, 16), torch.ones(4, 2)
    dy, h = torch.ones(1, 4), torch.ones(1, 2)
    calls = [
        lambda group: compiled_ops.dequantize_nf4(*group, [4, 16], torch.float32),
        lambda group: compiled_ops.nf4_linear(x, *group, 4, None),
        lambda group: compiled_ops.nf4_linear_dx(dy, *group, 16),
        lambda group: compiled_ops.lora_linear(x, *group, None, a, b, 1.0, 0.0, None, None),
        lambda group: compiled_ops.lora_linear_backward(
            dy, x, h, *group, a, b, 1.0, 0.0, None, None, True, True, True
        ),
    ]
    for call in calls:
        call(tuple(good.values()))
        with pytest.raises(RuntimeError, match=message):
            call(group)

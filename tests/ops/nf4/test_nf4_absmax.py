"""quantize_absmax and unpack_absmax, bit for bit, on every back end."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nf4_oracle import CPU, assert_same, distinguishing_absmax, oracle_codes, oracle_scaled
from torch import Tensor

import testing
from peft_kernels.core.code_tables import dynamic_map, dynamic_thresholds

ops = torch.ops.peft_kernels

pytestmark = pytest.mark.usefixtures("nan_outputs")


def oracle_quantize_absmax(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    scaled, absmax2 = oracle_scaled((absmax - offset).numpy(), 256)
    return torch.from_numpy(oracle_codes(scaled, dynamic_thresholds(CPU).numpy())), torch.from_numpy(absmax2)


@pytest.mark.parametrize("numel", [1, 2, 255, 256, 257, 1000, 20011])
@pytest.mark.parametrize("kind", ["normal", "constant", "wide"])
def test_quantize_absmax(backend: str, kind: str, numel: int) -> None:
    absmax = testing.tensor(numel).abs()
    if kind == "constant":
        absmax = torch.full((numel,), 0.7123)
    elif kind == "wide":
        absmax = absmax.pow(9)
    q8, absmax2, offset = ops.quantize_absmax(absmax)
    assert_same(offset, absmax.mean(), "offset")
    want_q8, want_absmax2 = oracle_quantize_absmax(absmax, offset)
    assert_same(absmax2, want_absmax2, "absmax2")
    assert_same(q8, want_q8, "q8")


def test_quantize_absmax_of_nothing(backend: str) -> None:
    q8, absmax2, offset = ops.quantize_absmax(torch.empty(0))
    assert q8.shape == (0,) and q8.dtype == torch.uint8 and absmax2.shape == (0,) and offset.shape == ()


def test_quantize_absmax_ties_take_the_lower_code(backend: str) -> None:
    midpoints = dynamic_thresholds(CPU)
    inf = torch.tensor(float("inf"))
    values = torch.stack(
        (torch.nextafter(midpoints, -inf), midpoints, torch.nextafter(midpoints, inf)), 1
    ).view(-1)
    expected = [code for i in range(255) for code in (i, i, i + 1)]
    for begin in range(0, values.numel(), 100):
        chunk = values[begin : begin + 100]
        # +1 and -1 fix the scale, a mirrored copy the mean: ties remain ties only if the offset is 0.
        absmax = torch.cat((torch.tensor([1.0, -1.0]), torch.stack((chunk, -chunk), 1).view(-1)))
        q8, absmax2, offset = ops.quantize_absmax(absmax)
        assert offset.item() == 0.0 and absmax2.item() == 1.0, "the sample does not test ties"
        assert q8[2::2].tolist() == expected[begin : begin + 100]


def test_quantize_absmax_multiplies_by_the_inverse(backend: str) -> None:
    tested = 0
    for largest, x in distinguishing_absmax(dynamic_thresholds(CPU).numpy()):
        group = torch.from_numpy(np.append(largest, x[:127]))
        absmax = torch.stack((group, -group), 1).view(-1)
        if absmax.mean() != 0:  # a rounded sum shifts the offset, and with it every value
            continue
        q8, absmax2, _ = ops.quantize_absmax(absmax)
        want_q8, want_absmax2 = oracle_quantize_absmax(absmax, torch.tensor(0.0))
        assert_same(absmax2, want_absmax2, "absmax2")
        assert_same(q8, want_q8, "q8")
        tested += len(x)
    assert tested > 500


def test_quantize_absmax_reads_views(backend: str) -> None:
    base = testing.tensor(1200).abs()
    for got, want in zip(ops.quantize_absmax(base[::2]), ops.quantize_absmax(base[::2].clone()), strict=True):
        assert_same(got, want, "strided")


@pytest.mark.parametrize("numel", [0, 1, 255, 256, 257, 70001])
def test_unpack_absmax_rounds_twice(backend: str, numel: int) -> None:
    q8 = torch.arange(numel).mul(37).to(torch.uint8)
    absmax2 = torch.linspace(1.7, 0.9, -(-numel // 256))  # not drawn: few of 257 products tell the two apart
    offset = torch.tensor(0.31415927)
    scale = absmax2.repeat_interleave(256)[:numel]
    values = dynamic_map(CPU)[q8.long()]
    twice = torch.from_numpy(values.numpy() * scale.numpy()) + offset
    assert_same(ops.unpack_absmax(q8, absmax2, offset), twice, "absmax")
    once = (values.double() * scale.double() + offset.double()).float()
    assert numel < 255 or not torch.equal(once, twice), "the sample cannot tell a fused multiply-add"


def test_unpack_absmax_reads_views(backend: str) -> None:
    q8, absmax2, offset = ops.quantize_absmax(testing.tensor(1000).abs())
    wide8, wide2 = torch.zeros(1000, 3, dtype=torch.uint8), torch.zeros(4, 2)
    wide8[:, 1], wide2[:, 1] = q8, absmax2
    want = ops.unpack_absmax(q8, absmax2, offset)
    assert_same(ops.unpack_absmax(wide8[:, 1], wide2[:, 1], offset.view(1)), want, "strided")


@given(numel=st.integers(1, 2000), seed=st.integers(0, 1000), spread=st.sampled_from([0.0, 1e-3, 1.0, 6.0]))
def test_absmax_round_trip(backend: str, numel: int, seed: int, spread: float) -> None:
    """Within half a gap of the dynamic map times its group's scale, plus a few roundings."""
    absmax = torch.exp(spread * testing.tensor(numel, seed=seed))
    q8, absmax2, offset = ops.quantize_absmax(absmax)
    back = ops.unpack_absmax(q8, absmax2, offset)
    table = dynamic_map(CPU)
    half_gap = float((table[1:] - table[:-1]).max()) / 2
    scale = absmax2.repeat_interleave(256)[:numel]
    # -1 is not in the map: values next to it are off by up to 1 - 0.99297.
    rounding = 4 * torch.finfo(torch.float32).eps * (scale + offset)
    assert ((back - absmax).abs() <= scale * max(half_gap, 1 - 0.99296) + rounding).all()

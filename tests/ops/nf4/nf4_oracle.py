"""NF4 packing in numpy, written from the format's description.

Shares only the tables with the package.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from peft_kernels.core.code_tables import NF4_CODE, NF4_THRESHOLDS

CPU = torch.device("cpu")


def oracle_codes(scaled: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    return sum((scaled > t).astype(np.uint8) for t in thresholds)


def oracle_scaled(flat: np.ndarray, blocksize: int) -> tuple[np.ndarray, np.ndarray]:
    """(values * (1 / absmax), absmax), block by block, in fp32."""
    absmax = np.maximum.reduceat(np.abs(flat), np.arange(0, flat.size, blocksize)) if flat.size else flat
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / absmax
    inverse[np.isinf(inverse)] = 0
    return flat * np.repeat(inverse, blocksize)[: flat.size], absmax


def distinguishing_absmax(thresholds: np.ndarray) -> list[tuple[np.float32, np.ndarray]]:
    """Absmax values, each with values whose codes by x / absmax and x * (1 / absmax) differ."""
    found = []
    for absmax in np.random.default_rng(0).uniform(1, 2, 200).astype(np.float32):
        x = np.abs(thresholds[thresholds != 0]) * absmax
        x = np.concatenate((np.nextafter(x, np.float32(0)), x, np.nextafter(x, np.float32(4))))
        by_inverse, by_division = (oracle_codes(y, thresholds) for y in (x * (1 / absmax), x / absmax))
        found.append((absmax, x[(by_inverse != by_division) & (x < absmax)]))
    assert sum(len(x) for _, x in found) > 100
    return found


def oracle_quantize(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    scaled, absmax = oracle_scaled(weight.float().numpy().ravel(), blocksize)
    codes = oracle_codes(scaled, np.array(NF4_THRESHOLDS, np.float32))
    if codes.size % 2:
        codes = np.append(codes, np.uint8(7))
    return torch.from_numpy(codes[0::2] * 16 + codes[1::2]), torch.from_numpy(absmax)


def oracle_dequantize(
    packed: Tensor, absmax: Tensor, blocksize: int, numel: int, dtype: torch.dtype
) -> Tensor:
    data = packed.numpy().ravel()
    values = np.empty(2 * data.size, np.float32)
    table = np.array(NF4_CODE, np.float32)
    values[0::2], values[1::2] = table[data >> 4], table[data & 15]
    with np.errstate(invalid="ignore"):
        values = values[:numel] * np.repeat(absmax.numpy(), blocksize)[:numel]
    return torch.from_numpy(values).to(dtype)


def assert_same(got: Tensor, expected: Tensor, what: str) -> None:
    """Bit-equal, signs of zeros included; NaN equals NaN."""
    assert got.dtype == expected.dtype and got.shape == expected.shape, what
    if got.is_floating_point():
        both_nan = got.isnan() & expected.isnan()
        integer = torch.int32 if got.dtype == torch.float32 else torch.int16
        differ = (got.view(integer) != expected.view(integer)) & ~both_nan
    else:
        differ = got != expected
    if differ.any():
        at = differ.nonzero()[0].tolist()
        raise AssertionError(
            f"{what}: {int(differ.sum())} of {got.numel()} differ, the first at {at}: "
            f"expected {expected[tuple(at)]}, got {got[tuple(at)]}"
        )

"""The formats of packed weights (for C++: ``csrc/common/codes.h``).

A packed weight is value(code) * scale(block): two 4-bit codes a byte, the first in the high nibble, and
blocks of `blocksize` consecutive values. Formats differ in the values of their codes and in how a scale is
stored: in fp32, double-quantised (`ops.nf4`), or as one of 256 codes with values of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .code_tables import BLOCKSIZES, E2M1_CODE, FP4_CODE, NF4_CODE

CODE_VALUES: tuple[tuple[float, ...], ...] = (NF4_CODE, FP4_CODE, E2M1_CODE)
"""Values of the 16 codes, by the number that a layout holds."""

_SHIFT = 16


@dataclass(frozen=True)
class Format:
    """How a weight is packed."""

    name: str
    codes: int  # index of CODE_VALUES
    blocksizes: tuple[int, ...]
    scale: str  # "absmax": fp32, or double-quantised; "e8m0", "e4m3": codes of a float format of 8 bits

    def layout(self, blocksize: int) -> int:
        """The integer that tells kernels the values of the codes, and the blocksize."""
        return self.codes << _SHIFT | blocksize


FORMATS: dict[str, Format] = {
    one.name: one
    for one in (
        Format("nf4", 0, BLOCKSIZES, "absmax"),
        Format("fp4", 1, BLOCKSIZES, "absmax"),
        Format("mxfp4", 2, (32,), "e8m0"),
        Format("nvfp4", 2, (16,), "e4m3"),
    )
}
"""All formats, by name."""


def blocksize_of(layout: int) -> int:
    return layout & (1 << _SHIFT) - 1


@lru_cache(maxsize=32)
def code_values(layout: int, device: torch.device) -> Tensor:
    """Values of a layout's codes, fp32 (16,), on `device`."""
    return torch.tensor(CODE_VALUES[layout >> _SHIFT], dtype=torch.float32, device=device)


@lru_cache(maxsize=16)
def e8m0_values(device: torch.device) -> Tensor:
    """2^(code - 127), fp32 (256,), on `device`; the last one is NaN."""
    values = torch.exp2(torch.arange(256, dtype=torch.float64) - 127)
    values[255] = torch.nan
    return values.float().to(device)


@lru_cache(maxsize=16)
def e4m3_values(device: torch.device) -> Tensor:
    """Values of the codes of torch.float8_e4m3fn, fp32 (256,), on `device`; codes 127 and 255 are NaN."""
    codes = torch.arange(256, dtype=torch.uint8)
    return codes.view(torch.float8_e4m3fn).float().to(device)


def check_form(
    format: str, blocksize: int | None, in_features: int | None = None, name: str = "weight"
) -> int:
    """The blocksize. Raises ValueError for a format or blocksize that does not exist, or that rows of
    `in_features` values cannot have."""
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    allowed = FORMATS[format].blocksizes
    if blocksize is None:
        blocksize = 64 if 64 in allowed else allowed[0]
    if blocksize not in allowed:
        raise ValueError(f"blocksize: expected one of {allowed}, got {blocksize}")
    if FORMATS[format].scale != "absmax" and in_features is not None and in_features % blocksize:
        raise ValueError(
            f"{name}: expected a multiple of {blocksize} input features for {format}, got {in_features}"
        )
    return blocksize

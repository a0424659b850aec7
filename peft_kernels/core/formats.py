"""The formats of packed weights (for C++: ``csrc/common/codes.h``).

A packed weight is value(code) * scale(block). Most formats have two 4-bit codes a byte, the first in the high
nibble, and blocks of `blocksize` consecutive values. Formats differ in the values of their codes and in how a
scale is stored: in fp32, double-quantised (`ops.nf4`), as one of 256 codes with values of their own, or in 16
bits with a zero point. FP8 and int8 have a code a byte, and a scale for each row or for `blocksize` columns:
of one row in int8, of as many rows in FP8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .code_tables import BLOCKSIZES, E2M1_CODE, FP4_CODE, INT4_CODE, NF4_CODE

CODE_VALUES: tuple[tuple[float, ...], ...] = (NF4_CODE, FP4_CODE, E2M1_CODE, INT4_CODE)
"""Values of the 16 codes, by the number that a layout holds."""

LAYOUT_SHIFT = 16
"""A layout is an index of CODE_VALUES, shifted by this, and the blocksize."""

WHOLE_ROWS = 0
"""Blocksize of weights with a scale for each row."""

SCALE_DTYPES = (torch.float16, torch.bfloat16)
"""Dtypes of the scales of int4."""


@dataclass(frozen=True)
class Format:
    """How a weight is packed."""

    name: str
    codes: int  # index of CODE_VALUES
    blocksizes: tuple[int, ...]
    # "absmax": fp32, or double-quantised; "e8m0", "e4m3": codes of a float format of 8 bits; "half": 16 bits,
    # and perhaps zero points; "fp32"
    scale: str
    code_dtype: torch.dtype | None = None  # of codes of a byte
    is_square: bool = False  # whether a scale is for as many rows as columns
    default_blocksize: int = 64

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 4 if self.code_dtype is None else 8

    @property
    def largest(self) -> float:
        """The largest magnitude of a code of a byte."""
        assert self.code_dtype is not None
        of_type = torch.finfo if self.code_dtype.is_floating_point else torch.iinfo
        return -float(of_type(self.code_dtype).min)

    @property
    def has_nan(self) -> bool:
        """Whether codes can be NaN."""
        return self.code_dtype is not None and self.code_dtype.is_floating_point

    @property
    def by_code(self) -> bool:
        """Whether scales are codes, with a table of their values."""
        return self.scale in ("e8m0", "e4m3")

    @property
    def takes_double_quant(self) -> bool:
        """Whether `double_quant` says how scales are stored; elsewhere it has no effect."""
        return self.scale in ("absmax", "half")

    @property
    def rows_have_blocks(self) -> bool:
        """Whether each row consists of whole blocks."""
        return self.bits == 4 and self.scale != "absmax"

    @property
    def is_sliced(self) -> bool:
        """Whether tensor parallelism cuts weights."""
        return self.scale in ("absmax", "e8m0", "e4m3")

    def nbytes(self, numel: int) -> int:
        """Bytes of the codes of so many values."""
        return numel if self.bits == 8 else (numel + 1) // 2

    def scales(self, shape: Sequence[int], blocksize: int) -> int:
        """Number of scales of a weight (out_features, in_features)."""
        if self.bits == 4:
            return -(-shape[0] * shape[1] // blocksize)
        height, width = self.cell(shape[1], blocksize)
        return -(-shape[0] // height) * (-(-shape[1] // width) if width else 1)

    def cell(self, cols: int, blocksize: int) -> tuple[int, int]:
        """Rows and columns of bytes that share a scale, in rows of `cols`."""
        if blocksize == WHOLE_ROWS:
            return 1, cols
        return (blocksize if self.is_square else 1), blocksize

    def bytes_per_value(self, blocksize: int, double_quant: bool = True) -> float:
        """About how much memory a value takes."""
        scale = {"absmax": 1 if double_quant else 4, "half": 3, "fp32": 4}.get(self.scale, 1)
        values = blocksize**2 if self.is_square else blocksize
        return self.bits / 8 + (scale / values if blocksize else 0)

    def layout(self, blocksize: int) -> int:
        """The integer that tells kernels the values of the codes, and the blocksize."""
        return self.codes << LAYOUT_SHIFT | blocksize


FORMATS: dict[str, Format] = {
    one.name: one
    for one in (
        Format("nf4", 0, BLOCKSIZES, "absmax"),
        Format("fp4", 1, BLOCKSIZES, "absmax"),
        Format("mxfp4", 2, (32,), "e8m0", default_blocksize=32),
        Format("nvfp4", 2, (16,), "e4m3", default_blocksize=16),
        Format("int4", 3, BLOCKSIZES, "half"),
        Format(
            "fp8",
            len(CODE_VALUES),
            (128, WHOLE_ROWS),
            "fp32",
            code_dtype=torch.float8_e4m3fn,
            is_square=True,
            default_blocksize=128,
        ),
        Format(
            "int8",
            len(CODE_VALUES) + 1,
            (64, 128, WHOLE_ROWS),
            "fp32",
            code_dtype=torch.int8,
            default_blocksize=128,
        ),
    )
}
"""All formats, by name."""

_BYTES = {one.codes: one for one in FORMATS.values() if one.bits == 8}


def blocksize_of(layout: int) -> int:
    return layout & (1 << LAYOUT_SHIFT) - 1


def codes_of(layout: int) -> int:
    """Index of CODE_VALUES."""
    return layout >> LAYOUT_SHIFT


def byte_format(layout: int) -> Format | None:
    """The format, if a code is a byte."""
    return _BYTES.get(codes_of(layout))


@lru_cache(maxsize=32)
def code_values(layout: int, device: torch.device) -> Tensor:
    """Values of a layout's codes, fp32 (16,), on `device`."""
    return torch.tensor(CODE_VALUES[codes_of(layout)], dtype=torch.float32, device=device)


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
    if not isinstance(format, str) or format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    allowed = FORMATS[format].blocksizes
    if blocksize is None:
        blocksize = FORMATS[format].default_blocksize
    if type(blocksize) is not int or blocksize not in allowed:
        raise ValueError(f"blocksize: expected one of {allowed}, got {blocksize}")
    if FORMATS[format].rows_have_blocks and in_features is not None and in_features % blocksize:
        raise ValueError(
            f"{name}: expected a multiple of {blocksize} input features for {format}, got {in_features}"
        )
    return blocksize

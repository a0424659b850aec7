"""Packed weights as kernels take them, and the checks of their parts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...core.code_tables import NESTED_BLOCKSIZE, dynamic_map
from ...core.formats import FORMATS, SCALE_DTYPES, Format, blocksize_of, codes_of
from ...core.op import Base
from ..core.common import check, check_dtype, check_numel, dtype_name
from ..core.launch import cdiv
from ..core.layouts import FUSED_CODES, check_layout

SCALE_CODES = 256
RUNS = 64, 32
SHORT_RUN = 16  # only where blocks are as short

BY_CODES = {one.codes: one for one in FORMATS.values()}
"""A format of these codes. Others of the same codes have as many bytes and scales."""


class Pointers(NamedTuple):
    """The tensors of a weight, for kernels. A dense weight is `packed` alone."""

    packed: Tensor | None  # uint8 [ceil(numel / 2)]; bytes [numel]
    absmax: Tensor | None = None  # scales [blocks]: fp32, uint8 codes of them, or of int4 16 bits
    # With an offset double quantisation, fp32 [ceil(blocks / 256)]; else fp32 [256]: values of those codes.
    absmax2: Tensor | None = None
    offset: Tensor | None = None  # fp32, one element; of int4 zero points, uint8 [blocks]
    dynamic_map: Tensor | None = None  # fp32 [256]: values of double-quantised codes


class Nf4(NamedTuple):
    """A packed weight, or several of one size, checked and contiguous."""

    pointers: Pointers
    layout: int

    @property
    def blocksize(self) -> int:
        return blocksize_of(self.layout)

    @property
    def is_fused(self) -> bool:
        """Whether GEMMs read it packed. Another one is dequantised (nf4_groups.py)."""
        return codes_of(self.layout) in FUSED_CODES

    @property
    def runs(self) -> tuple[int, ...]:
        """Lengths of the runs that kernels read (linear_kernels.py), the longest first."""
        return (SHORT_RUN,) if self.blocksize == SHORT_RUN else RUNS

    def run_from(self, k: int, col: int) -> int | None:
        """Length of the runs that rows of `k` elements are made of from column `col` on: they share a scale
        and fill whole bytes. None if there are none."""
        whole = (run for run in self.runs if k % run == col % run == self.blocksize % run == 0)
        return next(whole, None)


def nf4(base: Base, n: int, k: int) -> Nf4:
    """A packed weight (n, k). Raises RuntimeError when its parts do not fit."""
    return many_nf4(base, n, k, 1)


def many_nf4(base: Base, n: int, k: int, count: int) -> Nf4:
    """`count` packed weights (n, k). Raises RuntimeError when their parts do not fit."""
    packed, absmax, absmax2, offset, layout = base
    assert absmax is not None
    check_layout(layout)
    form = BY_CODES[codes_of(layout)]
    check_dtype(packed, torch.uint8, "packed")
    size, blocks = count * form.nbytes(n * k), form.scales((n, k), blocksize_of(layout))
    check(packed.numel() == size, "packed", f"{size} bytes", packed.numel())
    check_numel(absmax, count * blocks, "absmax")
    values = None
    if form.scale in ("half", "fp32"):
        check_group_scales(form, absmax, absmax2, offset)
        if offset is not None:
            check_numel(offset, count * blocks, "offset")
            offset = offset.contiguous()
        return Nf4(Pointers(packed.contiguous(), absmax.contiguous(), None, offset), layout)
    check_dtype(absmax, torch.float32 if absmax2 is None else torch.uint8, "absmax")
    check(absmax2 is not None or offset is None, "absmax2, offset", "both or neither", "only offset")
    if absmax2 is not None and offset is not None:
        check_nested(absmax2, offset, blocks, count)
        absmax2, offset, values = absmax2.contiguous(), offset.contiguous(), dynamic_map(packed.device)
    elif absmax2 is not None:
        check_dtype(absmax2, torch.float32, "absmax2")
        expected = f"{SCALE_CODES} values of scale codes without an offset"
        check(absmax2.numel() in (SCALE_CODES, count * SCALE_CODES), "absmax2", expected, absmax2.numel())
        absmax2 = absmax2.contiguous()
    return Nf4(Pointers(packed.contiguous(), absmax.contiguous(), absmax2, offset, values), layout)


def check_nested(absmax2: Tensor, offset: Tensor, blocks: int, count: int = 1) -> None:
    """Raises unless the second level of double quantisation fits `blocks` absmax values of each of `count`
    weights."""
    check_dtype(absmax2, torch.float32, "absmax2")
    check_dtype(offset, torch.float32, "offset")
    check_numel(absmax2, count * cdiv(blocks, NESTED_BLOCKSIZE), "absmax2")
    check_numel(offset, count, "offset")


def check_group_scales(form: Format, absmax: Tensor, absmax2: Tensor | None, offset: Tensor | None) -> None:
    """Raises unless the scales of int4 or of bytes, and int4's zero points, have the right dtypes."""
    if form.bits == 8:
        check(absmax2 is not None or offset is None, "absmax2, offset", "both or neither", "only offset")
        check(absmax2 is None, "absmax2", "none for codes of 8 bits", "one")
        check_dtype(absmax, torch.float32, "absmax")
        return
    expected = "Half or BFloat16 for int4"
    check(absmax.dtype in SCALE_DTYPES, "absmax", expected, dtype_name(absmax.dtype))
    check(absmax2 is None, "absmax2", "none for int4", "one")
    if offset is not None:
        check_dtype(offset, torch.uint8, "offset")

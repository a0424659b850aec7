"""What the owners of FP8 and INT8 checkpoints have in common.

A linear weight with a code a byte, (out, in), and floating-point scales that multiply: one for each block (of
FP8 128 x 128, of INT8 64 or 128 columns of a row), one for each row, or one for the weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ...core.formats import FORMATS, WHOLE_ROWS
from ...core.packed_state import PackedState
from ..assembly import check_byte_scales, nan_codes
from .owner import Owner, check_finite, expect_shape, kept, tensor_of

BLOCK = [128, 128]
_SCALES = (torch.float32, torch.bfloat16, torch.float16)


class ByteCodes(Owner):
    codes = "weight"
    scale: ClassVar[str]
    """The part that the scales have."""
    blocks_alone: ClassVar[bool] = False
    """Whether the owner has scales of blocks alone."""

    def read(self, tensors: Mapping[str, Tensor], weight: str) -> tuple[PackedState, dict[str, Tensor]]:
        stem = self.stem(weight)
        form = FORMATS[self.format]
        codes = self.codes_in(tensors, stem)
        scale = tensor_of(tensors, stem, self.scale, *_SCALES)
        out, into = codes.shape
        grids = {size: self._grid(size, (out, into)) for size in form.blocksizes if size}
        blocksize = next((size for size, grid in grids.items() if scale.shape == grid), WHOLE_ROWS)
        rows = scale.numel() == 1 or scale.shape in ((out,), (out, 1))
        if not blocksize and (self.blocks_alone or not rows):
            expected = " or ".join(map(str, grids.values()))
            expected += "" if self.blocks_alone else f", ({out}, 1), ({out},) or one number"
            raise ValueError(f"{stem + self.scale}: expected shape {expected}, got {tuple(scale.shape)}")
        check_finite(stem + self.scale, scale)
        if scale.device.type != "meta":
            check_byte_scales(stem + self.scale, scale, form)
        if form.has_nan and (bad := nan_codes(codes)):
            name = stem + self.codes
            raise ValueError(f"{name}: expected codes of finite values, got {bad} NaN among {codes.numel()}")
        wide = scale.float().reshape(-1)
        state = PackedState(
            (out, into),
            blocksize,
            codes,
            wide if blocksize or wide.numel() == out else wide.repeat(out),
            double_quant=False,
            name=weight,
            format=self.format,
        )
        assert state.absmax is not None
        changed = scale.dtype != torch.float32 or scale.shape != self._grid(blocksize, (out, into))
        return state, kept(tensors, (*self.beside, *([self.scale] if changed else [])))

    def write(self, state: PackedState, aside: Mapping[str, Tensor], weight: str) -> dict[str, Tensor]:
        assert state.packed is not None and state.absmax is not None
        stem = self.stem(weight)
        scale = state.absmax.view(self._grid(state.blocksize, state.shape))
        if self.scale in aside:
            scale = self._as_in_file(scale, aside[self.scale], stem + self.scale)
        found = {stem + self.codes: self.codes_of(state.packed), stem + self.scale: scale}
        return found | {stem + name: aside[name] for name in self.beside if name in aside}

    def codes_in(self, tensors: Mapping[str, Tensor], stem: str) -> Tensor:
        """Our codes, uint8 (out, in), of those in the file."""
        dtype = FORMATS[self.format].code_dtype
        assert dtype is not None
        codes = tensor_of(tensors, stem, self.codes, dtype)
        expect_shape(stem + self.codes, ("out", "in"), codes.shape)
        return codes.view(torch.uint8)

    def codes_of(self, packed: Tensor) -> Tensor:
        """The codes of the file."""
        dtype = FORMATS[self.format].code_dtype
        assert dtype is not None
        return packed.view(dtype)

    def _grid(self, blocksize: int, shape: Sequence[int]) -> tuple[int, int]:
        """The shape of the scales of blocks, or of rows."""
        height, width = FORMATS[self.format].cell(max(shape[1], 1), blocksize)
        return -(-shape[0] // height), -(-max(shape[1], 1) // width)

    def _as_in_file(self, scale: Tensor, old: Tensor, name: str) -> Tensor:
        """Scales in the shape and dtype that they had in the file. Raises ValueError if these cannot hold
        them."""
        flat = scale.view(-1)
        new = flat[: old.numel()].to(old.dtype)
        if not torch.equal(new.float().expand_as(flat), flat):
            raise ValueError(
                f"{name}: expected scales that {old.dtype} of shape {tuple(old.shape)} can hold, as in the "
                "file, got a weight that was packed again; leave it dense (merged) to save it"
            )
        return new.view(old.shape)


class Fp8(ByteCodes):
    format, any_code = "fp8", False

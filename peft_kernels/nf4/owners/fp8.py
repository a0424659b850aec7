"""What the owners of FP8 checkpoints have in common.

A linear weight in E4M3, (out, in), and floating-point scales that multiply: one for each block of 128 x 128,
one for each row, or one for the weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ...core.formats import FORMATS, WHOLE_ROWS
from ...core.nf4_state import NF4State
from ..assembly import check_byte_scales, nan_codes
from .owner import Owner, check_finite, expect_shape, kept, tensor_of

BLOCK = [128, 128]
_SCALES = (torch.float32, torch.bfloat16, torch.float16)


class Fp8(Owner):
    format, codes, any_code = "fp8", "weight", False
    scale: ClassVar[str]
    """The part that the scales have."""
    blocks_alone: ClassVar[bool] = False
    """Whether the owner has scales of blocks alone."""

    def read(self, tensors: Mapping[str, Tensor], weight: str) -> tuple[NF4State, dict[str, Tensor]]:
        stem = self.stem(weight)
        codes = tensor_of(tensors, stem, self.codes, torch.float8_e4m3fn)
        scale = tensor_of(tensors, stem, self.scale, *_SCALES)
        expect_shape(stem + self.codes, ("out", "in"), codes.shape)
        out, into = codes.shape
        grid = -(-out // BLOCK[0]), -(-into // BLOCK[1])
        in_blocks = scale.shape == grid
        rows = scale.numel() == 1 or scale.shape in ((out,), (out, 1))
        if not in_blocks and (self.blocks_alone or not rows):
            expected = "" if self.blocks_alone else f", ({out}, 1), ({out},) or one number"
            raise ValueError(
                f"{stem + self.scale}: expected shape {grid}{expected}, got {tuple(scale.shape)}"
            )
        check_finite(stem + self.scale, scale)
        if scale.device.type != "meta":
            check_byte_scales(stem + self.scale, scale, FORMATS[self.format])
        _check_codes(stem + self.codes, codes)
        wide = scale.float().reshape(-1)
        state = NF4State(
            (out, into),
            BLOCK[0] if in_blocks else WHOLE_ROWS,
            codes.view(torch.uint8),
            wide if in_blocks or wide.numel() == out else wide.repeat(out),
            double_quant=False,
            name=weight,
            format=self.format,
        )
        assert state.absmax is not None
        changed = scale.dtype != torch.float32 or scale.shape != (grid if in_blocks else (out, 1))
        return state, kept(tensors, (*self.beside, *([self.scale] if changed else [])))

    def write(self, state: NF4State, aside: Mapping[str, Tensor], weight: str) -> dict[str, Tensor]:
        assert state.packed is not None and state.absmax is not None
        stem, (out, into) = self.stem(weight), state.shape
        shape = (out, 1) if state.blocksize == WHOLE_ROWS else (-(-out // BLOCK[0]), -(-into // BLOCK[1]))
        scale = state.absmax.view(shape)
        if self.scale in aside:
            scale = self._as_in_file(scale, aside[self.scale], stem + self.scale)
        codes = state.packed.view(torch.float8_e4m3fn)
        found = {stem + self.codes: codes, stem + self.scale: scale}
        return found | {stem + name: aside[name] for name in self.beside if name in aside}

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


def _check_codes(name: str, codes: Tensor) -> None:
    """Raises ValueError if a code is NaN."""
    if codes.device.type == "meta":
        return
    bad = nan_codes(codes.view(torch.uint8))
    if bad:
        raise ValueError(f"{name}: expected codes of finite values, got {bad} NaN among {codes.numel()}")

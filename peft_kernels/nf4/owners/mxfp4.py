"""MXFP4 as transformers reads and writes it: the experts of GPT-OSS.

`*_blocks`, uint8 (experts, out, in / 32, 16), and `*_scales`, uint8 (experts, out, in / 32), E8M0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...core.formats import e8m0_values
from ...core.packed_state import PackedState
from .owner import Config, Owner, check_scales, expect_shape, state_of_codes, swapped, tensor_of

_BLOCKS, _SCALES = "_blocks", "_scales"


class Mxfp4(Owner):
    method, format, experts = "mxfp4", "mxfp4", True
    title, codes = "MXFP4", _BLOCKS
    parts = marks = (_BLOCKS, _SCALES)

    def check(self, config: Config) -> None:
        pass  # its configuration has no variants

    def read(self, tensors: Mapping[str, Tensor], weight: str) -> tuple[PackedState, dict[str, Tensor]]:
        scales = tensor_of(tensors, weight, _SCALES, torch.uint8)
        blocks = tensor_of(tensors, weight, _BLOCKS, torch.uint8)
        expect_shape(weight + _SCALES, ("experts", "out", "in / 32"), scales.shape)
        expect_shape(weight + _BLOCKS, (*scales.shape, self.blocksize // 2), blocks.shape)
        values = e8m0_values(scales.device)
        check_scales(weight + _SCALES, scales, values)
        experts, out, count = scales.shape
        shape = (experts, out, count * self.blocksize)
        return state_of_codes(self.format, shape, blocks, scales, values, weight), {}

    def write(self, state: PackedState, aside: Mapping[str, Tensor], weight: str) -> dict[str, Tensor]:
        assert state.packed is not None and state.absmax is not None
        experts, out, into = state.shape
        shape = (experts, out, into // self.blocksize)
        blocks = swapped(state.packed).view(*shape, self.blocksize // 2)
        return {weight + _BLOCKS: blocks, weight + _SCALES: state.absmax.view(shape)}

    def configuration(self, config: Config, dense: list[str]) -> dict[str, Any]:
        new = dict(config)
        if dense:
            new["modules_to_not_convert"] = [*(config.get("modules_to_not_convert") or ()), *dense]
        return new

"""What the owners of NVFP4 checkpoints have in common.

The codes of a linear weight, uint8 (out, in / 2); a scale in E4M3 for each 16 of them, (out, in / 16); and
one scale for the whole weight, fp32, with which owners multiply or divide. Activations are not quantised
here: what a file has for them is kept aside.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...core.packed_state import PackedState
from .config_groups import Grouped
from .owner import check_scales, expect_shape, kept, state_of_codes, swapped, tensor_of

_SCALE = "weight_scale"
_ONE = 0x38  # the code of 1.0 in E4M3


class Nvfp4(Grouped):
    format = "nvfp4"
    allowed: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "num_bits": (4,), "type": ("float",), "group_size": (16,), "symmetric": (True,)
    }  # fmt: skip
    whole: ClassVar[str]
    """The part that the scale of the whole weight has."""

    @abstractmethod
    def values(self, whole: Tensor) -> Tensor:
        """What the codes of scales mean, fp32 (256,), given the scale of the whole weight, fp32 ()."""

    @abstractmethod
    def whole_of(self, one: Tensor) -> Tensor:
        """The scale of the whole weight, in the owner's shape, with which the scale 1 means `one`, fp32 ();
        perhaps rounded."""

    def read(self, tensors: Mapping[str, Tensor], weight: str) -> tuple[PackedState, dict[str, Tensor]]:
        stem = self.stem(weight)
        codes = tensor_of(tensors, stem, self.codes, torch.uint8)
        scales = tensor_of(tensors, stem, _SCALE, torch.float8_e4m3fn)
        whole = tensor_of(tensors, stem, self.whole, torch.float32)
        expect_shape(stem + self.codes, ("out", "in / 2"), codes.shape)
        out, into = codes.shape[0], codes.shape[1] * 2
        if into % self.blocksize:
            raise ValueError(f"{stem + self.codes}: expected rows of whole blocks of 16, got {into} codes")
        expect_shape(stem + _SCALE, (out, into // self.blocksize), scales.shape)
        if whole.numel() != 1:
            raise ValueError(f"{stem + self.whole}: expected one number, got shape {tuple(whole.shape)}")
        values = self.values(whole.reshape(()))
        if whole.device.type != "meta" and not bool(values[_ONE].isfinite() & (values[_ONE] > 0)):
            raise ValueError(f"{stem + self.whole}: expected a number above 0, got {float(whole)}")
        check_scales(stem + _SCALE, scales.view(torch.uint8), values)
        state = state_of_codes(self.format, (out, into), codes, scales.view(torch.uint8), values, weight)
        return state, kept(tensors, (self.whole, *self.beside))

    def write(self, state: PackedState, aside: Mapping[str, Tensor], weight: str) -> dict[str, Tensor]:
        assert state.packed is not None and state.absmax is not None and state.absmax2 is not None
        stem, whole = self.stem(weight), aside.get(self.whole)
        if whole is None or not self._means(whole, state.absmax2):  # packed again since
            whole = self.whole_of(state.absmax2[_ONE].to("cpu", copy=True))
            if not self._means(whole, state.absmax2):
                raise ValueError(
                    f"{stem + self.whole}: expected the scale of the file, got a weight that was packed "
                    f"again, with one that {self.title} cannot hold; leave it dense (merged) to save it"
                )
        out, into = state.shape
        scales = state.absmax.view(torch.float8_e4m3fn).view(out, into // self.blocksize)
        found = {
            stem + self.codes: swapped(state.packed),
            stem + _SCALE: scales,
            stem + self.whole: whole,
        }
        return found | {stem + name: aside[name] for name in self.beside if name in aside}

    def _means(self, whole: Tensor, values: Tensor) -> bool:
        return torch.equal(self.values(whole.reshape(())).nan_to_num(), values.cpu().nan_to_num())

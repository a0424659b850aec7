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

from ...core.nf4_state import NF4State
from .owner import Config, Owner, check_scales, expect_shape, packed_state, swapped, tensor_of

_SCALE = "_scale"
_ONE = 0x38  # the code of 1.0 in E4M3


class Nvfp4(Owner):
    format, experts = "nvfp4", False
    whole: ClassVar[str]
    """Ending of the name of the scale of the whole weight."""

    @abstractmethod
    def values(self, whole: Tensor) -> Tensor:
        """What the codes of scales mean, fp32 (256,), given the scale of the whole weight, fp32 ()."""

    @abstractmethod
    def whole_of(self, one: Tensor) -> Tensor:
        """The scale of the whole weight, in the owner's shape, with which the scale 1 means `one`, fp32 ();
        perhaps rounded."""

    def read(self, tensors: Mapping[str, Tensor], weight: str) -> tuple[NF4State, dict[str, Tensor]]:
        codes = tensor_of(tensors, self.codes, weight, torch.uint8)
        scales = tensor_of(tensors, _SCALE, weight, torch.float8_e4m3fn)
        whole = tensor_of(tensors, self.whole, weight, torch.float32)
        expect_shape(weight + self.codes, ("out", "in / 2"), codes.shape)
        out, into = codes.shape[0], codes.shape[1] * 2
        if into % self.blocksize:
            raise ValueError(f"{weight + self.codes}: expected rows of whole blocks of 16, got {into} codes")
        expect_shape(weight + _SCALE, (out, into // self.blocksize), scales.shape)
        if whole.numel() != 1:
            raise ValueError(f"{weight + self.whole}: expected one number, got shape {tuple(whole.shape)}")
        values = self.values(whole.reshape(()))
        if whole.device.type != "meta" and not bool(values[_ONE].isfinite() & (values[_ONE] > 0)):
            raise ValueError(f"{weight + self.whole}: expected a number above 0, got {float(whole)}")
        check_scales(weight + _SCALE, scales.view(torch.uint8), values)
        state = packed_state(self.format, (out, into), codes, scales.view(torch.uint8), values, weight)
        aside = {name: tensors[name] for name in (self.whole, *self.beside) if name in tensors}
        return state, {name: tensor.to("cpu", copy=True) for name, tensor in aside.items()}

    def write(self, state: NF4State, aside: Mapping[str, Tensor], weight: str) -> dict[str, Tensor]:
        assert state.packed is not None and state.absmax is not None and state.absmax2 is not None
        whole = aside.get(self.whole)
        if whole is None or not self._means(whole, state.absmax2):  # packed again since
            whole = self.whole_of(state.absmax2[_ONE].cpu())
            if not self._means(whole, state.absmax2):
                raise ValueError(
                    f"{weight + self.whole}: expected the scale of the file, got a weight that was packed "
                    f"again, with one that {self.title} cannot hold; leave it dense (merged) to save it"
                )
        out, into = state.shape
        scales = state.absmax.view(torch.float8_e4m3fn).view(out, into // self.blocksize)
        module = weight.rpartition(".")[0]
        found = {
            weight + self.codes: swapped(state.packed),
            weight + _SCALE: scales,
            weight + self.whole: whole,
        }
        return found | {f"{module}.{name}": aside[name] for name in self.beside if name in aside}

    def _means(self, whole: Tensor, values: Tensor) -> bool:
        return torch.equal(self.values(whole.reshape(())).nan_to_num(), values.cpu().nan_to_num())

    def check_groups(self, config: Config) -> None:
        """Raises ValueError unless the `config_groups` are NVFP4 weights."""
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise ValueError(f"config_groups: expected groups of NVFP4 weights, got {groups!r}")
        expected = {"num_bits": 4, "type": "float", "group_size": self.blocksize}
        for name, group in groups.items():
            key = f"config_groups.{name}.weights"
            weights = group.get("weights") if isinstance(group, Mapping) else None
            if not isinstance(weights, Mapping):
                raise ValueError(f"{key}: expected NVFP4 weights, got {weights!r}")
            for what, value in expected.items():
                got = weights.get(what)
                if got != value:
                    raise ValueError(f"{key}.{what}: expected {value!r}, for NVFP4, got {got!r}")
            if not weights.get("symmetric", True):
                raise ValueError(f"{key}.symmetric: expected True, for NVFP4, got False")

    def configuration(self, config: Config, dense: list[str]) -> dict[str, Any]:
        new = dict(config)
        if dense:
            new["ignore"] = [*(config.get("ignore") or ()), *dense]
        return new

    def unused(self, config: Config) -> str:
        groups = config.get("config_groups") or {}
        activations = any(
            group.get("input_activations") or group.get("output_activations") for group in groups.values()
        )
        found = [
            "the quantisation of activations" * activations,
            "the quantisation of the cache" * bool(config.get("kv_cache_scheme")),
        ]
        return " and ".join(filter(None, found))

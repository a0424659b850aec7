"""An adapter, and the module that holds those of one sublayer and hooks them in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..ops.bottleneck import bottleneck
from .config import AdapterConfig
from .places import SITE_SUFFIX, Place, base_of


class BottleneckAdapter(nn.Module):
    """The parameters of one adapter in one place. Parameters and not nn.Linear: to PEFT and to quantisers
    there is no layer here.

    up and the biases start at zero: an adapter that has not been trained changes no bit.
    """

    def __init__(
        self, config: AdapterConfig, features: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.config = config
        self.in_training = False
        r = config.bottleneck_size(features)

        def zeros(wanted: bool, *shape: int) -> nn.Parameter | None:
            return nn.Parameter(torch.zeros(shape, device=device, dtype=dtype)) if wanted else None

        self.norm_weight = zeros(config.norm, features)
        self.norm_bias = zeros(config.norm, features)
        self.down = nn.Parameter(torch.zeros(r, features, device=device, dtype=dtype))
        self.down_bias = zeros(config.bias, r)
        self.up = nn.Parameter(torch.zeros(features, r, device=device, dtype=dtype))
        self.up_bias = zeros(config.bias, features)

    def initialise(self) -> None:
        """`down` as LoRA's A, from torch's generator."""
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        if self.norm_weight is not None:
            nn.init.ones_(self.norm_weight)

    def forward(self, x: Tensor | None, y: Tensor) -> Tensor:
        """Of the sublayer's output y and, beside it, its input x."""
        if self.config.parallel:
            assert x is not None
            residual, x = y, x.to(y.dtype)
        else:
            residual, x = None, y

        def kept(parameter: Any) -> Any:
            wide = parameter is None or parameter.dtype in (torch.float32, x.dtype)
            return parameter if wide else parameter.to(x.dtype)

        return bottleneck(
            x,
            kept(self.down),
            kept(self.up),
            kept(self.down_bias),
            kept(self.up_bias),
            self.config.activation,
            self.config.scaling,
            residual,
            kept(self.norm_weight),
            kept(self.norm_bias),
            dropout_p=self.config.dropout if self.training else 0.0,
        )


@dataclass
class _Links:
    """Modules around a site, which are not inside it."""

    layer: nn.Module
    parents: tuple[nn.Module, nn.Module]
    """Of the first and the last linear layer."""
    leaves: tuple[str, str]
    hooked: tuple[nn.Module, nn.Module] | None = None
    handles: list[RemovableHandle] = field(default_factory=list)
    input: Tensor | None = None
    """Of the sublayer, between its first and its last layer, if an adapter wants it."""

    def current(self) -> tuple[nn.Module, nn.Module]:
        """What stands at both ends of the sublayer now: PEFT and quantisers put layers around them, and in
        their place."""
        first, last = (p._modules[leaf] for p, leaf in zip(self.parents, self.leaves, strict=True))
        assert first is not None and last is not None
        return first, last


class AdapterSite(nn.Module):
    """The adapters of one sublayer. It stands beside the sublayer's last linear layer, and works by hooks."""

    def __init__(self, root: nn.Module, place: Place) -> None:
        super().__init__()
        self.place = place
        self.adapters = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        """Of the model, in their order; those that are not here are passed over."""
        paths = [name.rpartition(".") for name in (place.first, place.last)]
        parents = root.get_submodule(paths[0][0]), root.get_submodule(paths[1][0])
        self._links = _Links(root.get_submodule(place.layer), parents, (paths[0][2], paths[1][2]))

    @property
    def name(self) -> str:
        return self._links.leaves[1] + SITE_SUFFIX

    def attach(self) -> None:
        self._links.parents[1].add_module(self.name, self)
        self.hook()

    def detach(self) -> None:
        self._unhook()
        del self._links.parents[1]._modules[self.name]

    def is_free(self) -> bool:
        """Whether no other site stands where this one is or will be."""
        return self._links.parents[1]._modules.get(self.name) in (None, self)

    @property
    def _weight(self) -> Tensor:
        found: Tensor = base_of(self._links.current()[1]).weight
        return found

    @property
    def device(self) -> torch.device:
        return self._weight.device

    def new_adapter(self, config: AdapterConfig, device: torch.device) -> BottleneckAdapter:
        """In fp32 beside weights that have fewer bits. All zeros."""
        dtype = torch.float64 if self._weight.dtype == torch.float64 else torch.float32
        return BottleneckAdapter(config, self.place.features, device, dtype)

    def get(self, name: str) -> BottleneckAdapter | None:
        found: BottleneckAdapter | None = self.adapters._modules.get(name)  # type: ignore[assignment]
        return found

    def among(self, names: Sequence[str]) -> list[BottleneckAdapter]:
        """Those of these names that are here."""
        found: list[BottleneckAdapter] = []
        for name in names:  # Dynamo reads no comprehension that assigns
            adapter = self.get(name)
            if adapter is not None:
                found.append(adapter)
        return found

    def hook(self) -> None:
        """Hook in, where that is needed, whatever has become of the layers since."""
        current = self._links.current()
        hooked = self._links.hooked
        if hooked is not None and hooked[0] is current[0] and hooked[1] is current[1]:
            return
        self._unhook()
        first, last = self._links.hooked = current
        self._links.handles = [
            self._links.layer.register_forward_pre_hook(self._before_layer),
            first.register_forward_pre_hook(self._before_first),
            last.register_forward_hook(self._after_last),
        ]

    def _unhook(self) -> None:
        for handle in self._links.handles:
            handle.remove()
        self._links.handles, self._links.hooked, self._links.input = [], None, None

    def _before_layer(self, layer: nn.Module, args: Any) -> None:
        self.hook()

    def _before_first(self, first: nn.Module, args: Any) -> None:
        if any(adapter.config.parallel for adapter in self.among(self.active)):
            self._links.input = args[0]

    def _after_last(self, last: nn.Module, args: Any, output: Tensor) -> Tensor:
        # Let go first: checkpointing breaks a recomputation off as soon as it has what it wants.
        x = self._links.input
        if x is not None:
            self._links.input = None
        for adapter in self.among(self.active):
            if x is None and adapter.config.parallel:
                raise RuntimeError(f"{self.place.first}: expected a call before {self.place.last}")
            output = adapter(x, output)
        return output

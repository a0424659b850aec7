"""Linear layers whose rows belong to different requests, each with its own LoRA or DoRA adapter.

`Rows` describes a batch. It prepares the arguments of each layer's op once, at the layer's first call, and is
reused while the batch has the same requests: a layer then costs one op per decoded token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core import dispatch
from ..core.packed_state import PackedState
from ..nf4.weight import PackedWeight
from ..ops import arguments
from ..ops.lora.lora import lora_linear
from ..ops.lora.multi_lora import AdaptedLinear, Adapter, flatten, multi_lora_linear
from ..patch.fused import RECORD, Fallback, Fused, Record, fuse, record_of, restore
from ..patch.input_spec import input_spec
from ..patch.rules.linear import Base, fused_operands
from ..patch.rules.linear_kind import linear_kind, unsupported_reason


@dataclass
class LoraLayer:
    """An adapter of one linear layer: lora_a (r, in_features), lora_b (out_features, r)."""

    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    scale: Tensor | None = None
    """DoRA's magnitude / ||W + scaling * B A||, fp32 (out_features,). Computed once: the base is constant."""

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.lora_a, self.lora_b, self.scale) if t is not None)

    def factors(self) -> dict[str, Tensor]:
        """What an input is multiplied by, by name."""
        found = {"lora_A": self.lora_a, "lora_B": self.lora_b, "scaling": torch.tensor(self.scaling)}
        return found if self.scale is None else found | {"magnitude/norm": self.scale}


LoraLayers = Mapping[nn.Module, LoraLayer]
"""The layers of an adapter, by the linear layers of the model."""

Call = Callable[[Tensor], Tensor]


class Rows:
    """The adapter of each row, None for the base alone."""

    def __init__(self, adapters: Sequence[LoraLayers | None]) -> None:
        self.adapters = adapters
        self._calls: dict[nn.Module, Call | None] = {}

    def call_of(self, layer: nn.Module, x: Tensor) -> Call | None:
        """The function that computes the layer, or None for its own forward."""
        try:
            return self._calls[layer]
        except KeyError:
            call = self._calls[layer] = self._prepared(layer, x)
            return call

    def _prepared(self, layer: nn.Module, x: Tensor) -> Call | None:
        there = [None if one is None else one.get(layer) for one in self.adapters]
        different = list({id(one): one for one in there if one is not None}.values())
        base = fused_operands(layer, input_spec(x.dtype, x.device))
        if not different:
            # A dense weight goes through our op too, or bits of a row would depend on whether other rows have
            # an adapter here: for few rows our op and torch's differ.
            if (
                len(there) == 1
                or isinstance(base, Fallback)
                or isinstance(base.weight, (PackedWeight, PackedState))
            ):
                return None
            return _without(base)
        if isinstance(base, Fallback):
            raise RuntimeError(f"a layer with adapters cannot be computed: {base.reason}")
        if len(there) == 1:
            return _alone(base, different[0])
        group_of = {id(one): group for group, one in enumerate(different)}
        groups = [-1 if one is None else group_of[id(one)] for one in there]
        return _mixed(base, different, groups, x)


def _without(base: Base) -> Call:
    """No row has an adapter."""
    plain, compute = [AdaptedLinear(base.weight, base.bias)], base.compute_dtype

    def call(x: Tensor) -> Tensor:
        y: Tensor = multi_lora_linear(x.to(base.dtype), plain, None, compute)[0]
        return y.to(base.out_dtype)

    return call


def _alone(base: Base, one: LoraLayer) -> Call:
    """All rows belong to one request."""
    weight, bias, dtype, compute, out_dtype = base

    def call(x: Tensor) -> Tensor:
        y = lora_linear(x.to(dtype), weight, one.lora_a, one.lora_b, one.scaling, bias, compute_dtype=compute)
        if one.scale is not None:
            y = dispatch.call("dora_scale", y, one.scale, _bias_for_scaling(bias, dtype))
        return y.to(out_dtype)

    return call


def _mixed(base: Base, different: Sequence[LoraLayer], groups: Sequence[int], x: Tensor) -> Call:
    """One row per entry of `groups`, the index of its adapter, or -1."""
    adapters = [
        Adapter(one.lora_a, one.lora_b, one.scaling, group=group) for group, one in enumerate(different)
    ]
    dtype, out_dtype = base.dtype, base.out_dtype
    like = x.to(dtype)
    compute = arguments.compute_type(like, base.compute_dtype)
    layers, lists, served, _ = flatten(
        like, [AdaptedLinear(base.weight, base.bias, adapters)], [x.shape[-1]], compute, dtype
    )
    of_row = torch.tensor(groups, device=x.device)
    rounded = None if compute == dtype else compute
    features = len(groups) * x.shape[-1]
    scale = _scales(different, groups)
    bias = _bias_for_scaling(base.bias, dtype)

    def call(x: Tensor) -> Tensor:
        if x.numel() != features:
            raise RuntimeError(f"x: expected a row for each of {len(groups)} requests, got {tuple(x.shape)}")
        if x.dtype is not dtype:
            x = x.to(dtype)
        y: Tensor = dispatch.call("multi_lora_linear", x, *layers, *lists, None, served, of_row, rounded)[0][
            0
        ]
        if scale is not None:
            y = _scaled(y, scale, bias)
        return y if y.dtype is out_dtype else y.to(out_dtype)

    return call


def _scales(different: Sequence[LoraLayer], groups: Sequence[int]) -> Tensor | None:
    """DoRA's scale of each row, 1 in rows without; None if no row has one."""
    scales = [one.scale for one in different if one.scale is not None]
    if not scales:
        return None
    ones = torch.ones_like(scales[0])
    of_row = [None if group < 0 else different[group].scale for group in groups]
    return torch.stack([ones if scale is None else scale for scale in of_row])


def _scaled(y: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The op `dora_scale` with a scale for each row."""
    rows = y.view(scale.shape).float()
    if bias is None:
        rows = rows * scale
    else:
        rows = rows + (scale - 1) * (rows - bias.float())
    return rows.to(y.dtype).view(y.shape)


def _bias_for_scaling(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else arguments.bias_for_op(bias, dtype)


@dataclass
class Switch:
    """The rows that all layers of a model currently serve."""

    rows: Rows | None = None
    layers: set[nn.Module] = field(default_factory=set)

    def attach(self, layers: Sequence[nn.Module]) -> None:
        """Makes linear layers serve the rows."""
        for layer in layers:
            if layer not in self.layers:
                fuse(layer, ServedLinear, Record(facts=self))
                self.layers.add(layer)

    def detach(self) -> None:
        for layer in self.layers:
            restore(layer)
        self.layers.clear()

    @contextmanager
    def on(self, rows: Rows) -> Iterator[None]:
        self.rows = rows
        try:
            yield
        finally:
            self.rows = None


class ServedLinear(Fused):
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        record = self.__dict__.get(RECORD)
        rows = None if record is None else record.facts.rows
        call = None if rows is None else rows.call_of(self, x)
        if call is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        return call(x)


def reason_unserved(layer: nn.Module) -> str:
    """Why a layer cannot be served, or ""."""
    record = record_of(layer)
    if record is not None and not isinstance(record.facts, Switch):
        return "it is patched: pk.unpatch(model) first"
    return "" if linear_kind(layer) else unsupported_reason(layer)

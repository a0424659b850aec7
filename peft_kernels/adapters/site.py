"""The module that holds the adapters of one sublayer and applies them by hooks."""

from __future__ import annotations

import operator
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils.hooks import RemovableHandle

from ..ops.bottleneck.multi_bottleneck import multi_bottleneck
from .adapter import BottleneckAdapter
from .assignment import Assignment, assignment_for, is_recomputation
from .config import AdapterConfig
from .places import SITE_SUFFIX, Place, base_of


@dataclass
class _Links:
    """Modules around a site, and state that its hooks share."""

    layer: nn.Module
    parents: tuple[nn.Module, nn.Module]
    """Parents of the first and the last linear layer."""
    leaves: tuple[str, str]
    norm: str | None
    """Attribute of the layer norm next to the last linear layer."""
    hooked: tuple[nn.Module, ...] = ()
    handles: list[RemovableHandle] = field(default_factory=list)
    inputs: dict[int, Tensor] = field(default_factory=dict)
    """Input of the sublayer by thread, from its first to its last layer, if an adapter reads it."""
    ended: dict[int, bool] = field(default_factory=dict)
    """Set by thread from the last layer to the norm, if an adapter reads the norm."""
    entered: list[Assignment] = field(default_factory=list)
    """Assignments entered in any thread."""

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry no state of running calls."""
        none: dict[str, Any] = {"inputs": {}, "ended": {}, "entered": []}
        return vars(self) | none

    def current(self) -> tuple[nn.Module, ...]:
        """The modules at both ends of the sublayer and after it. PEFT and quantisers wrap and replace
        them."""
        first, last = (p._modules[leaf] for p, leaf in zip(self.parents, self.leaves, strict=True))
        assert first is not None and last is not None
        norm = None if self.norm is None else self.parents[1]._modules[self.norm]
        return (first, last) if norm is None else (first, last, norm)


class AdapterSite(nn.Module):
    """The adapters of one sublayer, a sibling of its last linear layer that works by hooks."""

    edition: ClassVar[int] = 0
    """Incremented when an adapter of any model is added or deleted."""

    def __init__(self, root: nn.Module, place: Place) -> None:
        super().__init__()
        self.place = place
        self.adapters = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        """The model's active adapters, in order; those not at this site are skipped."""
        paths = [name.rpartition(".") for name in (place.first, place.last)]
        parents = root.get_submodule(paths[0][0]), root.get_submodule(paths[1][0])
        leaves = paths[0][2], paths[1][2]
        self._links = _Links(root.get_submodule(place.layer), parents, leaves, place.norm)

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
        """Whether no other site has this one's place."""
        return self._links.parents[1]._modules.get(self.name) in (None, self)

    @property
    def _weight(self) -> Tensor:
        found: Tensor = base_of(self._links.current()[1]).weight
        return found

    @property
    def device(self) -> torch.device:
        return self._weight.device

    def new_adapter(self, config: AdapterConfig, device: torch.device) -> BottleneckAdapter:
        """A zero-initialised adapter in fp32, or fp64 for fp64 weights."""
        dtype = torch.float64 if self._weight.dtype == torch.float64 else torch.float32
        return BottleneckAdapter(config, self.place.features, device, dtype)

    def get(self, name: str) -> BottleneckAdapter | None:
        found: BottleneckAdapter | None = self.adapters._modules.get(name)  # type: ignore[assignment]
        return found

    def among(self, names: Sequence[str]) -> list[BottleneckAdapter]:
        """The adapters with these names at this site."""
        found: list[BottleneckAdapter] = []
        for name in names:  # Dynamo does not support walrus in comprehensions
            adapter = self.get(name)
            if adapter is not None:
                found.append(adapter)
        return found

    def put(self, name: str, adapter: BottleneckAdapter) -> None:
        self.adapters[name] = adapter
        AdapterSite.edition += 1

    def take_out(self, name: str) -> None:
        del self.adapters[name]
        AdapterSite.edition += 1

    @property
    def entered(self) -> list[Assignment]:
        """Assignments for this site that are currently entered, in any thread."""
        return self._links.entered

    def hook(self) -> None:
        """Registers hooks, again if the layers were replaced since."""
        current = self._links.current()
        hooked = self._links.hooked
        if len(hooked) == len(current) and all(map(operator.is_, hooked, current)):
            return
        self._unhook()
        self._links.hooked = current
        first, last, *norm = current
        self._links.handles = [
            self._links.layer.register_forward_pre_hook(self._before_layer),
            first.register_forward_pre_hook(self._before_first),
            last.register_forward_hook(self._after_last),
            *(one.register_forward_pre_hook(self._before_norm) for one in norm),
        ]

    def _unhook(self) -> None:
        for handle in self._links.handles:
            handle.remove()
        self._links.handles, self._links.hooked = [], ()
        self._links.inputs.clear()

    def _before_layer(self, layer: nn.Module, args: Any) -> None:
        self.hook()

    def _before_first(self, first: nn.Module, args: Any) -> None:
        if self._is_by_row():
            self._keep_for_rows(args[0])
        elif any(adapter.reads == "input" for adapter in self.among(self.active)):
            self._links.inputs[_thread()] = args[0]

    def _after_last(self, last: nn.Module, args: Any, output: Tensor) -> Tensor:
        if self._is_by_row():
            return self._by_row(output, ("input", "output"))
        # Popped first: checkpointing stops a recomputation as soon as it has its tensors.
        x = self._links.inputs.pop(_thread(), None)
        output = self._together(output, x, ("input", "output"))
        if any(adapter.reads == "norm" for adapter in self.among(self.active)):
            self._links.ended[_thread()] = True
        return output

    def _before_norm(self, norm: nn.Module, args: Any) -> Any:
        """Applies adapters to the input of the layer norm, which includes the residual."""
        y: Tensor = args[0]
        if self._is_by_row():
            return (self._by_row(y, ("norm",)), *args[1:])
        if not any(adapter.reads == "norm" for adapter in self.among(self.active)):
            return None
        self._check_order(self._links.ended.pop(_thread(), False))
        return (self._together(y, None, ("norm",)), *args[1:])

    def _check_order(self, ended: bool) -> None:
        if not ended:
            raise RuntimeError(f"{self.place.last}: expected a call before the layer norm after it")

    def _together(self, y: Tensor, x: Tensor | None, reads: tuple[str, ...]) -> Tensor:
        """Applies the active adapters to all rows."""
        for adapter in self.among(self.active):
            if adapter.reads in reads:
                y = adapter(*self._read(adapter.reads, y, x))
        return y

    def _read(self, reads: str, y: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The tensor that an adapter reads, and the residual, or None if they are the same."""
        if reads == "output":
            return y, None
        if reads == "norm":
            norm = self._links.current()[2]
            return type(norm).forward(norm, y), y
        if x is None:
            raise RuntimeError(f"{self.place.first}: expected a call before {self.place.last}")
        return x.to(y.dtype), y

    def _is_by_row(self) -> bool:
        """Whether an assignment is entered in any thread, or was in the forward that is recomputed."""
        if self._links.entered:  # Dynamo does not support bool(list)
            return True
        return not torch.compiler.is_compiling() and is_recomputation()

    def _keep_for_rows(self, x: Tensor) -> None:
        keep = AdapterSite._keep_apart if torch.compiler.is_compiling() else AdapterSite._keep
        keep(self, x)

    def _by_row(self, y: Tensor, reads: tuple[str, ...]) -> Tensor:
        serve = AdapterSite._serve_apart if torch.compiler.is_compiling() else AdapterSite._serve
        return serve(self, y, reads)

    def _keep(self, x: Tensor) -> None:
        self._links.inputs[_thread()] = x

    def _serve(self, y: Tensor, reads: tuple[str, ...]) -> Tensor:
        thread, x = _thread(), None
        if "norm" in reads:
            in_order = self._links.ended.pop(thread, False)
        else:
            x, in_order = self._links.inputs.pop(thread, None), True
            self._links.ended[thread] = True
        assignment = assignment_for(self)
        if assignment is None:
            return self._together(y, x, reads)
        for step in assignment.steps(self, self.among):
            kind = step.adapters[0].reads
            if kind in reads:
                self._check_order(in_order)
                row_group = assignment.row_group(step, y, self.place.last)
                into, residual = self._read(kind, y, x)
                adapters = [one.parameters_for(into) for one in step.adapters]
                y = multi_bottleneck(into, adapters, row_group, residual)
        return y

    # Not traced: a graph may run in any thread, so its rows are unknown when it is made.
    _keep_apart, _serve_apart = _disable_dynamo(_keep), _disable_dynamo(_serve)


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()

"""How to compute lazy logits: the call of the head, and the steps of the model after it."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ...core.packed_state import PackedState
from ...ops.arguments import no_autocast
from ...ops.loss.head import Head

Step = Callable[[Tensor], Tensor]


class HeadCall:
    """One call of a head, by the module `layer`."""

    def __init__(self, head: Head, layer: nn.Module) -> None:
        self.head = head
        self.is_scored = False
        """Whether a loss was computed without these logits."""
        self.lse: list[tuple[Kind, Tensor]] = []
        """Log sum exp of logits of which some were read, in the shape of their rows."""
        self.is_plain = False
        """Whether an op outside the family has read their values, so that later ops compute with these."""
        self.detached: list[weakref.ref[Any]] = []
        """Logits that a user may keep beyond a step."""
        self._layer: Any = layer
        self._is_stepped = False
        self._has_gradients = torch.is_grad_enabled()
        self._may_be_merged = hasattr(layer, "merged_adapters") and _shares_memory(head.weight, layer)
        self._before = self._state()
        self._graph: tuple[Any, list[Tensor]] | None = None
        _watch_optimizers()
        _calls[id(self)] = self

    def logits(self) -> Tensor:
        """Their values, computed as in the forward."""
        self.check()
        leaves = self.head.detached(leaves=self._has_gradients)
        plain = no_autocast(self.head.hidden.device.type)
        # Hooks for saved tensors that are active now are for those of the caller.
        with plain, torch.enable_grad(), saved_tensors_hooks(_unchanged, _unchanged):
            logits = leaves.output()
            view = logits.view_as(logits)  # torch takes no edge of a Function in Python
            if self._graph is None and view.requires_grad:  # not below autograd
                self._graph = get_gradient_edge(view), list(leaves.tensors.values())  # which keeps no values
        return logits.detach()

    def gradients(self, dy: Tensor) -> list[Tensor | None]:
        """Of the operands, in the order of `head.tensors`."""
        self.check()
        if self._graph is None:
            self.logits()
        if self._graph is None:
            return [None] * len(self.head.tensors)
        edge, leaves = self._graph
        wanted = [t for t in leaves if t.requires_grad]
        found = iter(torch.autograd.grad(edge, wanted, dy, retain_graph=True, allow_unused=True))
        return [next(found) if t.requires_grad else None for t in leaves]

    def check(self) -> None:
        """Raises RuntimeError if the logits would have other values now. Writes through `.data` or numpy are
        not found, as in torch."""
        if self._is_stepped or self._state() != self._before:
            raise RuntimeError(
                "logits: expected to be read before the head's weights or the hidden states change, got a "
                'read after; read them sooner, or patch with without="loss"'
            )

    def note_step(self, trained: set[int]) -> None:
        """An optimizer has changed parameters with these ids. Fused ones and bitsandbytes' change no version
        counter, nor does FSDP2, which gathers weights into the same tensor again."""
        self._is_stepped |= self._is_trained(trained)

    def note_coming_step(self, trained: set[int]) -> None:
        """Computes detached logits before an optimizer changes parameters with these ids."""
        if self.detached and self._is_trained(trained):
            for reference in self.detached:
                if (logits := reference()) is not None:
                    logits.read()

    def _is_trained(self, trained: set[int]) -> bool:
        return any(id(p) in trained for p in self._layer.parameters() if p.requires_grad)

    def _state(self) -> Any:
        parts = list(self.head.tensors.values())
        if isinstance(self.head.weight, PackedState):
            parts += [t for t in self.head.weight.tensors().values() if t is not None]
        versions = [None if t.is_inference() else t._version for t in parts]
        memory = [t.untyped_storage() for t in parts]  # FSDP2 frees that of weights
        # PEFT merges through `.data`, which changes no version. A weight with the rows of trained tokens is a
        # new tensor, which a merge leaves alone.
        merged = list(self._layer.merged_adapters) if self._may_be_merged else []
        return versions, [(m._cdata, m.nbytes()) for m in memory], merged


def _shares_memory(weight: Any, layer: nn.Module) -> bool:
    """Whether the weight of a head lies in the memory of a parameter of the layer, or is packed."""
    if not isinstance(weight, Tensor):
        return True
    own = (t.untyped_storage()._cdata for t in layer.parameters())
    return weight.untyped_storage()._cdata in own


_calls: weakref.WeakValueDictionary[int, HeadCall] = weakref.WeakValueDictionary()


@functools.cache
def _watch_optimizers() -> None:
    """Once, when the first head is called."""
    register_optimizer_step_pre_hook(functools.partial(_tell, HeadCall.note_coming_step))
    register_optimizer_step_post_hook(functools.partial(_tell, HeadCall.note_step))


def _tell(note: Callable[[HeadCall, set[int]], None], optimizer: torch.optim.Optimizer, *_: Any) -> None:
    references = _calls.valuerefs()
    if references:
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for reference in references:
            if (call := reference()) is not None:
                note(call, trained)


def _unchanged(t: Tensor) -> Tensor:
    return t


class Kind(NamedTuple):
    """A recipe without its call."""

    row_steps: tuple[Step, ...]
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Recipe:
    """How to compute logits from a head: by `steps`, in order. Each row is inner * z, or with a softcap outer
    * tanh(inner * z), where z is the head's output for that row; if `is_normalized`, its log-softmax."""

    call: HeadCall
    steps: tuple[Step, ...] = ()
    row_steps: tuple[Step, ...] = ()
    """The same steps on hidden, (..., hidden_size); they select and reshape rows only."""
    inner: float = 1.0
    outer: float | None = None
    is_normalized: bool = False

    def rows(self, hidden: Tensor) -> Tensor:
        for step in self.row_steps:
            hidden = step(hidden)
        return hidden

    @property
    def kind(self) -> Kind:
        return Kind(self.row_steps, (self.inner, self.outer, self.is_normalized))

    def steps_after(self, other: Kind) -> tuple[Step, ...] | None:
        """The steps on rows after those of a recipe that begins like this one; None if it does not."""
        count = len(other.row_steps)
        begins = self.kind.values == other.values and self.row_steps[:count] == other.row_steps
        return self.row_steps[count:] if begins else None

    def compute(self) -> Tensor:
        with no_autocast(self.call.head.hidden.device.type):
            logits = self.call.logits()
            for step in self.steps:
                logits = step(logits)
        return logits


def of_head(head: Head) -> AbstractContextManager[Any]:
    """A context in which the loss uses the head's operands: autocast is on if it must round the weight."""
    rounds = isinstance(head.weight, Tensor) and head.weight.dtype != head.hidden.dtype
    device = head.hidden.device.type
    return torch.autocast(device, head.hidden.dtype) if rounds and device != "meta" else no_autocast(device)

"""Freezes parameters for `train` and restores them later.

requires_grad does not record what cleared it, so parameters frozen here are recorded. If something else froze
the model since, as PEFT and `model.requires_grad_(False)` do, the adapters in training are frozen too; the
record is then dropped.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..nf4.tensor import PackedTensor
from ..quantize.architectures import in_task_head
from .adapter import BottleneckAdapter

RECORD = "_peft_kernels_adapters"
"""Attribute of a module with the names of its parameters that were frozen here."""


def start(model: nn.Module, adapters: Sequence[BottleneckAdapter], freeze: bool) -> None:
    """Makes these adapters trainable; with `freeze`, freezes everything else but the head."""
    _forget_if_frozen_since(model)
    if freeze:
        _freeze(model)
    for adapter in adapters:
        adapter.requires_grad_(True)
        adapter.in_training = True


def end(model: nn.Module, adapters: Sequence[BottleneckAdapter]) -> None:
    """Before these adapters are deleted: if no other is in training, unfreezes what was frozen for them."""
    _forget_if_frozen_since(model)
    if any(one not in adapters for one in _in_training(model)):
        return
    for module in model.modules():
        for name in vars(module).pop(RECORD, ()):
            parameter = module._parameters.get(name)
            if parameter is not None and not _is_packed(parameter):
                parameter.requires_grad_(True)


def _in_training(model: nn.Module) -> list[BottleneckAdapter]:
    return [one for one in model.modules() if isinstance(one, BottleneckAdapter) and one.in_training]


def _forget_if_frozen_since(model: nn.Module) -> None:
    if all(p.requires_grad for adapter in _in_training(model) for p in adapter.parameters()):
        return
    for module in model.modules():
        vars(module).pop(RECORD, None)


def _freeze(model: nn.Module) -> None:
    heads = {module for head in in_task_head(model) for module in head.modules()}
    for module in model.modules():
        if module in heads:
            continue
        frozen = [n for n, p in module._parameters.items() if p is not None and p.requires_grad]
        for name in frozen:
            module._parameters[name].requires_grad_(False)  # type: ignore[union-attr]
        if isinstance(module, BottleneckAdapter):
            module.in_training = False
        elif frozen:
            vars(module)[RECORD] = {*vars(module).get(RECORD, ()), *frozen}


def _is_packed(parameter: nn.Parameter) -> bool:
    """Whether the weight was quantised since it was frozen, so that it cannot be trained."""
    return isinstance(parameter, PackedTensor) or not parameter.is_floating_point()

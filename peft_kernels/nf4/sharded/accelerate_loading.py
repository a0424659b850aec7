"""Packed weights under accelerate's RAM-efficient loading, where only process 0 has the model.

accelerate moves the model to the meta device, shards it there and sends the tensors of process 0 one by one,
with shapes and dtypes that packed weights do not have. So layers leave packed weights out of the state dict
meanwhile; process 0 keeps them and sends them when the layer is loaded.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..offload import take_packed
from ..weight import PackedWeight
from .checks import is_dtensor, is_sharded

_ASSIGNS = nn.Module.__setattr__.__code__
_SETTINGS = "ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"


def is_ram_efficient() -> bool:
    return all(os.environ.get(name, "").lower() in ("1", "true", "yes", "on", "y", "t") for name in _SETTINGS)


def is_awaited(weight: Any) -> bool:
    """Whether process 0 will send this weight when its layer is loaded."""
    return is_sharded(weight) and weight.is_meta and is_ram_efficient()


def receive(module: nn.Module, name: str, key: str, state_dict: dict[str, Any]) -> None:
    """Receives a weight from process 0 and puts it into `module`. Every process must call it."""
    from torch.distributed import group

    from .ranks import broadcast_weight, first_value, layout_of, make_parameter

    place: Any = module._parameters[name]
    weight, mine = module.__dict__.get("_unsent_weights", {}).pop(name, None), place._local_tensor._rows
    kind = place.device_mesh.device_type
    form = first_value(None if weight is None or dist.get_rank() else layout_of(weight._state), [group.WORLD])
    if form is None:
        raise RuntimeError(f"{key}: expected it in process 0, whose model accelerate sends, got none there")
    whole = broadcast_weight(weight, form, [group.WORLD], kind, key)
    device = next((t.device for t in state_dict.values() if is_dtensor(t)), torch.device(kind))
    module._parameters[name] = make_parameter(place, whole.narrow(mine.start, mine.stop), device)


class ReceivesWeights:
    """Mixin for layers whose packed weights accelerate may send from process 0, or offload."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_hf_hook":
            take_packed(value, self)  # type: ignore[arg-type]
        super().__setattr__(name, value)

    def register_parameter(self: Any, name: str, param: Any) -> None:
        """Refuses torch's `parallelize_module`, which registers DTensors; FSDP2 assigns them."""
        weight, caller = self._parameters.get(name), sys._getframe(1).f_code
        if isinstance(weight, PackedWeight) and is_dtensor(param) and caller is not _ASSIGNS:
            raise ValueError(
                f"{weight._state.name}: expected a plan of transformers (from_pretrained(..., tp_plan=...)) "
                "for tensor parallelism of a packed weight, got a DTensor, as parallelize_module makes it"
            )
        super().register_parameter(name, param)  # type: ignore[misc]

    def _apply(self: Any, fn: Any, recurse: bool = True) -> Any:
        """Keeps packed weights that a move to the meta device would drop under RAM-efficient loading."""
        if not is_ram_efficient():
            return super()._apply(fn, recurse)  # type: ignore[misc]
        found = {name: w.detach() for name, w in self._parameters.items() if isinstance(w, PackedWeight)}
        super()._apply(fn, recurse)  # type: ignore[misc]
        for name, weight in found.items():
            if self._parameters[name].is_meta and not weight.is_meta:
                _refuse_older_accelerate()
                self.__dict__.setdefault("_unsent_weights", {})[name] = weight
        return self

    def named_buffers(self: Any, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        """Refuses torch's `set_model_state_dict`, which lists buffers before it sends anything."""
        for name, weight in self._parameters.items():
            if is_sharded(weight) or isinstance(weight, PackedWeight):
                _refuse_full_state_dict(name, weight, sys._getframe(1))
        found: Iterator[tuple[str, Tensor]] = super().named_buffers(*args, **kwargs)  # type: ignore[misc]
        return found


def _refuse_older_accelerate() -> None:
    """Before 1.14 it pairs the tensors of process 0 with those of a model without packed weights by order.
    Every process raises RuntimeError, before anything is sent."""
    version = getattr(sys.modules.get("accelerate"), "__version__", None)
    if version is not None and tuple(map(int, re.findall(r"\d+", version)[:2])) < (1, 14):
        raise RuntimeError(
            f"{_SETTINGS[1]}: expected accelerate 1.14 or later, which sends tensors by name, got {version}: "
            "install it, or set fsdp_cpu_ram_efficient_loading to false"
        )


def _refuse_full_state_dict(name: str, weight: Any, caller: FrameType | None) -> None:
    """Raises RuntimeError in torch's `set_model_state_dict`, in every process and before anything is sent, if
    it would write dense values to a packed weight. A state dict without the weight, as accelerate uses to
    load adapters, is fine."""
    layer = ""
    while caller is not None and caller.f_code.co_name in ("recurse", "_iterate_valid_model_state"):
        layer = layer or caller.f_locals.get("curr_fqn", "")
        caller = caller.f_back
    if caller is None or caller.f_code.co_name != "_load_model_state_dict":
        return
    options, state_dict = caller.f_locals.get("info"), caller.f_locals.get("state_dict", {})
    sends = getattr(options, "broadcast_from_rank0", False)
    if not sends and not (is_sharded(weight) and getattr(options, "full_state_dict", False)):
        return
    from torch.distributed import group

    from .ranks import groups_of, raise_everywhere

    key, error = f"{layer}{name}", None
    for wrapper in ("_orig_mod.", "_checkpoint_wrapped_module."):
        key = key.replace(wrapper, "")
    if any(other == key or other.startswith(f"{key}.") for other in state_dict):
        local: Any = getattr(weight, "_local_tensor", weight)
        error = (
            f"{local._rows.name if is_sharded(weight) else local._state.name}: expected "
            "peft_kernels.integrations.fsdp.load_full_state_dict(model, state_dict), which sends packed "
            "weights to all processes, got torch's set_model_state_dict with full_state_dict, which splits "
            "and sends dense ones"
        )
    groups = groups_of(weight.device_mesh) if is_dtensor(weight) else [group.WORLD]
    raise_everywhere(error, groups if sends else [])  # process 0 alone has the state dict

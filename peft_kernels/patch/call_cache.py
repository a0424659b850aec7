"""Reuses the prepared call of a layer while nothing that it was prepared from has changed.

Checking a layer and collecting its operands costs as much as the arithmetic of a decoded token. So the first
call records the dictionary entries, classes and tensors that it read. While these are the same objects, and
nothing was added (a hook, a merged adapter), the next call uses the same operands.

PEFT's own mutators are no substitute for these guards: parameters and submodules can be replaced, hooks
added, forwards overridden, dropout switched to training and lists of active adapters extended without calling
any method of the LoRA layer. Each guard is a loop in C (`map`), as there are some sixty entries a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
import torch.nn.modules.module
from torch import Tensor, nn

from ..core.module_calls import GLOBAL_HOOKS
from ..core.packed_state import HoldsPacked
from .fused import RECORD, Record, plain_class

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_MAX_STORES = 16  # a module that changes in every call gains nothing

_get = dict.get
_forward = attrgetter("forward")
_call = attrgetter("__call__")
_dtype = attrgetter("dtype")
_device = Tensor.get_device
_any_requires_grad = torch._C._any_requires_grad
_is_autocast_enabled = torch.is_autocast_enabled

Call = Callable[[Tensor], Tensor]
"""A layer with all its operands, prepared for one x or more. Decoder layers have a form of their own."""


class Guards:
    """What the call of a module was prepared from, without a reference to the module, which holds this."""

    def __init__(self, module: nn.Module) -> None:
        self._own: dict[str, Any] | None = module.__dict__
        self._own_keys: list[str] = []
        self._own_values: list[Any] = []
        self._own_empty: list[str] = []
        self._dicts: list[dict[str, Any]] = []
        self._keys: list[str] = []
        self._values: list[Any] = []
        self._empty_dicts: list[dict[str, Any]] = []
        self._empty_keys: list[str] = []
        self._modules: list[nn.Module] = []
        self._module_classes: list[type] = []
        self._classes: list[type] = []  # whose forward is replaced or skipped
        self._forwards: list[Any] = []
        self._calls: list[Any] = []
        self._tensors: list[Tensor] = []
        self._dtypes: list[torch.dtype] = []
        self._devices: list[int] = []
        self._lists: list[list[Any]] = []
        self._items: list[list[Any]] = []
        self._frozen: list[Tensor] = []
        self.unchanged: Callable[[nn.Module], bool] | None = None
        """A further condition."""
        self.expect_empty(vars(torch.nn.modules.module), *GLOBAL_HOOKS)

    def expect_same(self, where: dict[str, Any], key: str) -> Any:
        """Returns an entry of a dictionary, which must stay the same object."""
        value = where.get(key)
        if where is self._own:
            self._own_keys.append(key)
            self._own_values.append(value)
        else:
            self._dicts.append(where)
            self._keys.append(key)
            self._values.append(value)
        if isinstance(value, list):
            self._lists.append(value)
            self._items.append(list(value))
        return value

    def expect_empty(self, where: dict[str, Any], *keys: str) -> None:
        """Entries of a dictionary that must be empty or absent."""
        if where is self._own:
            self._own_empty += keys
        else:
            self._empty_dicts += [where] * len(keys)
            self._empty_keys += keys

    def expect_forward(self, cls: type[nn.Module]) -> None:
        """A class whose forward and call must stay the same."""
        self._classes.append(cls)
        self._forwards.append(cls.forward)
        self._calls.append(cls.__call__)

    def expect_untouched(self, module: nn.Module) -> None:
        """A module whose call is skipped: it must keep its class, and get no hooks and no forward of its
        own."""
        self._modules.append(module)
        self._module_classes.append(type(module))
        self.expect_forward(type(module))
        self.expect_empty(module.__dict__, "forward", *_HOOKS)

    def expect_dtype_and_device(self, tensor: Tensor) -> None:
        """A tensor whose dtype and device `module.to` may change in place."""
        self._tensors.append(tensor)
        self._dtypes.append(tensor.dtype)
        self._devices.append(tensor.get_device())

    def expect_linear(self, layer: nn.Module, has_bias: bool = True) -> None:
        """A linear layer whose weight, and bias if it is read, are its parameters."""
        self.expect_untouched(layer)
        parameters = layer.__dict__["_parameters"]
        self.expect_same(layer.__dict__, "compute_dtype")
        weight = self.expect_same(parameters, "weight")
        bias = self.expect_same(parameters, "bias") if has_bias else None
        if isinstance(weight, HoldsPacked):
            state = self.expect_same(weight.__dict__, "_state")
            for name in ("packed", "absmax", "absmax2", "offset", "dense"):
                self.expect_same(state.__dict__, name)
            self._frozen.append(weight)
        elif weight is not None:
            self.expect_dtype_and_device(weight)
        if bias is not None:
            self.expect_dtype_and_device(bias)

    def expect_lora(self, module: Any, names: Sequence[str]) -> None:
        """A LoRA layer of PEFT whose active adapters have no dropout and no variant."""
        d = module.__dict__
        children = self.expect_same(d, "_modules")
        self.expect_forward(plain_class(module))
        for name in ("_disable_adapters", "_active_adapter"):
            self.expect_same(d, name)
        self.expect_empty(d, "merged_adapters", "lora_variant")
        scaling, biases = self.expect_same(d, "scaling"), self.expect_same(d, "lora_bias")
        self.expect_linear(self.expect_same(children, "base_layer"))
        for kind in ("lora_A", "lora_B", "lora_dropout"):
            inside = self.expect_same(children, kind).__dict__["_modules"]
            for name in names:
                part = self.expect_same(inside, name)
                if kind == "lora_dropout":
                    self.expect_untouched(part)
                    self.expect_same(part.__dict__, "training")
                    self.expect_same(part.__dict__, "p")
                else:
                    self.expect_linear(part, has_bias=False)
        for name in names:
            self.expect_same(scaling, name)
            self.expect_same(biases, name)

    def expect_base_of_lora(self, module: Any) -> None:
        """A LoRA layer of PEFT that calls its base layer alone: its adapters are merged or disabled."""
        d = module.__dict__
        self.expect_forward(plain_class(module))
        for name in ("_disable_adapters", "merged_adapters"):
            self.expect_same(d, name)
        self.expect_linear(self.expect_same(self.expect_same(d, "_modules"), "base_layer"))

    def valid(self, module: nn.Module) -> bool:
        """Whether preparing the call of `module` again would give the same."""
        own = module.__dict__
        return (
            all(map(is_, map(own.get, self._own_keys), self._own_values))
            and not any(map(own.get, self._own_empty))
            and all(map(is_, map(_get, self._dicts, self._keys), self._values))
            and not any(map(_get, self._empty_dicts, self._empty_keys))
            and all(map(is_, map(type, self._modules), self._module_classes))
            and all(map(is_, map(_forward, self._classes), self._forwards))
            and all(map(is_, map(_call, self._classes), self._calls))
            and all(map(is_, map(_dtype, self._tensors), self._dtypes))
            and list(map(_device, self._tensors)) == self._devices
            and self._lists == self._items
            and not _any_requires_grad(*self._frozen)
            and (self.unchanged is None or self.unchanged(module))
        )

    def cover(self, args: Sequence[Any]) -> bool:
        """Whether every tensor among an op's arguments is guarded. One made for a single call is not; one
        without elements replaces an absent one."""
        guarded = {id(one) for one in (*self._values, *self._tensors)}
        for value in args:
            if isinstance(value, Tensor):
                if id(value) not in guarded and (value.numel() or value.is_inference()):
                    return False
            elif isinstance(value, (list, tuple)) and not self.cover(value):
                return False
        return True

    def release(self) -> None:
        """Drops the reference to the module's dictionary when all guards are set."""
        self._own = None


class CachedCall(NamedTuple):
    """A prepared call, for an x like that of the call it was prepared for."""

    call: Any
    guards: Guards
    dtype: torch.dtype
    device: torch.device
    features: torch.Size


def cached_call(module: nn.Module, record: Record, args: Any, kwargs: Any) -> Any:
    """The prepared call of an earlier forward, or None if it has to be prepared (again)."""
    cached: CachedCall | None = record.cached
    if cached is None or len(args) != 1 or kwargs or torch.compiler.is_compiling():
        return None
    (x,) = args
    call, guards, dtype, device, features = cached
    if (
        type(x) is Tensor
        and x.dtype is dtype
        and x.shape[-1:] == features
        and x.device == device
        and not _is_autocast_enabled(device.type)
        and guards.valid(module)
    ):
        return call
    record.cached = None
    return None


def store(
    module: nn.Module, x: Tensor, call: Any, args: Sequence[Any], guard: Callable[[Guards], None]
) -> None:
    """Cache a call with the arguments `args`, if they are the module's own. `guard` adds what it was prepared
    from to its guards."""
    record: Record = module.__dict__[RECORD]
    if record.stores >= _MAX_STORES or type(x) is not Tensor or torch.compiler.is_compiling():
        return
    if x.device.type == "meta" or _is_autocast_enabled(x.device.type):
        return
    record.stores += 1
    guards = Guards(module)
    guard(guards)
    if guards.cover(args) and guards.valid(module):
        guards.release()
        record.cached = CachedCall(call, guards, x.dtype, x.device, x.shape[-1:])

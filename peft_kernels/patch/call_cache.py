"""A fused call that is made again: what it was judged from is only compared with what was there before.

To judge a layer and to put its arguments together costs a decoded token as much as the layer's arithmetic.
So the first call notes the entries of dictionaries, the classes and the tensors that its judgement was made
from. While they are the same, and nothing has come that was not there, the next one takes the same arguments.
All comparisons are loops in C (`map`), as there are some sixty a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter, is_
from typing import Any

import torch
import torch.nn.modules.module
from torch import Tensor, nn

from ..core import dispatch
from ..core.module_calls import GLOBAL_HOOKS
from ..core.nf4_state import HoldsNF4
from .fused import RECORD, Record, plain_class

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_MOST = 16  # notes in the life of a module: who changes something in every call gains nothing

_get = dict.get
_forward = attrgetter("forward")
_call = attrgetter("__call__")
_dtype = attrgetter("dtype")
_device = Tensor.get_device
_any_requires_grad = torch._C._any_requires_grad
_is_autocast_enabled = torch.is_autocast_enabled


class Seen:
    """What a judgement of `module` was made from. The module itself is not kept, as this is kept by it."""

    def __init__(self, module: nn.Module) -> None:
        self._own: dict[str, Any] | None = module.__dict__
        self._own_keys: list[str] = []
        self._own_values: list[Any] = []
        self._own_empty: list[str] = []
        self._dicts: list[dict[str, Any]] = []
        self._keys: list[str] = []
        self._values: list[Any] = []
        self._holders: list[dict[str, Any]] = []  # of things that have to be empty, or not there
        self._empty: list[str] = []
        self._modules: list[nn.Module] = []
        self._classes: list[type] = []
        self._judged: list[type] = []  # classes whose forward is stood in for, or left out
        self._forwards: list[Any] = []
        self._calls: list[Any] = []
        self._tensors: list[Tensor] = []
        self._dtypes: list[torch.dtype] = []
        self._devices: list[int] = []
        self._lists: list[list[Any]] = []
        self._items: list[list[Any]] = []
        self._frozen: list[Tensor] = []
        self.unchanged: Callable[[nn.Module], bool] | None = None
        """What else is to be asked."""
        self.empty(vars(torch.nn.modules.module), *GLOBAL_HOOKS)

    def entry(self, where: dict[str, Any], key: str) -> Any:
        """That of a dictionary, to stay the same object."""
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

    def empty(self, where: dict[str, Any], *keys: str) -> None:
        if where is self._own:
            self._own_empty += keys
        else:
            self._holders += [where] * len(keys)
            self._empty += keys

    def forward(self, cls: type[nn.Module]) -> None:
        """That of a class, to stay what it is, and its call."""
        self._judged.append(cls)
        self._forwards.append(cls.forward)
        self._calls.append(cls.__call__)

    def part(self, module: nn.Module) -> None:
        """A module whose call is left out: its class's forward, and neither hooks nor one of its own."""
        self._modules.append(module)
        self._classes.append(type(module))
        self.forward(type(module))
        self.empty(module.__dict__, "forward", *_HOOKS)

    def tensor(self, tensor: Tensor) -> None:
        """One whose dtype and device may change in place, by `module.to`."""
        self._tensors.append(tensor)
        self._dtypes.append(tensor.dtype)
        self._devices.append(tensor.get_device())

    def linear(self, layer: nn.Module, has_bias: bool = True) -> None:
        """A linear layer whose weight, and bias if it counts, are its parameters."""
        self.part(layer)
        parameters = layer.__dict__["_parameters"]
        self.entry(layer.__dict__, "compute_dtype")
        weight = self.entry(parameters, "weight")
        bias = self.entry(parameters, "bias") if has_bias else None
        if isinstance(weight, HoldsNF4):
            state = self.entry(weight.__dict__, "_state")
            for name in ("packed", "absmax", "absmax2", "offset", "dense"):
                self.entry(state.__dict__, name)
            self._frozen.append(weight)
        elif weight is not None:
            self.tensor(weight)
        if bias is not None:
            self.tensor(bias)

    def lora(self, module: Any, names: Sequence[str]) -> None:
        """A LoRA layer of PEFT with its active adapters, none of which drops or is a variant."""
        d = module.__dict__
        children = self.entry(d, "_modules")
        self.forward(plain_class(module))
        for name in ("_disable_adapters", "_active_adapter"):
            self.entry(d, name)
        self.empty(d, "merged_adapters", "lora_variant")
        scaling, biases = self.entry(d, "scaling"), self.entry(d, "lora_bias")
        self.linear(self.entry(children, "base_layer"))
        for kind in ("lora_A", "lora_B", "lora_dropout"):
            inside = self.entry(children, kind).__dict__["_modules"]
            for name in names:
                part = self.entry(inside, name)
                if kind == "lora_dropout":
                    self.part(part)
                    self.entry(part.__dict__, "training")
                    self.entry(part.__dict__, "p")
                else:
                    self.linear(part, has_bias=False)
        for name in names:
            self.entry(scaling, name)
            self.entry(biases, name)

    def holds(self, module: nn.Module) -> bool:
        """Whether `module` would be judged the same again."""
        own = module.__dict__
        return (
            all(map(is_, map(own.get, self._own_keys), self._own_values))
            and not any(map(own.get, self._own_empty))
            and all(map(is_, map(_get, self._dicts, self._keys), self._values))
            and not any(map(_get, self._holders, self._empty))
            and all(map(is_, map(type, self._modules), self._classes))
            and all(map(is_, map(_forward, self._judged), self._forwards))
            and all(map(is_, map(_call, self._judged), self._calls))
            and all(map(is_, map(_dtype, self._tensors), self._dtypes))
            and list(map(_device, self._tensors)) == self._devices
            and self._lists == self._items
            and not _any_requires_grad(*self._frozen)
            and (self.unchanged is None or self.unchanged(module))
        )

    def owns(self, args: Sequence[Any]) -> bool:
        """Whether all tensors among an op's arguments were seen, and none was made for one call. One without
        elements stands for none."""
        known = {id(one) for one in (*self._values, *self._tensors)}
        for value in args:
            if isinstance(value, Tensor):
                if id(value) not in known and (value.numel() or value.is_inference()):
                    return False
            elif isinstance(value, (list, tuple)) and not self.owns(value):
                return False
        return True

    def forget_own(self) -> None:
        self._own = None


class Repeated:
    """A call of `op`, on an x like that of the first call and with the same other arguments."""

    def __init__(self, x: Tensor, op: str, args: tuple[Any, ...], seen: Seen) -> None:
        self._dtype, self._device, self._features = x.dtype, x.device, x.shape[-1:]
        self._op, self._args, self._seen = op, args, seen

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # the copy is another module

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """The result, or None: it has to be judged again."""
        if (
            type(x) is Tensor
            and x.dtype is self._dtype
            and x.shape[-1:] == self._features
            and x.device == self._device
            and not _is_autocast_enabled(self._device.type)
            and self._seen.holds(module)
        ):
            y: Tensor = dispatch.call(self._op, x, *self._args)[0]
            return y
        return None


def again(module: nn.Module, record: Record, args: Any, kwargs: Any) -> Tensor | None:
    """The result of a call that was noted before; None where there is none, or it has to be judged again."""
    call = record.repeated
    if call is None or len(args) != 1 or kwargs or torch.compiler.is_compiling():
        return None
    y: Tensor | None = call(module, args[0])
    if y is None:
        record.repeated = None
    return y


def note(module: nn.Module, x: Tensor, op: str, args: tuple[Any, ...], look: Callable[[Seen], None]) -> None:
    """Keep a call of `op` with x and `args` for the next one, if all of these are the module's own and none
    was made for this call. `look` is given what notes down what was judged."""
    record: Record = module.__dict__[RECORD]
    if record.notes >= _MOST or type(x) is not Tensor or torch.compiler.is_compiling():
        return
    if x.device.type == "meta" or _is_autocast_enabled(x.device.type):
        return
    record.notes += 1
    seen = Seen(module)
    look(seen)
    if seen.owns(args) and seen.holds(module):
        seen.forget_own()
        record.repeated = Repeated(x, op, args, seen)

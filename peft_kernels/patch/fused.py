"""Installs a fused forward in a module and removes it: the class of the module is swapped for a subclass.

The subclass adds a forward that falls back on `super().forward`. The module that is called is therefore the
one that computes (a replica of DataParallel has its own weights), hooks and instance attributes are kept, and
setting `module.forward` overrides ours, as on any module. Pickles hold the unpatched module, so they load
where this package is not installed.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, ClassVar, NamedTuple

from torch import nn

from ..core.module_calls import is_compiled_by_jit

RECORD = "_peft_kernels"
"""The attribute of a fused module that holds its Record."""

REPLACES = "_peft_kernels_replaces"
"""The attribute of a forward that we set on an instance: the one that was there before."""

_PLACES = ("forward", "_old_forward")  # accelerate keeps the forward that its hook wraps in the second


class Fallback(NamedTuple):
    """The original forward must run."""

    reason: str = ""
    """Counted in the report, unless empty: then the original forward is no slower."""


@dataclass
class Record:
    """State of one fused module."""

    fallbacks: Counter[str] = field(default_factory=Counter)
    """Calls that took the original forward, by reason."""
    facts: Any = None
    """Found when the module was patched, for kinds that need it."""
    of_model: Record | None = None
    """Of a head: the record of its model, which counts calls that compute logits."""
    without: frozenset[str] = frozenset()
    """The parts that `patch` was told to leave out."""
    cached: Any = None
    """The CachedCall of the module (`call_cache.py`)."""
    stores: int = 0
    """How often a call was cached."""
    attempts: int = 0
    """How often a whole decoder layer was prepared, or could not be."""

    def count(self, fallback: Fallback) -> None:
        if fallback.reason:
            self.fallbacks[fallback.reason] += 1

    def __getstate__(self) -> dict[str, Any]:
        """Copies start without a cached call: it belongs to this module and its tensors."""
        return self.__dict__ | {"cached": None}


class Fused:
    """Base of all classes that are swapped in. `module.__dict__[RECORD]` exists while the module is
    patched."""

    methods: ClassVar[tuple[str, ...]] = ()
    """Other methods that are swapped and may be bound on an instance."""
    signed: ClassVar[bool] = False
    """Whether forward shows the signature of the original one: libraries inspect that of a model."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        function, arguments, state, *rest = reduced
        plain = plain_class(self)  # type: ignore[arg-type]
        if function is copyreg.__newobj__:  # type: ignore[attr-defined]
            function = plain.__new__  # else pickle compares the class in `arguments` with that of the object
        arguments = tuple(plain if item is type(self) else item for item in arguments)
        if isinstance(state, dict):
            state = {name: value for name, value in state.items() if name != RECORD}
        return function, arguments, state, *rest


def computed_by(compute: Callable[..., Any]) -> Callable[[type[Any]], type[Any]]:
    """Gives a class the forward `compute(module, *args, **kwargs)`, and the original one where that returns a
    Fallback."""

    def install(cls: Any) -> Any:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            record = self.__dict__.get(RECORD)
            if record is not None:
                found = compute(self, *args, **kwargs)
                if not isinstance(found, Fallback):
                    return found
                record.count(found)
            return super(cls, self).forward(*args, **kwargs)

        cls.forward = forward
        return cls

    return install


def _twin(module: Fused, memo: dict[int, Any]) -> Any:
    reduced: Any = super(Fused, module).__reduce_ex__(4)
    function, arguments, state, *_ = reduced
    twin = memo[id(module)] = function(*arguments)
    twin.__setstate__(copy.deepcopy(state, memo))
    return twin


_classes: dict[tuple[type, type], type] = {}
_plain: dict[type, type[nn.Module]] = {}
_first: dict[type, type[nn.Module]] = {}


def fuse(module: nn.Module, mixin: type[Fused], record: Record) -> None:
    """Give a module the forward of `mixin`. The module is unchanged if this raises."""
    fuse_all([(module, mixin, record)])


def fuse_all(plan: Sequence[tuple[nn.Module, type[Fused], Record]]) -> None:
    """Give each module the forward of a mixin. All are unchanged if this raises."""
    classes = [_class(type(module), mixin) for module, mixin, _ in plan]
    before: list[tuple[nn.Module, type[nn.Module]]] = []
    try:
        for (module, _, record), cls in zip(plan, classes, strict=True):
            before.append((module, type(module)))
            _swap(module, cls)
            module.__dict__[RECORD] = record
    except BaseException:
        for module, old in before:
            module.__dict__.pop(RECORD, None)
            _swap(module, old)
        raise


def _class(cls: type[nn.Module], mixin: type[Fused]) -> type[nn.Module]:
    """The class of a module with the forward of `mixin`.

    A class may have it already although the module is not patched: the module was created by the class of a
    patched one, or unpatched while another library had subclassed it.
    """
    while cls in _plain:
        cls = _plain[cls]
    if issubclass(cls, mixin):
        return cls
    plain: Any = cls
    found: Any = _classes.get((plain, mixin))
    if found is not None:
        return found
    names: dict[str, Any] = {"__module__": plain.__module__, "__qualname__": plain.__qualname__}
    names["__doc__"] = plain.__doc__
    if mixin.signed:
        names["forward"] = _signed(mixin.forward, plain.forward)  # type: ignore[attr-defined]
    made: Any = type(plain.__name__, (mixin, plain), names)
    _classes[plain, mixin] = made
    _plain[made] = plain
    # Not by `__deepcopy__`: wrappers that forward attributes (PeftModel, PEFT's ModulesToSaveWrapper,
    # torch.compile's) would find that of the module inside, and be copied without themselves.
    getattr(copy, "_deepcopy_dispatch", {})[made] = _twin
    return made


def _swap(module: nn.Module, new: type[nn.Module]) -> None:
    old = type(module)
    if new is not old:
        module.__class__ = new
        _rebind(module, old, new)


def _signed(forward: Any, like: Any) -> Any:
    def signed(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    functools.update_wrapper(signed, like)
    # accelerate unwraps by this attribute.
    del signed.__wrapped__  # type: ignore[attr-defined]
    signed.__signature__ = inspect.signature(like)  # type: ignore[attr-defined]
    return signed


def restore(module: nn.Module) -> bool:
    """Remove the fused forward. Returns False if there was none."""
    if module.__dict__.pop(RECORD, None) is None:
        return False
    before = getattr(module.__dict__.get("forward"), REPLACES, None)
    if before is not None:
        module.__dict__["forward"] = before
    fused: Any = type(module)
    plain = _plain.get(fused)
    if plain is not None:
        _swap(module, plain)
    # Else another library subclassed our class: without a record our forward is `super().forward`.
    return True


def record_of(module: nn.Module) -> Record | None:
    """The Record of a patched module, or None."""
    record: Record | None = module.__dict__.get(RECORD)
    return record


def has(module: nn.Module, *mixins: type[Fused]) -> bool:
    """Whether a module is patched with one of these. `type(model)(config)` is an instance and not patched."""
    return RECORD in module.__dict__ and isinstance(module, mixins)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before it was patched, and before `fully_shard` subclassed it, which adds
    methods and no forward."""
    cls = type(module)
    found = _first.get(cls)
    return _first_class(cls) if found is None else found


def _first_class(cls: Any) -> type[nn.Module]:
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    found = cls
    while True:
        if found in _plain:
            found = _plain[found]
        elif fsdp is not None and fsdp.FSDPModule in found.__bases__:
            found = found.__bases__[-1]
        else:
            break
    if found is not cls:  # other classes may be short-lived
        _first[cls] = found
    return found


def is_own(module: Any, forward: Any) -> bool:
    """Whether a `forward` set on the instance is that of its class, bound: a removed hook leaves
    it there."""
    cls: Any = type(module)
    return getattr(forward, "__self__", None) is module and forward.__func__ is cls.forward


def _rebind(module: nn.Module, old: Any, new: Any) -> None:
    methods = old.methods if issubclass(old, Fused) else new.methods
    for name, place in (*(("forward", place) for place in _PLACES), *((name, name) for name in methods)):
        if getattr(module.__dict__.get(place), "__func__", None) is getattr(old, name):
            module.__dict__[place] = MethodType(getattr(new, name), module)


def _wrapped(module: nn.Module, forward: Any) -> Any:
    """The forward of the module's class or plain class inside wrappers with `__wrapped__`, or None."""
    known = type(module).forward, plain_class(module).forward
    while getattr(forward, "__self__", module) is module:
        function = getattr(forward, "__func__", forward)
        if function in known:
            return function
        if not hasattr(function, "__wrapped__"):
            break
        forward = function.__wrapped__
    return None


def replaced_reason(module: nn.Module) -> str:
    """Why the forward of a module's class does not run when the module is called, or "". It does under a hook
    of accelerate, and in the wrappers that accelerate's `prepare` puts around a patched forward."""
    if RECORD in module.__dict__ and not isinstance(module, Fused):
        return (
            f"its class was changed after patch(), to {type(module).__qualname__}; unpatch, and patch again"
        )
    forward = module.__dict__.get("forward")
    if is_compiled_by_jit(module):
        return "it is compiled by torch.jit; nothing to do"
    if forward is None or hasattr(forward, REPLACES):
        return ""
    if is_own(module, forward) or is_own(module, module.__dict__.get("_old_forward")):
        return ""
    inner = _wrapped(module, forward)
    if RECORD in module.__dict__ and inner is type(module).forward:
        return ""
    if inner is plain_class(module).forward:
        return "its forward was wrapped on the instance before patch(), as accelerate does; patch first"
    name = getattr(forward, "__qualname__", type(forward).__name__)
    return f"its forward was replaced on the instance, by {name}; restore it to fuse it"

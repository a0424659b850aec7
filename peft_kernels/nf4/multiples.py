"""Multiples of a packed weight, so that averaging the weight with itself keeps it packed.

Averages of models (SWA, EMA) read two weights as dense values, combine them and write the result back. For a
frozen weight that is the weight itself up to rounding, which would make it dense. So dense values computed as
a multiple of a packed weight record the weight and the factor, and writing one times the weight changes
nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..core.nf4_state import Share
from .read_only import has_views, written

aten = torch.ops.aten


class Multiple(Tensor):
    """Dense values that are a multiple of a packed weight. Results of other ops are plain tensors."""

    _held: Tensor
    _note: list[Share | None]
    """The share, in a list shared with aliases; None after something else was written."""

    @staticmethod
    def of(values: Any, share: Share | None, note: list[Share | None] | None = None) -> Any:
        """`values` as a Multiple; unchanged if there is no share, or if torch traces."""
        if share is None or type(values) is not Tensor:
            return values
        multiple = Tensor._make_subclass(Multiple, values)
        multiple._held, multiple._note = values, [share] if note is None else note
        return multiple

    def _share(self) -> Share | None:
        return self._note[0]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in _PLAIN:  # these expose the memory to unnoticed writes, or keep the type
                return func(_plain(args[0]), *args[1:], **(kwargs or {}))
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if func in EACH:
            return each(func, args, kwargs)
        share = outcome(func, args, kwargs)
        targets = [target for target in written(func, args, kwargs) if isinstance(target, Multiple)]
        out = func(*tree_map(_values_of, args), **tree_map(_values_of, kwargs))
        for target in targets:
            target._note[0] = share
        if targets and out is _values_of(args[0]):
            return args[0]
        if func in _ALIASES:
            return Multiple.of(out, share, args[0]._note)
        if has_views(func):  # writes to a view are not noticed
            tree_map(_plain, (args, kwargs))
        return Multiple.of(out, share)


_ALIASES = (aten.detach.default, aten.alias.default)

_PLAIN = frozenset(
    getattr(Tensor, name)
    for name in (
        *("numpy", "__array__", "__dlpack__", "data_ptr", "untyped_storage"),
        *("__deepcopy__", "__reduce_ex__"),
    )
)


def _values_of(value: Any) -> Any:
    return value._held if isinstance(value, Multiple) else value


def _plain(value: Any) -> Any:
    """The plain values, which may be modified: drops the share."""
    if isinstance(value, Multiple):
        value._note[0] = None
    return _values_of(value)


def share_of(value: Any) -> Share | None:
    """The share of a weight or of a Multiple; None for other values."""
    share: Callable[[Any], Share | None] | None = getattr(type(value), "_share", None)
    return None if share is None else share(value)


def outcome(func: Any, args: Any, kwargs: Any) -> Share | None:
    """The share of an op's result, if it is a multiple of the weight that the arguments are multiples of."""
    rule = _RULES.get(func)
    return None if rule is None else rule(*args, **kwargs)


def _number(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().double() if type(value) is Tensor and value.dim() == 0 else None
    return float(value) if isinstance(value, (int, float)) else None


def _scaled(a: Any, b: Any) -> Share | None:
    share, number = share_of(a), _number(b)
    if share is None:
        share, number = share_of(b), _number(a)
    return None if share is None or number is None else share.times(share.factor * number)


def _divided(a: Any, b: Any) -> Share | None:
    share, number = share_of(a), _number(b)
    if share is None or number is None or (not isinstance(number, Tensor) and number == 0):
        return None
    return share.times(share.factor / number)


def _added(a: Any, b: Any, alpha: Any = 1) -> Share | None:
    mine, other = share_of(a), share_of(b)
    if mine is None or other is None or not mine.is_of(other):
        return None
    return mine.times(mine.factor + alpha * other.factor)


def _subtracted(a: Any, b: Any, alpha: Any = 1) -> Share | None:
    return _added(a, b, -alpha)


def _between(a: Any, b: Any, weight: Any) -> Share | None:
    number = _number(weight)
    mine, other = share_of(a), share_of(b)
    if number is None or mine is None or other is None or not mine.is_of(other):
        return None
    return mine.times(mine.factor + number * (other.factor - mine.factor))


def _copied(target: Any, source: Any, non_blocking: bool = False) -> Share | None:
    share = share_of(source)
    return share if share is not None and share.shape == target.shape else None


def _same(source: Any, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> Share | None:
    return share_of(source) if dtype is None or dtype.is_floating_point else None


_RULES: dict[Any, Callable[..., Share | None]] = {
    **dict.fromkeys((aten.mul.Tensor, aten.mul_.Tensor, aten.mul.Scalar, aten.mul_.Scalar), _scaled),
    **dict.fromkeys((aten.div.Tensor, aten.div_.Tensor, aten.div.Scalar, aten.div_.Scalar), _divided),
    **dict.fromkeys((aten.add.Tensor, aten.add_.Tensor), _added),
    **dict.fromkeys((aten.sub.Tensor, aten.sub_.Tensor), _subtracted),
    **dict.fromkeys((aten.lerp.Scalar, aten.lerp_.Scalar, aten.lerp.Tensor, aten.lerp_.Tensor), _between),
    aten.copy_.default: _copied,
    **dict.fromkeys((*_ALIASES, aten.clone.default, aten._to_copy.default), _same),
}


def _single_ops() -> dict[Any, Any]:
    names = [f"{name}{place}" for name in ("add", "sub", "mul", "div", "lerp") for place in ("", "_")]
    found = {}
    for name in (*names, "copy_"):
        packet = getattr(aten, f"_foreach_{name}")
        found.update({getattr(packet, overload): getattr(aten, name) for overload in packet.overloads()})
    return found


EACH = _single_ops()
"""Ops on lists of tensors, with the op that they apply to each."""


def each(func: Any, args: Any, kwargs: Any) -> Any:
    """Runs an op on lists: one by one for weights, so that only one is dense at a time, together for the
    rest."""
    lists = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, (list, tuple))]
    count = len(args[0])

    def picked(numbers: list[int]) -> tuple[Any, Any]:
        def pick(arg: Any) -> Any:
            return [arg[i] for i in numbers] if isinstance(arg, (list, tuple)) else arg

        return [pick(arg) for arg in args], {name: pick(arg) for name, arg in kwargs.items()}

    special = [i for i in range(count) if any(hasattr(type(items[i]), "_share") for items in lists)]
    plain = [i for i in range(count) if i not in set(special)]
    found: dict[int, Any] = {}
    if plain:
        some_args, some_kwargs = picked(plain)
        results = func(*some_args, **some_kwargs)
        found.update(zip(plain, results or [None] * len(plain), strict=True))
    for i in special:
        one_args, one_kwargs = picked([i])
        first = [arg[0] if isinstance(arg, list) else arg for arg in one_args]
        named = {name: arg[0] if isinstance(arg, list) else arg for name, arg in one_kwargs.items()}
        found[i] = EACH[func](*first, **named)
    return [found[i] for i in range(count)] if func._schema.returns else None

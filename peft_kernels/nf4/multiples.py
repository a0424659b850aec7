"""Multiples of a packed weight, so that averaging the weight with itself keeps it packed.

Averages of models (SWA, EMA) read two weights as dense values, combine them and write the result back. For a
frozen weight that is the weight itself up to rounding, which would make it dense. So dense values computed as
a multiple of a packed weight record the weight and the factor, and writing one times the weight changes
nothing."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..core.packed_state import Share
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

_PLAIN = {
    *(Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.data_ptr, Tensor.untyped_storage),
    *(Tensor.__deepcopy__, Tensor.__reduce_ex__),
}


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
    if func in _SAME:
        share = share_of(args[1] if func is aten.copy_.default else args[0])
        dtype = kwargs.get("dtype") or args[0].dtype
        return share if share and share.shape == args[0].shape and dtype.is_floating_point else None
    if func not in _FACTORS:
        return None
    count, factor = _FACTORS[func]
    if func in _PRODUCTS and share_of(args[0]) is None:
        args = args[::-1]
    shares: list[Any] = [share_of(arg) for arg in args[:count]]
    numbers = [_number(arg) for arg in args[count:]]
    if any(known is None for known in (*shares, *numbers)) or not shares[-1].is_of(shares[0]):
        return None
    try:
        return shares[0].times(factor(*(share.factor for share in shares), *numbers, **kwargs))
    except ZeroDivisionError:
        return None


def _number(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().double() if type(value) is Tensor and value.dim() == 0 else None
    return float(value) if isinstance(value, (int, float)) else None


_SAME = (*_ALIASES, aten.clone.default, aten._to_copy.default, aten.copy_.default)
_PRODUCTS = (aten.mul.Tensor, aten.mul_.Tensor, aten.mul.Scalar, aten.mul_.Scalar)
_QUOTIENTS = (aten.div.Tensor, aten.div_.Tensor, aten.div.Scalar, aten.div_.Scalar)
_BETWEEN = (aten.lerp.Scalar, aten.lerp_.Scalar, aten.lerp.Tensor, aten.lerp_.Tensor)
_FACTORS: dict[Any, tuple[int, Callable[..., Any]]] = {
    **dict.fromkeys(_PRODUCTS, (1, lambda a, number: a * number)),
    **dict.fromkeys(_QUOTIENTS, (1, lambda a, number: a / number)),
    **dict.fromkeys((aten.add.Tensor, aten.add_.Tensor), (2, lambda a, b, alpha=1: a + alpha * b)),
    **dict.fromkeys((aten.sub.Tensor, aten.sub_.Tensor), (2, lambda a, b, alpha=1: a - alpha * b)),
    **dict.fromkeys(_BETWEEN, (2, lambda a, b, weight: a + weight * (b - a))),
}
"""Of each op whose result can be a multiple too: how many of its first arguments are multiples (the rest are
numbers), and the factor of its result."""

_NAMES = [f"{name}{place}" for name in ("add", "sub", "mul", "div", "lerp") for place in ("", "_")]
EACH = {
    getattr(packet, overload): getattr(aten, name)
    for name in (*_NAMES, "copy_")
    for packet in [getattr(aten, f"_foreach_{name}")]
    for overload in packet.overloads()
}
"""Ops on lists of tensors, with the op that they apply to each."""


def each(func: Any, args: Any, kwargs: Any) -> Any:
    """Runs an op on lists: one by one for weights, so that only one is dense at a time, together for the
    rest."""
    lists = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, (list, tuple))]
    alone = [any(hasattr(type(item), "_share") for item in items) for items in zip(*lists, strict=True)]
    rest = [i for i, single in enumerate(alone) if not single]

    def run(op: Any, pick: Callable[[Any], Any]) -> Any:
        def picked(arg: Any) -> Any:
            return pick(arg) if isinstance(arg, (list, tuple)) else arg

        return op(*map(picked, args), **{name: picked(arg) for name, arg in kwargs.items()})

    results = iter((run(func, lambda items: [items[i] for i in rest]) if rest else None) or ())
    found = [
        run(EACH[func], itemgetter(i)) if single else next(results, None) for i, single in enumerate(alone)
    ]
    return found if func._schema.returns else None

"""Read-only views of values that exist only as a copy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

_NO_WRITE = (
    "an NF4 weight has no writable views of its values (the write would be lost); write to the weight "
    "itself, or to a dense copy, weight.dequantize()"
)
_COPYING = (Tensor.numpy, Tensor.__array__, Tensor.tolist, Tensor.__reduce_ex__, Tensor.__deepcopy__)


class ReadOnlyView(Tensor):
    """A view of dequantised values. Views of it are read-only too; other results are plain tensors."""

    _copy: Tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in _COPYING:
                return func(args[0].clone(), *args[1:], **(kwargs or {}))
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if any(isinstance(value, cls) for value in written(func, args, kwargs)):
            raise NotImplementedError(f"{func}: {_NO_WRITE}")
        plain_args, plain_kwargs = tree_map(_plain, (args, kwargs))
        out = func(*plain_args, **plain_kwargs)
        return read_only(out) if has_views(func) else out


def _plain(value: Any) -> Any:
    return value._copy if isinstance(value, ReadOnlyView) else value


def read_only(value: Any) -> Any:
    """A tensor or a list of tensors as read-only views."""
    if isinstance(value, (list, tuple)):
        return type(value)(read_only(item) for item in value)
    if not isinstance(value, Tensor) or isinstance(value, ReadOnlyView):
        return value
    view = Tensor._make_subclass(ReadOnlyView, value)
    view._copy = value
    return view


def has_views(func: Any) -> bool:
    """Whether an op returns views of its arguments."""
    return any(
        result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns
    )


def written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments that an op writes to, with lists flattened."""
    found: list[Any] = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            found.extend(value if isinstance(value, (list, tuple)) else [value])
    return found

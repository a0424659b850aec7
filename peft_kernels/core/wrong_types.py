"""TypeErrors that name the argument, for calls with arguments of a wrong type.

Arguments are compared with their annotations only after a call has failed, so that correct calls cost no more
than a try block, and other errors stay as they are. Calls that construct something that would fail later are
checked afterwards too.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

WORDS = {
    types.NoneType: "None",
    float: "a number",
    int: "an int",
    bool: "a bool",
    str: "a str",
    torch.dtype: "a torch.dtype",
}


def names_wrong_types(function: Callable[P, R]) -> Callable[P, R]:
    """Wraps a function: its error becomes a TypeError `argument: expected ..., got ...` if an argument's type
    differs from its annotation, unless the error already begins with an argument's name.

    Numbers are anything with __float__ or __index__, and anything is a bool.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            sentence = _sentence(function, args, kwargs, error)
            if sentence is None:
                raise
            raise TypeError(sentence) from error

    return call


def refuses_wrong_types(function: Callable[P, R]) -> Callable[P, R]:
    """`names_wrong_types`, but raises the TypeError even where the function has not failed."""
    checked = names_wrong_types(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        made = checked(*args, **kwargs)
        sentence = _sentence(function, args, kwargs)
        if sentence is not None:
            raise TypeError(sentence)
        return made

    return call


def _sentence(function: Any, args: Any, kwargs: Any, error: Exception | None = None) -> str | None:
    try:
        given = inspect.signature(function).bind(*args, **kwargs).arguments
    except TypeError:  # Python's own message names missing or surplus arguments
        return None
    kinds = _kinds(function)
    if error is not None and re.split(r"[^\w]", str(error), maxsplit=1)[0] in given:
        return None
    for name, value in given.items():
        for path, kind, got in _wrong(name, value, kinds.get(name, Any)):
            return f"{path}: expected {_words(kind)}, got {_kind_of(got)}"
    return None


def _wrong(path: str, value: Any, kind: Any) -> Iterator[tuple[str, Any, Any]]:
    """(path, expected, value) of each part of `value` that is not of its kind."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        found = [list(_wrong(path, value, part)) for part in parts]
        deeper = [wrong for wrong in found if wrong and wrong[0][0] != path]
        if all(found):
            yield deeper[0][0] if deeper else (path, kind, value)
    elif not _is_a(value, origin or kind):
        yield path, kind, value
    elif dataclasses.is_dataclass(kind):
        for field, of_field in _kinds(kind).items():
            yield from _wrong(f"{path}.{field}", getattr(value, field), of_field)
    elif isinstance(value, (list, tuple)) and len(parts) == 1:
        for i, item in enumerate(value):
            yield from _wrong(f"{path}[{i}]", item, parts[0])


def _kinds(of: Any) -> dict[str, Any]:
    """Annotations of a function, or of a class's fields."""
    try:
        return typing.get_type_hints(of)
    except NameError:  # a name that is imported only for type checkers
        return {}


def _is_a(value: Any, kind: Any) -> bool:
    if kind is float or kind is int:
        return hasattr(type(value), "__index__") or (kind is float and hasattr(type(value), "__float__"))
    if kind is bool or kind is Any or not isinstance(kind, type):
        return True
    if kind is tuple:
        return isinstance(value, (tuple, list))
    if kind in (Sequence, Set, Mapping) and isinstance(value, str):
        return False
    return isinstance(value, kind)


def _words(kind: Any) -> str:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        words = list(dict.fromkeys(map(_words, parts)))
        return f"{', '.join(words[:-1])} or {words[-1]}"
    if origin is not None and isinstance(origin, type):
        inner = f" of {parts[0].__name__}" if len(parts) == 1 and isinstance(parts[0], type) else ""
        return f"{_named(origin)}{inner}"
    return WORDS.get(kind) or _named(kind)


def an(value: Any) -> str:
    """The class of a value, with its article: "a PackedWeight"."""
    return _named(type(value))


def _named(kind: Any) -> str:
    name: str = {"HoldsPacked": "PackedWeight", "PackedState": "PackedWeight"}.get(
        kind.__name__, kind.__name__
    )
    return f"{'an' if name[0] in 'AEIOUaeio' or name.startswith('NF') else 'a'} {name}"


def _kind_of(value: Any) -> str:
    return "None" if value is None else type(value).__name__

"""Speeds up Triton's interpreter, which rebuilds the types and shapes of every value.

Caches what Triton made of the same arguments, never tensor contents.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def speed_up() -> None:
    """Applies to the rest of the process."""
    _cache_types()
    _cache_shapes()
    _skip_broadcast_of_equal_shapes()


def _cache_types() -> None:
    by_name: dict[str, Any] = {}
    uncached: Callable[[Any], Any] = interpreter._get_np_dtype

    def np_dtype(dtype: Any) -> Any:
        if (found := by_name.get(dtype.name)) is None:
            found = by_name[dtype.name] = uncached(dtype)
        return found

    interpreter._get_np_dtype = np_dtype
    made = tl.block_type.__init__
    attributes: dict[Any, dict[str, Any]] = {}

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = shape.values if isinstance(shape, tl.tuple) else shape
        # By name, as pointer types are not hashable; the name lacks only the address space.
        key = element_ty.name, *(size.value if isinstance(size, tl.constexpr) else size for size in sizes)
        if (found := attributes.get(key)) is None:
            made(self, element_ty, shape)
            found = attributes[key] = dict(vars(self))
        vars(self).update(found)

    tl.block_type.__init__ = block_type


def _cache_shapes() -> None:
    @cache
    def shape_of(sizes: tuple[int, ...]) -> tuple[Any, Any]:
        numel = 1
        for size in sizes:
            numel *= size
        return tl.constexpr(numel), tl.tuple([tl.constexpr(size) for size in sizes])

    def tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = shape_of(tuple(type.shape.values) if type.is_block() else ())

    tl.tensor.__init__ = tensor


def _skip_broadcast_of_equal_shapes() -> None:
    broadcast = TritonSemantic.broadcast_impl_value

    def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> Any:
        one, other = lhs.type, rhs.type
        if one.is_block() and other.is_block() and one.shape.values == other.shape.values:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    TritonSemantic.broadcast_impl_value = broadcast_impl_value

"""Sums, exponentials and quotients with the rounding of NVIDIA's cards, for Triton's interpreter.

Sums on tensor cores: products are exact; eight of them and the accumulator are truncated towards zero to the
bits of the largest, and so is their sum (Fasi et al. 2021; Ampere's width, the shortest of the supported
cards). Sums in fp32: a chain of fused multiply-adds. `acc + tl.dot(a, b)` is computed as `tl.dot(a, b, acc)`,
as Triton's compiler does. `ex2.approx` and `div.full` are off by what PTX allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter

Array = NDArray[Any]

WIDTH = 8  # products at a time
BITS = 25  # one more than the largest term has


def truncated_to(values: Array, bits: int, largest: Array) -> Array:
    """fp64 values truncated towards zero to that many bits below `largest`."""
    unit = np.exp2(np.frexp(largest)[1] - float(bits))
    return np.trunc(values / unit) * unit


def truncated(a: Array, b: Array, acc: Array) -> Array:
    """acc [m, n] + a [m, k] b [k, n] as on a tensor core, in fp64."""
    for first in range(0, a.shape[1], WIDTH):
        products = a[:, None, first : first + WIDTH] * b.T[None, :, first : first + WIDTH]
        terms = np.concatenate([acc[:, :, None], products], 2)
        total = truncated_to(terms, BITS, np.abs(terms).max(2, keepdims=True)).sum(2)
        acc = truncated_to(total, 24, total)
    return acc


def chained(a: Array, b: Array, acc: Array) -> Array:
    """The same as a chain of fused multiply-adds in fp32."""
    for i in range(a.shape[1]):
        acc = (a[:, i, None] * b[None, i] + acc).astype(np.float32).astype(np.float64)
    return acc


def tf32(values: Array) -> Array:
    """Drops the low 13 bits, as tensor cores read fp32."""
    return (values.astype(np.float32).view(np.uint32) & 0xFFFFE000).view(np.float32).astype(np.float64)


def multiply_add(a: Array, b: Array, acc: Array, kind: str) -> Array:
    if not all(np.isfinite(part).all() for part in (a, b, acc)):
        return a @ b + acc
    if kind == "fp32":
        return chained(a, b, acc)
    if kind == "16 bits":
        return truncated(a, b, acc)
    assert kind == "tf32x3", kind
    (a_high, a_low), (b_high, b_low) = ((tf32(t), tf32(t - tf32(t))) for t in (a, b))
    for left, right in ((a_low, b_high), (a_high, b_low), (a_high, b_high)):
        acc = truncated(left, right, acc)
    return acc


def _wide(handle: Any) -> Array:
    data = handle.data
    if handle.dtype.scalar == tl.bfloat16:
        data = (data.astype(np.uint32) << 16).view(np.float32)
    return data.astype(np.float64)


def _kind(a: Any, precision: Any) -> str:
    if a.dtype.scalar != tl.float32:
        return "16 bits"
    return "tf32x3" if "TF32x3" in str(precision) else "fp32"


def _off_by(values: Array, units: float) -> Array:
    """fp32 values off by so many ulps, up or down depending on their lowest bit."""
    sign = np.where(values.view(np.uint32) & 1, 1.0, -1.0)
    return (values * (1 + sign * units * 2.0**-24)).astype(np.float32)


@contextmanager
def as_on_cards() -> Iterator[None]:
    builder: Any = interpreter.InterpreterBuilder
    handle = interpreter.TensorHandle
    add: Callable[..., Any] = builder.create_fadd

    def create_dot(self: Any, a: Any, b: Any, acc: Any, precision: Any, _: Any) -> Any:
        kind = _kind(a, precision)
        assert acc.dtype.scalar == tl.float32
        result = handle(multiply_add(_wide(a), _wide(b), _wide(acc), kind).astype(np.float32), tl.float32)
        if not acc.data.any():
            result.dot = a, b, precision
        return result

    def create_fadd(self: Any, left: Any, right: Any) -> Any:
        for one, other in ((left, right), (right, left)):
            if hasattr(one, "dot") and other.data.shape == one.data.shape:
                a, b, precision = one.dot
                return create_dot(self, a, b, other, precision, 0)
        return add(self, left, right)

    def exp2(values: Array) -> Array:
        return _off_by(np.exp2(values.astype(np.float64)).astype(np.float32), 2)

    def create_exp(self: Any, x: Any) -> Any:
        assert x.dtype.scalar == tl.float32
        return handle(exp2(x.data * np.float32(1.4426950408889634)), x.dtype.scalar)

    def create_exp2(self: Any, x: Any) -> Any:
        return handle(exp2(x.data), x.dtype.scalar)

    def create_fdiv(self: Any, left: Any, right: Any) -> Any:
        assert left.dtype.scalar == tl.float32
        return handle(_off_by((left.data / right.data).astype(np.float32), 2), tl.float32)

    made = (create_dot, create_fadd, create_exp, create_exp2, create_fdiv)
    with patch.multiple(builder, **{function.__name__: function for function in made}):
        yield

"""Checks of arguments, with the messages of the compiled back ends."""

from __future__ import annotations

from collections.abc import Sequence, Sized

import torch
from torch import Tensor

from ...core.backends.base import DTYPES


def check(condition: bool, name: str, expected: object, got: object) -> None:
    """Raises a RuntimeError that names the argument unless `condition`."""
    if not condition:
        raise RuntimeError(f"{name}: expected {expected}, got {got}")


_NAMES = {
    torch.float32: "Float",
    torch.bfloat16: "BFloat16",
    torch.float16: "Half",
    torch.float64: "Double",
    torch.uint8: "Byte",
    torch.int64: "Long",
    torch.int32: "Int",
}


def dtype_name(dtype: torch.dtype) -> str:
    """The name that the compiled back ends print."""
    return _NAMES.get(dtype, str(dtype))


def check_dtype(t: Tensor, expected: torch.dtype, name: str) -> None:
    check(t.dtype == expected, name, _NAMES[expected], dtype_name(t.dtype))


def check_float(t: Tensor, name: str) -> None:
    """Raises unless kernels take its dtype."""
    check(t.dtype in DTYPES, name, "float32, bfloat16 or float16", dtype_name(t.dtype))


def compute_type(compute_dtype: torch.dtype | None, x: Tensor) -> torch.dtype:
    """Dtype of the base GEMM: `compute_dtype`, or x's own."""
    if compute_dtype is None:
        return x.dtype
    expected, got = "float32, bfloat16 or float16", dtype_name(compute_dtype)
    check(compute_dtype in DTYPES, "compute_dtype", expected, got)
    return compute_dtype


def check_shape(t: Tensor, expected: Sequence[int], name: str) -> None:
    check(list(t.shape) == list(expected), name, f"shape {list(expected)}", list(t.shape))


def check_lengths(lists: Sequence[Sized], count: int, name: str, like: str) -> None:
    """Raises unless every list has `count` entries, as `like` has."""
    got = [len(values) for values in lists]
    check(got == [count] * len(got), name, f"{count} of each like {like}", ", ".join(map(str, got)))


def check_numel(t: Tensor, expected: int, name: str) -> None:
    check(t.numel() == expected, name, f"{expected} elements", t.numel())


def matching(t: Tensor, like: Tensor, name: str) -> Tensor:
    """t, contiguous. Raises unless it has the shape and dtype of `like`."""
    check_dtype(t, like.dtype, name)
    check_shape(t, like.shape, name)
    return t.contiguous()

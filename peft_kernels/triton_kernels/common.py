"""What ops share: their arguments, checked."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.base import DTYPES
from ..code_tables import BLOCKSIZES, NESTED_BLOCKSIZE, dynamic_map
from .launch import INTERPRETED, launch

__all__ = [
    "INTERPRETED",
    "Nf4",
    "check",
    "check_blocksize",
    "check_dtype",
    "check_float",
    "check_lengths",
    "check_nested",
    "check_numel",
    "check_shape",
    "compute_type",
    "launch",
    "matching",
    "nf4",
]


def check(condition: bool, name: str, expected: object, got: object) -> None:
    """RuntimeError that names an argument, in the words of the compiled back ends."""
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


def check_dtype(t: Tensor, expected: torch.dtype, name: str) -> None:
    check(t.dtype == expected, name, _NAMES[expected], _NAMES.get(t.dtype, t.dtype))


def check_float(t: Tensor, name: str) -> None:
    """That kernels take its dtype."""
    check(t.dtype in DTYPES, name, "float32, bfloat16 or float16", _NAMES.get(t.dtype, t.dtype))


def compute_type(compute_dtype: torch.dtype | None, x: Tensor) -> torch.dtype:
    """Of the base product: x's own unless another is asked for."""
    if compute_dtype is None:
        return x.dtype
    expected, got = "float32, bfloat16 or float16", _NAMES.get(compute_dtype, compute_dtype)
    check(compute_dtype in DTYPES, "compute_dtype", expected, got)
    return compute_dtype


def check_shape(t: Tensor, expected: Sequence[int], name: str) -> None:
    check(list(t.shape) == list(expected), name, f"shape {list(expected)}", list(t.shape))


def check_lengths(lists: Sequence[Sized], count: int, name: str, like: str) -> None:
    """That there is one of each for each of `like`."""
    got = [len(values) for values in lists]
    check(got == [count] * len(got), name, f"{count} of each like {like}", ", ".join(map(str, got)))


def check_numel(t: Tensor, expected: int, name: str) -> None:
    check(t.numel() == expected, name, f"{expected} elements", t.numel())


def check_blocksize(blocksize: int) -> None:
    check(blocksize in BLOCKSIZES, "blocksize", "a power of two from 32 to 4096", blocksize)


def matching(t: Tensor, like: Tensor, name: str) -> Tensor:
    """Contiguous, and of the shape and dtype of `like`."""
    check_dtype(t, like.dtype, name)
    check_shape(t, like.shape, name)
    return t.contiguous()


class Nf4(NamedTuple):
    """A weight in NF4, checked and contiguous. In the order in which kernels take its pointers."""

    packed: Tensor  # uint8 [ceil(numel / 2)]
    absmax: Tensor  # fp32, or uint8 codes of it when double-quantised [blocks]
    absmax2: Tensor | None  # fp32 [ceil(blocks / 256)]
    offset: Tensor | None  # fp32, one element
    dynamic_map: Tensor | None  # fp32 [256]: what those codes mean
    blocksize: int


def nf4(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    numel: int,
) -> Nf4:
    """The arguments that make an NF4 weight of `numel` elements. RuntimeError when they do not fit."""
    check_blocksize(blocksize)
    check_dtype(packed, torch.uint8, "packed")
    check(packed.numel() == (numel + 1) // 2, "packed", f"{(numel + 1) // 2} bytes", packed.numel())
    blocks = -(-numel // blocksize)
    if absmax2 is None or offset is None:
        check(absmax2 is offset, "absmax2, offset", "both or neither", "only one of them")
        check_dtype(absmax, torch.float32, "absmax")
        table = None
    else:
        check_dtype(absmax, torch.uint8, "absmax")
        check_nested(absmax2, offset, blocks)
        absmax2, table = absmax2.contiguous(), dynamic_map(packed.device)
    check_numel(absmax, blocks, "absmax")
    return Nf4(packed.contiguous(), absmax.contiguous(), absmax2, offset, table, blocksize)


def check_nested(absmax2: Tensor, offset: Tensor, blocks: int) -> None:
    """The second level of double quantisation, for `blocks` absmax values."""
    check_dtype(absmax2, torch.float32, "absmax2")
    check_dtype(offset, torch.float32, "offset")
    check_numel(absmax2, -(-blocks // NESTED_BLOCKSIZE), "absmax2")
    check_numel(offset, 1, "offset")

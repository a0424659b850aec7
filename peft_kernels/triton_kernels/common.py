"""The host's side of kernels: checked arguments, and launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..backends.base import DTYPES
from ..code_tables import BLOCKSIZES, NESTED_BLOCKSIZE, dynamic_map

Grid = Callable[[dict[str, Any]], tuple[int, ...]]

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether the kernels of this process run in numpy. Triton decides that when it sees a kernel first."""


def check_usable() -> None:
    """Raise when Triton cannot compile and launch on this machine."""
    if not INTERPRETED:
        _ = triton.runtime.driver.active.utils  # compiled by the C compiler that launches need too


def launch(
    kernel: Any,
    grid: Grid,
    *args: Any,
    configs: Sequence[triton.Config],
    key: tuple[Any, ...] = (),
    **constants: Any,
) -> None:
    """Run a kernel once on the current device.

    Parameters
    ----------
    kernel
        A function under @triton.jit. A parameter `PTX: tl.constexpr` gets whether the target takes PTX.
    grid : callable
        The number of programs by the meta-parameters of the config and the constants. 0 programs are none.
        Only the first dimension may pass 65535.
    args
        Tensors (None for one that is not there) and numbers, in the kernel's order.
    configs : sequence of triton.Config
        Meta-parameters, warps and stages to choose from, the best guess first. They must not differ in what
        changes the order of a sum: results are to be the same from run to run.
    key : tuple
        The class of shapes: for each the best config is looked for once. It must hold whatever else changes
        which config is best.
    constants
        The kernel's other constexpr parameters, and options of the compiler (enable_fp_fusion).
    """
    if "PTX" in kernel.arg_names:
        constants["PTX"] = not INTERPRETED and _target().backend == "cuda"
    config = configs[0]
    meta = {**constants, **config.all_kwargs()}
    programs = grid(meta)
    if 0 not in programs:
        kernel[programs](*args, **meta)


def _target() -> Any:
    return triton.runtime.driver.active.get_current_target()


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
}


def check_dtype(t: Tensor, expected: torch.dtype, name: str) -> None:
    check(t.dtype == expected, name, _NAMES[expected], _NAMES.get(t.dtype, t.dtype))


def check_float(t: Tensor, name: str) -> None:
    """That kernels take its dtype."""
    check(t.dtype in DTYPES, name, "float32, bfloat16 or float16", _NAMES.get(t.dtype, t.dtype))


def check_shape(t: Tensor, expected: Sequence[int], name: str) -> None:
    check(list(t.shape) == list(expected), name, f"shape {list(expected)}", list(t.shape))


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

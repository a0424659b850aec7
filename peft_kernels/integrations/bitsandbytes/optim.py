"""Our kernels for steps of bitsandbytes' optimizers, whose classes, states and state dicts are unchanged.

Kernels return NotImplemented to fall back to bitsandbytes.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...core import dispatch
from ...core.backends.base import DTYPES
from ...core.code_tables import dynamic_map
from ...core.op import argument_names
from ...optim.states import blocks_of
from .covers import has_kernels, is_table

_KINDS = {"adam": "adamw", "lion": "lion"}
"""bitsandbytes' names of updates (AdamW uses Adam's), and the op's."""


SCHEMAS = {
    "optimizer_update_32bit": "(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, "
    "Tensor(a3!)? state2, Tensor(a4!)? unorm_vec, float max_unorm, float param_norm, float beta1, "
    "float beta2, float beta3, float alpha, float eps, float weight_decay, int step, float lr, "
    "float gnorm_scale, bool skip_zeros=False) -> ()",
    "optimizer_update_8bit_blockwise": "(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, "
    "Tensor(a2!) state1, Tensor(a3!)? state2, float beta1, float beta2, float beta3, float alpha, float eps, "
    "int step, float lr, Tensor(a4!) qmap1, Tensor(a5!)? qmap2, Tensor(a6!) absmax1, Tensor(a7!)? absmax2, "
    "float weight_decay, float gnorm_scale, bool skip_zeros=False) -> ()",
}


def _update_32bit(args: Any) -> Any:
    if args.max_unorm > 0 or args.skip_zeros:
        return NotImplemented
    none = torch.empty(0, device=args.p.device)
    return _update(args, none, none)


def _update_8bit(args: Any) -> Any:
    if args.skip_zeros or not is_table(args.qmap1, dynamic_map):
        return NotImplemented
    if args.qmap2 is not None and not is_table(args.qmap2, _unsigned_map):
        return NotImplemented
    return _update(args, args.absmax1, args.absmax2)


def _unsigned_map(device: torch.device) -> Tensor:
    return dynamic_map(device, signed=False)


@torch.no_grad()
def _update(args: Any, *absmax: Tensor | None) -> Any:
    """A step of one parameter. Large states of paged optimizers on CUDA are in managed memory, which torch
    reports as CPU memory: they fall back to bitsandbytes."""
    g, p = args.g, args.p
    kind, device = _KINDS.get(args.optimizer_name), p.device
    if kind is None or p.dtype not in DTYPES or not has_kernels(device):
        return NotImplemented
    moments = [t for t in (args.state1, args.state2) if t is not None]
    scales = [t for t in absmax if t is not None][: len(moments)]
    blocks = blocks_of(p.shape) if moments[0].dtype == torch.uint8 else 0
    sizes = [(t, p.numel()) for t in (g, p, *moments)] + [(t, blocks) for t in scales]
    if not len(moments) == len(scales) == (1 if kind == "lion" else 2) or any(
        t.device != device or not t.is_contiguous() or t.numel() != size for t, size in sizes
    ):
        return NotImplemented
    steps = torch.full((1,), args.step, dtype=torch.int64, device=device)
    rate = torch.full((1,), args.lr, dtype=torch.float32, device=device)
    factor = None if args.gnorm_scale == 1 else torch.full((), args.gnorm_scale, device=device)
    none: list[list[Tensor]] = [[]] * (2 - len(moments))
    lists = [*([t] for t in moments), *none, *([t] for t in scales), *none]
    numbers = [args.beta1], [args.beta2], [args.eps], [args.weight_decay], kind
    dispatch.call(
        "adamw", [p], [g], *lists, [], steps, [0], rate, *numbers, None, None, 0.0, None, factor, like=p
    )
    return None


def _by_name(op: str, update: Callable[[Any], Any]) -> Callable[..., Any]:
    """A kernel that takes the op's arguments by position and passes them as one named tuple."""
    named = namedtuple("Arguments", argument_names(SCHEMAS[op].split(" -> ")[0]), defaults=(False,))  # type: ignore[misc]
    return lambda *args: update(named(*args))


KERNELS: dict[str, Callable[..., Any]] = {
    op: _by_name(op, update) for op, update in zip(SCHEMAS, (_update_32bit, _update_8bit), strict=True)
}

"""Our kernels for steps of bitsandbytes' optimizers, whose classes, states and state dicts are unchanged.

Kernels return NotImplemented to fall back to bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core import dispatch
from ...core.backends.base import DTYPES
from ...core.code_tables import dynamic_map
from ...optim.states import blocks_of
from .covers import has_kernels, is_table

_KINDS = {"adam": "adamw", "lion": "lion"}
"""bitsandbytes' names of updates (AdamW uses Adam's), and the op's."""


def _update_32bit(
    name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    unorm_vec: Tensor | None,
    max_unorm: float,
    param_norm: float,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    step: int,
    lr: float,
    gnorm_scale: float,
    skip_zeros: bool = False,
) -> Any:
    if max_unorm > 0 or skip_zeros:
        return NotImplemented
    numbers = (beta1, beta2), eps, weight_decay, step, lr, gnorm_scale
    return _update(name, g, p, (state1, state2), (torch.empty(0, device=p.device),) * 2, *numbers)


def _update_8bit(
    name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    step: int,
    lr: float,
    qmap1: Tensor,
    qmap2: Tensor | None,
    absmax1: Tensor,
    absmax2: Tensor | None,
    weight_decay: float,
    gnorm_scale: float,
    skip_zeros: bool = False,
) -> Any:
    if skip_zeros or not is_table(qmap1, dynamic_map):
        return NotImplemented
    if qmap2 is not None and not is_table(qmap2, _unsigned_map):
        return NotImplemented
    numbers = (beta1, beta2), eps, weight_decay, step, lr, gnorm_scale
    return _update(name, g, p, (state1, state2), (absmax1, absmax2), *numbers)


def _unsigned_map(device: torch.device) -> Tensor:
    return dynamic_map(device, signed=False)


def _update(
    name: str,
    g: Tensor,
    p: Tensor,
    states: Sequence[Tensor | None],
    absmax: Sequence[Tensor | None],
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    lr: float,
    gnorm_scale: float,
) -> Any:
    """A step of one parameter. Large states of paged optimizers on CUDA are in managed memory, which torch
    reports as CPU memory: they fall back to bitsandbytes."""
    kind, device = _KINDS.get(name), p.device
    if kind is None or p.dtype not in DTYPES or not has_kernels(device):
        return NotImplemented
    moments = [t for t in states if t is not None]
    scales = [t for t in absmax if t is not None][: len(moments)]
    blocks = blocks_of(p.shape) if moments[0].dtype == torch.uint8 else 0
    if (
        len(moments) != (1 if kind == "lion" else 2)
        or any(t.device != device or not t.is_contiguous() for t in (g, p, *moments, *scales))
        or any(t.numel() != p.numel() for t in (g, *moments))
        or [t.numel() for t in scales] != [blocks] * len(moments)
    ):
        return NotImplemented
    steps = torch.full((1,), step, dtype=torch.int64, device=device)
    rate = torch.full((1,), lr, dtype=torch.float32, device=device)
    factor = None if gnorm_scale == 1 else torch.full((), gnorm_scale, device=device)
    lists = [[t] for t in moments] + [[]] * (2 - len(moments))
    lists += [[t] for t in scales] + [[]] * (2 - len(moments))
    numbers = [betas[0]], [betas[1]], [eps], [weight_decay], kind
    with torch.no_grad():
        dispatch.call(
            "adamw", [p], [g], *lists, [], steps, [0], rate, *numbers, None, None, 0.0, None, factor, like=p
        )
    return None


KERNELS: dict[str, Callable[..., Any]] = {
    "optimizer_update_32bit": _update_32bit,
    "optimizer_update_8bit_blockwise": _update_8bit,
}
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

"""FLOPs of the ops' GEMMs, for torch's FlopCounterMode.

2 m n k for the GEMM with a base weight, and likewise for h = x A^T, h B^T, dY B, dh A, dA and dB of an
adapter where they are computed. Elementwise work, quantising and dequantising count nothing, as in torch.

torch.utils.flop_counter imports Triton, so it is not imported here: a counter gets the formulas when it first
sees an op.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

Shape = Sequence[int]

_packets: dict[Any, Callable[..., int]] = {}
"""Formulas by op, of all namespaces."""


def register(namespace: str, formulas: Mapping[str, tuple[Callable[..., Any], Callable[[Any], int]]]) -> None:
    """Registers the ops of a namespace: per op, how to name its arguments, and its formula."""
    ops = getattr(torch.ops, namespace)
    for op, (named, formula) in formulas.items():
        _packets[getattr(ops, op)] = _of_shapes(named, formula)
    update_counters()


def _of_shapes(named: Callable[..., Any], formula: Callable[[Any], int]) -> Callable[..., int]:
    def count(*shapes: Any, out_shape: Any = None, **_: Any) -> int:
        return formula(named(shapes))

    return count


def update_counters() -> None:
    """Adds the formulas to torch.utils.flop_counter, if it is imported, and to active counters, which copied
    the registry when they were made."""
    module: Any = sys.modules.get("torch.utils.flop_counter")
    if module is None or not hasattr(module, "register_flop_formula"):  # or is being imported
        return
    for packet, formula in _packets.items():
        if packet not in module.flop_registry:
            module.register_flop_formula(packet)(formula)
    for mode in _get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", mode)
        if isinstance(counter, module.FlopCounterMode):
            counter.flop_registry.update({packet: module.flop_registry[packet] for packet in _packets})


def layers(x: Shape, out_features: Sequence[int], lora_a: Sequence[Shape], lora_b: Sequence[Shape]) -> int:
    """FLOPs of linear layers on one x, with their adapters."""
    base = x[-1] * sum(out_features)
    return 2 * prod(x[:-1]) * (base + sum(prod(a) for a in lora_a) + sum(prod(b) for b in lora_b))


def layers_backward(
    dy: Sequence[Shape],
    x: Shape,
    lora_a: Sequence[Shape],
    lora_b: Sequence[Shape],
    need_dx: bool,
    need_da: Sequence[bool],
    need_db: Sequence[bool],
) -> int:
    per_row = 0
    if need_dx:
        per_row += x[-1] * sum(d[-1] for d in dy) + sum(prod(a) for a in lora_a)
    for a, b, for_a, for_b in zip(lora_a, lora_b, need_da, need_db, strict=True):
        per_row += prod(b) * (need_dx or for_a)  # dh
        per_row += prod(a) * for_a + prod(b) * for_b
    return 2 * prod(x[:-1]) * per_row

"""What torch's FlopCounterMode counts for the ops: those of their matrix products.

2 m n k for a product with a base weight, and in the same way for h = x A^T, h B^T, dY B, dh A, dA and dB of
an adapter, where they are computed. Elementwise work, quantising and dequantising count nothing, as in torch.

torch.utils.flop_counter imports Triton, so it is not imported for this: a counter is told of the formulas
when it first meets an op.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

Shape = Sequence[int]


def nf4_linear(x: Shape, *args: Any, **_: Any) -> int:
    """Of nf4_linear_dx too: out_features there is in_features."""
    features: int = args[5]
    return 2 * prod(x) * features


def lora_linear(x: Shape, *args: Any, **_: Any) -> int:
    lora_a, lora_b = args[6:8]
    return _layers(x, [lora_b[0]], [lora_a], [lora_b])


def lora_linear_backward(dy: Shape, x: Shape, *args: Any, **_: Any) -> int:
    lora_a, lora_b = args[6:8]
    need_dx, need_da, need_db = args[12:]
    return _backward([dy], x, [lora_a], [lora_b], need_dx, [need_da], [need_db])


def multi_lora_linear(x: Shape, *args: Any, **_: Any) -> int:
    return _layers(x, args[5], args[7], args[8])


def multi_lora_linear_backward(dy: Sequence[Shape], x: Shape, *args: Any, **_: Any) -> int:
    lora_a, lora_b = args[6:8]
    need_dx, need_da, need_db = args[15:]
    return _backward(dy, x, lora_a, lora_b, need_dx, need_da, need_db)


def gated_mlp(x: Shape, *args: Any, **_: Any) -> int:
    gate, up, down = args[5]
    lora_a, lora_b = args[7:9]
    m = _rows(x)
    base = 2 * m * (x[-1] * (gate + up) + gate * down)
    return base + sum(2 * m * (prod(a) + prod(b)) for a, b in zip(lora_a, lora_b, strict=True))


def dora_norm(*args: Any, **_: Any) -> int:
    """Of W A^T, A A^T and B (A A^T)."""
    (r, k), (n, _rank) = args[5:7]
    return 2 * r * (n * k + r * k + n * r)


FORMULAS: dict[str, Callable[..., int]] = {
    "nf4_linear": nf4_linear,
    "nf4_linear_dx": nf4_linear,
    "lora_linear": lora_linear,
    "lora_linear_backward": lora_linear_backward,
    "multi_lora_linear": multi_lora_linear,
    "multi_lora_linear_backward": multi_lora_linear_backward,
    "gated_mlp": gated_mlp,
    "dora_norm": dora_norm,
}

_packets: dict[Any, Callable[..., int]] = {}
"""Of all namespaces."""


def know(namespace: str) -> None:
    """Have counters told of the ops of a namespace."""
    ops = getattr(torch.ops, namespace)
    _packets.update({getattr(ops, name): formula for name, formula in FORMULAS.items()})
    tell()


def tell() -> None:
    """Make the formulas known to torch.utils.flop_counter, if anybody has imported it, and to the counters
    that are at work: each has a copy of what was known when it was made."""
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


def _rows(x: Shape) -> int:
    return prod(x[:-1])


def _layers(x: Shape, out_features: Sequence[int], lora_a: Sequence[Shape], lora_b: Sequence[Shape]) -> int:
    base = x[-1] * sum(out_features)
    return 2 * _rows(x) * (base + sum(prod(a) for a in lora_a) + sum(prod(b) for b in lora_b))


def _backward(
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
    return 2 * _rows(x) * per_row

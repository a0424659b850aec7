"""Linear layers with a frozen weight, dense or NF4, and what adapters add: y = x W^T + bias, dx = dY W."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .adapters import Delta
from .common import Nf4, check_dtype, check_lengths, check_shape, compute_type, nf4
from .linear import checked_bias, linear, linear_dx, product, product_dx
from .lora_products import sum_with_deltas


class Layer(NamedTuple):
    weight: Nf4 | Tensor  # dense: of the base product's type, contiguous
    n: int  # outputs
    k: int  # inputs


def layers_of(
    x: Tensor,
    weight: Sequence[Tensor],
    absmax: Sequence[Tensor | None],
    absmax2: Sequence[Tensor | None],
    offset: Sequence[Tensor | None],
    blocksize: Sequence[int],
    out_features: Sequence[int],
    compute_dtype: torch.dtype | None,
) -> list[Layer]:
    """The arguments that make layers on x [m, k]. RuntimeError when they do not fit."""
    lists = (absmax, absmax2, offset, blocksize, out_features)
    check_lengths(lists, len(weight), "absmax, absmax2, offset, blocksize, out_features", "weight")
    layers, k = [], x.shape[1]
    for w, scales, scales2, shift, size, n in zip(weight, *lists, strict=True):
        if scales is None:
            check_dtype(w, compute_type(compute_dtype, x), "weight")
            check_shape(w, (n, k), "weight")
            layers.append(Layer(w.contiguous(), n, k))
        else:
            layers.append(Layer(nf4(w, scales, scales2, shift, size, n * k), n, k))
    return layers


def forward(
    x: Tensor, layer: Layer, bias: Tensor | None, deltas: Sequence[Delta], dtype: torch.dtype
) -> Tensor:
    """y [m, n], of `dtype`, of x [m, k] in the base product's type. Contiguous."""
    weight, n, _ = layer
    if bias is not None:
        bias = checked_bias(bias, n, x.dtype if bias.dtype == x.dtype else dtype)
        bias = bias if bias.dtype == x.dtype else bias.float()
    if isinstance(weight, Tensor):
        y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    else:
        fused = linear(x, weight, n, bias, deltas[0]) if x.dtype == dtype and joins_product(deltas) else None
        if fused is not None:
            return fused
        y = product(x, weight, n, bias)
    return sum_with_deltas([y.to(dtype)], deltas)


def input_gradient(
    dy: Sequence[Tensor], layers: Sequence[Layer], deltas: Sequence[Delta], dtype: torch.dtype
) -> Tensor:
    """dx [m, k], of `dtype`, of the dy [m, n] of all layers in the base product's type, at least one."""
    weight, _, k = layers[0]
    if dy[0].dtype == dtype and len(layers) == 1 and isinstance(weight, Nf4) and joins_product(deltas):
        fused = linear_dx(dy[0], weight, k, deltas[0])
        if fused is not None:
            return fused
    terms = [
        (torch.mm(d, weight) if isinstance(weight, Tensor) else product_dx(d, weight, k)).to(dtype)
        for d, (weight, _, k) in zip(dy, layers, strict=True)
    ]
    return sum_with_deltas(terms, deltas)


def joins_product(deltas: Sequence[Delta]) -> bool:
    """Whether the kernels of the product can add them: a single one, and in every row. In rows that it does
    not serve, zeros would meet what the adapter holds, which may be Inf."""
    return len(deltas) == 1 and deltas[0].served is None

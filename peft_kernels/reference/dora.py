"""DoRA (Liu et al. 2024): the row norms of W0 + s B A, and the magnitudes' part of the layer."""

from __future__ import annotations

from torch import Tensor

from .common import accumulator_dtype, dense_weight, rows


def dora_norm(
    weight: Tensor,
    absmax: Tensor | None,
    absmax2: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
) -> Tensor:
    acc = accumulator_dtype(lora_a.dtype)
    a, b = lora_a.to(acc), lora_b.to(acc)
    shape = (b.shape[0], a.shape[1])
    w = dense_weight(weight, absmax, absmax2, offset, blocksize, shape, acc).to(acc)
    # ||W + sBA||^2 by row, without the product B A.
    square = w.square().sum(1) + (2 * scaling * (w @ a.t()) * b).sum(1)
    square = square + (scaling**2 * (b @ (a @ a.t())) * b).sum(1)
    return square.clamp(min=0).sqrt()


def dora_scale(z: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    acc = accumulator_dtype(z.dtype)
    y = z.to(acc) * scale.to(acc)
    return (y if bias is None else y + bias.to(acc)).to(z.dtype)


def dora_scale_backward(dy: Tensor, z: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    acc = accumulator_dtype(z.dtype)
    dz = (dy.to(acc) * scale.to(acc)).to(dy.dtype)
    return dz, (rows(dy).to(acc) * rows(z).to(acc)).sum(0).to(scale.dtype)

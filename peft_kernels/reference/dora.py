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
    # Not (z - bias) * scale + bias: a scale of 1 is to change no bit.
    y = z.to(acc) + (scale.to(acc) - 1) * _unbiased(z, bias)
    return (z.to(acc) * scale.to(acc) if bias is None else y).to(z.dtype)


def dora_scale_backward(dy: Tensor, z: Tensor, scale: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    acc = accumulator_dtype(z.dtype)
    dz = (dy.to(acc) * scale.to(acc)).to(dy.dtype)
    return dz, (rows(dy).to(acc) * rows(_unbiased(z, bias))).sum(0).to(scale.dtype)


def _unbiased(z: Tensor, bias: Tensor | None) -> Tensor:
    acc = accumulator_dtype(z.dtype)
    return z.to(acc) if bias is None else z.to(acc) - bias.to(acc)

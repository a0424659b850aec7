"""Fake kernels of the ops in `spec`: shapes and dtypes only."""

# The arguments are those of the schemas, which are typed.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch

from . import reference
from .code_tables import NESTED_BLOCKSIZE


def quantize_nf4(weight, blocksize):
    n = weight.numel()
    packed = weight.new_empty((n + 1) // 2, dtype=torch.uint8)
    return packed, weight.new_empty((n + blocksize - 1) // blocksize, dtype=torch.float32)


def quantize_absmax(absmax):
    n = absmax.numel()
    absmax2 = absmax.new_empty((n + NESTED_BLOCKSIZE - 1) // NESTED_BLOCKSIZE)
    return absmax.new_empty(n, dtype=torch.uint8), absmax2, absmax.new_empty(())


def unpack_absmax(q8, absmax2, offset):
    return absmax2.new_empty(q8.numel())


def dequantize_nf4(packed, absmax, absmax2, offset, blocksize, shape, dtype):
    return packed.new_empty(shape, dtype=dtype)


def nf4_linear(x, packed, absmax, absmax2, offset, blocksize, out_features, bias):
    return x.new_empty((*x.shape[:-1], out_features))


def nf4_linear_dx(dy, packed, absmax, absmax2, offset, blocksize, in_features):
    return dy.new_empty((*dy.shape[:-1], in_features))


def _h(x, rank):
    return x.new_empty((*x.shape[:-1], rank), dtype=reference.accumulator_dtype(x.dtype))


def lora_linear(x, weight, absmax, absmax2, offset, blocksize, bias, lora_a, lora_b, *_):
    return x.new_empty((*x.shape[:-1], lora_b.shape[0])), _h(x, lora_a.shape[0])


def lora_linear_backward(
    dy, x, h, weight, absmax, absmax2, offset, blocksize, lora_a, lora_b, scaling, dropout_p, seed,
    compute_dtype, *needed,
):  # fmt: skip
    return tuple(
        t.new_empty(t.shape if need else (0,)) for t, need in zip((x, lora_a, lora_b), needed, strict=True)
    )


def multi_lora_linear(
    x, weight, absmax, absmax2, offset, blocksize, out_features, bias, lora_a, *_
):  # fmt: skip
    y = [x.new_empty((*x.shape[:-1], n)) for n in out_features]
    return y, _h(x, sum(a.shape[0] for a in lora_a))


def multi_lora_linear_backward(
    dy, x, h, weight, absmax, absmax2, offset, blocksize, lora_a, lora_b, layer, scaling, dropout_p, seed,
    group, row_group, compute_dtype, need_dx, need_da, need_db,
):  # fmt: skip
    da = [a.new_empty(a.shape if need else (0,)) for a, need in zip(lora_a, need_da, strict=True)]
    db = [b.new_empty(b.shape if need else (0,)) for b, need in zip(lora_b, need_db, strict=True)]
    return x.new_empty(x.shape if need_dx else (0,)), da, db


def gated_mlp(
    x, weight, absmax, absmax2, offset, blocksize, out_features, bias, lora_a, lora_b, layer, *_
):  # fmt: skip
    gate, up, y = (x.new_empty((*x.shape[:-1], n)) for n in out_features)
    ranks = [
        sum(a.shape[0] for a, j in zip(lora_a, layer, strict=True) if (j == 2) is down)
        for down in (False, True)
    ]
    return y, gate, up, _h(x, ranks[0]), _h(x, ranks[1])


def dora_norm(weight, absmax, absmax2, offset, blocksize, lora_a, lora_b, scaling):
    return lora_b.new_empty(lora_b.shape[0], dtype=reference.accumulator_dtype(lora_a.dtype))


def dora_scale(z, scale, bias):
    return z.new_empty(z.shape)


def dora_scale_backward(dy, z, scale, bias):
    return dy.new_empty(dy.shape), scale.new_empty(scale.shape)


def dropout(x, p, seed):
    return x.new_empty(x.shape)


def gated_activation(gate, up, activation):
    return gate.new_empty(gate.shape)


def gated_activation_backward(dy, gate, up, activation):
    return gate.new_empty(gate.shape), up.new_empty(up.shape)

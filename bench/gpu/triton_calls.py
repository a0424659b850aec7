"""Calls of the ops of back end `triton` that cover every kernel with every config.

Tensors are on device "meta": the calls are made under `launch.recording`, where nothing runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_kernels.core.formats import FORMATS, WHOLE_ROWS
from peft_kernels.triton_kernels.gated import ACTIVATIONS
from peft_kernels.triton_kernels.linear.linear import table_for

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SIZE, ODD, SMALL, WHOLE = 4096, 4097, 64, 512
"""Features: many programs; rows that start inside a byte or block; with and without split-k."""
FEW, MANY, RANK, RANKS, HEAD = 16, 1024, 16, 64, 128
EXPERTS = 128


class Call(NamedTuple):
    op: str
    args: tuple[Any, ...]


def empty(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def nf4(n: int, k: int, nested: bool = True, blocksize: int = 64) -> tuple[Any, ...]:
    """The op arguments of an NF4 weight."""
    blocks = -(-n * k // blocksize)
    packed = empty((n * k + 1) // 2, dtype=torch.uint8)
    if not nested:
        return packed, empty(blocks), None, None, blocksize
    return packed, empty(blocks, dtype=torch.uint8), empty(-(-blocks // 256)), empty(), blocksize


def packed(format: str, n: int, k: int) -> tuple[Any, ...]:
    """The op arguments of a weight in a format without double quantisation, with its longest blocks up to
    64."""
    form = FORMATS[format]
    blocksize = max(size for size in form.blocksizes if size <= 64)
    blocks, layout = -(-n * k // blocksize), form.layout(blocksize)
    codes = empty((n * k + 1) // 2, dtype=torch.uint8)
    if form.scale == "absmax":
        return codes, empty(blocks), None, None, layout
    return codes, empty(blocks, dtype=torch.uint8), empty(256), None, layout


def groups(format: str, n: int, k: int, count: int = 1, whole_rows: bool = False) -> tuple[Any, ...]:
    """The op arguments of `count` weights in int4, with zero points where there is one, in FP8 or int8."""
    form = FORMATS[format]
    blocksize = WHOLE_ROWS if whole_rows else form.default_blocksize
    blocks, layout = count * form.scales((n, k), blocksize), form.layout(blocksize)
    codes = empty(count * form.nbytes(n * k), dtype=torch.uint8)
    if form.bits == 8:
        return codes, empty(blocks), None, None, layout
    zeros = empty(blocks, dtype=torch.uint8) if count == 1 else None
    return codes, empty(blocks, dtype=FP16 if count == 1 else BF16), None, zeros, layout


def calls(dtypes: Sequence[torch.dtype], adapters_on_every_line: bool) -> Iterator[Call]:
    """Calls with activations of the dtypes; GEMMs, which have separate fp32 configs, also in fp32.

    `adapters_on_every_line`: LoRA with every row of the config tables, in the first dtype; otherwise with
    some.
    """
    yield Call("quantize_absmax", (empty(SIZE),))
    yield Call("unpack_absmax", (empty(SIZE, dtype=torch.uint8), empty(SIZE // 256), empty()))
    for dtype in dtypes:
        nested = dtype != FP16
        yield from _weights(dtype, nested)
        yield from _elementwise(dtype)
        yield from _blocks(dtype)
        yield from _losses(dtype, nested)
        yield from _products(dtype, nested)
        first = dtype == dtypes[0]
        yield from _adapters(dtype, nested, adapters_on_every_line and first)
        yield from _bottlenecks(dtype)
        yield from _experts(dtype, nested)
        if first:
            yield from _lists(dtype)
            yield from _formats(dtype)
        yield from _groups(dtype)
    yield from _groups(FP32)
    yield from _products(FP32, nested=True)
    yield from _short_blocks(FP32)
    yield from _optimizers()


def _optimizers() -> Iterator[Call]:
    """A step with every option, and one with none. The code is the same for all dtypes."""
    numbers = [0.9], [0.99], [1e-8], [0.01]
    params, codes, scales = (
        empty(SIZE, SIZE, dtype=BF16),
        empty(SIZE, SIZE, dtype=torch.uint8),
        empty(SIZE**2 // 256),
    )
    scalars = empty(1, dtype=torch.int64), [0], empty(1)
    tensors = [params], [params], [codes], [codes], [scales], [scales], [params]
    extras = empty(), empty(1), 1.0, empty(dtype=torch.int64), None
    yield Call("adamw", (*tensors, *scalars, *numbers, "adamw", *extras))
    tensors = [params], [params], [codes], [], [scales], [], []
    yield Call("adamw", (*tensors, *scalars, *numbers, "lion", None, None, 0.0, None, None))
    yield Call("adamw", (*tensors, *scalars, *numbers, "lion", None, None, 0.0, None, empty()))
    yield Call("clip_factor", ([params], empty(), 1.0))


def _weights(dtype: torch.dtype, nested: bool) -> Iterator[Call]:
    yield Call("quantize_nf4", (empty(SIZE, SIZE, dtype=dtype), 64))
    yield Call("dequantize_nf4", (*nf4(SIZE, SIZE, nested), [SIZE, SIZE], dtype))
    a, b = empty(RANK, SIZE), empty(SIZE, RANK)
    yield Call("dora_norm", (*nf4(SIZE, SIZE, nested), a, b, 0.5))
    yield Call("dora_norm", (*nf4(SIZE, ODD, nested), empty(RANKS, ODD), empty(SIZE, RANKS), 0.5))
    yield Call("dora_norm", (*nf4(SIZE, SIZE, nested), empty(RANKS, SIZE), empty(SIZE, RANKS), 0.5))
    yield Call("dora_norm", (empty(SIZE, SIZE, dtype=dtype), None, None, None, 0, a, b, 0.5))


def _elementwise(dtype: torch.dtype) -> Iterator[Call]:
    t, scale, seed = empty(MANY, SIZE, dtype=dtype), empty(SIZE), empty(dtype=torch.int64)
    yield Call("dropout", (t, 0.5, seed))
    for activation in ACTIVATIONS if dtype == BF16 else ACTIVATIONS[:1]:
        yield Call("gated_activation", (t, t, activation))
        yield Call("gated_activation_backward", (t, t, t, activation))
    for bias in (None, empty(SIZE, dtype=dtype)) if dtype == BF16 else (None,):
        yield Call("dora_scale", (t, scale, bias))
        yield Call("dora_scale_backward", (t, t, scale, bias))


def _blocks(dtype: torch.dtype) -> Iterator[Call]:
    """Norms of heads, of models, and of rows longer than a tile (of more than 8192 features, backward spills
    a few bytes); rotary embedding of queries and of one key head."""
    for features in (HEAD, SIZE, 2 * SIZE) if dtype == BF16 else (SIZE,):
        x, weight, rstd = empty(MANY, features, dtype=dtype), empty(features, dtype=dtype), empty(MANY)
        yield Call("rms_norm", (x, weight, 1e-6, 0.0, True, dtype))
        yield Call("add_rms_norm", (x, x, weight, 1e-6, 1.0, False, dtype))
        yield Call("rms_norm_backward", (x, x, weight, rstd, x, 0.0, True, True, False))
        yield Call("rms_norm_backward", (x, x, weight, rstd, None, 0.0, True, True, True))
    q, k = empty(1, MANY, 32, HEAD, dtype=dtype), empty(1, MANY, 1, HEAD, dtype=dtype)
    for cos in (empty(1, MANY, HEAD, dtype=dtype), empty(1, MANY, HEAD)):
        yield Call("rotary", ([q, k], cos, cos, False, dtype))
        yield Call("rotary", ([q, k], cos, cos, True, dtype))


def _losses(dtype: torch.dtype, nested: bool) -> Iterator[Call]:
    """A packed head with every option; a dense one with few, also without gradients, and trained."""
    x, labels = empty(MANY, SIZE, dtype=dtype), empty(MANY, dtype=torch.int64)
    head = *nf4(16 * SIZE, SIZE, nested), 16 * SIZE, empty(16 * SIZE)
    capped, smoothed = (labels, -100, 0.5, 30.0, 0.0, 1e-4), (labels, -100, 1.0, 0.0, 0.1, 0.0)
    yield Call("linear_cross_entropy", (x, *head, *capped, True, True, True, True))
    dense = empty(SIZE, SIZE, dtype=dtype), None, None, None, 0, SIZE, None
    yield Call("linear_cross_entropy", (x, *dense, *smoothed, True, False, False, False))
    yield Call("linear_cross_entropy", (x, *dense, *smoothed, False, False, False, False))
    adapter = empty(MANY, RANK), empty(16 * SIZE, RANK)
    yield Call("linear_cross_entropy_trained", (x, *head, *adapter, *capped, True, True, True))
    row = empty(MANY)
    needs = True, False, True, True, True
    trained = x, *head, *adapter, *capped[:-1]
    yield Call("linear_cross_entropy_backward", (row, row, row, row, *trained, *needs))
    needs = True, True, False, False, False
    trained = x, *dense, None, None, *smoothed[:-1]
    yield Call("linear_cross_entropy_backward", (row, row, None, row, *trained, *needs))


def _products(dtype: torch.dtype, nested: bool) -> Iterator[Call]:
    """One GEMM per row of the config tables, one beyond them, one with split-k, one with odd rows."""

    def forward(m: int, n: int, k: int, bias: Tensor | None = None) -> Call:
        return Call("nf4_linear", (empty(m, k, dtype=dtype), *nf4(n, k, nested), n, bias))

    def backward(m: int, n: int, k: int) -> Call:
        return Call("nf4_linear_dx", (empty(m, n, dtype=dtype), *nf4(n, k, nested), k))

    for m in _rows(dtype, backward=False):
        yield forward(m, SIZE, SIZE, empty(SIZE))
    for m in _rows(dtype, backward=True):
        yield backward(m, SIZE, SIZE)
    for m in (1, MANY):
        yield forward(m, SMALL, SIZE)
        yield forward(m, SIZE, ODD)
        yield backward(m, SIZE, SMALL)
        yield backward(m, SIZE, ODD)


def _rows(dtype: torch.dtype, backward: bool) -> list[int]:
    return [*(tiles.rows for tiles in table_for(dtype, backward)), MANY]


def _adapters(dtype: torch.dtype, nested: bool, every: bool) -> Iterator[Call]:
    """Adapters in fp32, with dropout."""
    seed = empty(dtype=torch.int64)
    a, b = empty(RANK, WHOLE), empty(WHOLE, RANK)
    weight = nf4(WHOLE, WHOLE, nested)
    for m in _rows(dtype, backward=False) if every else (FEW, MANY):
        x = empty(m, WHOLE, dtype=dtype)
        yield Call("lora_linear", (x, *weight, None, a, b, 0.5, 0.3, seed, None))
    needs = True, True, True
    for m in _rows(dtype, backward=True) if every else (FEW, MANY):
        x, h = empty(m, WHOLE, dtype=dtype), empty(m, RANK)
        yield Call("lora_linear_backward", (x, x, h, *weight, a, b, 0.5, 0.3, seed, None, *needs))
    # Few features: sums over rows are split.
    x, h, a, b = empty(MANY, SMALL, dtype=dtype), empty(MANY, RANK), empty(RANK, SMALL), empty(SMALL, RANK)
    yield Call(
        "lora_linear_backward", (x, x, h, *nf4(SMALL, SMALL, nested), a, b, 0.5, 0.3, seed, None, *needs)
    )


def _bottlenecks(dtype: torch.dtype) -> Iterator[Call]:
    """Few rows with every option, in fp32; many rows with none, in fp32 and the given dtype."""
    needs = True, False, True, True, True, True
    for m, kept, p in ((FEW, FP32, 0.3), (MANY, FP32, 0.0), (MANY, dtype, 0.0)):
        out = WHOLE + SMALL if p else WHOLE
        x, dy, z = empty(m, WHOLE, dtype=dtype), empty(m, out, dtype=dtype), empty(m, RANKS)
        down, up = empty(RANKS, WHOLE, dtype=kept), empty(out, RANKS, dtype=kept)
        beside, seed = (dy, empty(dtype=torch.int64)) if p else (None, None)
        biases = [empty(size, dtype=kept) if p else None for size in (RANKS, out)]
        rest = "gelu", 0.5, p, seed
        yield Call("bottleneck", (x, beside, None, None, 0.0, down, biases[0], up, biases[1], *rest))
        yield Call("bottleneck_backward", (dy, x, z, None, None, 0.0, down, up, *rest, not p, *needs))
        yield from _two_bottlenecks(m, x, dy, z, down, up, biases, rest)


def _two_bottlenecks(
    m: int, x: Tensor, dy: Tensor, z: Tensor, down: Tensor, up: Tensor, biases: list[Any], rest: Any
) -> Iterator[Call]:
    """The same adapter twice, for different rows."""
    groups, beside = empty(m, dtype=torch.int64), x.shape[1] != dy.shape[1]
    norms, both = ([None] * 2, [None] * 2, [0.0] * 2), [[one] * 2 for one in rest]
    factors = [down] * 2, [biases[0]] * 2, [up] * 2, [biases[1]] * 2
    yield Call("multi_bottleneck", (x, dy if beside else None, groups, *norms, *factors, *both))
    needs = True, *[[one] * 2 for one in (False, True, True, True, True)]
    backward = dy, x, z, groups, *norms, factors[0], factors[2], *both, not beside
    yield Call("multi_bottleneck_backward", (*backward, *needs))


def _experts(dtype: torch.dtype, nested: bool) -> Iterator[Call]:
    """Rows per expert for each row of the config tables; odd rows, a dense weight, and a single token, which
    uses split-k. Adapters in fp32, and none."""
    odd = ODD - WHOLE
    for k, rows in ((WHOLE, 16), (WHOLE, 32), (WHOLE, 65), (odd, 16)):
        yield from _experts_lora(of_experts(nf4(WHOLE, k, nested)), WHOLE, k, EXPERTS * rows, dtype)
    yield from _experts_lora(of_experts(nf4(SMALL, SIZE, nested)), SMALL, SIZE, 8, dtype)
    dense = empty(EXPERTS, WHOLE, WHOLE, dtype=dtype), None, None, None, 0
    yield from _experts_lora(dense, WHOLE, WHOLE, EXPERTS * 65, dtype)
    ends, x, weight = empty(EXPERTS, dtype=torch.int32), empty(EXPERTS, WHOLE, dtype=dtype), nf4(WHOLE, WHOLE)
    for bias in (None, empty(EXPERTS, WHOLE)):
        yield Call("experts_linear", (x, ends, *of_experts(weight), WHOLE, bias))
    yield Call("experts_linear_dx", (x, ends, *of_experts(weight), WHOLE))


def _experts_lora(weight: tuple[Any, ...], n: int, k: int, rows: int, dtype: torch.dtype) -> Iterator[Call]:
    ends, x, dy = empty(EXPERTS, dtype=torch.int32), empty(rows, k, dtype=dtype), empty(rows, n, dtype=dtype)
    rest = *weight, empty(EXPERTS, n), empty(EXPERTS, RANK, k), empty(EXPERTS, n, RANK), 0.5
    yield Call("experts_lora_linear", (x, ends, *rest))
    of_backward = *weight, *rest[len(weight) + 1 :], True, True, True
    yield Call("experts_lora_linear_backward", (dy, x, empty(rows, RANK), ends, *of_backward))


def of_experts(one: tuple[Any, ...], count: int = EXPERTS) -> tuple[Any, ...]:
    """One expert's weight, expanded to all experts."""
    return tuple(part.expand(count, *part.shape) if isinstance(part, Tensor) else part for part in one)


def _formats(dtype: torch.dtype) -> Iterator[Call]:
    """Formats other than NF4. FP4 has the same code with other numbers; MXFP4 has runs of 32, and here odd
    rows too; NVFP4 has short blocks."""
    yield Call("nf4_linear", (empty(FEW, SIZE, dtype=dtype), *packed("fp4", SIZE, SIZE), SIZE, None))
    for m in (FEW, 4 * FEW, MANY):
        x, dy = empty(m, SIZE, dtype=dtype), empty(m, WHOLE, dtype=dtype)
        yield Call("nf4_linear", (x, *packed("mxfp4", WHOLE, SIZE), WHOLE, None))
        yield Call("nf4_linear_dx", (dy, *packed("mxfp4", WHOLE, SIZE), SIZE))
    odd = empty(FEW, ODD, dtype=dtype)
    yield Call("nf4_linear", (odd, *packed("mxfp4", WHOLE, ODD), WHOLE, None))
    yield from _experts_lora(of_experts(packed("mxfp4", WHOLE, WHOLE)), WHOLE, WHOLE, EXPERTS * 65, dtype)
    yield from _short_blocks(dtype)
    weight = packed("nvfp4", WHOLE, WHOLE)
    yield Call("dequantize_nf4", (*weight, [WHOLE, WHOLE], dtype))
    for rank in (RANK, RANKS):
        yield Call("dora_norm", (*weight, empty(rank, WHOLE), empty(WHOLE, rank), 0.5))
    for rows in (16, 32, 65):
        yield from _experts_lora(of_experts(weight), WHOLE, WHOLE, EXPERTS * rows, dtype)


def _groups(dtype: torch.dtype) -> Iterator[Call]:
    """Formats that are dequantised: whole, in rows and columns, of odd sizes, of experts."""
    for format, whole_rows in (("int4", False), ("fp8", False), ("fp8", True), ("int8", False)):
        weight, odd = groups(format, SIZE, SIZE, 1, whole_rows), groups(format, SIZE, ODD, 1, whole_rows)
        experts = groups(format, WHOLE, WHOLE, EXPERTS, whole_rows)
        yield Call("dequantize_nf4", (*odd, [SIZE, ODD], dtype))
        yield Call("nf4_linear", (empty(FEW, SIZE, dtype=dtype), *weight, SIZE, None))
        yield Call("nf4_linear_dx", (empty(FEW, SIZE, dtype=dtype), *weight, SIZE))
        yield Call("dora_norm", (*weight, empty(RANK, SIZE), empty(SIZE, RANK), 0.5))
        yield from _experts_lora(experts, WHOLE, WHOLE, EXPERTS * 65, dtype)


def _short_blocks(dtype: torch.dtype) -> Iterator[Call]:
    """One GEMM per row of the config tables, and one beyond them."""
    weight = packed("nvfp4", WHOLE, SIZE)
    for m in _rows(dtype, backward=False):
        yield Call("nf4_linear", (empty(m, SIZE, dtype=dtype), *weight, WHOLE, None))
    for m in _rows(dtype, backward=True):
        yield Call("nf4_linear_dx", (empty(m, WHOLE, dtype=dtype), *weight, SIZE))


def _lists(dtype: torch.dtype) -> Iterator[Call]:
    """Two layers on one x, two adapters of its dtype on the second, which is dense, with row groups."""
    for m, size in ((FEW, SIZE), (MANY, WHOLE)):
        bases = nf4(size, size), (empty(size, size, dtype=dtype), None, None, None, 0)
        lists = [list(part) for part in zip(*bases, strict=True)]
        x, a, b = empty(m, size, dtype=dtype), empty(RANK, size, dtype=dtype), empty(size, RANK, dtype=dtype)
        row_group = empty(m, dtype=torch.int64)
        rest = [a, a], [b, b], [1, 1], [0.5, 0.5], [0.0, 0.0], None, [2, 3], row_group, None
        yield Call("multi_lora_linear", (x, *lists, [size, size], [empty(0), empty(size)], *rest))
        h, needs = empty(m, 2 * RANK), (True, [True, True], [True, True])
        yield Call("multi_lora_linear_backward", ([x, x], x, h, *lists, *rest, *needs))

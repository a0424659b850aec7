"""Arguments of ops that show whether a kernel is right: several tiles and their tails, odd sizes, the other
blocksizes, ranks of several stages, rows that belong to nobody.

Drawn on the device from a fixed seed. Weights are scaled like those of a model, so that results are of the
order of 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...formats import FORMATS, LAYOUT_SHIFT

Args = tuple[Any, ...]
FP32 = torch.float32
ROWS = 45
"""Of activations: several tiles of the kernels for few rows, the last of them not whole."""


class Values:
    """Draws arguments for a device and a dtype of activations."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.random = torch.Generator(device).manual_seed(0)
        self.device, self.dtype = device, dtype

    def normal(self, *size: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.randn(size, generator=self.random, dtype=FP32, device=self.device) * scale
        return drawn.to(dtype or self.dtype)

    def codes(self, count: int) -> Tensor:
        """All values of a byte."""
        return torch.randint(256, (count,), generator=self.random, dtype=torch.uint8, device=self.device)

    @property
    def many_rows(self) -> int:
        """Rows that keep all multiprocessors busy, for which some ops have other kernels."""
        if self.device.type != "cuda":
            return 4 * 32  # the CPU, and the simulated card of tests
        return 32 * torch.cuda.get_device_properties(self.device).multi_processor_count

    def whole(self, values: Any, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def packed(self, n: int, k: int, layout: int, is_nested: bool, experts: int = 0) -> Args:
        """A packed weight, or those of experts, in which no two neighbouring scales are alike. The layout of
        NF4 is the blocksize."""
        blocks, size = -(-n * k // (layout % (1 << LAYOUT_SHIFT))), 2.0 * k**-0.5

        def values(count: int) -> Tensor:
            of_all = self.normal(max(experts, 1) * count, dtype=FP32).abs() * size + size / 2
            return of_all.view(experts, count) if experts else of_all

        def codes(count: int) -> Tensor:
            of_all = self.codes(max(experts, 1) * count)
            return of_all.view(experts, count) if experts else of_all

        weight = codes(-(-n * k // 2))
        if layout == NVFP4:
            scales = self.whole(range(256), torch.uint8).view(torch.float8_e4m3fn).to(FP32)
            return weight, codes(blocks) % 24 + 44, scales * size / 6, None, layout
        if not is_nested:
            return weight, values(blocks), None, None, layout
        return weight, codes(blocks), values(-(-blocks // 256)), values(1).squeeze(-1), layout

    def factors(self, n: int, k: int, rank: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """A and B of an adapter."""
        return self.normal(rank, k, scale=k**-0.5, dtype=dtype), self.normal(n, rank, dtype=dtype)


def dense(weight: Tensor) -> Args:
    return weight, None, None, None, 0


WEIGHTS = ((136, 192, 64, True), (72, 256, 32, False), (33, 35, 64, True), (64, 128, 4096, False))
"""out_features, in_features, blocksize, double quantisation."""
FP4, NVFP4 = FORMATS["fp4"].layout(64), FORMATS["nvfp4"].layout(16)
"""The layouts of other formats of codes: with scales as NF4 has them, and with scales that are codes."""
DROPS = 0.3


def quantize_nf4(draw: Values) -> Iterator[Args]:
    yield draw.normal(37, 131), 64
    yield draw.normal(72, 96), 4096


def quantize_absmax(draw: Values) -> Iterator[Args]:
    yield (draw.normal(1500, dtype=FP32).abs(),)


def unpack_absmax(draw: Values) -> Iterator[Args]:
    yield draw.codes(1500), draw.normal(6, dtype=FP32).abs(), draw.normal(1, dtype=FP32)[0]


def dequantize_nf4(draw: Values) -> Iterator[Args]:
    for n, k, size, nested in WEIGHTS:
        yield *draw.packed(n, k, size, nested), [n, k], draw.dtype
    for layout in (FP4, NVFP4):
        yield *draw.packed(72, 96, layout, False), [72, 96], draw.dtype


def nf4_linear(draw: Values) -> Iterator[Args]:
    for rows, (n, k, size, nested) in zip((ROWS, 1, 7, 130), WEIGHTS, strict=True):
        bias = draw.normal(n, dtype=FP32 if n % 2 else None)
        yield draw.normal(rows, k), *draw.packed(n, k, size, nested), n, bias
    yield draw.normal(7, 256), *draw.packed(72, 256, NVFP4, False), 72, None


def nf4_linear_dx(draw: Values) -> Iterator[Args]:
    for rows, (n, k, size, nested) in zip((ROWS, 1, 7, 130), WEIGHTS, strict=True):
        yield draw.normal(rows, n), *draw.packed(n, k, size, nested), k


def lora_linear(draw: Values) -> Iterator[Args]:
    """With one stage of ranks and with several, with fp32 factors, and with dropout."""
    options = ((16, None, 0.0), (40, FP32, 0.0), (3, None, DROPS), (72, None, DROPS))
    for rows, (n, k, size, nested), (rank, dtype, p) in zip((ROWS, 3, 7, 130), WEIGHTS, options, strict=True):
        base, drops = draw.packed(n, k, size, nested), (p, draw.whole(3) if p else None)
        factors = draw.factors(n, k, rank, dtype)
        yield draw.normal(rows, k), *base, draw.normal(n), *factors, 0.5, *drops, None
    base, factors = dense(draw.normal(136, 192, scale=192**-0.5)), draw.factors(136, 192, 24, FP32)
    yield draw.normal(ROWS, 192), *base, None, *factors, 2.0, 0.0, None, None


def _layers(draw: Values, weights: tuple[tuple[int, int, int, bool], ...], ranks: tuple[int, ...]) -> Args:
    """Layers with one adapter each, as lists."""
    bases = zip(*(draw.packed(*weight) for weight in weights), strict=True)
    factors = (draw.factors(n, k, rank) for (n, k, *_), rank in zip(weights, ranks, strict=True))
    a, b = zip(*factors, strict=True)
    counts = range(len(weights))
    sizes, bias = [n for n, *_ in weights], [draw.normal(n) for n, *_ in weights]
    scaling, dropout = [0.5 + i for i in counts], [DROPS * (i % 2) for i in counts]
    return (*map(list, bases), sizes, bias, list(a), list(b), list(counts), scaling, dropout, draw.whole(3))


def multi_lora_linear(draw: Values) -> Iterator[Args]:
    """Layers that share x; then one where each row has one of two adapters or none."""
    layers = ((136, 192, 64, True), (72, 192, 64, False))
    yield draw.normal(ROWS, 192), *_layers(draw, layers, (16, 40)), [0, 0], None, None
    groups = draw.whole([row % 4 - 1 for row in range(ROWS)])
    yield draw.normal(ROWS, 192), *_layers(draw, layers, (8, 24)), [0, 1], groups, None


def gated_activation(draw: Values) -> Iterator[Args]:
    for activation in ("silu", "gelu_tanh", "gelu", "relu"):
        yield draw.normal(ROWS, 131), draw.normal(ROWS, 131), activation


def gated_mlp(draw: Values) -> Iterator[Args]:
    layers = ((136, 192, 64, True), (136, 192, 64, False), (192, 136, 32, True))
    yield draw.normal(ROWS, 192), *_layers(draw, layers, (16, 8, 24)), "silu"


EXPERTS = 4
ENDS = (0, 3, 41, 43), (45, 45, 45, 45)
"""Of the rows of each expert: some have none, and some rows no expert."""


def experts_linear(draw: Values) -> Iterator[Args]:
    for ends, (n, k, size, nested) in zip(ENDS, WEIGHTS, strict=False):
        weight, bias = draw.packed(n, k, size, nested, EXPERTS), draw.normal(EXPERTS, n)
        yield draw.normal(ROWS, k), draw.whole(ends, torch.int32), *weight, n, bias


def experts_linear_dx(draw: Values) -> Iterator[Args]:
    for ends, (n, k, size, nested) in zip(ENDS, WEIGHTS, strict=False):
        weight = draw.packed(n, k, size, nested, EXPERTS)
        yield draw.normal(ROWS, n), draw.whole(ends, torch.int32), *weight, k


def experts_lora_linear(draw: Values) -> Iterator[Args]:
    for ends, rank, (n, k, size, nested) in zip(ENDS, (16, 40), WEIGHTS, strict=False):
        a = draw.normal(EXPERTS, rank, k, scale=k**-0.5)
        b, x = draw.normal(EXPERTS, n, rank), draw.normal(ROWS, k)
        weight = draw.packed(n, k, size, nested, EXPERTS)
        yield x, draw.whole(ends, torch.int32), *weight, draw.normal(EXPERTS, n), a, b, 0.5
    rows, (n, k) = EXPERTS * draw.many_rows, (64, 128)
    weight, bias = draw.packed(n, k, 64, True, EXPERTS), draw.normal(EXPERTS, n)
    a, b = draw.normal(EXPERTS, 16, k, scale=k**-0.5), draw.normal(EXPERTS, n, 16)
    halves = draw.whole([1, rows // 2, rows // 2, rows - 1], torch.int32)
    yield draw.normal(rows, k), halves, *weight, bias, a, b, 0.5


def dropout(draw: Values) -> Iterator[Args]:
    for features in (131, 136):
        yield draw.normal(ROWS, features), DROPS, draw.whole(3)


def dora_norm(draw: Values) -> Iterator[Args]:
    for n, k, size, nested in WEIGHTS:
        yield *draw.packed(n, k, size, nested), *draw.factors(n, k, 24, FP32), 0.5
    yield *dense(draw.normal(72, 96)), *draw.factors(72, 96, 16), 0.5


def dora_scale(draw: Values) -> Iterator[Args]:
    for n in (131, 136):
        yield draw.normal(ROWS, n), draw.normal(n, dtype=FP32), draw.normal(n)


def _bottleneck(draw: Values, activation: str, has_norm: bool, p: float, dtype: torch.dtype | None) -> Args:
    k, rank = 192, 24
    norm = (draw.normal(k, dtype=dtype) + 1, draw.normal(k, dtype=dtype)) if has_norm else (None, None)
    down, up = draw.factors(k, k, rank, dtype)
    biases = draw.normal(rank, dtype=dtype), draw.normal(k, dtype=dtype)
    drops = 0.5, p, draw.whole(3) if p else None
    return *norm, 1e-5, down, biases[0], up * rank**-0.5, biases[1], activation, *drops


def bottleneck(draw: Values) -> Iterator[Args]:
    yield draw.normal(ROWS, 192), None, *_bottleneck(draw, "relu", False, 0.0, None)
    yield draw.normal(ROWS, 192), draw.normal(ROWS, 192), *_bottleneck(draw, "gelu", True, DROPS, FP32)
    yield draw.normal(draw.many_rows, 192), None, *_bottleneck(draw, "silu", False, DROPS, None)


def multi_bottleneck(draw: Values) -> Iterator[Args]:
    adapters = _bottleneck(draw, "silu", True, 0.0, FP32), _bottleneck(draw, "relu", False, DROPS, None)
    groups = draw.whole([row % 4 - 1 for row in range(ROWS)])
    yield draw.normal(ROWS, 192), None, groups, *map(list, zip(*adapters, strict=True))


WIDTHS, FEW = (120, 131, 256, 1000, 4096, 8192, 16392), 9
"""For which norms have kernels of their own, and rows of each."""


def rms_norm(draw: Values) -> Iterator[Args]:
    for features in WIDTHS:
        yield draw.normal(FEW, features), draw.normal(features), 1e-6, 0.0, True, draw.dtype
    yield draw.normal(ROWS, 192), draw.normal(192, scale=0.1), 1e-6, 1.0, False, draw.dtype


def add_rms_norm(draw: Values) -> Iterator[Args]:
    for features in WIDTHS:
        rows = draw.normal(FEW, features), draw.normal(FEW, features)
        yield *rows, draw.normal(features), 1e-6, 0.0, True, draw.dtype


def rotary(draw: Values) -> Iterator[Args]:
    for width in (64, 80, 10):
        angles = draw.normal(1, 15, width, scale=3.0, dtype=FP32)
        heads = [draw.normal(3, 15, count, width) for count in (4, 2)]
        yield heads, angles.cos(), angles.sin(), False, draw.dtype
        yield heads, angles.cos().to(draw.dtype), angles.sin().to(draw.dtype), False, draw.dtype


def _labels(draw: Values, vocabulary: int) -> Tensor:
    return draw.whole([-100 if row % 5 == 0 else row * 31 % vocabulary for row in range(ROWS)])


def linear_cross_entropy(draw: Values) -> Iterator[Args]:
    """A packed head; then a dense one with a soft cap, and one with smoothing."""
    n, k = 1000, 192
    rest, wants = (_labels(draw, n), -100), (True,) * 4
    yield draw.normal(ROWS, k), *draw.packed(n, k, 64, True), n, None, *rest, 1.0, 0.0, 0.0, 0.0, *wants
    head = dense(draw.normal(n + 1, k, scale=k**-0.5))
    bias = draw.normal(n + 1)
    for options in ((0.5, 30.0, 0.0, 1e-3), (1.0, 0.0, 0.1, 0.0)):
        yield draw.normal(ROWS, k), *head, n + 1, bias, *rest, *options, *wants


def linear_cross_entropy_trained(draw: Values) -> Iterator[Args]:
    """A trained head; then one with an adapter."""
    n, k, rank = 1000, 192, 24
    rest = _labels(draw, n), -100, 1.0, 0.0, 0.0, 0.0
    head = dense(draw.normal(n, k, scale=k**-0.5))
    yield draw.normal(ROWS, k), *head, n, draw.normal(n), None, None, *rest, False, True, False
    h, b = draw.normal(ROWS, rank, dtype=FP32), draw.normal(n, rank, scale=rank**-0.5)
    yield draw.normal(ROWS, k), *draw.packed(n, k, 64, True), n, None, h, b, *rest, True, True, True


def _updates(draw: Values, kind: str, bits: int) -> Args:
    """One step of parameters of all sizes, with moments of so many bits."""
    sizes = [5000, 513, 1]
    params, grads = ([draw.normal(n) for n in sizes] for _ in range(2))

    def moment(n: int, is_square: bool) -> Tensor:
        if bits == 8:
            return draw.codes(n)
        return draw.normal(n, dtype=FP32).abs() if is_square else draw.normal(n, dtype=FP32)

    def scales(n: int) -> Tensor:
        return draw.normal(-(-n // 256) if bits == 8 else 0, dtype=FP32).abs()

    squared = [] if kind == "lion" else sizes  # Lion has no second moment
    moments = [moment(n, False) for n in sizes], [moment(n, True) for n in squared]
    absmax = [scales(n) for n in sizes], [scales(n) for n in squared]
    group, rates = [0, 1, 0], draw.whole([1e-2, 3e-3], FP32)
    settings = [0.9, 0.8], [0.999, 0.95], [1e-8, 1e-6], [0.01, 0.0]
    return (
        *(params, grads, *moments, *absmax, [], draw.whole([1, 2, 3]), group, rates),
        *(*settings, kind, draw.whole(8.0, FP32), draw.whole([0.0], FP32), 0.0, None, draw.whole(0.3, FP32)),
    )


def adamw(draw: Values) -> Iterator[Args]:
    yield _updates(draw, "adamw", 8)
    yield _updates(draw, "adamw", 32)
    yield _updates(draw, "lion", 8)


def clip_factor(draw: Values) -> Iterator[Args]:
    yield [draw.normal(n) for n in (5000, 513, 1)], None, 0.5


CASES: dict[str, Callable[[Values], Iterator[Args]]] = {
    case.__name__: case
    for case in (
        quantize_nf4, quantize_absmax, unpack_absmax, dequantize_nf4, nf4_linear, nf4_linear_dx, lora_linear,
        multi_lora_linear, gated_activation, gated_mlp, experts_linear, experts_linear_dx,
        experts_lora_linear, dropout, dora_norm, dora_scale, bottleneck, multi_bottleneck, rms_norm,
        add_rms_norm, rotary, linear_cross_entropy, linear_cross_entropy_trained, adamw, clip_factor,
    )
}  # fmt: skip
"""By op. An op that only a gradient calls is tested by the op that has the gradient."""

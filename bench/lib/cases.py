"""The timed cases of layers and blocks: shapes and contenders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import peft_kernels as pk
from peft_kernels.core.formats import FORMATS

from . import correctness, layers
from .adapted import SMOLLM2, Model, Sizes, Variant
from .block import Blocks
from .harness import Build, Case, Contenders, Entry, Verify, contenders, copies
from .layers import BNB, Weights
from .report import OURS, missing

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}

Shape = tuple[int, int]
LARGE, WIDE, SMALL, SMALL_TALL = (4096, 4096), (14336, 4096), (1536, 576), (576, 1536)
FORWARD_M = (1, 4, 16, 64, 128, 512, 2048)
TRAINING_M = {LARGE: (16, 128, 512, 2048), SMALL: (256, 1024, 4096)}

PEFT_ON_BNB, PEFT_ON_DENSE = "PEFT on bnb", "PEFT on dense"
PLAIN_LORA, ONE_ADAPTER = "ours, plain LoRA", "ours, one adapter"
THE_OP = "pk.lora_linear"

FORWARD, QLORA, LORA, QUANTIZE, DEQUANTIZE = "forward", "qlora", "lora", "quantize", "dequantize"
DX = "dx"  # on a GPU only
BLOCK_LORA, BLOCK_QLORA, BLOCK_DORA = "block-lora", "block-qlora", "block-dora"
BLOCK_DROPOUT, BLOCK_MIXED = "block-dropout", "block-mixed"
OVERHEAD, OVERHEAD_NF4 = "overhead", "overhead-nf4"
TITLES = {
    FORWARD: "NF4 linear, forward without grad",
    DX: "NF4 linear, backward to x",
    QLORA: f"LoRA r={layers.RANK} on an NF4 base, forward + backward",
    LORA: f"LoRA r={layers.RANK} on a dense base, forward + backward",
    QUANTIZE: "quantise to NF4, with double quantisation",
    DEQUANTIZE: "dequantise NF4, double-quantised",
    BLOCK_LORA: "decoder block, LoRA on a dense base, forward + backward",
    BLOCK_QLORA: "decoder block, LoRA on an NF4 base, forward + backward",
    BLOCK_DORA: "decoder block, DoRA on a dense base, forward + backward",
    BLOCK_DROPOUT: "decoder block, LoRA with dropout 0.05 on a dense base, forward + backward",
    BLOCK_MIXED: "decoder block, 8 samples with 8 LoRA adapters on a dense base, forward without grad",
    OVERHEAD: "a patched LoRA layer of 64 by 64 and its op, forward without grad",
    OVERHEAD_NF4: "the same on an NF4 base",
    **{f"formats-{format}": f"{format} linear, forward without grad" for format in FORMATS},
}

BLOCKS = {
    BLOCK_LORA: Variant(),
    BLOCK_QLORA: Variant(base="nf4"),
    BLOCK_DORA: Variant(dora=True),
    BLOCK_DROPOUT: Variant(dropout=0.05),
    BLOCK_MIXED: Variant(adapters=8, training=False),
}
YARDSTICKS = {BLOCK_DORA: [PLAIN_LORA], BLOCK_MIXED: [ONE_ADAPTER]}
BATCHES = ((1, 256), (4, 256), (8, 512))
"""Samples x tokens in training; the mixed batch, always of 8 samples, has as many tokens in total."""

SECONDS = {QLORA: (1.5, 0.9), LORA: (1.5, 0.9)}
BLOCK_SECONDS, OTHERS = (3.0, 5.0), (1.0, 0.5)
"""Upper estimate on two cores, checks and five rounds included: fixed, and per 1e9 weights times rows."""


def standard(dtype: str) -> list[Case]:
    """All cases, the most important groups first."""
    shapes = (LARGE, WIDE, SMALL, SMALL_TALL)
    found = [forward(shape, m, dtype) for shape in shapes for m in FORWARD_M]
    for group in (QLORA, LORA):
        found += [training(group, shape, m, dtype) for shape, rows in TRAINING_M.items() for m in rows]
    found += [block(group, *batch, dtype) for group in BLOCKS for batch in _batches(group)]
    found += [quantize(LARGE, dtype), dequantize(LARGE, dtype)]
    found += [quantize(SMALL, dtype), dequantize(SMALL, dtype)]
    found += [overhead(group, dtype) for group in (OVERHEAD, OVERHEAD_NF4)]
    return found


def case(group: str, shape: Shape, m: int | None, dtype: str, build: Build, **options: Any) -> Case:
    at_once, by_rows = SECONDS.get(group, BLOCK_SECONDS if group in BLOCKS else OTHERS)
    seconds = at_once + by_rows * (m or 0) * shape[0] * shape[1] / 1e9
    options |= {"yardsticks": YARDSTICKS.get(group, ()), "title": TITLES[group], "seconds": seconds}
    return Case(group, *shape, m, dtype, build, **options)


def forward(shape: Shape, m: int, dtype: str, format: str = "nf4") -> Case:
    """nf4_linear compared with torch's dense layer and, of NF4, bitsandbytes in both modes."""
    group = FORWARD if format == "nf4" else f"formats-{format}"

    def build() -> Contenders:
        weights = layers.shared(Weights, group, *shape, DTYPES[dtype], format)
        x = weights.x(m)
        expected = correctness.linear(x, weights.exact)
        packed, dense = weight_copies(weights, 4)
        entries = (
            Entry(
                OURS,
                lambda: [partial(pk.nf4_linear, weight=w) for w in layers.nf4_copies(weights, packed)],
                expected.strict,
            ),
            Entry(
                "torch dense",
                lambda: [partial(F.linear, weight=weights.rounded.clone()) for _ in range(dense)],
                expected.sane,
            ),
            *(
                Entry(f"bnb {mode}", partial(layers.bnb_linears, weights, packed, mode), expected.sane, BNB)
                for mode in (("eval", "train") if format == "nf4" else ())
            ),
        )
        return contenders(entries, lambda layer: layers.forward_call(layer, x), weights)

    return case(group, shape, m, dtype, build)


def training(group: str, shape: Shape, m: int, dtype: str) -> Case:
    """A LoRA layer compared with PEFT's on the same kind of base and the frozen dense layer alone."""

    def build() -> Contenders:
        weights = layers.shared(Weights, group, *shape, DTYPES[dtype])
        entries, call = training_entries(weights, m, group == QLORA, weight_copies(weights, 3))
        return contenders(entries, call, weights)

    return case(group, shape, m, dtype, build)


def training_entries(
    weights: Weights, m: int, nf4_base: bool, counts: tuple[int, int], alone: str = "frozen dense (no LoRA)"
) -> tuple[list[Entry], Callable[[Any], Callable[[], Any]]]:
    """The contenders, and how a layer is called."""
    x, dy = weights.x(m), weights.dy(m)
    base = weights.exact if nf4_base else weights.rounded
    expected = correctness.lora(x, dy, base, weights.lora_a, weights.lora_b, layers.SCALING)
    frozen = correctness.linear_with_dx(x, dy, weights.rounded, torch.float32)
    packed, dense = counts
    x.requires_grad_()

    def ours() -> Sequence[Any]:
        bases = layers.nf4_linears(weights, packed) if nf4_base else layers.dense_linears(weights, dense)
        if missing("peft"):
            return layers.own_loras(bases, weights)
        return layers.peft_loras(bases, weights, patch=True)

    def stock() -> Sequence[Any]:
        on_bnb = nf4_base and layers.bnb_linears(weights, packed, "train")
        return layers.peft_loras(on_bnb or layers.dense_linears(weights, dense), weights, patch=False)

    peer, needs = (PEFT_ON_BNB, f"peft {BNB}") if nf4_base else (PEFT_ON_DENSE, "peft")
    entries = [
        Entry(OURS, ours, expected.strict),
        Entry(peer, stock, expected.sane, needs),
        Entry(alone, lambda: layers.dense_linears(weights, dense), frozen.sane),
    ]
    return entries, lambda layer: layers.training_call(layer, x, dy)


def block(group: str, batch: int, tokens: int, dtype: str, sizes: Sizes = SMOLLM2) -> Case:
    """A patched decoder block with adapters on all projections, and PEFT's on the same kind of base."""
    variant = BLOCKS[group]

    def build() -> Contenders:
        blocks = layers.shared(Blocks, group, sizes, DTYPES[dtype])
        inputs = blocks.inputs(batch, tokens)
        ours, theirs = blocks.expected(variant, inputs)
        count = copies(blocks.nbytes, 3)
        nf4_base = variant.base == "nf4"

        def entry(
            name: str, of: Variant, make: Callable[[Variant], Model], verify: Verify, needs: str = ""
        ) -> Entry:
            def call(model: Model) -> Callable[[], Any]:
                return blocks.run(model, of, inputs)

            return Entry(name, lambda: [make(of) for _ in range(count)], verify, needs, call, Model.remark)

        peer, needs = (PEFT_ON_BNB, BNB) if nf4_base else (PEFT_ON_DENSE, "")
        entries = [
            entry(OURS, variant, blocks.ours, ours.strict),
            entry(peer, variant, blocks.stock, theirs.sane, needs),
        ]
        cheaper = {PLAIN_LORA: replace(variant, dora=False), ONE_ADAPTER: replace(variant, adapters=1)}
        for name in YARDSTICKS.get(group, ()):
            other = cheaper[name]
            entries.append(entry(name, other, blocks.ours, blocks.expected(other, inputs)[0].strict))
        return contenders(entries, cache=blocks)

    shape, needs = (sizes.hidden, sizes.intermediate), "peft transformers"
    return case(group, shape, batch * tokens, dtype, build, batch=batch, needs=needs)


def overhead(group: str, dtype: str) -> Case:
    """What a patched PEFT layer adds to the op: the layer is so small that overhead dominates."""

    def build() -> Contenders:
        weights = layers.shared(Weights, group, 64, 64, DTYPES[dtype])
        x, packed = weights.x(1), group == OVERHEAD_NF4
        exact = weights.exact if packed else weights.rounded
        expected = correctness.lora_forward(x, exact, weights.lora_a, weights.lora_b, layers.SCALING)
        bases = layers.nf4_linears(weights, 1) if packed else layers.dense_linears(weights, 1)
        (layer,) = layers.peft_loras(bases, weights, patch=True)
        a, b = layers.adapters(layer)
        op = partial(pk.lora_linear, weight=bases[0].weight, lora_a=a, lora_b=b, scaling=layers.SCALING)
        entries = (
            Entry(OURS, lambda: [layer], expected.strict),
            Entry(THE_OP, lambda: [op], expected.strict),
        )
        return contenders(entries, lambda one: layers.forward_call(one, x), weights)

    return case(group, (64, 64), 1, dtype, build, needs="peft")


def quantize(shape: Shape, dtype: str) -> Case:
    def build() -> Contenders:
        weights = layers.shared(Weights, QUANTIZE, *shape, DTYPES[dtype])
        _, dense = weight_copies(weights, 2)
        expected = correctness.Bits(layers.nf4_parts(weights.nf4))

        def theirs() -> Sequence[Any]:
            quantizer = partial(
                layers.bitsandbytes().functional.quantize_4bit,
                blocksize=64,
                compress_statistics=True,
                quant_type="nf4",
            )
            return [partial(quantizer, weights.original.clone()) for _ in range(dense)]

        entries = (
            Entry(
                OURS,
                lambda: [partial(pk.NF4Weight.quantize, weights.original.clone()) for _ in range(dense)],
                lambda weight: expected.strict(layers.nf4_parts(weight)),
            ),
            Entry("bnb", theirs, lambda pair: expected.sane(layers.bnb_parts(*pair)), BNB),
        )
        return contenders(entries, cache=weights)

    return case(QUANTIZE, shape, None, dtype, build)


def dequantize(shape: Shape, dtype: str) -> Case:
    def build() -> Contenders:
        weights = layers.shared(Weights, DEQUANTIZE, *shape, DTYPES[dtype])
        return contenders(dequantize_entries(weights, weight_copies(weights, 2)[0]), cache=weights)

    return case(DEQUANTIZE, shape, None, dtype, build)


def dequantize_entries(weights: Weights, count: int) -> list[Entry]:
    expected = correctness.Bits({"weight": weights.rounded})

    def ours() -> Sequence[Any]:
        return [partial(w.dequantize, weights.dtype) for w in layers.nf4_copies(weights, count)]

    def theirs() -> Sequence[Any]:
        dequantizer = layers.bitsandbytes().functional.dequantize_4bit
        params = [layer.weight for layer in layers.bnb_linears(weights, count, "train")]
        return [partial(dequantizer, param.data, param.quant_state) for param in params]

    return [
        Entry(OURS, ours, lambda got: expected.strict({"weight": got})),
        Entry("bnb", theirs, lambda got: expected.sane({"weight": got}), BNB),
    ]


def _batches(group: str) -> list[tuple[int, int]]:
    adapters = BLOCKS[group].adapters
    if adapters == 1:
        return list(BATCHES)
    return [(adapters, batch * tokens // adapters) for batch, tokens in BATCHES]


def weight_copies(weights: Weights, contenders: int, cache: int | None = None) -> tuple[int, int]:
    """Number of copies of the packed and of the dense weight to rotate through."""
    packed, dense = (copies(w.nbytes, contenders, cache) for w in (weights.nf4, weights.rounded))
    return packed, dense

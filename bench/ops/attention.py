"""Causal attention at training shapes: ours, and torch's scaled_dot_product_attention as transformers calls
it.

With a mask transformers repeats keys and values for each query head; without, torch shares them. `padded`:
rows padded on the left to different lengths, whose mask rules out torch's causal kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import testing

from ..lib import correctness, layers
from ..lib.cases import DTYPES
from ..lib.harness import Case, Contenders, compared
from ..lib.report import OURS

SDPA = "torch's sdpa"


class Heads(NamedTuple):
    queries: int
    keys: int
    features: int


SMOLLM2, LLAMA, QWEN = Heads(9, 3, 64), Heads(32, 8, 64), Heads(16, 8, 128)
"""Of SmolLM2-135M, Llama 3.2 1B and Qwen3 0.6B."""
SIZES = ((8, 128), (4, 256), (2, 512), (1, 1024), (1, 2048))


def padding(batch: int, tokens: int) -> Tensor:
    """Mask (batch, 1, tokens, tokens): the first row is full, each further one is shorter."""
    row = torch.arange(tokens)
    first = torch.arange(batch)[:, None, None, None] * tokens // (2 * batch)
    return (row >= first) & (row <= row[:, None])


def attention(heads: Heads, batch: int, tokens: int, dtype: str, train: bool, padded: bool = False) -> Case:
    def build() -> Contenders:
        from peft_kernels.integrations import attention as ours

        counts = {"dq": heads.queries, "dk": heads.keys, "dv": heads.keys}
        # (batch, tokens, heads, features), the layout of projections; transformers passes a transposed view.
        tensors = {
            name: testing.tensor(batch, tokens, count, heads.features, dtype=DTYPES[dtype], seed=seed)
            for seed, (name, count) in enumerate(counts.items())
        }
        dy = testing.tensor(*tensors["dq"].shape, dtype=DTYPES[dtype], seed=5)
        module = nn.Module()
        module.num_key_value_groups, module.is_causal = heads.queries // heads.keys, True  # type: ignore[assignment]
        mask = padding(batch, tokens) if padded else None

        def call(forward: Callable[..., Any], like: Mapping[str, Tensor], dy: Tensor) -> Callable[[], Any]:
            leaves = {name: t.clone().requires_grad_(train) for name, t in like.items()}

            def run() -> Tensor:
                sides = (t.transpose(1, 2) for t in leaves.values())
                y: Tensor = forward(module, *sides, mask)[0]
                return y

            if not train:
                return layers.forward_call(lambda _: run(), dy)
            return layers.differentiated(run, leaves, dy)

        wide = {name: t.double() for name, t in tensors.items()}
        theirs = ours.sdpa_attention_forward
        wanted = correctness.Expected(call(theirs, tensors, dy)(), call(theirs, wide, dy.double())())
        forwards = {OURS: ours.attention_forward, SDPA: theirs}
        return compared(wanted, {name: partial(call, f, tensors, dy) for name, f in forwards.items()})

    group = "-".join(["attention", *["padded"] * padded, "train" if train else "forward"])
    title = f"attention of query heads by features, causal{', padded' * padded}"
    title += ", forward + backward" if train else ", forward without grad"
    return Case(
        group, heads.queries, heads.features, batch * tokens, dtype, build, batch, title=title, seconds=5.0,
        needs="transformers",
    )  # fmt: skip


def standard(dtype: str) -> list[Case]:
    found = [attention(SMOLLM2, *size, dtype, train) for train in (False, True) for size in SIZES]
    found += [attention(heads, 1, 1024, dtype, True) for heads in (LLAMA, QWEN)]
    return [*found, attention(SMOLLM2, 4, 256, dtype, True, padded=True)]

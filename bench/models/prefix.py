"""Attention over [prefix; tokens] in one layer of SmolLM2, and steps of prefix tuning, patched and by PEFT.

PEFT looks the prefix up for each sample and copies it again into its cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import peft_kernels as pk
import testing
from peft_kernels.patch.prefix import cache as prefix_cache

from ..lib import correctness, layers
from ..lib.adapted import Model
from ..lib.cases import DTYPES
from ..lib.harness import Build, Case, Contenders, compared
from ..lib.report import OURS
from .model import SMOLLM2_135M, Models, ModelSizes

ATTENTION, JOIN, STEP = "prefix-attention", "prefix-join", "prefix-step"
PEFT = "PEFT's copies"
TOKENS = 128  # of a sample
HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64

Widen = Callable[[Tensor], Tensor]
Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Takes queries (batch, HEADS, tokens, HEAD_DIM), keys and values (batch, KV_HEADS, ...), and an embedding
(virtual tokens, 2 * KV_HEADS * HEAD_DIM). Causal among the tokens."""


def looked_up(embedding: Tensor, batch: int, dtype: torch.dtype) -> list[Tensor]:
    """Keys and values (batch, KV_HEADS, virtual tokens, HEAD_DIM), looked up and copied as PEFT does."""
    count = len(embedding)
    rows = F.embedding(torch.arange(count).expand(batch, -1), embedding).to(dtype)
    pair = rows.view(batch, count, 2, KV_HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4)
    return [torch.cat([each.new_empty(0), each], -2) for each in pair]


def joined(k: Tensor, v: Tensor, prefix: Sequence[Tensor]) -> list[Tensor]:
    return [torch.cat(pair, -2) for pair in zip(prefix, (k, v), strict=True)]


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over a cache, as in transformers."""
    k, v = (each.repeat_interleave(HEADS // KV_HEADS, 1) for each in (k, v))
    seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril(k.shape[-2] - q.shape[-2])
    return F.scaled_dot_product_attention(q, k, v, seen)


def with_copies(k: Tensor, v: Tensor, embedding: Tensor) -> list[Tensor]:
    return joined(k, v, looked_up(embedding, len(k), k.dtype))


def with_one(k: Tensor, v: Tensor, embedding: Tensor) -> list[Tensor]:
    prefix = looked_up(embedding, 1, embedding.dtype if len(k) > 1 else k.dtype)
    return joined(k, v, [prefix_cache.shared(each, len(k), k.dtype) for each in prefix])


def copied(q: Tensor, k: Tensor, v: Tensor, embedding: Tensor) -> Tensor:
    return attended(q, *with_copies(k, v, embedding))


def shared(q: Tensor, k: Tensor, v: Tensor, embedding: Tensor) -> Tensor:
    return attended(q, *with_one(k, v, embedding))


def tensors_of(virtual: int, batch: int, tokens: int, dtype: str) -> dict[str, Tensor]:
    """Inputs by the names of their gradients."""
    heads = {"dq": HEADS, "dk": KV_HEADS, "dv": KV_HEADS}
    found = {
        name: testing.tensor(batch, count, tokens, HEAD_DIM, dtype=DTYPES[dtype], seed=seed)
        for seed, (name, count) in enumerate(heads.items())
    }
    return found | {"dprefix": testing.tensor(virtual, 2 * KV_HEADS * HEAD_DIM, seed=4)}


def attention(virtual: int, batch: int, tokens: int, dtype: str) -> Case:
    def build() -> Contenders:
        tensors = tensors_of(virtual, batch, tokens, dtype)
        dy = testing.tensor(*tensors["dq"].shape, dtype=DTYPES[dtype], seed=5)

        def call(attend: Attention, widen: Widen = Tensor.clone) -> Callable[[], Any]:
            inputs = {name: widen(t).requires_grad_() for name, t in tensors.items()}
            return layers.differentiated(lambda: attend(*inputs.values()), inputs, widen(dy))

        wanted = correctness.Expected(call(copied)(), call(copied, Tensor.double)())
        attends = {OURS: shared, PEFT: copied}
        return compared(wanted, {name: partial(call, attend) for name, attend in attends.items()})

    title = f"attention over {virtual} virtual tokens and {tokens} others, forward + backward"
    return case(f"{ATTENTION}-{virtual}", batch, tokens, dtype, build, title)


def join(virtual: int, batch: int, tokens: int, dtype: str) -> Case:
    def build() -> Contenders:
        tensors = tensors_of(virtual, batch, tokens, dtype)
        del tensors["dq"]
        shape = batch, KV_HEADS, virtual + tokens, HEAD_DIM
        dy = [testing.tensor(*shape, dtype=DTYPES[dtype], seed=seed) for seed in (6, 7)]

        def call(attend: Callable[..., list[Tensor]], widen: Widen = Tensor.clone) -> Callable[[], Any]:
            inputs = {name: widen(t).requires_grad_() for name, t in tensors.items()}
            gradients = [widen(each) for each in dy]

            def run() -> dict[str, Tensor]:
                k, v = attend(*inputs.values())
                found = torch.autograd.grad((k, v), tuple(inputs.values()), gradients)
                return {"k": k.detach(), "v": v.detach(), **dict(zip(inputs, found, strict=True))}

            return run

        wanted = correctness.Expected(call(with_copies)(), call(with_copies, Tensor.double)())
        return compared(wanted, {OURS: partial(call, with_one), PEFT: partial(call, with_copies)})

    title = f"{virtual} virtual tokens put before the keys and values of {tokens} others, forward + backward"
    return case(f"{JOIN}-{virtual}", batch, tokens, dtype, build, title)


def case(group: str, batch: int, tokens: int, dtype: str, build: Build, title: str) -> Case:
    return Case(group, HEADS, HEAD_DIM, batch * tokens, dtype, build, batch, title=title, seconds=3.0)


def step(
    virtual: int, projection: bool, batch: int, tokens: int, dtype: str, sizes: ModelSizes | None = None
) -> Case:
    """A training step of an NF4 model; ours and PEFT's differ only in the prefix."""
    sizes = sizes or ModelSizes(SMOLLM2_135M.block, layers=6, vocabulary=2048)

    def build() -> Contenders:
        models = Models(sizes, DTYPES[dtype])
        ids = models.tokens(batch, tokens)

        def made(base: str) -> Any:
            import peft

            model = models.over(base)
            options: dict[str, Any] = {"prefix_projection": projection, "encoder_hidden_size": 512}
            torch.manual_seed(0)
            config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual, **options)
            return peft.get_peft_model(model, config).train()

        def call(model: Any) -> Callable[[], dict[str, Tensor]]:
            return models.step(Model(model), ids)

        def ours() -> Callable[[], Any]:
            model = made("nf4")
            pk.patch(model)
            return call(model)

        def stock() -> Callable[[], Any]:
            return call(made("nf4"))

        wanted = correctness.Expected(stock()(), call(made("exact").double())())
        return compared(wanted, {OURS: ours, PEFT: stock}, "peft transformers")

    group = f"{STEP}-{virtual}" + ("-projection" if projection else "")
    kind = "through a projection" if projection else "plain"
    title = (
        f"a step of prefix tuning, {virtual} virtual tokens, {kind}, {sizes.layers} layers of SmolLM2 in NF4"
    )
    block = sizes.block
    return Case(
        group, block.hidden, block.hidden, batch * tokens, dtype, build, batch, title=title, seconds=8.0
    )


def standard(dtype: str) -> list[Case]:
    lengths, batches = (30, 200), (1, 8, 32)
    return [
        *(join(virtual, batch, TOKENS, dtype) for virtual in lengths for batch in batches),
        *(attention(virtual, batch, TOKENS, dtype) for virtual in lengths for batch in batches),
        *(step(30, projection, batch, TOKENS, dtype) for projection in (False, True) for batch in (1, 8)),
    ]

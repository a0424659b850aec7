"""A decoder block of SmolLM2-135M with adapters on all seven projections."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import peft_kernels as pk
import testing

from . import correctness, layers
from .adapted import Adapted, Model, Sizes, Variant

SEED = 11
"""Of torch's generator before every forward, so that dropout masks are fixed."""


class Inputs(NamedTuple):
    """Arguments of a block, and the gradient of its output."""

    x: Tensor
    dy: Tensor
    position: tuple[Tensor, Tensor]

    def widen(self) -> Inputs:
        x, dy, cos, sin = map(testing.widen, (self.x.detach(), self.dy, *self.position))
        return Inputs(x.requires_grad_(), dy, (cos, sin))


class Blocks(Adapted):
    sizes: Sizes

    @cached_property
    def config(self) -> Any:
        return self.sizes.config()

    def plain(self) -> Any:
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer

        block = LlamaDecoderLayer(self.config, 0).to(self.dtype)
        for seed, parameter in enumerate(block.parameters()):
            scale = parameter.shape[1] ** -0.5 if parameter.ndim == 2 else 0.1
            values = testing.tensor(*parameter.shape, seed=seed, scale=scale)
            parameter.data.copy_(values if parameter.ndim == 2 else 1 + values)  # of a norm
        return block.requires_grad_(False)

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self.packed.values())

    def inputs(self, batch: int, tokens: int) -> Inputs:
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        shape = (batch, tokens, self.sizes.hidden)
        x, dy = (testing.tensor(*shape, dtype=self.dtype, seed=seed) for seed in (4, 5))
        cos, sin = LlamaRotaryEmbedding(self.config)(x, torch.arange(tokens)[None])
        return Inputs(x.requires_grad_(), dy, (cos, sin))

    def run(self, model: Model, variant: Variant, inputs: Inputs) -> Callable[[], dict[str, Tensor]]:
        """A call of the block: a forward, or forward and backward if the variant trains."""
        forward = self.forward(model, variant, inputs)
        if not variant.training:
            return layers.forward_call(forward, inputs.x)
        named = {name: p for name, p in model.model.named_parameters() if p.requires_grad}
        return layers.differentiated(partial(forward, inputs.x), {"dx": inputs.x, **named}, inputs.dy)

    def forward(self, model: Model, variant: Variant, inputs: Inputs) -> Callable[[Tensor], Tensor]:
        arguments: dict[str, Any] = {"position_embeddings": inputs.position}
        if variant.adapters > 1:
            count = inputs.x.shape[0]
            arguments["adapter_names"] = [variant.names[i % variant.adapters] for i in range(count)]

        def forward(x: Tensor) -> Tensor:
            torch.default_generator.manual_seed(SEED)
            y: Tensor = model.model(x, **arguments)
            return y

        return forward

    def expected(self, variant: Variant, inputs: Inputs) -> tuple[correctness.Expected, correctness.Expected]:
        """Expected results of ours and of PEFT's.

        The truth is PEFT in fp64. Under dropout the two draw different masks: there the truth for ours is the
        patched block on the reference back end in fp64.
        """

        def outputs(variant: Variant, wide: bool, patch: bool) -> dict[str, Tensor]:
            model = self.reference(variant, wide, patch)
            return self.run(model, variant, inputs.widen() if wide else inputs)()

        plain, truth = (outputs(variant, wide, patch=False) for wide in (False, True))
        theirs = correctness.Expected(plain, truth)
        if not variant.dropout:
            return theirs, theirs
        no_dropout = outputs(replace(variant, dropout=0.0), wide=True, patch=False)
        usual = {
            name: testing.relative_error(tensor, no_dropout[name]) for name, tensor in theirs.truth.items()
        }
        with pk.use_backend("reference"):
            plain, truth = (outputs(variant, wide, patch=True) for wide in (False, True))
        return correctness.Dropout(plain, truth, no_dropout, usual), theirs

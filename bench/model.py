"""A whole model that takes part: the sizes of SmolLM2-135M, random weights, adapters on all projections."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import peft_kernels as pk

from . import gate
from .adapted import SMOLLM2, Adapted, Model, Sizes, Variant

LORA = Variant(base="nf4")


@dataclass(frozen=True)
class ModelSizes:
    block: Sizes
    layers: int
    vocabulary: int


SMOLLM2_135M = ModelSizes(SMOLLM2, layers=30, vocabulary=49152)


class Models(Adapted):
    delta = 0.2

    def __init__(self, sizes: ModelSizes, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.sizes = sizes

    @cached_property
    def config(self) -> Any:
        return self.sizes.block.config(
            vocab_size=self.sizes.vocabulary, num_hidden_layers=self.sizes.layers, tie_word_embeddings=True
        )

    def plain(self) -> Any:
        import transformers

        torch.manual_seed(0)
        # A configuration of its own: it says how attention is computed.
        model = transformers.LlamaForCausalLM(copy.deepcopy(self.config)).to(self.dtype)
        return model.requires_grad_(False)

    def over(self, base: str) -> Any:
        return pk.quantize_model(self.plain(), progress=False) if base == "nf4" else super().over(base)

    def tokens(self, batch: int, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(0, self.sizes.vocabulary, (batch, count), generator=generator)

    def whole(self) -> Model:
        """Ours with all that is for the asking: the loss without logits, and attention."""
        return _whole(self.adapt(self.over("nf4"), LORA))

    def textbook(self, base: str, patch: bool, whole: bool = False) -> Model:
        """As tutorials make a model: 4-bit base, kbit preparation (norms, embeddings and head in fp32), LoRA.
        Steps are taken under autocast, as by `Trainer(bf16=True)`. Patched, all of it must run fused."""
        model = self.over(base)
        if base == "bnb":
            # Of the bits of our quantiser: bitsandbytes' own takes a neighbouring code of a scale now and
            # then, and no two models would hold the same weights.
            for name, weight in self.packed.items():
                model.get_submodule(name).weight = weight.to_bnb()
        prepared = self._prepared(model)
        if not patch:
            return Model(prepared)
        found = _whole(prepared) if whole else Model(prepared, pk.patch(prepared))
        report = found.report
        assert report is not None
        if report.original or len(report.fused) != len(self.originals):
            raise RuntimeError(f"pk.patch: {report}")
        return found

    def textbook_step(self, model: Model, ids: Tensor) -> Callable[[], dict[str, Tensor]]:
        call = self.step(model, ids)

        def under_autocast() -> dict[str, Tensor]:
            with torch.autocast("cpu", dtype=self.dtype):
                return call()

        return under_autocast

    def expected_textbook(self, run: Callable[[Model], Callable[[], dict[str, Tensor]]]) -> gate.Expected:
        """PEFT over the dequantised weights: in fp64, and under autocast."""
        plain = run(Model(self._prepared(self.over("dense"))))()
        return gate.Expected(plain, run(Model(self._prepared(self.over("exact").double())))())

    def step(self, model: Model, ids: Tensor) -> Callable[[], dict[str, Tensor]]:
        """Forward, loss and backward of one training step."""
        trainable = [p for p in model.model.parameters() if p.requires_grad]

        def call() -> dict[str, Tensor]:
            loss = model.model(input_ids=ids, labels=ids).loss
            gradients = torch.autograd.grad(loss, trainable)
            return {"gradients": torch.cat([g.reshape(-1) for g in gradients])}

        return call

    def decode(self, model: Model, ids: Tensor, prompt: int) -> Callable[[], dict[str, Tensor]]:
        """The tokens after the prompt, one at a time, with a cache of those before: generation without its
        sampling. They are given, so that every contender does the same work."""
        import transformers

        cache = transformers.DynamicCache(config=self.config)
        model.model.eval()
        with torch.no_grad():
            model.model(input_ids=ids[:, :prompt], past_key_values=cache, use_cache=True)

        def call() -> dict[str, Tensor]:
            if cache.get_seq_length() > prompt:
                cache.crop(prompt - cache.get_seq_length())  # as many as that are taken off the end
            with torch.no_grad():
                logits = [
                    model.model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits
                    for i in range(prompt, ids.shape[1])
                ]
            return {"logits": torch.cat(logits, 1)}

        return call

    def expected(self, run: Callable[[Model], Callable[[], dict[str, Tensor]]]) -> gate.Expected:
        """PEFT over the dequantised weights: in fp64, and in the dtype of the case."""
        plain, truth = (run(self.reference(LORA, wide))() for wide in (False, True))
        return gate.Expected(plain, truth)

    def _prepared(self, model: Any) -> Any:
        import peft

        wide = next(model.parameters()).dtype == torch.float64
        prepared = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        return self.adapt(prepared, LORA, wide)


def _whole(model: Any) -> Model:
    from peft_kernels.integrations import attention

    report = pk.patch(model, loss=True)
    attention.use(model)
    return Model(model, report)

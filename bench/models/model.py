"""Training steps and decoding of a whole model with SmolLM2-135M's sizes and random weights.

It has adapters on all projections.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

import peft_kernels as pk

from ..lib import correctness, layers
from ..lib.adapted import SMOLLM2, Adapted, Model, Sizes, Variant
from ..lib.cases import DTYPES, PEFT_ON_BNB
from ..lib.harness import Build, Case, Contenders, Entry, contenders
from ..lib.layers import BNB
from ..lib.report import OURS

STEP, TEXTBOOK, DECODE = "step", "textbook", "decode"
OURS_QUANTISED = "ours on quantize_model"
TITLES = {
    STEP: "training step of a model of 135M parameters, QLoRA, loss included",
    TEXTBOOK: "the same step set up as in tutorials: 4-bit base of bitsandbytes, kbit preparation, autocast",
    DECODE: "decoding by the same model, one sample and eight at a time",
}
SECONDS = {STEP: 45.0, TEXTBOOK: 90.0, DECODE: 15.0}
LORA = Variant(base="nf4")


@dataclass(frozen=True)
class ModelSizes:
    block: Sizes
    layers: int
    vocabulary: int


SMOLLM2_135M = ModelSizes(SMOLLM2, layers=30, vocabulary=49152)


def standard(dtype: str) -> list[Case]:
    return [
        step(4, 256, dtype), decode(1, 64, 16, dtype), decode(8, 64, 16, dtype), textbook(4, 256, dtype),
    ]  # fmt: skip


class Models(Adapted):
    delta = 0.2
    sizes: ModelSizes

    @cached_property
    def config(self) -> Any:
        return self.sizes.block.config(
            vocab_size=self.sizes.vocabulary, num_hidden_layers=self.sizes.layers, tie_word_embeddings=True
        )

    def plain(self) -> Any:
        import transformers

        torch.manual_seed(0)
        # A copy: the configuration selects the attention implementation.
        model = transformers.LlamaForCausalLM(copy.deepcopy(self.config)).to(self.dtype)
        return model.requires_grad_(False)

    def over(self, base: str) -> Any:
        return pk.quantize_model(self.plain(), progress=False) if base == "nf4" else super().over(base)

    def tokens(self, batch: int, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(0, self.sizes.vocabulary, (batch, count), generator=generator)

    def textbook(self, base: str, patch: bool) -> Model:
        """A model as in tutorials: 4-bit base, kbit preparation (norms, embeddings and head in fp32), LoRA;
        its steps run under autocast, as in `Trainer(bf16=True)`. If patched, all layers must run fused."""
        model = self.over(base)
        if base == "bnb":
            # With our quantiser's bits: bitsandbytes' own sometimes picks a neighbouring code of a scale.
            for name, weight in self.packed.items():
                model.get_submodule(name).weight = weight.to_bnb()
        prepared = self._prepared(model)
        if not patch:
            return Model(prepared)
        found = Model(prepared, pk.patch(prepared))
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

    def expected_textbook(
        self, run: Callable[[Model], Callable[[], dict[str, Tensor]]]
    ) -> correctness.Expected:
        """PEFT over the dequantised weights, in fp64 and under autocast."""
        plain = run(Model(self._prepared(self.over("dense"))))()
        return correctness.OfModel(plain, run(Model(self._prepared(self.over("exact").double())))())

    def step(self, model: Model, ids: Tensor) -> Callable[[], dict[str, Tensor]]:
        trainable = [p for p in model.model.parameters() if p.requires_grad]

        def call() -> dict[str, Tensor]:
            loss = model.model(input_ids=ids, labels=ids).loss
            gradients = torch.autograd.grad(loss, trainable)
            return {"gradients": torch.cat([g.reshape(-1) for g in gradients])}

        return call

    def decode(self, model: Model, ids: Tensor, prompt: int) -> Callable[[], dict[str, Tensor]]:
        """A call that decodes the given tokens after the prompt, one at a time, with a cache. Tokens are
        given so that every contender does the same work."""
        import transformers

        cache = transformers.DynamicCache(config=self.config)
        model.model.eval()
        with torch.no_grad():
            model.model(input_ids=ids[:, :prompt], past_key_values=cache, use_cache=True)

        def call() -> dict[str, Tensor]:
            if cache.get_seq_length() > prompt:
                cache.crop(prompt - cache.get_seq_length())  # removes that many from the end
            with torch.no_grad():
                logits = [
                    model.model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits
                    for i in range(prompt, ids.shape[1])
                ]
            return {"logits": torch.cat(logits, 1)}

        return call

    def expected(self, run: Callable[[Model], Callable[[], dict[str, Tensor]]]) -> correctness.Expected:
        """PEFT over the dequantised weights, in fp64 and in the dtype of the case."""
        plain, truth = (run(self.reference(LORA, wide))() for wide in (False, True))
        return correctness.OfModel(plain, truth)

    def _prepared(self, model: Any) -> Any:
        import peft

        wide = next(model.parameters()).dtype == torch.float64
        prepared = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        return self.adapt(prepared, LORA, wide)


def step(batch: int, tokens: int, dtype: str, sizes: ModelSizes = SMOLLM2_135M) -> Case:
    """A training step of a patched model on NF4 weights, compared with PEFT on bitsandbytes."""

    def run(models: Models, model: Model) -> Callable[[], Any]:
        return models.step(model, models.tokens(batch, tokens))

    return _model_case(STEP, batch, batch * tokens, dtype, sizes, run)


def textbook(batch: int, tokens: int, dtype: str, sizes: ModelSizes = SMOLLM2_135M) -> Case:
    """A training step of the tutorials' script with `pk.patch` and without, and with `pk.quantize_model`
    instead of bitsandbytes."""

    def build() -> Contenders:
        models = layers.shared(Models, TEXTBOOK, sizes, DTYPES[dtype])

        def call(model: Model) -> Callable[[], Any]:
            return models.textbook_step(model, models.tokens(batch, tokens))

        expected = models.expected_textbook(call)
        kinds = (
            (OURS, ("bnb", True), expected.strict),
            (PEFT_ON_BNB, ("bnb", False), expected.sane),
            (OURS_QUANTISED, ("nf4", True), expected.strict),
        )
        entries = [
            Entry(name, lambda how=how: [models.textbook(*how)], verify, call=call, remark=Model.remark)
            for name, how, verify in kinds
        ]
        return contenders(entries, cache=models)

    return _case(TEXTBOOK, batch, batch * tokens, dtype, sizes, build)


def decode(samples: int, prompt: int, tokens: int, dtype: str, sizes: ModelSizes = SMOLLM2_135M) -> Case:
    """The same contenders decoding `tokens` tokens after a prompt, for several samples at once."""

    def run(models: Models, model: Model) -> Callable[[], Any]:
        return models.decode(model, models.tokens(samples, prompt + tokens), prompt)

    return _model_case(DECODE, samples, samples * tokens, dtype, sizes, run)


def _model_case(
    group: str, batch: int, rows: int, dtype: str, sizes: ModelSizes,
    run: Callable[[Models, Model], Callable[[], Any]],
) -> Case:  # fmt: skip
    def build() -> Contenders:
        models = layers.shared(Models, group, sizes, DTYPES[dtype])
        call = partial(run, models)
        expected = models.expected(call)
        # A model is larger than any cache: one copy is enough.
        entries = [
            Entry(OURS, lambda: [models.ours()], expected.strict, call=call, remark=Model.remark),
            Entry(PEFT_ON_BNB, lambda: [models.stock()], expected.sane, BNB, call=call),
        ]
        return contenders(entries, cache=models)

    return _case(group, batch, rows, dtype, sizes, build)


def _case(group: str, batch: int, rows: int, dtype: str, sizes: ModelSizes, build: Build) -> Case:
    shape = sizes.block.hidden, sizes.block.intermediate
    needs = f"peft transformers {BNB if group == TEXTBOOK else ''}"
    title, seconds = TITLES[group], SECONDS[group]
    return Case(group, *shape, rows, dtype, build, batch, title=title, seconds=seconds, needs=needs)

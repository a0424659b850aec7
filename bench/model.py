"""A whole model that takes part: the sizes of SmolLM2-135M, random weights, adapters on all projections."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

import peft_kernels as pk
import testing

from . import gate, layers
from .block import SMOLLM2, Model, Sizes

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ModelSizes:
    block: Sizes
    layers: int
    vocabulary: int


SMOLLM2_135M = ModelSizes(SMOLLM2, layers=30, vocabulary=49152)


class Models(layers.Kept):
    """Models that hold the same numbers over bases of each kind, in one dtype throughout."""

    def __init__(self, sizes: ModelSizes, dtype: torch.dtype) -> None:
        super().__init__()
        self.sizes, self.dtype = sizes, dtype

    @cached_property
    def config(self) -> Any:
        return self.sizes.block.config(
            vocab_size=self.sizes.vocabulary, num_hidden_layers=self.sizes.layers, tie_word_embeddings=True
        )

    def tokens(self, batch: int, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(0, self.sizes.vocabulary, (batch, count), generator=generator)

    def ours(self) -> Model:
        model = self._adapted(self._quantised())
        return Model(model, pk.patch(model))

    def stock(self) -> Model:
        """PEFT over bitsandbytes' 4-bit layers."""
        return Model(self._adapted(self._on_bitsandbytes()), None)

    def textbook(self, base: str, patch: bool) -> Model:
        """As tutorials make a model: 4-bit base, kbit preparation (norms, embeddings and head in fp32), LoRA.
        Steps are taken under autocast, as by `Trainer(bf16=True)`. Patched, all of it must run fused."""
        model = self._on_bitsandbytes(ours=True) if base == layers.BNB else self._quantised()
        prepared = self._prepared(model)
        if not patch:
            return Model(prepared, None)
        report = pk.patch(prepared)
        if report.original or len(report.fused) != len(PROJECTIONS) * self.sizes.layers:
            raise RuntimeError(f"pk.patch: {report}")
        return Model(prepared, report)

    def textbook_step(self, model: Model, ids: Tensor) -> Callable[[], dict[str, Tensor]]:
        call = self.step(model, ids)

        def under_autocast() -> dict[str, Tensor]:
            with torch.autocast("cpu", dtype=self.dtype):
                return call()

        return under_autocast

    def expected_textbook(self, run: Callable[[Model], Callable[[], dict[str, Tensor]]]) -> gate.Expected:
        """PEFT over the dequantised weights: in fp64, and under autocast."""
        plain, truth = (run(Model(self._prepared(self._exact(wide)), None)) for wide in (False, True))
        return gate.Expected(plain(), truth())

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
        plain, truth = (run(Model(self._reference(wide), None))() for wide in (False, True))
        return gate.Expected(plain, truth)

    def _projections(self, model: nn.Module) -> list[str]:
        return [name for name, _ in model.named_modules() if name.endswith(PROJECTIONS)]

    def _dense(self) -> Any:
        import transformers

        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(self.config).to(self.dtype)
        return model.requires_grad_(False)

    def _quantised(self) -> Any:
        model = self._dense()
        pk.quantize_model(model, skip=("lm_head",), progress=False)
        return model

    def _on_bitsandbytes(self, ours: bool = False) -> Any:
        """With `ours`, from the bits of our quantiser: bitsandbytes' own takes a neighbouring code of a scale
        now and then, and no two models would hold the same weights."""
        model = self._dense()
        for name in self._projections(model):
            weight = model.get_submodule(name).weight.detach()
            layer = layers.linear4bit(weight)
            if ours:
                layer.weight = pk.NF4Weight.quantize(weight).to_bnb()
            model.set_submodule(name, layer)
        model.is_loaded_in_4bit = True
        return model

    def _prepared(self, model: Any) -> Any:
        import peft

        wide = next(model.parameters()).dtype == torch.float64
        prepared = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        adapted = self._adapted(prepared)
        return adapted.double() if wide else adapted

    def _reference(self, wide: bool) -> Any:
        adapted = self._adapted(self._exact(wide))
        return adapted.double() if wide else adapted

    def _exact(self, wide: bool) -> Any:
        """The model with its NF4 weights dequantised, in fp64 or in the dtype of the case."""
        model = self._quantised()
        for name in self._projections(model):
            exact = layers.dequantized(model.get_submodule(name).weight)
            model.set_submodule(name, layers.dense_linear(exact if wide else exact.to(self.dtype)))
        return model.double() if wide else model

    def _adapted(self, model: Any) -> Any:
        count = len(PROJECTIONS) * self.sizes.layers
        adapted = layers.adapted(model, list(PROJECTIONS), count, ("default",))
        for seed, layer in enumerate(layers.lora_layers(adapted).values()):
            for parts, scale in ((layer.lora_A, 1.0), (layer.lora_B, 0.1)):
                shape = parts["default"].weight.shape
                values = testing.tensor(*shape, seed=seed, scale=scale * shape[1] ** -0.5)
                parts["default"].weight.data.copy_(values)
        return adapted

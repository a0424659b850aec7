"""Serving eight requests with an adapter each: in one batch, one after the other, and with one adapter for
all."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import peft_kernels as pk
import testing

from ..lib import correctness, layers
from ..lib.adapted import Variant
from ..lib.cases import DTYPES
from ..lib.harness import Build, Case, Contenders, Entry, contenders
from ..lib.layers import RANK
from ..lib.report import OURS
from .model import SMOLLM2_135M, Models, ModelSizes

WHOLE, DECODE = "serving", "serving-decode"
DECODE_16, BOTTLENECK = "serving-decode-16bit", "serving-decode-bottleneck"
ONE, PASSES = "ours, one adapter", "8 passes of generate, patched"
REQUESTS = 8
TITLES = {
    WHOLE: f"8 requests with an adapter each (LoRA r={RANK}), 135M parameters in NF4, from prompt to end",
    DECODE: f"four decoded tokens of 8 requests with an adapter each (LoRA r={RANK}), 135M parameters in NF4",
    DECODE_16: "the same with adapters kept in 16 bits",
    BOTTLENECK: "the same with bottleneck adapters (houlsby)",
}
STEPS = 4  # tokens per timed call, so that a call is longer than interruptions
SANE = 0.1
"""Relative error of logits from fp32 that bf16 rounding explains; those of a wrong adapter are 10 times as
far off."""

LORA = Variant(base="nf4", adapters=REQUESTS, training=False)


def standard(dtype: str) -> list[Case]:
    return [whole(16, 32, dtype), *(decode(group, 32, dtype) for group in (DECODE, DECODE_16, BOTTLENECK))]


class Served(Models):
    @cached_property
    def folder(self) -> Path:
        self._temporary = tempfile.TemporaryDirectory()
        return Path(self._temporary.name)

    @cached_property
    def loras(self) -> dict[str, Path]:
        self.adapt(self.plain(), LORA).save_pretrained(self.folder)
        return {name: self.folder / name for name in LORA.names}

    @cached_property
    def bottlenecks(self) -> dict[str, Path]:
        model, found = self.plain(), {}
        for number, name in enumerate(LORA.names):
            pk.adapters.add(model, name)
            mine = (p for key, p in model.named_parameters() if f"adapters.{name}." in key)
            with torch.no_grad():
                for seed, parameter in enumerate(mine):
                    parameter.copy_(testing.tensor(*parameter.shape, seed=1000 * number + seed, scale=0.05))
            pk.adapters.save(model, name, self.folder / f"b-{name}")
            pk.adapters.delete(model, name)
            found[name] = self.folder / f"b-{name}"
        return found

    def engine(self, folders: dict[str, Path], adapter_dtype: torch.dtype = torch.float32) -> Any:
        model = self.over("nf4").eval()
        engine = pk.serving.Engine(model, max_batch=REQUESTS, adapter_dtype=adapter_dtype)
        for name, folder in folders.items():
            engine.load(name, folder)
        return engine

    def prompts(self, count: int) -> list[list[int]]:
        found: list[list[int]] = self.tokens(REQUESTS, count).tolist()
        return found

    def error(self, answers: Sequence[tuple[list[int], Tensor]], prompts: list[list[int]]) -> float:
        """The largest relative error of the answers' logits (tokens, vocabulary) from those of PEFT over
        dense weights in fp32, given the same tokens. AssertionError beyond SANE."""
        model, worst = self._reference, 0.0
        for name, prompt, (tokens, logits) in zip(LORA.names, prompts, answers, strict=True):
            model.set_adapter(name)
            with torch.no_grad():
                wanted = model(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
            worst = max(worst, testing.relative_error(logits, wanted))
        assert worst < SANE, f"logits: expected an error below {SANE}, got {worst:.2g}"
        return worst

    @cached_property
    def _reference(self) -> Any:
        return self.adapt(self.over("exact").float(), LORA).eval()


def whole(prompt: int, new: int, dtype: str, sizes: ModelSizes = SMOLLM2_135M) -> Case:
    def build() -> Contenders:
        models = layers.shared(Served, WHOLE, sizes, DTYPES[dtype])
        prompts = models.prompts(prompt)
        options: dict[str, Any] = {"max_new_tokens": new}

        def ours() -> Callable[[], Any]:
            engine = models.engine(models.loras)

            def call() -> Any:
                requests = [
                    engine.submit(ids, name, **options, eos_token_id=(), keep_logits=True)
                    for ids, name in zip(prompts, LORA.names, strict=True)
                ]
                engine.run()
                return [(r.result(), torch.stack(r.logits)) for r in requests]

            return call

        def passes() -> Callable[[], Any]:
            model = models.ours(LORA).model

            def one(ids: list[int], name: str) -> tuple[list[int], Tensor]:
                model.set_adapter(name)
                found = model.generate(
                    input_ids=torch.tensor([ids]), **options, do_sample=False, eos_token_id=None,
                    pad_token_id=0, output_logits=True, return_dict_in_generate=True,
                )  # fmt: skip
                return found.sequences[0, prompt:].tolist(), torch.cat(found.logits)

            return lambda: [one(ids, name) for ids, name in zip(prompts, LORA.names, strict=True)]

        def verify(answers: Any) -> float:
            return models.error(answers, prompts)

        entries = (Entry(OURS, lambda: [ours()], verify), Entry(PASSES, lambda: [passes()], verify))
        return contenders(entries, cache=models)

    return _case(WHOLE, REQUESTS * new, dtype, sizes, build)


def decode(group: str, prompt: int, dtype: str, sizes: ModelSizes = SMOLLM2_135M) -> Case:
    def build() -> Contenders:
        models = layers.shared(Served, group, sizes, DTYPES[dtype])
        given = models.prompts(prompt + STEPS)

        def make(names: list[str]) -> Callable[[], Any]:
            folders = models.bottlenecks if group == BOTTLENECK else models.loras
            kept = DTYPES[dtype] if group == DECODE_16 else torch.float32
            engine = models.engine({name: folders[name] for name in names}, kept)
            requests = [
                engine.submit(ids[:prompt], name, max_new_tokens=2 * STEPS, eos_token_id=())
                for ids, name in zip(given, names, strict=True)
            ]
            engine.step()
            assert not any(request.done for request in requests)
            return _forced(engine, given, prompt)

        def of(names: list[str]) -> tuple[Callable[[], list[Any]], Callable[[Any], float]]:
            alone = _alone(models, group, given, prompt, names)
            return lambda: [make(names)], alone.sane if group == DECODE_16 else alone.strict

        entries = [
            Entry(OURS, *of(LORA.names)),
            Entry(ONE, *of([LORA.names[0]] * REQUESTS)),
        ]
        return contenders(entries, cache=models)

    return _case(group, REQUESTS, dtype, sizes, build)


def _forced(engine: Any, given: list[list[int]], prompt: int) -> Callable[[], dict[str, Tensor]]:
    """Steps of an engine with a full batch and given tokens, so that each call does the same work."""

    def call() -> dict[str, Tensor]:
        logits = []
        for slot in engine._batch.slots:
            slot.cache.crop(prompt - slot.cache.get_seq_length())  # removes that many from the end
        for i in range(STEPS):
            for slot, ids in zip(engine._batch.slots, given, strict=True):
                slot.request.tokens[:] = ids[prompt : prompt + i + 1]
                slot.request.logits.clear()
                slot.request._keep_logits = True
            engine.step()
            logits.append(torch.stack([slot.request.logits[0] for slot in engine._batch.slots]))
        return {"logits": torch.stack(logits)}

    return call


def _alone(
    models: Served, group: str, given: list[list[int]], prompt: int, names: Sequence[str]
) -> correctness.Expected:
    """Expected logits: each request alone over dense weights, in fp32 and in the dtype of the case."""

    def run(wide: bool) -> dict[str, Tensor]:
        base = models.over("exact").float() if wide else models.over("dense")
        if group == BOTTLENECK:
            model = base.eval()
            for name in dict.fromkeys(names):
                pk.adapters.load(model, models.bottlenecks[name], load_as=name)
        else:
            model = models.adapt(base, LORA).eval()
        logits = []
        for ids, name in zip(given, names, strict=True):
            pk.adapters.set_active(model, name) if group == BOTTLENECK else model.set_adapter(name)
            with torch.no_grad():
                logits.append(model(input_ids=torch.tensor([ids])).logits[0, prompt:])
        return {"logits": torch.stack(logits, 1)}

    return correctness.OfModel(run(False), run(True))


def _case(group: str, rows: int, dtype: str, sizes: ModelSizes, build: Build) -> Case:
    shape = sizes.block.intermediate, sizes.block.hidden
    cheaper, seconds = ((), 60.0) if group == WHOLE else ((ONE,), 30.0)
    return Case(
        group, *shape, rows, dtype, build, REQUESTS, cheaper, TITLES[group], seconds, "peft transformers"
    )

"""Fine-tuning methods side by side on one model: parameters, memory, time and loss.

Model, task and training are those of `examples/finetune.py`: SmolLM2-135M-Instruct, patched, under autocast,
on NF4 weights except for LoRA over dense ones and full fine-tuning. Four cases, each of all methods: bytes
saved for backward (exact), the time of a step and of decoding a token (interleaved), and the held-out loss
after equal steps. A fifth compares LoRA on weights in each packed format: bits per weight, the held-out loss
before and after equal steps, and the time of a step.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peft_kernels as pk
import testing
from peft_kernels.core.formats import FORMATS

from ..lib import examples, harness, report
from ..lib.layers import RANK
from ..lib.report import Progress, Spread, Timing, missing

BASE, DENSE, LORA, DORA = "base in 4 bits", "base in bf16", "QLoRA", "QDoRA"
KEPT = f"{DORA}, norms kept"
"""Decoding under PEFT's `DoraCaching`."""
BYTES, STEP, DECODE, LOSS, FORMAT = "bytes", "step", "decode", "loss", "formats"
TITLES = {
    BYTES: "saved for backward, bytes a token",
    STEP: f"step by that of {LORA}",
    DECODE: f"decoding by that of the {BASE}",
    LOSS: "held-out loss",
}
TRAINED = "trained"
FORMS = {BYTES: ",.0f", STEP: ".2f", DECODE: ".2f", LOSS: ".3f"}
BITS, BEFORE, AFTER, TIME = "bits per weight", "held-out loss", "after LoRA", "step by that of nf4"
FORMATS_FORMS = {BITS: ".2f", BEFORE: ".3f", AFTER: ".3f", TIME: ".2f"}
VIRTUAL = 16  # tokens of prefixes and prompts
HIDDEN = 256  # of the networks that produce them
BATCH, TOKENS, LENGTHS = 1, 128, (64, 128)
PROMPT, NEW = 64, 2  # tokens, of decoding
STEPS, BATCH_SIZE, MAX_LENGTH, HELD_OUT, SEED = 30, 4, 128, 32, 0

NEEDS = "transformers peft accelerate rich tqdm"

Adapt = Callable[[Any, str], Any]
"""Takes the base model and its folder; returns the model to train."""


@dataclass(frozen=True)
class Method:
    """`base`: a packed format, "bf16", or "fp32" if the base weights train."""

    adapt: Adapt
    lr: float
    base: str = "nf4"
    ahead: int = 0
    """Virtual tokens before each row."""


def _lora(model: Any, folder: str, **options: Any) -> Any:
    import peft

    lora = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(model, peft.LoraConfig(**lora, **options))


def _bottleneck(kind: str, model: Any, folder: str) -> Any:
    pk.adapters.add(model, "task", kind)
    pk.adapters.train(model, "task")
    return model


def _virtual(kind: str, options: dict[str, Any], model: Any, folder: str) -> Any:
    import peft

    if options.get("prompt_tuning_init") == "TEXT":
        options = {**options, "tokenizer_name_or_path": folder}
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, **options)
    return peft.get_peft_model(model, config)


TEXT = {
    "prompt_tuning_init": "TEXT",
    "prompt_tuning_init_text": "Write the one-line summary of this function.",
}
PREFIX = {"prefix_projection": True, "encoder_hidden_size": HIDDEN}
METHODS: dict[str, Method] = {
    "LoRA": Method(_lora, 5e-4, "bf16"),
    LORA: Method(_lora, 5e-4),
    DORA: Method(partial(_lora, use_dora=True), 5e-4),
    "Houlsby": Method(partial(_bottleneck, "houlsby"), 1e-3),
    "Pfeiffer": Method(partial(_bottleneck, "pfeiffer"), 1e-3),
    "parallel": Method(partial(_bottleneck, "parallel"), 1e-3),
    "prefix": Method(partial(_virtual, "PrefixTuningConfig", PREFIX), 5e-3),
    "prompt tuning": Method(partial(_virtual, "PromptTuningConfig", TEXT), 2e-2, ahead=VIRTUAL),
    "P-tuning": Method(
        partial(_virtual, "PromptEncoderConfig", {"encoder_hidden_size": HIDDEN}), 2e-3, ahead=VIRTUAL
    ),
    "full fine-tuning": Method(lambda model, folder: model.requires_grad_(True), 5e-5, "fp32"),
}


@dataclass(frozen=True)
class Case:
    """One column of the table of methods, or the table of formats. `model` and `data`: paths instead of the
    demo's, as options of finetune.py."""

    column: str
    steps: int = STEPS
    model: Path | None = None
    data: Path | None = None

    @property
    def name(self) -> str:
        return "formats-model" if self.column == FORMAT else f"methods-{self.column}"

    @property
    def seconds(self) -> float:
        own = {
            BYTES: 20.0,
            STEP: 25.0,
            DECODE: 15.0,
            LOSS: 15.0 + len(METHODS) * (0.5 * self.steps + 4),
            FORMAT: 45.0 + (len(FORMATS) + 1) * (1.0 * self.steps + 15),
        }
        return 15.0 + own[self.column]

    def run(self, timing: Timing = report.ONCE, progress: Progress = report.silent) -> Measured:
        title = TITLES.get(self.column)
        forms = {TRAINED: ",", title: FORMS[self.column]} if title else FORMATS_FORMS
        found = Measured(self, title=f"{'methods' if title else 'formats'} on SmolLM2-135M", forms=forms)
        if reason := missing(NEEDS + ("" if self.model else " gguf")):
            found.absent[self.column] = reason
            return found
        progress("model")
        models = Models(self, examples.MODELS)
        columns = {BYTES: _bytes, STEP: _steps, DECODE: _decoding, LOSS: _losses, FORMAT: _formats}
        columns[self.column](found, models, timing, progress)
        return found


class Measured(report.Figures):
    def put(self, name: str, value: float | Spread) -> None:
        self.values.setdefault(name, {})[TITLES[self.case.column]] = value

    def data(self) -> dict[str, Any]:
        """Of methods by name, as tools/figures.py reads them."""
        if self.case.column == FORMAT:
            return super().data()
        column = TITLES[self.case.column]
        values = {name: self.value(name, column) for name in self.values}
        trained = {name: found[TRAINED] for name, found in self.values.items() if TRAINED in found}
        return {"group": "methods", "values": values, "trained": trained}


class Models:
    def __init__(self, case: Any, folder: Path) -> None:
        self.case, self.lib = case, examples.module("finetune_model")
        self.folder = examples.module("demo_model").model_folder(case.model, folder)

    def base(self, kind: str) -> Any:
        """The base model, with the linear layers' weights in the given format or dtype."""
        model = self.lib.AutoModelForCausalLM.from_pretrained(self.folder, dtype=self.lib.DTYPE)
        body = {m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
        if kind in FORMATS:
            pk.quantize_model(model, format=kind)
        for p in model.parameters():
            p.requires_grad_(False)
            if kind == "fp32" or not (p in body or isinstance(p, pk.NF4Weight)):
                p.data = p.data.float()
        model.forward = torch.autocast(self.lib.DEVICE, dtype=self.lib.DTYPE)(model.forward)
        return model

    def adapted(self, method: Method, base: Any) -> Any:
        torch.manual_seed(SEED)
        model = method.adapt(base, str(self.folder))
        pk.patch(model)
        return model

    def make(self, name: str) -> Any:
        return self.adapted(METHODS[name], self.base(METHODS[name].base))

    def training(self, name: str, found: Measured, progress: Progress) -> Any:
        """The model in training mode; counts its trained parameters."""
        progress(name)
        model = self.make(name).train()
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        found.values.setdefault(name, {})[TRAINED] = trained
        return model

    def batches(self, size: int = BATCH_SIZE, held_out: int = HELD_OUT) -> tuple[list[Any], list[Any]]:
        """To train on, and held out."""
        tokenizer, case = self.lib.load_tokenizer(self.folder), self.case
        return examples.batches(case.data, tokenizer, MAX_LENGTH, size, case.steps, SEED, held_out)

    def step(self, model: Any) -> Callable[[], None]:
        """Forward and backward of a training step."""
        ids = self.tokens(BATCH, TOKENS)

        def call() -> None:
            model.zero_grad()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

        return call

    def tokens(self, batch: int, length: int) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        size = self.config.vocab_size
        return torch.randint(3, size, (batch, length), generator=generator)

    @cached_property
    def config(self) -> Any:
        import transformers

        return transformers.AutoConfig.from_pretrained(self.folder)


def _bytes(found: Measured, models: Models, timing: Timing, progress: Progress) -> None:
    """From the difference between two lengths, so that fixed costs (bf16 copies of weights, a prefix) do not
    count. Without the head, which is the same for all methods."""
    for name in METHODS:
        model, saved = models.training(name, found, progress), []
        for length in LENGTHS:
            ids = models.tokens(1, length)
            run = partial(model, input_ids=ids, logits_to_keep=1, use_cache=False)
            saved.append(testing.saved_bytes(run, [*model.parameters(), *model.buffers()]))
        found.put(name, (saved[1] - saved[0]) / (LENGTHS[1] - LENGTHS[0]))
        del model, run
        gc.collect()


def _steps(found: Measured, models: Models, timing: Timing, progress: Progress) -> None:
    calls = {name: models.step(models.training(name, found, progress)) for name in METHODS}
    progress("time")
    for name, ratio in _ratios(calls, timing, LORA).items():
        found.put(name, ratio)


def _decoding(found: Measured, models: Models, timing: Timing, progress: Progress) -> None:
    calls: dict[str, Callable[[], Any]] = {}
    for name in (BASE, DENSE, *METHODS, KEPT):
        if name == "full fine-tuning":  # the same as the base
            continue
        progress(name)
        base = {BASE: "nf4", DENSE: "bf16"}.get(name)
        model = models.make(DORA if name == KEPT else name) if base is None else models.base(base)
        if base is not None:
            pk.patch(model)
        calls[name] = Decoding(model.eval(), name, models.tokens(1, PROMPT + NEW))
        if name == KEPT:
            calls[name] = partial(_keeping_norms, calls[name])
    progress("time")
    for name, ratio in _ratios(calls, timing, BASE).items():
        found.put(name, ratio)


def _keeping_norms(call: Callable[[], Any]) -> None:
    from peft.helpers import DoraCaching

    with DoraCaching():
        call()


class Decoding:
    """Decodes a few given tokens, one at a time, after the prompt and the method's virtual tokens."""

    def __init__(self, model: Any, name: str, ids: Tensor) -> None:
        import transformers

        self.model, self.ids = model, ids
        prompt: dict[str, Tensor] = {"input_ids": ids[:, :PROMPT]}
        self.cache = transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            if name == "prefix":
                self.model, self.cache = model.get_base_model(), model.get_prompt(1)
            elif name in METHODS and METHODS[name].ahead:
                self.model, prompt = model.get_base_model(), pk.prompts.mixed_inputs(model, ids[:, :PROMPT])
            self.model(**prompt, past_key_values=self.cache, use_cache=True)
        self.length = self.cache.get_seq_length()

    def __call__(self) -> None:
        if self.cache.get_seq_length() > self.length:
            self.cache.crop(self.length - self.cache.get_seq_length())
        with torch.no_grad():
            for at in range(PROMPT, PROMPT + NEW):
                self.model(input_ids=self.ids[:, at : at + 1], past_key_values=self.cache, use_cache=True)


def _losses(found: Measured, models: Models, timing: Timing, progress: Progress) -> None:
    batches, held_out = models.batches()
    for name, base in ((BASE, "nf4"), (DENSE, "bf16")):
        progress(name)
        found.put(name, models.lib.loss_of(models.base(base), held_out))
    for name, method in METHODS.items():
        model = models.training(name, found, progress)
        losses = models.lib.train(model, batches, method.lr, name, method.ahead)
        found.put(name, models.lib.loss_of(model, held_out, method.ahead))
        _check(found, name, [*losses, found.value(name, TITLES[LOSS])])
        del model
        gc.collect()


def _formats(found: Measured, models: Models, timing: Timing, progress: Progress) -> None:
    (batches, held_out), method, calls = models.batches(), METHODS[LORA], {}
    for name in ("bf16", *FORMATS):
        progress(name)
        model = models.base(name)
        row = found.values[name] = {BITS: _bits(model), BEFORE: models.lib.loss_of(model, held_out)}
        model = models.adapted(method, model).train()
        losses = models.lib.train(model, batches, method.lr, name)
        row[AFTER] = models.lib.loss_of(model, held_out)
        _check(found, name, [*losses, row[AFTER]])
        calls[name] = models.step(model.train())
        gc.collect()
    progress("time")
    for name, ratio in _ratios(calls, timing, "nf4").items():
        found.values[name][TIME] = ratio


def _bits(model: nn.Module) -> float:
    """Bits per weight of the linear layers but the head."""
    layers = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.endswith("lm_head")]
    return 8 * sum(m.weight.nbytes for m in layers) / sum(m.weight.numel() for m in layers)


def _check(found: Measured, name: str, losses: Iterable[Any]) -> None:
    if not all(map(math.isfinite, losses)):
        found.wrong[name] = f"losses, the last one held out: {losses}"


def _ratios(calls: dict[str, Callable[[], Any]], timing: Timing, yardstick: str) -> dict[str, Spread]:
    """Time / the yardstick's time, within each round."""
    runners = [harness.Contender(name, [call], lambda _: 0.0) for name, call in calls.items()]
    seconds = harness.interleave(runners, timing)
    return {name: Spread.of_ratios(times, seconds[yardstick]) for name, times in seconds.items()}


def standard(dtype: str) -> list[Case]:
    return [Case(column) for column in (*TITLES, FORMAT)]

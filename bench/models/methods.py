"""Fine-tuning methods side by side on one model: parameters, memory, time and loss.

Model, task and training are those of `examples/finetune.py`: SmolLM2-135M-Instruct, patched, under autocast,
on NF4 weights except for LoRA over dense ones and full fine-tuning. Four cases, each of all methods: bytes
saved for backward (exact), the time of a step and of decoding a token (interleaved), and the held-out loss
after equal steps.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peft_kernels as pk
import testing

from ..lib import examples, harness, report
from ..lib.layers import RANK
from ..lib.report import Spread, missing

BASE, DENSE, LORA, DORA = "base in 4 bits", "base in bf16", "QLoRA", "QDoRA"
KEPT = f"{DORA}, norms kept"
"""Decoding under PEFT's `DoraCaching`."""
BYTES, STEP, DECODE, LOSS = "bytes", "step", "decode", "loss"
TITLES = {
    BYTES: "saved for backward, bytes a token",
    STEP: f"step by that of {LORA}",
    DECODE: f"decoding by that of the {BASE}",
    LOSS: "held-out loss",
}
VIRTUAL = 16  # tokens of prefixes and prompts
HIDDEN = 256  # of the networks that produce them
BATCH, TOKENS, LENGTHS = 1, 128, (64, 128)
PROMPT, NEW = 64, 2  # tokens, of decoding
STEPS, BATCH_SIZE, MAX_LENGTH, HELD_OUT, SEED = 30, 4, 128, 32, 0

Adapt = Callable[[Any, str], Any]
"""Takes the base model and its folder; returns the model to train."""


@dataclass(frozen=True)
class Method:
    """`base`: "nf4", "bf16", or "fp32" if the base weights train."""

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
    """One column of the table. `model` and `data`: paths instead of the demo's, as options of finetune.py."""

    column: str
    steps: int = STEPS
    model: Path | None = None
    data: Path | None = None

    @property
    def name(self) -> str:
        return f"methods-{self.column}"

    @property
    def seconds(self) -> float:
        own = {BYTES: 20.0, STEP: 25.0, DECODE: 15.0, LOSS: 15.0 + len(METHODS) * (0.5 * self.steps + 4)}
        return 15.0 + own[self.column]

    def run(self, timing: report.Timing = report.ONCE, progress: report.Progress = report.silent) -> Measured:
        found = Measured(self)
        if reason := missing("transformers peft accelerate rich tqdm" + ("" if self.model else " gguf")):
            found.absent[self.column] = reason
            return found
        progress("model")
        models = Models(self, examples.MODELS)
        columns = {BYTES: _bytes, STEP: _steps, DECODE: _decoding, LOSS: _losses}
        columns[self.column](found, models, timing, progress)
        return found


@dataclass
class Measured(report.Outcome):
    case: Case
    values: dict[str, float] = field(default_factory=dict)
    spreads: dict[str, Spread] = field(default_factory=dict)
    trained: dict[str, int] = field(default_factory=dict)
    """Parameters."""

    def cell(self, name: str) -> str:
        if name not in self.values:
            return "-"
        form = {BYTES: ",.0f", LOSS: ".3f"}.get(self.case.column, ".2f")
        return f"{self.values[name]:{form}}"

    def parts(self) -> list[str]:
        return [", ".join(f"{name} {self.cell(name)}" for name in self.values)] if self.values else []

    def data(self) -> dict[str, Any]:
        spreads = {name: report.rounded(spread) for name, spread in self.spreads.items()}
        return {"group": "methods", "values": self.values, "spreads": spreads, "trained": self.trained}

    @classmethod
    def tables(cls, outcomes: Sequence[Measured], unit: str) -> Iterator[tuple[str, str]]:
        names = report.unique(name for one in outcomes for name in one.values)
        trained = {name: count for one in outcomes for name, count in one.trained.items()}
        rows = [
            [name, f"{trained[name]:,}" if name in trained else "-", *(one.cell(name) for one in outcomes)]
            for name in names
        ]
        titles = ["", "trained", *(TITLES[one.case.column] for one in outcomes)]
        yield "methods on SmolLM2-135M", report.table(titles, rows)


class Models:
    def __init__(self, case: Case, folder: Path) -> None:
        self.lib = examples.module("finetune_model")
        self.folder = examples.module("demo_model").model_folder(case.model, folder)

    def base(self, kind: str) -> Any:
        """The base model, with the linear layers' weights in the given dtype."""
        if kind == "nf4":
            model = self.lib.load_base(self.folder, "peft_kernels")
        else:
            model = self.lib.AutoModelForCausalLM.from_pretrained(self.folder, dtype=self.lib.DTYPE)
            body = {m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
            for p in model.parameters():
                p.requires_grad_(False)
                if kind == "fp32" or p not in body:
                    p.data = p.data.float()
        model.forward = torch.autocast(self.lib.DEVICE, dtype=self.lib.DTYPE)(model.forward)
        return model

    def make(self, name: str) -> Any:
        method = METHODS[name]
        torch.manual_seed(SEED)
        model = method.adapt(self.base(method.base), str(self.folder))
        pk.patch(model)
        return model

    def training(self, name: str, found: Measured, progress: report.Progress) -> Any:
        """The model in training mode; counts its trained parameters."""
        progress(name)
        model = self.make(name).train()
        found.trained[name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return model

    def tokens(self, batch: int, length: int) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        size = self.config.vocab_size
        return torch.randint(3, size, (batch, length), generator=generator)

    @cached_property
    def config(self) -> Any:
        import transformers

        return transformers.AutoConfig.from_pretrained(self.folder)


def _bytes(found: Measured, models: Models, timing: report.Timing, progress: report.Progress) -> None:
    """From the difference between two lengths, so that fixed costs (bf16 copies of weights, a prefix) do not
    count. Without the head, which is the same for all methods."""
    for name in METHODS:
        model, saved = models.training(name, found, progress), []
        for length in LENGTHS:
            ids = models.tokens(1, length)
            run = partial(model, input_ids=ids, logits_to_keep=1, use_cache=False)
            saved.append(testing.saved_bytes(run, [*model.parameters(), *model.buffers()]))
        found.values[name] = (saved[1] - saved[0]) / (LENGTHS[1] - LENGTHS[0])
        del model, run
        gc.collect()


def _steps(found: Measured, models: Models, timing: report.Timing, progress: report.Progress) -> None:
    ids = models.tokens(BATCH, TOKENS)

    def step(model: Any) -> None:
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    runners = []
    for name in METHODS:
        model = models.training(name, found, progress)
        runners.append(harness.Contender(name, [partial(step, model)], lambda _: 0.0))
    progress("time")
    _ratios(found, harness.interleave(runners, timing), LORA)


def _decoding(found: Measured, models: Models, timing: report.Timing, progress: report.Progress) -> None:
    runners = []
    for name in (BASE, DENSE, *METHODS, KEPT):
        if name == "full fine-tuning":  # the same as the base
            continue
        progress(name)
        base = {BASE: "nf4", DENSE: "bf16"}.get(name)
        model = models.make(DORA if name == KEPT else name) if base is None else models.base(base)
        if base is not None:
            pk.patch(model)
        ids = models.tokens(1, PROMPT + NEW)
        call: Callable[[], Any] = Decoding(model.eval(), name, ids)
        if name == KEPT:
            call = partial(_keeping_norms, call)
        runners.append(harness.Contender(name, [call], lambda _: 0.0))
    progress("time")
    _ratios(found, harness.interleave(runners, timing), BASE)


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


def _ratios(found: Measured, seconds: dict[str, list[float]], yardstick: str) -> None:
    """Time / the yardstick's time, within each round."""
    for name, times in seconds.items():
        found.spreads[name] = Spread.of_ratios(times, seconds[yardstick])
        found.values[name] = found.spreads[name].median


def _losses(found: Measured, models: Models, timing: report.Timing, progress: report.Progress) -> None:
    case, lib = found.case, models.lib
    batches, validation = examples.batches(
        case.data, lib.load_tokenizer(models.folder), MAX_LENGTH, BATCH_SIZE, case.steps, SEED, HELD_OUT
    )
    for name, base in ((BASE, "nf4"), (DENSE, "bf16")):
        progress(name)
        found.values[name] = lib.loss_of(models.base(base), validation)
    for name, method in METHODS.items():
        model = models.training(name, found, progress)
        losses = lib.train(model, batches, method.lr, name, method.ahead)
        found.values[name] = lib.loss_of(model, validation, method.ahead)
        if not all(map(math.isfinite, (*losses, found.values[name]))):
            found.wrong[name] = f"losses: {losses}, held out {found.values[name]}"
        del model
        gc.collect()


def standard(dtype: str) -> list[Case]:
    return [Case(column) for column in TITLES]

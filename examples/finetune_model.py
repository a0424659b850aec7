"""The model of finetune.py: loaded in 4 bits, adapted, trained by transformers' Trainer, measured."""

from __future__ import annotations

import re
import resource
import signal
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from finetune_data import IGNORED, Encoded, in_order, prompt_text
from finetune_turns import STEPS, Turns
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    logging,
)

import peft_kernels as pk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16  # of GEMMs; everything else is fp32

# Messages of the libraries that a user of this script cannot act on.
logging.set_verbosity_error()
logging.disable_progress_bar()
warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", message=".* bytes for each value of an NF4 weight")  # the check merges


def load_tokenizer(folder: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(folder: Path, backend: str) -> nn.Module:
    """The model in 4 bits except its head, by the usual QLoRA recipe: norms, embeddings and activations in
    fp32. Run it under autocast, as `Trainer(bf16=True)` does.

    In an all-bf16 model stock PEFT adds the update to a base output rounded to bf16 and rounds again: the
    small updates of a new adapter are lost.
    """
    options: dict[str, Any] = {"dtype": DTYPE, "device_map": DEVICE}
    if backend == "bitsandbytes":
        nf4 = {
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": DTYPE,
        }
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, **nf4)
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    if backend == "peft_kernels":
        pk.quantize_model(model)
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model.config.use_cache = False
    return model


def add_lora(model: nn.Module, r: int, seed: int) -> PeftModel:
    """The model with a new adapter, which depends only on the seed."""
    torch.manual_seed(seed)
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            # PEFT rounds a new adapter to the compute dtype only over bitsandbytes. Round it over both.
            parameter.data.copy_(parameter.data.to(DTYPE))
    return adapted


def autocast() -> torch.autocast:
    """GEMMs in bf16, as under `Trainer(bf16=True)`."""
    return torch.autocast(DEVICE, dtype=DTYPE)


def response_logits(model: nn.Module, batch: dict[str, Tensor], ahead: int = 0) -> tuple[Tensor, Tensor]:
    """The logits that predict the response tokens, fp32 (tokens, vocabulary), and those tokens (tokens,).
    `ahead`: virtual tokens that the model puts before each row."""
    # The logits at position t predict token t + 1. The head is a large part of a small model's time, so it
    # computes only the positions from the first response on.
    labels = batch["labels"]
    first = int((labels != IGNORED).any(0).nonzero()[0])
    kept = torch.arange(first - 1, labels.shape[1] - 1, device=labels.device)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with autocast():
        logits = model(**inputs, logits_to_keep=kept + ahead, use_cache=False).logits
    counted = labels[:, first:] != IGNORED
    return logits[counted].float(), labels[:, first:][counted]


def make_trainer(
    model: nn.Module, tokenizer: Any, examples: list[Encoded], args: Namespace, speed: Speed
) -> Trainer:
    """The plain Trainer of transformers for both back ends. It saves checkpoints beside the adapter and uses
    the examples in the given order."""
    arguments = TrainingArguments(
        output_dir=str(args.output / "checkpoints"),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        train_sampling_strategy="sequential",
        learning_rate=args.lr,
        lr_scheduler_type="cosine",
        bf16=True,
        use_cpu=DEVICE == "cpu",
        seed=args.seed,
        save_steps=25,
        save_total_limit=1,
        logging_steps=1,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        report_to="none",
    )
    trainer = Trainer(model, arguments, DataCollatorForSeq2Seq(tokenizer), examples)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress)
    trainer.add_callback(speed)
    return trainer


def train(
    model: nn.Module, batches: list[dict[str, Tensor]], lr: float, what: str, ahead: int = 0
) -> list[float]:
    """A training loop with a progress bar, for the other examples. Returns the losses."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    rising = 0.1 if len(batches) > 10 else 0.3  # with exactly one rising step the schedule divides by 0
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=len(batches), pct_start=rising)
    losses = []
    model.train()
    with tqdm(batches, desc=what, disable=not sys.stderr.isatty()) as bar:
        for batch in bar:
            loss = F.cross_entropy(*response_logits(model, batch, ahead))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            bar.set_postfix_str(f"loss {losses[-1]:.3f}")
    return losses


def training_batches(
    examples: list[Encoded], tokenizer: Any, size: int, steps: int, seed: int
) -> list[dict[str, Tensor]]:
    """The batches of a run for `train`, in an order that depends only on the seed."""
    order = in_order(examples, size, steps, seed)
    starts = range(0, len(order), size)
    return [batch for at in starts for batch in batches_of(order[at : at + size], tokenizer, size)]


class Speed(TrainerCallback):  # type: ignore[misc]
    """Times the training steps, and between them lets another run have its turn."""

    def __init__(self, turns: Turns | None) -> None:
        self.turns, self.seconds, self.rates = turns, list[float](), list[float]()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seen = state.num_input_tokens_seen

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.turns is not None and self.seconds and len(self.seconds) % STEPS == 0:
            self.turns.swap()
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)
        self.rates.append((state.num_input_tokens_seen - self.seen) / self.seconds[-1])
        self.seen = state.num_input_tokens_seen

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.turns is not None:
            self.turns.swap()


class Progress(ProgressCallback):  # type: ignore[misc]
    """The Trainer's progress bar with the loss. The first Ctrl-C saves and stops after the step."""

    interrupted = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        super().on_train_begin(args, state, control, **more)
        self.handler = signal.signal(signal.SIGINT, self.interrupt)

    def interrupt(self, *_: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        print("\nCtrl-C: stopping after this step (again to stop at once)", file=sys.stderr)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        super().on_step_end(args, state, control, **more)
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        super().on_train_end(args, state, control, **more)
        signal.signal(signal.SIGINT, self.handler)


def batches_of(examples: list[Encoded], tokenizer: Any, size: int) -> list[dict[str, Tensor]]:
    """Batches sorted by length, padded on the right."""
    collate = DataCollatorForSeq2Seq(tokenizer)
    order = sorted(examples, key=lambda example: len(example["input_ids"]))
    chunks = (order[start : start + size] for start in range(0, len(order), size))
    return [{name: part.to(DEVICE) for name, part in collate(chunk).items()} for chunk in chunks]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model.eval()` without grad inside the context, except for bitsandbytes' layers.

    In eval mode on some CPUs bitsandbytes repacks a weight and rounds its scales to bf16, and quantises again
    when training continues: evaluating would change the base. Both modes compute the same.
    """
    training = model.training
    model.eval()
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.training = True
    with torch.no_grad():
        yield
    model.train(training)


def logits_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with evaluating(model):
        return response_logits(model, batch)[0]


def loss_of(model: nn.Module, batches: list[dict[str, Tensor]], ahead: int = 0) -> float:
    """Mean loss over all response tokens of the batches."""
    with evaluating(model):
        found = [
            F.cross_entropy(*response_logits(model, batch, ahead), reduction="none") for batch in batches
        ]
    return float(torch.cat(found).mean())


def generate(model: Any, tokenizer: Any, prompt: str, before: Any = (), max_new_tokens: int = 24) -> str:
    """The model's greedy answer on one line."""
    text = prompt_text(prompt, tokenizer, before)
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt").to(model.device)
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "use_cache": True}
    with evaluating(model), autocast():
        ids = model.generate(**inputs, **options, pad_token_id=tokenizer.pad_token_id)
    answer = tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return " ".join(str(answer).split())


def reset_peak_memory() -> None:
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # if permitted, loading the model does not count
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb() -> float:
    """Peak memory of the GPU's allocator, or of the process on a CPU, in MB."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    if (status := Path("/proc/self/status")).exists():
        return int(re.findall(r"VmHWM:\s*(\d+)", status.read_text())[0]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes on macOS

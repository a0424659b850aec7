"""Training for finetune.py: encode examples, plan batches, step, evaluate, save and resume."""

from __future__ import annotations

import math
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from finetune_data import Example, UserError
from finetune_model import trainable_parameters
from peft import PeftModel
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label of the positions that the loss leaves out
STATE_FILE = "trainer_state.pt"
STATE_VERSION = 1


@dataclass(frozen=True)
class Encoded:
    ids: list[int]
    prompt_length: int


@dataclass(frozen=True)
class Batch:
    ids: Tensor  # (examples, longest), padded on the right
    mask: Tensor  # (examples, longest): 1 where there is a token
    labels: Tensor  # (examples, longest): the token at responses, else IGNORED
    first_label: int  # no example has a label before this position

    @property
    def tokens(self) -> int:
        return int(self.mask.sum())


def prompt_text(prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompt as the model expects it: by its chat template if it has one."""
    if tokenizer.chat_template is None:
        return f"{tokenizer.bos_token or ''}{prompt}\n\n"
    turns = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def encode(examples: list[Example], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Encoded]:
    """Tokenise; responses are cut to fit, and prompts that reach `max_length` alone are left out."""
    if not examples:
        return []
    prompts = tokenizer(
        [prompt_text(e.prompt, tokenizer) for e in examples], add_special_tokens=False
    ).input_ids
    responses = tokenizer([e.response for e in examples], add_special_tokens=False).input_ids
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    return [
        Encoded((prompt + response + end)[:max_length], len(prompt))
        for prompt, response in zip(prompts, responses, strict=True)
        if len(prompt) < max_length
    ]


def collate(examples: list[Encoded], pad_id: int, device: torch.device) -> Batch:
    longest = max(len(e.ids) for e in examples)
    ids = torch.full((len(examples), longest), pad_id)
    mask = torch.zeros((len(examples), longest), dtype=torch.long)
    labels = torch.full((len(examples), longest), IGNORED)
    for row, example in enumerate(examples):
        length = len(example.ids)
        ids[row, :length] = torch.tensor(example.ids)
        mask[row, :length] = 1
        labels[row, example.prompt_length : length] = ids[row, example.prompt_length : length]
    return Batch(ids.to(device), mask.to(device), labels.to(device), min(e.prompt_length for e in examples))


def plan_batches(lengths: list[int], batch_size: int, count: int, seed: int) -> list[list[int]]:
    """The examples of each of `count` batches: the whole order of a run, from the seed alone.

    Every epoch is shuffled, then sorted by length within pools of several batches, so that a batch holds
    examples of like length and little padding; then the batches of a pool are shuffled.
    """
    rng = random.Random(seed)
    batch_size = min(batch_size, len(lengths))
    batches: list[list[int]] = []
    while len(batches) < count:
        order = list(range(len(lengths)))
        rng.shuffle(order)
        pool_size = 16 * batch_size
        for start in range(0, len(order), pool_size):
            pool = sorted(order[start : start + pool_size], key=lambda index: lengths[index])
            in_pool = [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
            rng.shuffle(in_pool)
            # A remainder waits for its next epoch.
            batches += [batch for batch in in_pool if len(batch) == batch_size]
    return batches[:count]


def response_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The logits that predict the response tokens, fp32 (tokens, vocabulary), and those tokens (tokens,)."""
    # The logits at position t predict token t + 1. lm_head is a large part of a small model's time, so it
    # sees only the positions from the first response on.
    kept = torch.arange(batch.first_label - 1, batch.ids.shape[1] - 1, device=batch.ids.device)
    logits = model(
        input_ids=batch.ids, attention_mask=batch.mask, logits_to_keep=kept, use_cache=False
    ).logits
    labels = batch.labels[:, batch.first_label :]
    counted = labels != IGNORED
    return logits[counted].float(), labels[counted]


def response_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy over the response tokens, a scalar."""
    return F.cross_entropy(*response_logits(model, batch))


@torch.no_grad()
def evaluate(model: nn.Module, batches: list[Batch]) -> float:
    """Mean loss over all response tokens of the batches."""
    total, count = 0.0, 0
    with evaluation_mode(model):
        for batch in batches:
            labels = int((batch.labels != IGNORED).sum())
            total += float(response_loss(model, batch)) * labels
            count += labels
    return total / count


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """`model.eval()` for a while, except for bitsandbytes' layers.

    In eval mode on a CPU with AVX512-BF16, bitsandbytes repacks a weight and rounds its scales to bf16, and
    going back to training quantises them anew: evaluating would change the base. Both modes mean the same.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    for module in modes:
        if type(module).__name__ == "Linear4bit" and type(module).__module__.startswith("bitsandbytes"):
            module.training = True
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@dataclass
class Progress:
    """What has been trained so far: with adapter and optimiser state, all that a run needs to go on."""

    run: dict[str, Any]  # the settings that must be the same on --resume
    start: str  # fingerprint of the first adapter and the batches
    loss_before: float
    sample_before: str
    losses: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def step(self) -> int:
        return len(self.losses)

    @property
    def tokens_per_second(self) -> float:
        return sum(self.tokens) / max(sum(self.seconds), 1e-9)


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def make_optimizer(model: nn.Module) -> torch.optim.AdamW:
    parameters = list(trainable_parameters(model).values())
    return torch.optim.AdamW(
        parameters, lr=0.0, weight_decay=0.0, fused=parameters[0].device.type in ("cpu", "cuda")
    )


def train(
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    progress: Progress,
    *,
    lr: float,
    warmup: int,
    save: Callable[[], None],
    save_every: int,
) -> bool:
    """Train on the batches from `progress.step` on; False if Ctrl-C ended it early. Saved either way."""
    parameters = list(trainable_parameters(model).values())
    steps = len(batches)
    model.train()
    bar = tqdm(
        total=steps,
        initial=progress.step,
        desc="training",
        unit="step",
        mininterval=0.5,
        dynamic_ncols=True,
        bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
    )
    with _interrupt_after_step() as interrupted, bar:
        while progress.step < steps and not interrupted():
            start = time.perf_counter()
            batch = batches[progress.step]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(progress.step, steps, lr, warmup)
            loss = response_loss(model, batch)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            progress.losses.append(loss.item())  # waits for the device, so the time below is the step's
            progress.seconds.append(time.perf_counter() - start)
            progress.tokens.append(batch.tokens)
            if not math.isfinite(progress.losses[-1]):
                raise UserError(
                    f"the loss became {progress.losses[-1]} at step {progress.step}; try a smaller --lr"
                )
            bar.set_postfix_str(f"loss {progress.losses[-1]:.3f}, {progress.tokens_per_second:.0f} tokens/s")
            bar.update()
            if progress.step % save_every == 0 and progress.step < steps:
                save()
        save()
        return not interrupted() or progress.step == steps


@contextmanager
def _interrupt_after_step() -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C end training between two steps, never in an update; a second stops at once."""
    pressed = False

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        tqdm.write("Ctrl-C: stopping after this step (again to stop at once)")

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, previous)


def save_adapter(
    model: PeftModel, optimizer: torch.optim.Optimizer, progress: Progress, folder: Path
) -> None:
    """Write the adapter in PEFT's format, the trainer's state beside it; the folder changes all at once."""
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(str(unfinished))
    state = {
        "version": STATE_VERSION,
        "progress": asdict(progress),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }
    torch.save(state, unfinished / STATE_FILE)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def read_state(folder: Path, run: dict[str, Any]) -> dict[str, Any]:
    """Read the trainer's state of an earlier run and check that it was the same run.

    Raises:
        UserError: no state there, an unreadable one, or one of a run with other settings.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        raise UserError(f"--resume: {path} does not exist: nothing to go on from")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = state["progress"]["run"]
        version = state["version"]
    except Exception as error:  # torch.load raises anything from KeyError to UnpicklingError on foreign bytes
        raise UserError(
            f"--resume: {path} is no trainer state ({type(error).__name__}: damaged or foreign)"
        ) from None
    if version != STATE_VERSION:
        raise UserError(f"--resume: {path} has version {version}, and this script reads {STATE_VERSION}")
    for name in run:
        if saved.get(name) != run[name]:
            raise UserError(f"--resume: {path} was trained with {name} {saved.get(name)}, not {run[name]}")
    return dict(state)


def restore(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> Progress:
    """Put back the optimiser's state and the random generators, and return the progress."""
    try:
        optimizer.load_state_dict(state["optimizer"])
    except ValueError as error:
        raise UserError(f"--resume: the optimiser's state does not fit the adapter: {error}") from None
    torch.set_rng_state(state["rng"])
    if state["cuda_rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    return Progress(**state["progress"])

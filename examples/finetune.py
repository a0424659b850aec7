#!/usr/bin/env python3
"""QLoRA fine-tuning from start to finish on peft_kernels: the main job of this project, run by `make demo`.

Quantises a model to NF4, adds LoRA through PEFT, patches in the fused kernels, trains, reports, saves the
adapter, and checks that the trained, the reloaded and the merged model agree. Without arguments it teaches
SmolLM2-135M-Instruct to summarise functions, from the docstrings of Python's own standard library:

    python examples/finetune.py
    python examples/finetune.py --compare         # beside stock PEFT + bitsandbytes
    python examples/finetune.py --resume          # go on after Ctrl-C
    python examples/finetune.py --model ./my-llama --data pairs.jsonl --steps 500 --output my-adapter

This file is the course of a run. Its parts: finetune_cli.py (arguments), finetune_data.py (examples),
finetune_model.py (load, quantise, LoRA), finetune_train.py (batches, steps, checkpoints), finetune_check.py
(the three-way check, measurements), finetune_report.py (tables and picture).
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import signal
import statistics
import subprocess
import sys
import warnings
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_cli import parse_arguments
from finetune_data import Example, UserError, load_examples, split
from finetune_report import (
    Metrics,
    Stages,
    plot_comparison,
    plot_run,
    print_comparison,
    print_report,
    read_metrics,
    write_metrics,
)

# The other parts import torch, transformers and PEFT, which takes seconds: that happens inside the functions
# that need them, so that --help and mistyped arguments answer at once.
if TYPE_CHECKING:
    import torch
    from finetune_train import Batch, Encoded, Progress
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

EXIT_OK, EXIT_CHECK_FAILED, EXIT_USER_ERROR, EXIT_INTERRUPTED = 0, 1, 2, 130
REPOSITORY = Path(__file__).resolve().parent.parent


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(argv)
    try:
        require_packages(args)
        args.output.mkdir(parents=True, exist_ok=True)
        return compare(args, argv) if args.compare else run(args)
    except (UserError, OSError) as error:
        print(f"finetune.py: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("\nfinetune.py: stopped", file=sys.stderr)
        return EXIT_INTERRUPTED


def require_packages(args: Namespace) -> None:
    """Fail with the command to run if something optional is not installed."""
    if importlib.util.find_spec("peft_kernels") is None:
        sys.path.append(str(REPOSITORY))  # built in place, not installed
    needed = {"torch", "transformers", "peft", "accelerate", "tqdm", args.backend}
    if args.compare:
        needed |= {"peft_kernels", "bitsandbytes"}
    missing = sorted(name for name in needed if importlib.util.find_spec(name) is None)
    if missing:
        extra = "bench" if "bitsandbytes" in missing else "demo"
        raise UserError(f"not installed: {', '.join(missing)}; pip install peft_kernels[{extra}]")


def run(args: Namespace) -> int:
    """Train, measure, check and report; the exit code."""
    stages = Stages()
    setup = prepare(args, stages)

    from finetune_check import PeakMemory, fingerprint, generate
    from finetune_train import Progress, evaluate, make_optimizer, read_state, restore, save_adapter, train

    adapter = args.output / "adapter"
    state = read_state(adapter, setup.settings) if args.resume else None
    model = build_model(args, setup, adapter if args.resume else None)
    optimizer = make_optimizer(model)
    stages.done("model", patch(args, model))

    if state is not None:
        progress = restore(state, optimizer)
    else:
        progress = Progress(
            run=setup.settings,
            start=fingerprint(model, setup.batches),
            loss_before=evaluate(model, setup.validation),
            sample_before=generate(model, setup.tokenizer, setup.sample.prompt, args.sample_tokens),
        )
    stages.done("before", f"validation loss {progress.loss_before:.3f}")

    memory = PeakMemory(setup.device)
    memory.reset()
    finished = train(
        model,
        optimizer,
        setup.batches,
        progress,
        lr=args.lr,
        warmup=round(args.warmup * args.steps),
        save=lambda: save_adapter(model, optimizer, progress, adapter),
        save_every=args.save_every,
    )
    peak_memory = memory.megabytes()
    stages.done("training", f"{progress.step} of {args.steps} steps, adapter saved in {adapter}")
    if not finished:
        print("to go on from there: the same command with --resume")
        return EXIT_INTERRUPTED

    loss_after = evaluate(model, setup.validation)
    sample_after = generate(model, setup.tokenizer, setup.sample.prompt, args.sample_tokens)
    stages.done("after", f"validation loss {loss_after:.3f}")

    metrics = collect_metrics(args, setup, model, progress, loss_after, sample_after, peak_memory)
    if args.backend == "peft_kernels" and not args.no_check:
        logits = adapter_on_and_off(model, setup.validation[0])
        del model, optimizer  # room for a second base
        metrics["check"] = check_three_ways(args, setup, *logits, loss_after)
        stages.done("check", "trained, reloaded and merged adapter compared")
    metrics["stage_seconds"] = stages.seconds

    files = [adapter, args.output / "metrics.json", args.output / "loss.png"]
    write_metrics(metrics, files[1])
    plot_run(metrics, files[2])
    print_report(metrics)
    print("written: " + ", ".join(map(str, files)))
    return EXIT_CHECK_FAILED if metrics.get("check", {}).get("problems") else EXIT_OK


@dataclass(frozen=True)
class Setup:
    """What a run works on."""

    device: torch.device
    dtype: torch.dtype
    folder: Path  # of the base model
    tokenizer: PreTrainedTokenizerBase
    batches: list[Batch]  # one a step
    validation: list[Batch]
    sample: Example
    settings: dict[str, Any]  # what must not change on --resume


def prepare(args: Namespace, stages: Stages) -> Setup:
    """Examples, tokenizer and batches: all that depends on the arguments alone."""
    examples, held_out = split(load_examples(args.data))
    held_out = held_out[: args.val_examples]
    stages.done("data", f"{len(examples):,} examples to train on, {len(held_out)} to validate")

    quiet_libraries()
    import torch
    import transformers
    from finetune_model import base_model_folder, load_tokenizer
    from finetune_train import collate, encode, plan_batches

    if args.threads:
        torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    is_gpu = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if is_gpu else f"{torch.get_num_threads()} CPU threads"
    stages.done("imports", f"torch {torch.__version__}, transformers {transformers.__version__}, {where}")

    folder = base_model_folder(args.model, args.output)
    tokenizer = load_tokenizer(folder)
    training = encode(examples, tokenizer, args.max_length)
    validation = sorted(encode(held_out, tokenizer, args.max_length), key=lambda example: len(example.ids))
    if not training or not validation:
        raise UserError(f"--max-length: the prompts alone reach {args.max_length} tokens")
    left_out = len(examples) + len(held_out) - len(training) - len(validation)
    note = f", {left_out} examples left out (prompt of {args.max_length} tokens or more)" if left_out else ""
    stages.done("base", f"{folder}{note}")

    def batch(chosen: list[Encoded]) -> Batch:
        return collate(chosen, tokenizer.pad_token_id, device)

    size = args.batch_size
    plan = plan_batches([len(example.ids) for example in training], size, args.steps, args.seed)
    return Setup(
        device=device,
        dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype],
        folder=folder,
        tokenizer=tokenizer,
        batches=[batch([training[index] for index in indices]) for indices in plan],
        validation=[batch(validation[start : start + size]) for start in range(0, len(validation), size)],
        sample=held_out[0],
        settings={
            "model": str(args.model or folder.name),
            "val_examples": args.val_examples,
            "batch_size": size,
            "max_length": args.max_length,
            "lr": args.lr,
            "r": args.r,
            "alpha": args.alpha,
            "dropout": args.dropout,
            "seed": args.seed,
            "dtype": args.dtype,
            "data_sha256": hashlib.sha256(repr([example.ids for example in training]).encode()).hexdigest(),
        },
    )


def quiet_libraries() -> None:
    """Keep back what the libraries print while loading and no user of this script can act upon."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def choose_device(name: str | None) -> torch.device:
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UserError(f"--device: expected cpu, cuda or cuda:N, got {name}") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device: expected cpu, cuda or cuda:N, got {name}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device: {name} was asked for, and torch sees {torch.cuda.device_count()} GPUs")
    return device


def build_model(args: Namespace, setup: Setup, adapter: Path | None, trainable: bool = True) -> PeftModel:
    """The quantised base with a fresh adapter, or with the one saved in a folder."""
    from finetune_model import add_lora, load_lora, load_quantised

    base = load_quantised(setup.folder, args.backend, setup.dtype, setup.device)
    if adapter is not None:
        return load_lora(base, adapter, trainable)
    return add_lora(base, args.r, args.alpha, args.dropout, args.seed, setup.dtype)


def patch(args: Namespace, model: PeftModel) -> str:
    """The one line that peft_kernels asks of a user's own script; returns what it did."""
    if args.backend != "peft_kernels" or args.no_patch:
        return f"{args.backend}, not patched"
    import peft_kernels as pk

    summary, *notes = str(pk.patch(model)).splitlines()
    return summary + (f"; {len(notes)} notes, the first: {notes[0]}" if notes else "")


def collect_metrics(
    args: Namespace,
    setup: Setup,
    model: PeftModel,
    progress: Progress,
    loss_after: float,
    sample_after: str,
    peak_memory: float,
) -> Metrics:
    """The content of metrics.json."""
    trained, total = model.get_nb_trainable_parameters()
    return {
        "backend": args.backend + (" unpatched" if args.no_patch else ""),
        "device": str(setup.device),
        "model": str(setup.folder),
        "run": progress.run,
        "start": progress.start,
        "loss_before": progress.loss_before,
        "loss_after": loss_after,
        "losses": progress.losses,
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        "tokens_per_second": progress.tokens_per_second,
        "seconds_per_step": statistics.median(progress.seconds),
        "peak_memory_mb": peak_memory,
        "trainable_parameters": trained,
        "total_parameters": total,
        "sample": {
            "prompt": setup.sample.prompt,
            "reference": setup.sample.response,
            "before": progress.sample_before,
            "after": sample_after,
        },
    }


def adapter_on_and_off(model: PeftModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits of the trained model, and of its base alone."""
    from finetune_check import logits_of

    on = logits_of(model, batch)
    with model.disable_adapter():
        return on, logits_of(model, batch)


def check_three_ways(
    args: Namespace, setup: Setup, trained: Tensor, base_only: Tensor, loss: float
) -> dict[str, Any]:
    """Compare the trained model's logits and validation loss with those of the other forms of its adapter:
    saved and loaded onto a fresh base, merged into that, and merged back into NF4."""
    from finetune_check import ThreeWayCheck, logit_error, logits_of
    from finetune_train import evaluate

    from peft_kernels.integrations.peft import merge_and_unload

    batch, adapter = setup.validation[0], args.output / "adapter"
    model: Any = build_model(args, setup, adapter, trainable=False)
    patch(args, model)
    reloaded = logits_of(model, batch)
    model = model.merge_and_unload()
    merged, merged_loss = logits_of(model, batch), evaluate(model, setup.validation)
    del model  # one at a time in memory
    model = merge_and_unload(build_model(args, setup, adapter, trainable=False), quantize=True)
    return ThreeWayCheck(
        reloaded=logit_error(trained, reloaded),
        merged=logit_error(trained, merged),
        merged_nf4=logit_error(trained, logits_of(model, batch)),
        base_only=logit_error(trained, base_only),
        losses={"trained": loss, "merged": merged_loss, "merged_nf4": evaluate(model, setup.validation)},
    ).as_dict()


def compare(args: Namespace, argv: list[str]) -> int:
    """Run both back ends, each in a process with a peak memory of its own, and set them side by side."""
    quiet_libraries()
    from finetune_model import base_model_folder

    folder = base_model_folder(args.model, args.output)  # once, and not in the memory of the first run
    results: list[Metrics] = []
    for backend in ("peft_kernels", "bitsandbytes"):
        output = args.output / backend
        unwanted = {"--compare", "--no-patch"} if backend == "bitsandbytes" else {"--compare"}
        own = ["--model", str(folder), "--backend", backend, "--output", str(output)]
        print(f"--- {backend}", flush=True)
        code = run_child([sys.executable, __file__, *(word for word in argv if word not in unwanted), *own])
        if code != EXIT_OK:
            print(f"finetune.py: the run on {backend} ended with exit code {code}", file=sys.stderr)
            return code
        results.append(read_metrics(output / "metrics.json"))

    ours, theirs = results
    if ours["start"] != theirs["start"]:
        print("CHECK FAILED: the two runs did not start with the same adapter and batches")
        return EXIT_CHECK_FAILED
    agree = print_comparison(ours, theirs)
    picture = args.output / "loss.png"
    plot_comparison(ours, theirs, picture)
    write_metrics({"peft_kernels": ours, "bitsandbytes": theirs}, args.output / "comparison.json")
    print(f"written: {picture}, {args.output / 'comparison.json'}")
    return EXIT_OK if agree else EXIT_CHECK_FAILED


def run_child(command: list[str]) -> int:
    """Run a command. Ctrl-C reaches the child too, which then saves its adapter: wait for it."""
    previous = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        return subprocess.Popen(command).wait()
    finally:
        signal.signal(signal.SIGINT, previous)


if __name__ == "__main__":
    sys.exit(main())

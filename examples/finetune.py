#!/usr/bin/env python3
"""QLoRA fine-tuning from start to finish with peft_kernels, run by `make demo`.

Quantises a model to NF4, adds LoRA through PEFT, patches in the fused kernels, trains with transformers'
Trainer, reports, saves the adapter, and checks that the trained, the reloaded and the merged model agree.
Without arguments it teaches SmolLM2-135M-Instruct to summarise functions, from the docstrings of Python's own
standard library:

    python examples/finetune.py
    python examples/finetune.py --compare         # beside stock PEFT + bitsandbytes
    python examples/finetune.py --resume          # continue after Ctrl-C
    python examples/finetune.py --model ./my-llama --data pairs.jsonl --steps 500 --output my-adapter

This file has the stages of a run; finetune_data.py has the examples, demo_model.py and finetune_model.py the
model and its training, finetune_turns.py the turns of --compare, finetune_report.py tables and pictures. To
write your own script, copy qlora_sft.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from demo_model import model_folder
from finetune_data import FORMS, UserError, docstring_examples, encode, in_order, read_jsonl, split
from finetune_turns import STEPS, inherited, run_in_turns

# torch, transformers and PEFT take seconds to import: functions import them when needed, so that --help and
# wrong arguments are answered at once.

BACKENDS = ("peft_kernels", "bitsandbytes")
EXIT_OK, EXIT_CHECK_FAILED, EXIT_USER_ERROR, EXIT_INTERRUPTED = 0, 1, 2, 130
VALIDATION_EXAMPLES = 64
# Relative RMS difference of logits at most. The reloaded model has the same values and runs the same kernels,
# so 0 is expected; a single different bf16 rounding causes 1e-2 after thirty layers. Merging rounds the sum
# of weight and update to bf16 again, which gives 0.014 to 0.03 on SmolLM2-135M; without the adapter it is
# 0.43 to 0.53. The model merged in 16 bits and then quantised has other roundings in every weight: 0.14.
LIMITS = {"reloaded": 1e-3, "merged": 0.08, "merged, then NF4": 0.25}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(argv)
    return run_or_tell("finetune.py", args, lambda args: compare(args, argv) if args.compare else run(args))


def finish(output: Path, written: str, metrics: dict[str, Any], problems: Sequence[str]) -> int:
    """Writes metrics.json and reports problems. Returns the exit status."""
    (output / "metrics.json").write_text(json.dumps(metrics, indent=1), encoding="utf-8")
    print(f"written to {output}: {written}, metrics.json")
    for problem in problems:
        print(f"CHECK FAILED: {problem}")
    return EXIT_CHECK_FAILED if problems else EXIT_OK


def run_or_tell(script: str, args: argparse.Namespace, run: Callable[[argparse.Namespace], int]) -> int:
    """Makes the output folder and runs `run`; user errors and Ctrl-C are reported in one line. Returns the
    exit status."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs on import
    try:
        require_packages(args)
        args.output.mkdir(parents=True, exist_ok=True)
        return run(args)
    except (UserError, OSError) as error:
        print(f"{script}: error: {str(error).splitlines()[0]}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print(f"\n{script}: stopped", file=sys.stderr)
        return EXIT_INTERRUPTED


def require_packages(args: argparse.Namespace) -> None:
    """Fails with the pip command if something is not installed."""
    if importlib.util.find_spec("peft_kernels") is None:
        sys.path.append(str(Path(__file__).resolve().parent.parent))  # not installed
    needed = ["torch", "peft_kernels", "transformers", "peft", "accelerate", "tqdm", "rich"]
    needed += ["bitsandbytes"] if args.compare or args.backend == "bitsandbytes" else []
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        extra = "bench" if "bitsandbytes" in missing else "demo"
        raise UserError(f"not installed: {', '.join(missing)}; pip install peft_kernels[{extra}]")


def run(args: argparse.Namespace) -> int:
    """Trains, measures, checks and reports. Returns the exit status."""
    turns = inherited()
    if turns is not None:
        turns.wait()
    stage = Stages(args.backend if turns is not None else "")
    examples, held_out = split(read_jsonl(args.data) if args.data else docstring_examples())
    sample, held_out = held_out[0], held_out[:VALIDATION_EXAMPLES]
    stage("data", f"{len(examples):,} examples to train on, {len(held_out)} to validate")

    print("loading torch and the model, which can take half a minute the first time", flush=True)
    import finetune_model as lib
    import finetune_report as report
    import torch

    import peft_kernels as pk

    folder = model_folder(args.model, args.output)
    tokenizer = lib.load_tokenizer(folder)
    training = in_order(encode(examples, tokenizer, args.max_length), args.batch_size, args.steps, args.seed)
    validation = lib.batches_of(encode(held_out, tokenizer, args.max_length), tokenizer, args.batch_size)
    stage("base", f"{folder}, torch {torch.__version__} on {lib.DEVICE}, {torch.get_num_threads()} threads")

    model = lib.add_lora(lib.load_base(folder, args.backend), args.r, args.seed)
    ours = args.backend == "peft_kernels"
    stage("model", f"NF4 by {args.backend}, LoRA with r={args.r}")
    if ours:
        print(pk.patch(model), flush=True)

    settings = {name: str(value) for name, value in vars(args).items() if name not in ("resume", "output")}
    if args.resume:
        start = read_start(args.output / "start.json", settings)
    else:
        loss, answer = (
            lib.loss_of(model, validation),
            lib.generate(model, tokenizer, sample.prompt, sample.before),
        )
        start = {"settings": settings, "loss": loss, "sample": answer}
        (args.output / "start.json").write_text(json.dumps(start), encoding="utf-8")
    stage("before", f"validation loss {start['loss']:.3f}")

    lib.reset_peak_memory()
    speed = lib.Speed(turns)
    trainer = lib.make_trainer(model, tokenizer, training, args, speed)
    trainer.train(resume_from_checkpoint=args.resume)
    peak = lib.peak_memory_mb()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    losses = [entry["loss"] for entry in steps]
    stage(
        "training", f"{len(losses)} of {args.steps} steps, of {statistics.median(speed.seconds):.2f} s each"
    )
    if len(losses) < args.steps:
        print("to continue: the same command with --resume")
        return EXIT_INTERRUPTED
    adapter = args.output / "adapter"
    model.save_pretrained(adapter)

    trained, total = model.get_nb_trainable_parameters()
    metrics = {
        "backend": args.backend,
        "model": str(folder),
        "settings": settings,
        "loss_before": start["loss"],
        "loss_after": lib.loss_of(model, validation),
        "losses": losses,
        "tokens_per_second": statistics.median(speed.rates),
        "seconds_per_step": statistics.median(speed.seconds),
        "peak_memory_mb": peak,
        "trainable_parameters": trained,
        "total_parameters": total,
        "sample": {
            "prompt": sample.prompt,
            "reference": sample.response,
            "before": start["sample"],
            "after": lib.generate(model, tokenizer, sample.prompt, sample.before),
        },
    }
    stage("after", f"validation loss {metrics['loss_after']:.3f}, adapter saved in {adapter}")
    if ours:
        logits = lib.logits_of(model, validation[0])
        with model.disable_adapter():
            without = lib.logits_of(model, validation[0])
        del model, trainer  # frees memory for a second base
        metrics["check"] = check(folder, adapter, validation, logits)
        metrics["check"]["forms"]["base only"] = distance(logits, without)
        stage("check", "trained, reloaded and merged adapter compared")
    (args.output / "metrics.json").write_text(json.dumps(metrics, indent=1), encoding="utf-8")
    report.print_run(metrics)
    report.plot([metrics], args.output / "loss.png")
    print(f"written to {args.output}: adapter, metrics.json, loss.png")
    return EXIT_CHECK_FAILED if metrics.get("check", {}).get("problems") else EXIT_OK


def check(folder: Path, adapter: Path, validation: list[Any], trained: Any) -> dict[str, Any]:
    """Compares the trained model's logits with those of its adapter reloaded onto a fresh base, merged into
    it, and merged into the 16-bit model that is then quantised."""
    import finetune_model as lib

    import peft_kernels as pk

    def measure(model: Any) -> dict[str, float]:
        return distance(trained, lib.logits_of(model, validation[0])) | {
            "loss": lib.loss_of(model, validation)
        }

    model = lib.PeftModel.from_pretrained(lib.load_base(folder, "peft_kernels"), adapter)
    pk.patch(model)
    forms = {"reloaded": measure(model), "merged": measure(model.merge_and_unload())}
    del model  # one at a time in memory
    # Not the NF4 base: its weights lie on the 4-bit grid, and most updates are too small to leave it.
    base = lib.AutoModelForCausalLM.from_pretrained(folder, dtype=lib.DTYPE, device_map=lib.DEVICE)
    merged = lib.PeftModel.from_pretrained(base, adapter).merge_and_unload()
    pk.quantize_model(merged)
    forms["merged, then NF4"] = measure(merged)
    return {"forms": forms, "problems": problems(forms)}


def distance(expected: Any, got: Any) -> dict[str, float]:
    """Distance between logits (tokens, vocabulary), without the mean of each row, which softmax ignores."""
    expected, got = (logits - logits.mean(dim=-1, keepdim=True) for logits in (expected, got))
    return {
        "relative_rms": float((got - expected).norm() / expected.norm()),
        "same_top_token": float((expected.argmax(-1) == got.argmax(-1)).float().mean()),
    }


def problems(forms: dict[str, dict[str, float]]) -> list[str]:
    """A line for each form of the adapter beyond its limit; NaN is beyond every limit."""
    return [
        f"the {form} model differs from the trained one: relative RMS error {found['relative_rms']:.2e}"
        for form, found in forms.items()
        if not (found["relative_rms"] <= LIMITS[form] and found["loss"] < float("inf"))
    ]


def read_start(path: Path, settings: dict[str, str]) -> dict[str, Any]:
    """The metrics of an earlier run's start, if it had the same settings."""
    try:
        start: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--resume: there is no run to continue: {path}: {error}") from None
    if start["settings"] != settings:
        raise UserError(f"--resume: the run in {path.parent} had other settings: {start['settings']}")
    return start


class Stages:
    """Prints a line with the seconds taken at the end of each stage, and the run if there are two."""

    def __init__(self, run: str = "") -> None:
        self.run = f"{run:<13}" if run else ""
        self.start = time.perf_counter()

    def __call__(self, name: str, text: str) -> None:
        now = time.perf_counter()
        print(f"{self.run}{name:<10} {text} ({now - self.start:.1f} s)", flush=True)
        self.start = now


def compare(args: argparse.Namespace, argv: list[str]) -> int:
    """Runs both back ends, each in its own process and a few steps in turn, and compares them."""
    from finetune_report import plot, print_comparison

    folder = model_folder(args.model, args.output)  # once, and not in the first run's process
    arguments = [word for word in argv if word != "--compare"]
    outputs = [args.output / backend for backend in BACKENDS]
    own = [["--backend", b, "--output", str(o)] for b, o in zip(BACKENDS, outputs, strict=True)]
    print(f"{' and '.join(BACKENDS)} train in turns, {STEPS} steps at a time", flush=True)
    if code := run_in_turns(
        [[sys.executable, __file__, *arguments, "--model", str(folder), *words] for words in own]
    ):
        print(f"finetune.py: a run ended with exit code {code}", file=sys.stderr)
        return code
    results = [json.loads((output / "metrics.json").read_text(encoding="utf-8")) for output in outputs]
    plot(results, args.output / "loss.png")
    print(f"written: {args.output / 'loss.png'}")
    agree = print_comparison(*results)
    return EXIT_OK if agree else EXIT_CHECK_FAILED


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Exits with code 2 and one sentence on a wrong argument."""
    parser = argparse.ArgumentParser(
        prog="finetune.py",
        description="Fine-tune a causal language model with QLoRA on peft_kernels.",
        epilog="Exit code: 0 done, 1 a check failed, 2 a wrong argument or file, 130 stopped by Ctrl-C.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", type=Path, metavar="PATH", help="a transformers model folder (SmolLM2-135M-Instruct)")
    add("--data", type=Path, metavar="FILE.jsonl", help=f"lines of {FORMS}")
    add("--output", type=Path, default=Path("demo-output"), metavar="FOLDER", help="(demo-output)")
    add("--resume", action="store_true", help="continue from the last checkpoint in the output folder")
    add("--compare", action="store_true", help="train stock PEFT + bitsandbytes too, in turns")
    add("--backend", choices=BACKENDS, default=BACKENDS[0], help="library of the 4-bit layers (peft_kernels)")
    add("--steps", type=positive, default=50, metavar="N", help="optimiser steps (50)")
    add("--batch-size", type=positive, default=8, metavar="N", help="examples a step (8)")
    add("--max-length", type=positive, default=256, metavar="N", help="tokens of an example (256)")
    add("--lr", type=fraction, default=5e-4, metavar="X", help="peak learning rate of AdamW (0.0005)")
    add("--r", type=positive, default=16, metavar="N", help="rank of LoRA; alpha is twice as much (16)")
    add(
        "--seed", type=int, default=0, metavar="N", help="of the adapter's initial values and the batches (0)"
    )
    args = parser.parse_args(argv)
    if args.compare and args.resume:
        parser.error("argument --resume: not allowed with --compare, whose two runs start afresh")
    return args


def fraction(text: str) -> float:
    if not re.fullmatch(r"[\d.e-]+", text) or not 0 < float(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, got {text}")
    return float(text)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())

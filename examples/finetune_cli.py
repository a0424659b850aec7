"""The arguments of finetune.py."""

from __future__ import annotations

import argparse
from pathlib import Path


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Exits with code 2 and one sentence on a wrong argument."""
    parser = argparse.ArgumentParser(
        prog="finetune.py",
        description="Fine-tune a causal language model with QLoRA on peft_kernels.",
        epilog="Exit code: 0 done, 1 a check failed, 2 a wrong argument or file, 130 stopped by Ctrl-C.",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )

    files = parser.add_argument_group("files")
    files.add_argument(
        "--model",
        type=Path,
        metavar="PATH",
        help="a local transformers model folder or .gguf file (without it: SmolLM2-135M-Instruct)",
    )
    files.add_argument(
        "--data",
        type=Path,
        metavar="FILE.jsonl",
        help='lines of {"prompt": "...", "response": "..."} (without it: docstrings of the standard library)',
    )
    files.add_argument(
        "--output", type=Path, default=Path("demo-output"), metavar="FOLDER", help="where to write"
    )
    files.add_argument("--resume", action="store_true", help="go on from the adapter in the output folder")

    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=positive, default=50, metavar="N", help="optimiser steps in all")
    training.add_argument("--batch-size", type=positive, default=8, metavar="N", help="examples a step")
    training.add_argument(
        "--max-length",
        type=positive,
        default=256,
        metavar="N",
        help="tokens of an example, prompt and response",
    )
    training.add_argument(
        "--lr", type=positive_float, default=5e-4, metavar="X", help="peak learning rate of AdamW"
    )
    training.add_argument(
        "--warmup", type=fraction, default=0.1, metavar="X", help="share of the steps to warm up in"
    )
    training.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the adapter's start and the batches"
    )
    training.add_argument(
        "--save-every", type=positive, default=25, metavar="N", help="steps between checkpoints"
    )

    lora = parser.add_argument_group("LoRA")
    lora.add_argument("--r", type=positive, default=16, metavar="N", help="rank")
    lora.add_argument(
        "--alpha", type=positive, default=32, metavar="N", help="the update is scaled by alpha / r"
    )
    lora.add_argument("--dropout", type=fraction, default=0.0, metavar="X", help="dropout before lora_A")

    evaluation = parser.add_argument_group("evaluation")
    evaluation.add_argument(
        "--val-examples", type=positive, default=64, metavar="N", help="validation examples used"
    )
    evaluation.add_argument(
        "--sample-tokens", type=positive, default=24, metavar="N", help="length of the sample"
    )
    evaluation.add_argument(
        "--no-check", action="store_true", help="skip the check of the reloaded and merged model"
    )

    compute = parser.add_argument_group("compute")
    compute.add_argument(
        "--compare", action="store_true", help="run stock PEFT + bitsandbytes too, side by side"
    )
    compute.add_argument(
        "--backend",
        choices=("peft_kernels", "bitsandbytes"),
        default="peft_kernels",
        help="who runs the 4-bit layers",
    )
    compute.add_argument(
        "--no-patch", action="store_true", help="quantise with peft_kernels, keep PEFT's own forward"
    )
    compute.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="type of matrix products")
    compute.add_argument(
        "--device", metavar="NAME", help="cpu, cuda, cuda:1 (without it: a GPU if there is one)"
    )
    compute.add_argument(
        "--threads", type=positive, metavar="N", help="CPU threads (without it: torch's choice)"
    )

    args = parser.parse_args(argv)
    if args.compare and args.resume:
        parser.error("argument --resume: not allowed with --compare, whose two runs start afresh")
    if args.no_patch and args.backend == "bitsandbytes":
        parser.error("argument --no-patch: not allowed with --backend bitsandbytes, which is never patched")
    return args


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but not the None and False of options that are off."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text}")
    return value


def positive_float(text: str) -> float:
    value = _number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value


def fraction(text: str) -> float:
    value = _number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to less than 1, got {text}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")

#!/usr/bin/env python3
"""Prefix tuning, start to finish: PEFT's prefixes on SmolLM2-135M in 4 bits, with gradient checkpointing.

The task is finetune.py's: the one-line summary of a function. An embedding and an MLP are trained that
produce the keys and values of virtual tokens for each layer; `pk.prefix.fold` then replaces them with the
prefixes, with the same logits, and the adapter is saved as an ordinary PEFT folder.

    python examples/prefix_tuning.py               # some minutes on two cores
    python examples/prefix_tuning.py --quick       # a few steps

Prints the loss on held-out examples before and after, and checks that the folded and the reloaded model give
the trained one's logits. Exit code: 0 done, 1 a check failed, 2 something is missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from demo_model import model_folder
from finetune import Stages, distance, finish, fraction, positive, run_or_tell
from finetune_data import FORMS, docstring_examples, encode, read_jsonl, split

# Relative RMS difference of logits at most. Folding only changes the rounding of the keys and values that the
# MLP computed for a batch.
LIMIT = 1e-3


def main(argv: Sequence[str] | None = None) -> int:
    return run_or_tell("prefix_tuning.py", parse_arguments(argv), run)


def run(args: argparse.Namespace) -> int:
    stage = Stages()
    examples, held_out = split(read_jsonl(args.data) if args.data else docstring_examples())
    sample, held_out = held_out[0], held_out[: 8 if args.quick else 64]
    stage("data", f"{len(examples):,} examples to train on, {len(held_out)} held out")

    import finetune_model as lib
    import torch
    from peft import PeftModel, PrefixTuningConfig, get_peft_model

    import peft_kernels as pk

    folder = model_folder(args.model, args.output)
    tokenizer = lib.load_tokenizer(folder)
    training = encode(examples, tokenizer, args.max_length)
    batches = lib.training_batches(training, tokenizer, args.batch_size, args.steps, args.seed)
    validation = lib.batches_of(encode(held_out, tokenizer, args.max_length), tokenizer, 8)

    torch.manual_seed(args.seed)
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=args.virtual_tokens,
        prefix_projection=True,
        encoder_hidden_size=args.hidden,
    )
    model = get_peft_model(lib.load_base(folder, "peft_kernels"), config)
    report = pk.patch(model)
    model.gradient_checkpointing_enable()  # after adding the prefix: PEFT rejects the other order
    stage("model", str(report).splitlines()[0])
    with model.disable_adapter():
        before = lib.loss_of(model, validation)
    start = lib.loss_of(model, validation)
    stage("before", f"held-out loss {before:.3f} without prefix, {start:.3f} with a new one")

    losses = lib.train(model, batches, args.lr, "prefix")
    after, trained = lib.loss_of(model, validation), lib.logits_of(model, validation[0])
    making = model.get_nb_trainable_parameters()[0]
    stage("after", f"held-out loss {after:.3f}")

    with lib.autocast():  # it computed the prefix in training, too
        pk.prefix.fold(model)
    folded = lib.logits_of(model, validation[0])
    prefix = model.get_nb_trainable_parameters()[0]
    stage("fold", f"{making:,} trained parameters became the {prefix:,} of the prefixes")

    adapter = args.output / "adapter"
    model.save_pretrained(adapter)
    answer = lib.generate(model, tokenizer, sample.prompt, sample.before)
    del model
    again = PeftModel.from_pretrained(lib.load_base(folder, "peft_kernels"), adapter)
    pk.patch(again)
    forms = {
        "folded": distance(trained, folded),
        "reloaded": distance(trained, lib.logits_of(again, validation[0])),
    }
    problems = [
        f"the {form} model differs from the trained one: relative RMS error {found['relative_rms']:.2e}"
        for form, found in forms.items()
        if not found["relative_rms"] <= LIMIT  # NaN included
    ]
    if not args.quick and not after < start:  # NaN included
        problems.append(
            f"the held-out loss went from {start:.3f} to {after:.3f}: is --lr {args.lr:g} too much?"
        )
    stage(
        "reload", ", ".join(f"{form} {found['relative_rms']:.1e}" for form, found in forms.items()) + " off"
    )

    print(f"  {sample.prompt.splitlines()[-1]}\n  reference  {sample.response}\n  answer     {answer}")
    metrics = {
        "loss_before": before,
        "loss_new_prefix": start,
        "loss_after": after,
        "losses": losses,
        "trained_parameters": making,
        "prefix_parameters": prefix,
        "forms": forms,
    }
    return finish(args.output, "adapter", metrics, problems)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="prefix_tuning.py",
        description="Prefix tuning of a language model in 4 bits.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="3 steps and a few held-out examples")
    add("--model", type=Path, metavar="PATH", help="a transformers model folder (SmolLM2-135M-Instruct)")
    add("--data", type=Path, metavar="FILE.jsonl", help=f"lines of {FORMS}")
    add("--output", type=Path, default=Path("prefix-output"), metavar="FOLDER", help="(prefix-output)")
    add("--steps", type=positive, metavar="N", help="optimiser steps (60)")
    add("--batch-size", type=positive, default=4, metavar="N", help="examples a step (4)")
    add("--max-length", type=positive, default=128, metavar="N", help="tokens of an example (128)")
    add("--virtual-tokens", type=positive, default=16, metavar="N", help="of the prefix (16)")
    add("--hidden", type=positive, default=256, metavar="N", help="width of the MLP (256)")
    add("--lr", type=fraction, default=1e-3, metavar="X", help="peak learning rate of AdamW (0.001)")
    add("--seed", type=int, default=0, metavar="N", help="of the prefix and the batches (0)")
    args = parser.parse_args(argv)
    args.steps = args.steps or (3 if args.quick else 60)
    args.compare, args.backend = False, "peft_kernels"
    return args


if __name__ == "__main__":
    sys.exit(main())

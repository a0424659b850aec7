#!/usr/bin/env python3
"""Three adapters on one base in 4 bits, trained one after the other, then served in one batch.

The prompt is the same for all, a function's signature; the adapter says what becomes of it: `summary` its
one-line summary, `arguments` the names of its parameters, `words` its name in words. A batch holds the same
functions three times, a row for each adapter, and a row without any.

    python examples/serve_adapters.py               # some minutes on two cores
    python examples/serve_adapters.py --quick       # a few steps

Tells each adapter's loss on held-out functions before and after, saves all three, loads them onto a fresh
base, and checks that a mixed batch gives each row the logits that its adapter gives alone, in the trained and
in the reloaded model. Exit code: 0 done, 1 a check failed, 2 something is missing.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from finetune import EXIT_CHECK_FAILED, EXIT_OK, Stages, distance, positive, run_or_tell
from finetune_data import (
    INSTRUCTION,
    Example,
    UserError,
    docstring_examples,
    encode,
    prompt_text,
    read_jsonl,
    split,
)

BASE = "__base__"
# Of the relative RMS difference of logits: the number of rows changes the order of sums in bf16 products, no
# more. Adapters differ from each other by tens of per cent.
LIMIT = 0.03


def arguments_of(example: Example) -> str:
    """Names of the parameters."""
    given = _function(example).args
    found = [
        arg.arg
        for arg in (*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg)
        if arg
    ]
    return ", ".join(found) or "none"


def words_of(example: Example) -> str:
    """The function's name in words."""
    return " ".join(_function(example).name.replace("_", " ").split()) or "none"


def _function(example: Example) -> ast.FunctionDef | ast.AsyncFunctionDef:
    line = (example.prompt.splitlines() or [""])[-1]
    try:
        (found,) = ast.parse(f"{line} pass").body
    except (SyntaxError, ValueError):
        found = None
    if not isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef):
        raise UserError(f"--data: expected prompts that end with a function's signature, got {line!r}")
    return found


TASKS: dict[str, Callable[[Example], str]] = {
    "summary": lambda example: example.response,
    "arguments": arguments_of,
    "words": words_of,
}


def examples_of(task: str, examples: Sequence[Example]) -> list[Example]:
    """The same prompts for every task, without the instruction of one."""
    return [
        Example(example.prompt.removeprefix(INSTRUCTION).strip(), TASKS[task](example))
        for example in examples
    ]


def main(argv: Sequence[str] | None = None) -> int:
    return run_or_tell("serve_adapters.py", parse_arguments(argv), run)


def run(args: argparse.Namespace) -> int:
    stage = Stages()
    functions, held_out = split(read_jsonl(args.data) if args.data else docstring_examples())
    held_out = held_out[: 8 if args.quick else 32]
    stage("data", f"{len(functions):,} functions to train on, {len(held_out)} held out")

    import finetune_model as lib
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from torch import Tensor

    import peft_kernels as pk

    folder = lib.model_folder(args.model, args.output)
    tokenizer = lib.load_tokenizer(folder)
    torch.manual_seed(args.seed)
    model: Any = None
    for task in TASKS:
        config = LoraConfig(
            r=args.r, lora_alpha=2 * args.r, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        if model is None:
            model = get_peft_model(lib.load_base(folder, "peft_kernels"), config, adapter_name=task)
        else:
            model.add_adapter(task, config)
    stage("model", str(pk.patch(model)).splitlines()[0])

    losses: dict[str, dict[str, float]] = {}
    for task in TASKS:
        model.set_adapter(task)
        encoded = encode(examples_of(task, functions), tokenizer, args.max_length)
        validation = lib.batches_of(
            encode(examples_of(task, held_out), tokenizer, args.max_length), tokenizer, 8
        )
        batches = lib.training_batches(encoded, tokenizer, args.batch_size, args.steps, args.seed)
        before = lib.loss_of(model, validation)
        lib.train(model, batches, args.lr, task)
        losses[task] = {"before": before, "after": lib.loss_of(model, validation)}
        stage(task, f"held-out loss {before:.3f} before, {losses[task]['after']:.3f} after")
    model.save_pretrained(args.output / "adapters")  # each in a folder of its name

    # Three functions of different lengths, so that rows are padded, and each with every adapter.
    shown = held_out[:3]
    prompts = [example.prompt for example in examples_of("summary", shown)]
    texts = [prompt_text(prompt, tokenizer) for prompt in prompts for _ in (*TASKS, BASE)]
    names = [*TASKS, BASE] * len(prompts)
    batch = dict(
        tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    )

    def served(model: Any, rows: slice, **options: Any) -> Tensor:
        """The logits of each row's last token."""
        part = {name: tensor[rows] for name, tensor in batch.items()}
        with torch.no_grad():
            found: Tensor = model(**part, logits_to_keep=1, use_cache=False, **options).logits[:, -1].float()
        return found

    def alone(model: Any) -> Tensor:
        rows = []
        for i, name in enumerate(names):
            if name == BASE:
                with model.disable_adapter():
                    rows.append(served(model, slice(i, i + 1)))
            else:
                model.set_adapter(name)
                rows.append(served(model, slice(i, i + 1)))
        return torch.cat(rows)

    model.eval()
    everything = slice(None)
    one_by_one = alone(model)
    mixed = served(model, everything, adapter_names=names)
    started = time.perf_counter()
    tokens = model.generate(
        **batch, adapter_names=names, max_new_tokens=args.new_tokens, do_sample=False, use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    answers = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    stage(
        "serve",
        f"{len(names)} rows with {len(TASKS)} adapters in one batch, {seconds:.1f} s for their answers",
    )

    del model
    again = PeftModel.from_pretrained(
        lib.load_base(folder, "peft_kernels"), args.output / "adapters" / next(iter(TASKS)), next(iter(TASKS))
    )
    for task in [*TASKS][1:]:
        again.load_adapter(args.output / "adapters" / task, task)
    pk.patch(again)
    again.eval()
    reloaded = served(again, everything, adapter_names=names)
    forms = {"mixed": distance(one_by_one, mixed), "reloaded": distance(mixed, reloaded)}
    forms["another adapter"] = distance(one_by_one, one_by_one.roll(1, 0))
    limits = {"mixed": LIMIT, "reloaded": 1e-3}
    problems = [
        f"{form}: relative RMS error {forms[form]['relative_rms']:.2e}, expected at most {limit}"
        for form, limit in limits.items()
        if not forms[form]["relative_rms"] <= limit
    ]
    stage("check", ", ".join(f"{form} {found['relative_rms']:.1e}" for form, found in forms.items()) + " off")

    for i, (name, answer) in enumerate(zip(names, answers, strict=True)):
        if i % (len(TASKS) + 1) == 0:
            print(f"\n  {prompts[i // (len(TASKS) + 1)].splitlines()[-1]}")
        print(f"    {name:<10} {' '.join(answer.split())}")
    metrics = {"losses": losses, "forms": forms, "rows": len(names), "seconds": seconds, "answers": answers}
    (args.output / "metrics.json").write_text(json.dumps(metrics, indent=1), encoding="utf-8")
    print(f"\nwritten to {args.output}: adapters, metrics.json")
    for problem in problems:
        print(f"CHECK FAILED: {problem}")
    return EXIT_CHECK_FAILED if problems else EXIT_OK


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="serve_adapters.py", description="Three adapters served in one batch.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="2 steps for each adapter and short answers")
    add("--model", type=Path, metavar="PATH", help="a transformers model folder (SmolLM2-135M-Instruct)")
    add(
        "--data",
        type=Path,
        metavar="FILE.jsonl",
        help='lines of {"prompt": "...def f(a):", "response": "..."}',
    )
    add("--output", type=Path, default=Path("serve-output"), metavar="FOLDER", help="(serve-output)")
    add("--steps", type=positive, metavar="N", help="optimiser steps for each adapter (30)")
    add("--batch-size", type=positive, default=4, metavar="N", help="examples a step (4)")
    add("--max-length", type=positive, default=128, metavar="N", help="tokens of an example (128)")
    add("--new-tokens", type=positive, metavar="N", help="of an answer (24)")
    add("--lr", type=float, default=1e-3, metavar="X", help="peak learning rate of AdamW (0.001)")
    add("--r", type=positive, default=8, metavar="N", help="rank of LoRA; alpha is twice as much (8)")
    add("--seed", type=int, default=0, metavar="N", help="of the adapters and the batches (0)")
    args = parser.parse_args(argv)
    args.steps = args.steps or (2 if args.quick else 30)
    args.new_tokens = args.new_tokens or (4 if args.quick else 24)
    args.compare, args.backend = False, "peft_kernels"
    return args


if __name__ == "__main__":
    sys.exit(main())

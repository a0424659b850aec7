#!/usr/bin/env python3
"""Three adapters on one base in 4 bits, trained one after the other, then served together by `pk.serving`.

All use the same prompt, a function's signature; adapter `summary` answers with its one-line summary,
`arguments` with the names of its parameters, `words` with its name in words. Each held-out function makes
four requests, one per adapter and one to the base alone; requests join and leave one batch.

    python examples/serve_adapters.py               # some minutes on two cores
    python examples/serve_adapters.py --quick       # a few steps

Prints each adapter's loss on held-out functions before and after, and how many of their answers are right to
the letter with the adapter and without. Saves all three adapters, and checks that what is served from their
folders has the bits that PEFT computes from them, one by one on a base of its own; that it is nearer to what
the trained model says with that adapter than with any other; that neighbours in the batch change no bit, and
that another engine over a fresh base gives the same. Exit code: 0 done, 1 a check failed, 2 something is
missing.
"""

from __future__ import annotations

import argparse
import ast
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from demo_model import model_folder
from finetune import Stages, distance, finish, fraction, positive, run_or_tell
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

ALONE = "none"  # the base without an adapter
EXACT = ("arguments", "words")  # tasks with one right answer
SLOTS = 8  # requests that run at once


class Question(NamedTuple):
    prompt: list[int]
    adapter: str


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
    """The same prompts for every task, without instructions."""
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

    folder = model_folder(args.model, args.output)
    tokenizer = lib.load_tokenizer(folder)
    model, losses = train_adapters(folder, tokenizer, functions, held_out, args, stage)
    adapters = args.output / "adapters"
    model.save_pretrained(adapters)  # each in a folder with its name

    names = [*TASKS, ALONE]
    texts = [prompt_text(one.prompt, tokenizer) for one in examples_of("summary", held_out)]
    prompts = tokenizer(texts, add_special_tokens=False).input_ids
    questions = [Question(ids, name) for ids in prompts for name in names]
    shown = questions[: 3 * len(names)]  # three functions, whose logits are compared
    with lib.autocast():
        trained = torch.stack([last_logits(model, question) for question in shown])
    del model

    options = {"max_new_tokens": args.new_tokens, "eos_token_id": tokenizer.eos_token_id}
    engine = engine_over_a_fresh_base(folder, adapters)
    started = time.perf_counter()
    served = ask(engine, questions, len(shown), options)
    seconds = time.perf_counter() - started
    tokens = sum(len(request.tokens) for request in served)
    stage("serve", f"{len(served)} requests, {tokens} tokens in {seconds:.1f} s, {SLOTS} requests at a time")
    alone = [ask(engine, [question], 1, options)[0] for question in shown]
    engine.close()
    again = ask(engine_over_a_fresh_base(folder, adapters), shown, len(shown), options)
    by_peft = logits_by_peft(folder, adapters, shown)

    answers = [
        " ".join(tokenizer.decode(request.tokens, skip_special_tokens=True).split()) for request in served
    ]
    of = {name: answers[i :: len(names)] for i, name in enumerate(names)}
    exact = {
        task: {
            "before": share_right(examples_of(task, held_out), of[ALONE]),
            "after": share_right(examples_of(task, held_out), of[task]),
        }
        for task in EXACT
    }
    for task, right in exact.items():
        before, after = f"{right['before']:.0%}", f"{right['after']:.0%}"
        stage(task, f"{before} of the answers right without the adapter, {after} with it")

    first = torch.stack([request.logits[0].float() for request in served[: len(shown)]])
    own, other = distances(trained, first, len(names))
    off = {"own": max(own), "other": min(other)}
    same = {
        "alone": sum(map(same_bits, served, alone)) / len(shown),
        "reloaded": sum(map(same_bits, served, again)) / len(shown),
        "peft": sum(map(torch.equal, by_peft, first)) / len(shown),
    }
    stage(
        "check",
        f"same bits alone: {same['alone']:.0%}, in another engine: {same['reloaded']:.0%}, by PEFT: "
        f"{same['peft']:.0%}; logits at most {off['own']:.1e} off the trained model's, at least "
        f"{off['other']:.1e} off those of another adapter",
    )
    problems = [
        f"{form}: expected the same bits for all requests, got them for {share:.0%}"
        for form, share in same.items()
        if share < 1
    ]
    if mixed_up := [
        question.adapter
        for question, near, far in zip(shown, own, other, strict=True)
        if not near < far  # NaN included
    ]:
        problems.append(
            f"trained: expected logits nearest to those of the request's own adapter, got others for "
            f"{', '.join(mixed_up)}"
        )

    for i, (question, answer) in enumerate(zip(shown, answers, strict=False)):
        if i % len(names) == 0:
            print(f"\n  {held_out[i // len(names)].prompt.splitlines()[-1]}")
        print(f"    {question.adapter:<10} {answer}")
    metrics = {
        "losses": losses,
        "exact": exact,
        "off": off,
        "same": same,
        "held_out": len(held_out),
        "requests": len(served),
        "tokens": tokens,
        "seconds": seconds,
        "answers": answers,
    }
    print()
    return finish(args.output, "adapters", metrics, problems)


def train_adapters(
    folder: Path,
    tokenizer: Any,
    functions: Sequence[Example],
    held_out: Sequence[Example],
    args: argparse.Namespace,
    stage: Stages,
) -> tuple[Any, dict[str, dict[str, float]]]:
    """PEFT's model with all adapters, in evaluation mode, and their losses before and after."""
    import finetune_model as lib
    import torch
    from peft import LoraConfig, get_peft_model

    import peft_kernels as pk

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
    return model.eval(), losses


def fresh_base(folder: Path) -> Any:
    import finetune_model as lib

    import peft_kernels as pk

    base = lib.AutoModelForCausalLM.from_pretrained(folder, dtype=lib.DTYPE, device_map=lib.DEVICE)
    pk.quantize_model(base, progress=False)
    return base.eval()


def engine_over_a_fresh_base(folder: Path, adapters: Path) -> Any:
    import peft_kernels as pk

    engine = pk.serving.Engine(fresh_base(folder), max_batch=SLOTS)
    for task in TASKS:
        engine.register(task, adapters / task)
    return engine


def ask(engine: Any, questions: Sequence[Question], kept: int, options: dict[str, Any]) -> list[Any]:
    """Requests that are done; the first `kept` with their logits."""
    from tqdm import tqdm

    requests = [
        engine.submit(ids, None if name == ALONE else name, keep_logits=i < kept, **options)
        for i, (ids, name) in enumerate(questions)
    ]
    with tqdm(total=len(requests), desc="serve", leave=False, disable=not sys.stderr.isatty()) as bar:
        while engine.step():
            bar.update(sum(request.done for request in requests) - bar.n)
    for request in requests:
        request.result()  # raises what went wrong with it
    return requests


def logits_by_peft(folder: Path, adapters: Path, questions: Sequence[Question]) -> Any:
    """Behind the prompts, with the saved adapters on such a base as an engine has: fp32 (questions,
    vocabulary)."""
    import torch
    from peft import PeftModel

    import peft_kernels as pk

    first, *others = TASKS
    model = PeftModel.from_pretrained(fresh_base(folder), adapters / first, adapter_name=first)
    for name in others:
        model.load_adapter(adapters / name, name)
    # Layer by layer, as engines compute.
    pk.patch(model, without=("mlp", "qkv", "attention", "norms", "residuals", "loss"))
    model.eval()
    return torch.stack([last_logits(model, question) for question in questions])


def distances(trained: Any, served: Any, adapters: int) -> tuple[list[float], list[float]]:
    """Of each request's logits from what the trained model says behind that prompt with the same adapter, and
    with the nearest of the others. Both (requests, vocabulary), the adapters of a prompt side by side.

    A served model is in bf16; the norms and residuals of a trained one are fp32: some difference there is.
    """
    own, other = [], []
    for i, logits in enumerate(served):
        start = i // adapters * adapters
        found = [distance(trained[j], logits)["relative_rms"] for j in range(start, start + adapters)]
        own.append(found.pop(i - start))
        other.append(min(found))
    return own, other


def last_logits(model: Any, question: Question) -> Any:
    """Of PEFT's model with one of its adapters, or without, behind a prompt: fp32 (vocabulary,)."""
    import torch

    tokens, name = torch.tensor([question.prompt], device=model.device), question.adapter
    with torch.no_grad(), model.disable_adapter() if name == ALONE else nullcontext():
        if name != ALONE:
            model.set_adapter(name)
        return model(input_ids=tokens, logits_to_keep=1, use_cache=False).logits[0, -1].float()


def same_bits(one: Any, other: Any) -> bool:
    """Whether two requests have the same tokens, from the same logits."""
    import torch

    return one.tokens == other.tokens and all(map(torch.equal, one.logits, other.logits))


def share_right(examples: Sequence[Example], answers: Sequence[str]) -> float:
    pairs = zip(examples, answers, strict=True)
    return sum(answer == " ".join(example.response.split()) for example, answer in pairs) / len(examples)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="serve_adapters.py", description="Three adapters served together.", allow_abbrev=False
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
    add("--lr", type=fraction, default=1e-3, metavar="X", help="peak learning rate of AdamW (0.001)")
    add("--r", type=positive, default=8, metavar="N", help="rank of LoRA; alpha is twice as much (8)")
    add("--seed", type=int, default=0, metavar="N", help="of the adapters and the batches (0)")
    args = parser.parse_args(argv)
    args.steps = args.steps or (2 if args.quick else 30)
    args.new_tokens = args.new_tokens or (4 if args.quick else 24)
    args.compare, args.backend = False, "peft_kernels"
    return args


if __name__ == "__main__":
    sys.exit(main())

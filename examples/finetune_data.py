"""Training data of finetune.py: docstrings of the standard library, or the user's JSONL file, tokenised."""

from __future__ import annotations

import ast
import json
import random
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INSTRUCTION = "Write the one-line summary of this Python function."
MIN_DOCSTRINGS = 2_000
MIN_SUMMARY_CHARS, MAX_SUMMARY_CHARS = 15, 120
MAX_SIGNATURE_CHARS = 240
# Tests, and other people's code.
SKIPPED = frozenset({"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "ensurepip"})
# Not the run's --seed: runs with different seeds must have the same validation examples.
SPLIT_SEED = 20240229
ROLES = ("system", "user", "assistant")
FORMS = (
    '{"prompt": "...", "response": "..."} or "completion", '
    'or {"messages": [{"role": "user", "content": "..."}, ...]}'
)
IGNORED = -100  # label of positions without loss

Encoded = dict[str, list[int]]


class UserError(Exception):
    """A mistake of the user: shown as one sentence without a traceback, exit code 2."""


@dataclass(frozen=True, order=True)
class Example:
    prompt: str
    response: str
    before: tuple[tuple[str, str], ...] = ()
    """Earlier messages of a conversation: role and text."""


def split(examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """Shuffles with a fixed seed and returns (train, validation); validation gets a tenth, at least one."""
    if len(examples) < 2:
        raise UserError(f"--data: expected at least 2 examples, one to validate with, got {len(examples)}")
    shuffled = examples.copy()
    random.Random(SPLIT_SEED).shuffle(shuffled)
    held_out = max(1, len(shuffled) // 10)
    return shuffled[held_out:], shuffled[:held_out]


def docstring_examples(root: Path | None = None) -> list[Example]:
    """One example per documented function below `root` (the standard library unless named), in sorted order.

    Sources are parsed, not imported. Each summary is used once, so that no response of the validation split
    is seen in training.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    by_summary: dict[str, Example] = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED.isdisjoint(relative.parts):
            module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
            for example in _examples_of_module(path, module):
                by_summary.setdefault(example.response.casefold(), example)
    if len(by_summary) < MIN_DOCSTRINGS:
        raise UserError(
            f"{root} holds only {len(by_summary)} usable docstrings, and {MIN_DOCSTRINGS} are needed (this "
            "Python may come without its sources); name your own prompt/response pairs with --data FILE.jsonl"
        )
    return sorted(by_summary.values())


def _examples_of_module(path: Path, module: str) -> Iterator[Example]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes such as "\d" in old sources
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):  # templates and broken files are skipped
        return
    for function, classes in _functions(tree, ()):
        summary = summarise(ast.get_docstring(function) or "")
        keyword = "async def" if isinstance(function, ast.AsyncFunctionDef) else "def"
        returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
        signature = f"{keyword} {function.name}({ast.unparse(function.args)}){returns}:"
        if summary is not None and len(signature) <= MAX_SIGNATURE_CHARS:
            owner = f"module {module}" + (f", class {'.'.join(classes)}" if classes else "")
            yield Example(f"{INSTRUCTION}\n\n# {owner}\n{signature}", summary)


Function = ast.FunctionDef | ast.AsyncFunctionDef


def _functions(node: ast.AST, classes: tuple[str, ...]) -> Iterator[tuple[Function, tuple[str, ...]]]:
    """Every function below `node`, with the names of its enclosing classes."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            yield child, classes
        yield from _functions(child, (*classes, child.name) if isinstance(child, ast.ClassDef) else classes)


def summarise(docstring: str) -> str | None:
    """The first paragraph on one line, or its first sentence if that is long; None if it is not prose."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    if len(paragraph) > MAX_SUMMARY_CHARS:
        paragraph = re.split(r"(?<=[.!?])\s", paragraph, maxsplit=1)[0]
    is_prose = paragraph[:1].isalpha() and paragraph.count(" ") >= 2
    return paragraph if is_prose and MIN_SUMMARY_CHARS <= len(paragraph) <= MAX_SUMMARY_CHARS else None


def read_jsonl(path: Path) -> list[Example]:
    """Reads lines of one example each, in a form of FORMS; blank lines and other keys are ignored.

    Raises:
        UserError: with the file, the line and the problem.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"--data: cannot read {path}: {error.strerror or error}") from None
    return [_example(line, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]


def _example(line: bytes, where: str) -> Example:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON in UTF-8: {error}") from None
    messages = _messages(record) if isinstance(record, dict) else []
    if [role for role, _ in messages[-2:]] != ["user", "assistant"]:
        raise UserError(
            f"{where}: expected {FORMS}, texts that are not empty, last a user's and the assistant's, "
            f"got {json.dumps(record)[:60]}"
        )
    *before, (_, prompt), (_, response) = messages
    return Example(prompt, response, tuple(before))


def _messages(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Roles and texts of a record; empty if it has another form."""
    messages = record.get("messages")
    if messages is None:  # TRL's completion is our response; each may be a list of messages
        parts = (
            ("user", record.get("prompt")),
            ("assistant", record.get("response", record.get("completion"))),
        )
        turns = [
            part if isinstance(part, list) else [{"role": role, "content": part}] for role, part in parts
        ]
        messages = [*turns[0], *turns[1]]
    found = []
    for one in messages if isinstance(messages, list) else []:
        role, text = (one.get("role"), one.get("content")) if isinstance(one, dict) else (None, None)
        if role not in ROLES or not isinstance(text, str) or not text.strip():
            return []
        found.append((role, text))
    return found


def prompt_text(prompt: str, tokenizer: Any, before: Iterable[tuple[str, str]] = ()) -> str:
    """The prompt, after the messages before it, in the model's chat template, if it has one."""
    if tokenizer.chat_template is None:
        if before:
            raise UserError(
                "--data: expected one prompt an example, the model has no chat template; got several"
            )
        return f"{tokenizer.bos_token or ''}{prompt}\n\n"
    turns = [{"role": role, "content": text} for role, text in (*before, ("user", prompt))]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def encode(examples: list[Example], tokenizer: Any, max_length: int) -> list[Encoded]:
    """Tokenises; responses are truncated to fit, and examples whose prompt reaches `max_length` are skipped,
    and both are counted in a printed line.

    Only responses have labels.
    """
    texts = [prompt_text(example.prompt, tokenizer, example.before) for example in examples]
    prompts = tokenizer(texts, add_special_tokens=False).input_ids
    responses = tokenizer([example.response for example in examples], add_special_tokens=False).input_ids
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    found, cut = [], 0
    for prompt, response in zip(prompts, responses, strict=True):
        ids = [*prompt, *response, *end][:max_length]
        if len(prompt) < max_length:
            cut += len(prompt) + len(response) + len(end) > max_length
            labels = [IGNORED] * len(prompt) + ids[len(prompt) :]
            found.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    if not found:
        raise UserError(f"--max-length: the prompts alone reach {max_length} tokens")
    if cut or len(found) < len(examples):
        left = f"{len(examples) - len(found)} left out, whose prompts alone are that long"
        print(
            f"--max-length {max_length}: of {len(examples)} examples, {left}; {cut} with their response cut"
        )
    return found


def in_order(examples: list[Encoded], batch_size: int, steps: int, seed: int) -> list[Encoded]:
    """The examples of `steps` batches in the order of a run, which depends only on the seed.

    Examples of a batch have similar lengths, for little padding; the batches of an epoch are shuffled.
    """
    if len(examples) < batch_size:
        raise UserError(f"--batch-size: expected at most {len(examples)}, all examples, got {batch_size}")
    rng = random.Random(seed)
    batches: list[list[Encoded]] = []
    while len(batches) < steps:
        epoch = sorted(rng.sample(examples, len(examples)), key=lambda example: len(example["input_ids"]))
        first = rng.randrange(len(epoch) % batch_size + 1)  # different examples are left over in each epoch
        starts = range(first, len(epoch) - batch_size + 1, batch_size)
        batches += rng.sample([epoch[start : start + batch_size] for start in starts], len(starts))
    return [example for batch in batches[:steps] for example in batch]

"""Prompt/response pairs for finetune.py: docstrings of the standard library, or the user's JSONL file."""

from __future__ import annotations

import ast
import json
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

INSTRUCTION = "Write the one-line summary of this Python function."
MIN_DOCSTRINGS = 2_000
MIN_SUMMARY_CHARS, MAX_SUMMARY_CHARS = 15, 120
MAX_SIGNATURE_CHARS = 240
VALIDATION_FRACTION = 0.1
# Not the run's --seed: runs with different seeds must be judged on the same validation examples.
SPLIT_SEED = 20240229

# Tests, and other people's code.
SKIPPED = frozenset({"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "ensurepip"})


class UserError(Exception):
    """A mistake that the user can mend: shown as one sentence without a traceback, exit code 2."""


@dataclass(frozen=True, order=True)
class Example:
    prompt: str
    response: str


def load_examples(jsonl: Path | None) -> list[Example]:
    """The user's pairs if a file is named, else those made from the standard library."""
    return read_jsonl(jsonl) if jsonl is not None else docstring_examples()


def split(examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """Shuffle by a fixed seed and return (train, validation); validation gets a tenth, and at least one."""
    if len(examples) < 2:
        raise UserError(
            f"the data has {len(examples)} example(s), but a train and a validation split need at least 2"
        )
    shuffled = examples.copy()
    random.Random(SPLIT_SEED).shuffle(shuffled)
    held_out = max(1, int(len(shuffled) * VALIDATION_FRACTION))
    return shuffled[held_out:], shuffled[:held_out]


def docstring_examples(root: Path | None = None) -> list[Example]:
    """One example per documented function below `root` (the standard library unless named), in sorted order.

    The sources are parsed, never imported. A summary is used once only, so that no response of the validation
    split has been seen in training.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    by_summary: dict[str, Example] = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED.isdisjoint(relative.parts):
            for example in _examples_of_module(path, _module_name(relative)):
                by_summary.setdefault(example.response.casefold(), example)
    if len(by_summary) < MIN_DOCSTRINGS:
        raise UserError(
            f"{root} holds only {len(by_summary)} usable docstrings, and {MIN_DOCSTRINGS} are needed (this "
            "Python may come without its sources); name your own prompt/response pairs with --data FILE.jsonl"
        )
    return sorted(by_summary.values())


def _module_name(relative: Path) -> str:
    parts = relative.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _examples_of_module(path: Path, module: str) -> Iterator[Example]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes such as "\d" in sources that are not ours
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):  # templates and broken files are no loss
        return
    for function, classes in _functions(tree, ()):
        summary = summarise(ast.get_docstring(function) or "")
        text = signature(function)
        if summary is not None and len(text) <= MAX_SIGNATURE_CHARS:
            owner = f"module {module}" + (f", class {'.'.join(classes)}" if classes else "")
            yield Example(f"{INSTRUCTION}\n\n# {owner}\n{text}", summary)


Function = ast.FunctionDef | ast.AsyncFunctionDef


def _functions(node: ast.AST, classes: tuple[str, ...]) -> Iterator[tuple[Function, tuple[str, ...]]]:
    """Every function below `node` with the names of the classes around it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            yield child, classes
        yield from _functions(child, (*classes, child.name) if isinstance(child, ast.ClassDef) else classes)


def signature(function: Function) -> str:
    """`def name(arguments) -> returns:` as one line of source."""
    keyword = "async def" if isinstance(function, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    return f"{keyword} {function.name}({ast.unparse(function.args)}){returns}:"


def summarise(docstring: str) -> str | None:
    """The first paragraph on one line, or its first sentence if that is long; None if not usable prose."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    if len(paragraph) > MAX_SUMMARY_CHARS:
        paragraph = re.split(r"(?<=[.!?])\s", paragraph, maxsplit=1)[0]
    is_prose = paragraph[:1].isalpha() and paragraph.count(" ") >= 2
    return paragraph if is_prose and MIN_SUMMARY_CHARS <= len(paragraph) <= MAX_SUMMARY_CHARS else None


def read_jsonl(path: Path) -> list[Example]:
    """Read `{"prompt": "...", "response": "..."}` lines; blank lines and further keys are ignored.

    Raises:
        UserError: naming the file, the line and what is wrong with it.
    """
    try:
        with path.open("rb") as file:
            numbered = [(number, line) for number, line in enumerate(file, 1) if line.strip()]
    except OSError as error:
        raise UserError(f"--data: cannot read {path}: {error.strerror or error}") from None
    if not numbered:
        raise UserError(f"{path}: the file is empty; expected lines such as {_SAMPLE_LINE}")
    return [_parse_line(line.rstrip(), f"{path}, line {number}") for number, line in numbered]


_SAMPLE_LINE = '{"prompt": "...", "response": "..."}'
_JSON_NAMES = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}


def _parse_line(line: bytes, where: str) -> Example:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text (byte {error.start + 1})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply; expected {_SAMPLE_LINE}") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object {_SAMPLE_LINE}, got {_json_name(record)}")
    return Example(_text(record, "prompt", where), _text(record, "response", where))


def _text(record: dict[str, object], key: str, where: str) -> str:
    if key not in record:
        raise UserError(f'{where}: "{key}" is missing; expected {_SAMPLE_LINE}')
    value = record[key]
    if not isinstance(value, str):
        raise UserError(f'{where}: "{key}": expected a string, got {_json_name(value)}')
    if not value.strip():
        raise UserError(f'{where}: "{key}" is empty')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        code = f"\\u{ord(value[error.start]):04x}"
        raise UserError(f'{where}: "{key}" holds half a surrogate pair ({code}), which is no text') from None
    return value


def _json_name(value: object) -> str:
    return _JSON_NAMES.get(type(value), "a number")

"""Reasons why something is not fused end with what a user can do about it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft_kernels as pk
from peft_kernels.core.module_calls import HOOKED_ALL
from peft_kernels.nf4.sharded.checks import UNGATHERED
from peft_kernels.patch.rules.calls import NO_KERNEL, PARALLEL

PACKAGE = Path(pk.__file__).parent
PLACES = [*sorted((PACKAGE / "patch").rglob("*.py")), PACKAGE / "core" / "module_calls.py"]
PLACES.append(PACKAGE / "nf4" / "bitsandbytes_format.py")
ACTIONS = (
    "nothing to do", "activate", "call", "cast", "freeze", "give", "install", "keep", "leave out", "load",
    "move", "pass", "patch", "quantise", "reload", "remove", "restore", "set ", "shard", "unmerge",
    "unpatch", "use ", "see ", "for GRPO use",
)  # fmt: skip
"""How what a user can do begins, after the last semicolon of a reason."""
GIVEN_TO = ("Fallback", "CannotTry", "reasons.append")
WITHOUT = {"sources.py"}
"""`verdict.decide` adds what one can do to its reasons."""


def reasons_in(path: Path) -> Iterator[str]:
    """The reasons that a module gives, with {...} for expressions; without those that end with another."""
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    for function in functions:
        named = re.search("reason|more_than_forward|not_recomputable", function.name)
        for node in ast.walk(function):
            given: list[ast.AST | None] = []
            if isinstance(node, ast.Call) and ast.unparse(node.func) in GIVEN_TO:
                given = [*node.args]
            elif isinstance(node, ast.Return):
                given = [node.value] if named else []
            elif isinstance(node, ast.Assign) and re.search("reason$|found$", ast.unparse(node.targets[0])):
                given = [node.value]
            yield from (text for value in given for text in texts(value) if not text.endswith("reason}"))


def texts(node: Any) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value:
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else part for part in node.values]
        yield "".join(part if isinstance(part, str) else f"{{{ast.unparse(part.value)}}}" for part in parts)
    elif isinstance(node, ast.IfExp | ast.BoolOp | ast.Tuple):
        children = (node.body, node.orelse) if isinstance(node, ast.IfExp) else ast.iter_child_nodes(node)
        for child in children:
            yield from texts(child)


def test_every_reason_says_what_to_do() -> None:
    found = {
        (path.name, reason) for path in PLACES if path.name not in WITHOUT for reason in reasons_in(path)
    }
    found |= {("constants", one) for one in (HOOKED_ALL, NO_KERNEL, PARALLEL, UNGATHERED)}
    tails = ("{NO_KERNEL}", "{UNGATHERED}", "{hooked}", "{next(iter(record.fallbacks))}")  # reasons too
    found = {(name, reason) for name, reason in found if not reason.endswith(tails)}
    assert len(found) > 85
    without = [
        one for one in found if not one[1].rpartition("; ")[2].startswith(ACTIONS) or "; " not in one[1]
    ]
    assert sorted(without) == []

"""Recognises the functions of other libraries that our fused forwards replace, by a hash of their source.

A fused forward computes what a forward of PEFT or bitsandbytes computed when ours was written. The table
lists the versions of each function that were reviewed. Others are tried on a layer: to spare them that, read
what has changed, and add the fingerprint that tests/patch/test_sources.py prints.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.metadata
import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

KNOWN: dict[str, dict[str, str]] = {
    "peft.tuners.lora.layer.Linear.forward": {"2e1d22f1fee17f0a": "0.20.0 to 0.21.2"},
    "peft.tuners.lora.layer.LoraLayer._mixed_batch_forward": {"f680ce66ce51f6d8": "0.20.0 to 0.21.2"},
    "peft.tuners.lora.layer.LoraLayer._check_forward_args": {"d04d6192f6c9ddc1": "0.20.0 to 0.21.2"},
    "peft.tuners.tuners_utils.BaseTunerLayer._cast_input_dtype": {"7e8ecb3f75bbbb5b": "0.20.0 to 0.21.2"},
    "peft.tuners.lora.layer.ParamWrapper.forward": {"cb359d7242d14315": "0.20.0 to 0.21.2"},
    "peft.tuners.lora.layer.ParamWrapper._activate_lora": {
        "3e792c73458461ec": "0.20.0",
        "455779f8be2d6d66": "0.21.0 to 0.21.2",
    },
    "peft.tuners.lora.layer.ParamWrapper.get_delta_weight": {"64be0d16fda5334b": "0.20.0 to 0.21.2"},
    "peft.tuners.lora.layer.ParamWrapper.get_delta_factors": {"5f2205026029792c": "0.21.0 to 0.21.2"},
    "peft.tuners.lora.layer.ParamWrapper.get_param": {"b6c5e30d2c7099f8": "0.20.0 to 0.21.2"},
    "peft.tuners.lora.bnb.Linear4bit.forward": {"4f76d5fb0d5e860b": "0.20.0 to 0.21.2"},
    "peft.tuners.lora.bnb.Linear4bit._mixed_batch_forward": {"ea8ad923172f67ad": "0.20.0 to 0.21.2"},
    "peft.tuners.lora.variants.DoraLinearVariant.forward": {"fa812862b566abd6": "0.20.0 to 0.21.2"},
    "peft.tuners.lora.dora.DoraLinearLayer.forward": {"4c52f28e70ce3cab": "0.20.0 to 0.21.2"},
    "peft.tuners.lora.dora.DoraLinearLayer.get_weight_norm": {"90ae12a68132eb6e": "0.20.0 to 0.21.2"},
    "peft.tuners.lora.dora.DoraLinearLayer.get_lora_weight": {"4c4445d4c9f2e0cc": "0.20.0 to 0.21.2"},
    "peft.tuners.lora.dora.cache_decorator": {"288b4d50b73adb54": "0.20.0 to 0.21.2"},
    "bitsandbytes.nn.modules.Linear4bit.forward": {"ca51ab17d0636863": "0.50.0 to 0.50.2"},
    "bitsandbytes.nn.modules.Linear4bit.set_compute_type": {"d1f7a6eb3da2dd81": "0.50.0 to 0.50.2"},
}
"""Fingerprints of the reviewed sources, by qualified name, and the versions that have them."""

_TITLES = {"peft": "PEFT"}
"""Packages whose name is spelled differently in text."""


class _Essence(ast.NodeTransformer):
    """Removes docstrings and annotations, which compute nothing, and differences between Python versions."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        constant = node.value
        if isinstance(constant, ast.Constant) and isinstance(constant.value, str):
            return None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        return None if node.value is None else self.generic_visit(ast.Assign([node.target], node.value))

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        # Python 3.12 ends some formats with an empty string.
        node.values = [part for part in node.values if getattr(part, "value", None) != ""]
        return self.generic_visit(node)


_IGNORED = ("annotation", "returns", "type_comment", "type_params", "kind", "ctx")
"""Fields of syntax trees that compute nothing, or do not exist in every version of Python."""


def _written(node: Any) -> str:
    """A syntax tree as text, the same from Python 3.10 on; `ast.dump` and `ast.unparse` change."""
    if isinstance(node, ast.AST):
        fields = [
            f"{name}={_written(value)}"
            for name, value in ast.iter_fields(node)
            if name not in _IGNORED and value is not None and value != []
        ]
        return f"{type(node).__name__}({', '.join(sorted(fields))})"
    if isinstance(node, list):
        return f"[{', '.join(map(_written, node))}]"
    return ascii(node)


_MANAGER = contextlib.contextmanager(iter).__code__
"""The code of every function wrapped by contextmanager."""


@lru_cache(maxsize=256)
def fingerprint(function: Callable[..., Any]) -> str | None:
    """16 hex digits of a hash of a function's source, or None if there is no source.

    Comments, docstrings, annotations, blank lines and formatting are ignored. A wrapper (`functools.wraps`)
    has no fingerprint, unless it is defined in the same file as the function: then it is the library's own
    decorator, and part of the source. The wrapper of `contextlib.contextmanager` is ignored.
    """
    wrappers: list[Any] = []
    inner = inspect.unwrap(function, stop=wrappers.append)  # `append` returns None: never stops
    try:
        file = inspect.getsourcefile(inner)
        codes = map(_code, [*wrappers, inner])
        if not all(code is _MANAGER or inspect.getsourcefile(code) == file for code in codes):
            return None
        source = inspect.getsource(inner)
        # The lines of a method are indented, except inside of strings.
        body: list[Any] = ast.parse(f"if True:\n{source}" if source[0].isspace() else source).body
    except (OSError, TypeError, SyntaxError):
        return None
    tree = body[0].body[0] if source[0].isspace() else body[0]
    return hashlib.sha256(_written(_Essence().visit(tree)).encode()).hexdigest()[:16]


def _code(function: Any) -> Any:
    """The function's own code: for a wrapper, `inspect` returns the file of the wrapped function."""
    return getattr(function, "__code__", None)


def qualified_name(function: Callable[..., Any]) -> str:
    """Module and qualified name, as in "peft.tuners.lora.layer.Linear.forward"."""
    other = type(function).__name__
    return f"{getattr(function, '__module__', other)}.{getattr(function, '__qualname__', other)}"


def known(function: Callable[..., Any]) -> bool:
    """Whether this is, by name and source, a reviewed function."""
    return fingerprint(function) in KNOWN.get(qualified_name(function), ())


def reason_unknown(*functions: Callable[..., Any]) -> str:
    """Why the first of the functions that is not `known` is not, or "" if all are."""
    return next((_reason(function) for function in functions if not known(function)), "")


def _reason(function: Callable[..., Any]) -> str:
    name = qualified_name(function)
    if name not in KNOWN:
        return f"{name} is none of the functions known here"
    if fingerprint(function) is None:
        return f"{name} is wrapped, or has no source to compare with the versions known"
    package, _, rest = name.partition(".")
    try:
        version = f" {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:  # a checkout on the path
        version = ""
    versions = ", ".join(KNOWN[name].values())
    return f"{_TITLES.get(package, package)}{version} has changed {rest}, known here as of {versions}"

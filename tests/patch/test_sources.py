"""Fingerprints: replaced functions are recognised by their source."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from installed import before

from peft_kernels.patch.rules import sources
from peft_kernels.patch.rules.sources import KNOWN, fingerprint, known, reason_unknown

SAMPLE = '''
    def scaled(self, x, *args, scale: float = 2.5, **kwargs):
        """Words."""
        if (name := kwargs.get("name")) is not None and len(x) != 3:
            raise ValueError(f"{name!r}: expected {self.n:>{self.width}} of them," f' got {len(x)}')
        first: int = -1
        return [None if item is None else item ** scale for item in x[1:first, ..., 0]], 'é', True
'''


def made(folder: Path, source: str, name: str = "scaled") -> Callable[..., Any]:
    """A method with this source, in a file that `inspect` can read."""
    path = folder / f"made_{len(list(folder.iterdir()))}.py"
    path.write_text(f"class Made:{source}\n")
    space: dict[str, Any] = {"__name__": "made"}
    exec(compile(path.read_text(), str(path), "exec"), space)
    return getattr(space["Made"], name)


def test_a_fingerprint_is_the_same_on_every_python(tmp_path: Path) -> None:
    """All supported Python versions use the same table."""
    assert fingerprint(made(tmp_path, SAMPLE)) == "a9162cdbe74fe38e"


@pytest.mark.parametrize(
    "old,new",
    [
        ("scale: float = 2.5", "scale: int = 2.5"),
        ("scale: float = 2.5, **kwargs)", "scale=2.5, **kwargs) -> None"),
        ('"""Words."""', '"""Other\nwords."""\n\n        # and a comment'),
        ("first: int = -1", "first = (-1)  # the last"),
        ("x[1:first, ..., 0]", "x[\n            1:first, ..., 0\n        ]"),
        ('"name"', "'name'"),
    ],
    ids=["annotation", "return", "docstring", "assignment", "lines", "quotes"],
)
def test_annotations_comments_and_quotes_do_not_count(old: str, new: str, tmp_path: Path) -> None:
    assert SAMPLE.count(old) == 1
    assert fingerprint(made(tmp_path, SAMPLE.replace(old, new))) == fingerprint(made(tmp_path, SAMPLE))


@pytest.mark.parametrize(
    "old,new",
    [
        ("2.5", "2.0"),
        ("!= 3", "== 3"),
        ("item ** scale", "item * scale"),
        ("self.n:>", "self.n:<"),
        ("self.width", "self.n"),
        ("{name!r}", "{name}"),
        ("None if item", "0 if item"),
        ("1:first", "1:first:2"),
        ("1:first", "-1:first"),
        ("*args", "args"),
        ("first: int = -1", "self.first: int = -1"),
        ("    def scaled", "    @staticmethod\n    def scaled"),
        ("True", "False"),
    ],
)
def test_every_token_counts(old: str, new: str, tmp_path: Path) -> None:
    assert SAMPLE.count(old) == 1
    assert fingerprint(made(tmp_path, SAMPLE.replace(old, new))) != fingerprint(made(tmp_path, SAMPLE))


def test_foreign_wrapper_is_not_unwrapped(tmp_path: Path) -> None:
    """`functools.wraps` copies name and module, and `inspect` returns the source of the wrapped function."""
    original = made(tmp_path, SAMPLE)

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return 2 * original(*args, **kwargs)

    assert fingerprint(original) is not None
    assert fingerprint(wrapper) is None


def test_a_decorator_of_the_same_file_counts_by_its_name(tmp_path: Path) -> None:
    decorated = """
    from functools import wraps as keeping_its_name
    def once(function, keeping_its_name=keeping_its_name):
        @keeping_its_name(function)
        def wrapper(*args):
            return function(*args)
        return wrapper
    twice = once
    @once
    def scaled(self, x):
        return x
"""
    found = fingerprint(made(tmp_path, decorated))
    assert found is not None
    assert found != fingerprint(made(tmp_path, decorated.replace("@once", "@twice")))
    assert found != fingerprint(made(tmp_path, decorated.replace("@once", "")))


def test_without_a_source_there_is_no_fingerprint() -> None:
    space: dict[str, Any] = {}
    exec("def forward(self, x): return x", space)
    for function in (space["forward"], len, functools.partial(len), torch_function()):
        assert fingerprint(function) is None
        assert not known(function)


def torch_function() -> Callable[..., Any]:
    return pytest.importorskip("torch").relu


def resolve(name: str) -> Callable[..., Any] | None:
    """The installed function of this qualified name, or None if this version does not have it."""
    parts = name.split(".")
    pytest.importorskip(parts[0])
    for end in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part, None)
        return found
    raise AssertionError(f"no module of {name} can be imported")


@pytest.mark.parametrize("name", KNOWN)
def test_the_installed_version_is_in_the_table(name: str) -> None:
    function = resolve(name)
    if function is None:
        package = name.partition(".")[0]
        pytest.skip(f"{package} {importlib.metadata.version(package)} has no {name}")
    if before("peft", "0.20") or before("bitsandbytes", "0.50"):
        pytest.skip("functions of these versions have not been reviewed: a trial decides")
    assert sources.qualified_name(function) == name
    assert not reason_unknown(function), fingerprint(function)


def test_changed_function_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = pytest.importorskip("peft").tuners.lora.layer
    name = "peft.tuners.lora.layer.Linear.forward"
    monkeypatch.setitem(KNOWN, name, {"0123456789abcdef": "0.17.0", "fedcba9876543210": "0.18.0 to 0.20.0"})
    assert not known(layer.Linear.forward)
    version = importlib.metadata.version("peft")
    assert reason_unknown(layer.LoraLayer._check_forward_args, layer.Linear.forward) == (
        f"PEFT {version} has changed tuners.lora.layer.Linear.forward, "
        "known here as of 0.17.0, 0.18.0 to 0.20.0"
    )


def test_foreign_forward_is_reported(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    mine = made(tmp_path, SAMPLE)
    assert reason_unknown(mine) == "made.Made.scaled is none of the functions known here"
    name = "peft.tuners.lora.layer.Linear.forward"
    wrapped = functools.wraps(peft.tuners.lora.layer.Linear.forward)(lambda *args: None)
    assert (
        reason_unknown(wrapped) == f"{name} is wrapped, or has no source to compare with the versions known"
    )

"""The version of the package, and the versions of libraries that it supports, wherever they are written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import requirements

ROOT = Path(__file__).resolve().parent.parent
HOME = "peft_kernels/__init__.py"
LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes")
PAGE, DOCTOR = "docs/supported.md", "peft_kernels/cli/doctor.py"
SENTENCES = (
    ("README.md", "torch", r"^pip install torch +# ([\d.]+) or later"),
    ("tools/build_backend.py", "torch", r'^TORCH = "torch>=([\d.]+)"'),
    ("docs/recipes/transformers.md", "NF4Config", r"needs transformers ([\d.]+) or later"),
    (
        "peft_kernels/quantize/transformers/config.py",
        "NF4Config",
        r"transformers: expected ([\d.]+) or later",
    ),
)
"""Other places that say an oldest version: of a library, or of transformers for `NF4Config`."""


class Heading(NamedTuple):
    """The title of a section of CHANGELOG.md, `## VERSION (DATE)`; "unreleased" until there is a date."""

    version: str
    date: str


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def current() -> str:
    found = re.search(r'^__version__ = "(.+)"$', text(HOME), re.MULTILINE)
    assert found is not None, HOME
    return found[1]


def newest_heading() -> Heading:
    found = re.search(r"^## (.*)$", text("CHANGELOG.md"), re.MULTILINE)
    title = found[1] if found else ""
    match = re.fullmatch(r"(\S+) \((\S+)\)", title)
    return Heading(match[1], match[2]) if match else Heading(title, "")


def oldest() -> dict[str, str]:
    """The lower bounds of pyproject.toml."""
    project = requirements.project()
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *requirements.requirements(extras, extras)]
    bounds = dict(match.groups() for one in wanted if (match := re.fullmatch(r"([\w-]+)>=([\w.]+)", one)))
    return {name: bounds[name] for name in LIBRARIES if name in bounds}


def pinned() -> dict[str, str]:
    """The versions of constraints.txt."""
    return dict(re.findall(r"^([\w-]+)==(\S+)$", text("constraints.txt"), re.MULTILINE))


def disagreements() -> list[str]:
    """A sentence for each place that says other versions than pyproject.toml and constraints.txt."""
    return list(_disagreements())


def _disagreements() -> Iterator[str]:
    bounds, pins = oldest(), pinned()
    for name in LIBRARIES:
        if name not in bounds:
            yield f"pyproject.toml: expected a lower bound of {name}, found none"
    table = re.search(r"^## Versions$.*?(?=^#)", text(PAGE), re.MULTILINE | re.DOTALL)
    cells = re.findall(r"^\| (\w+) +\| ([^|]+?) +\|", table[0] if table else "", re.MULTILINE)
    rows = {name.lower(): words for name, words in cells}
    for name, bound in bounds.items():
        expected = f"{bound} or later" if name == "torch" else f"{bound} to {pins[name]}"
        if rows.get(name) != expected:
            yield f"{PAGE}: expected {name} {expected}, got {rows.get(name)}"
    needed = re.search(r"^_NEEDED = .*$", text(DOCTOR), re.MULTILINE)
    for name, numbers in re.findall(r'"(\w+)": \(([\d, ]+)\)', needed[0] if needed else ""):
        bound = ".".join(re.findall(r"\d+", numbers))
        if bound != bounds.get(name):
            yield f"{DOCTOR}: expected {name} {bounds.get(name)}, got {bound}"
    bounds["NF4Config"] = "".join(re.findall(r"`NF4Config`: ([\d.]+)", text(PAGE))[:1])
    for place, name, pattern in SENTENCES:
        said = re.search(pattern, text(place), re.MULTILINE)
        if said is None or said[1] != bounds.get(name):
            yield f"{place}: expected {name} {bounds.get(name)}, got {said and said[1]}: {pattern}"

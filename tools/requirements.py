"""Prints the requirements of the given extras of pyproject.toml.

pip cannot install a project's extras without the project, whose build needs the requirements (torch of the
same environment).
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    print(" ".join(sorted(set(requirements(project()["optional-dependencies"], sys.argv[1:])))))


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements(extras: dict[str, list[str]], names: Iterable[str]) -> Iterator[str]:
    """What the named extras require, also through other extras (`peft_kernels[hf]`)."""
    for requirement in (requirement.replace(" ", "") for name in names for requirement in extras[name]):
        if requirement.startswith("peft_kernels["):
            yield from requirements(extras, requirement[len("peft_kernels[") : -1].split(","))
        else:
            yield requirement


if __name__ == "__main__":
    main()

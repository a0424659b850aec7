"""Prints the requirements of the given extras of pyproject.toml.

pip cannot install a project's extras without the project, whose build needs the requirements (torch of the
same environment).
"""

from __future__ import annotations

import sys
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib


def main() -> None:
    extras = tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = {requirement for name in sys.argv[1:] for requirement in extras[name]}
    print(" ".join(sorted(r.replace(" ", "") for r in wanted if not r.startswith("peft_kernels["))))


if __name__ == "__main__":
    main()

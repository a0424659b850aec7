"""Writes the figures of `make bench ARGS='--only ^methods'` into the documentation.

    python tools/methods_figures.py [bench-output/results.jsonl ...]

Every `1.26<!-- f:methods-COLUMN-METHOD -->` in docs/ gets the measured value, if there is one.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FORMS = {"bytes": ",.0f", "loss": ".3f", "trained": ",", "step": ".2f", "decode": ".2f"}
MARK = re.compile(r"\d[\d,.]*(?=\**<!-- f:(methods-[\w-]+) -->)")


def main(arguments: Sequence[str] | None = None) -> int:
    paths = [Path(path) for path in (sys.argv[1:] if arguments is None else arguments)]
    found = figures(paths or [ROOT / "bench-output" / "results.jsonl"])
    if not found:
        print("methods_figures.py: no results of methods", file=sys.stderr)
        return 1
    missing = set(found)
    for page in sorted((ROOT / "docs").rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        new = MARK.sub(lambda match: found.get(match[1], match[0]), text)
        missing -= set(MARK.findall(text))
        if new != text:
            page.write_text(new, encoding="utf-8")
            print(f"changed: {page.relative_to(ROOT)}")
    if missing:
        print(f"not in the documentation: {', '.join(sorted(missing))}")
    return 0


def figures(paths: Iterable[Path]) -> dict[str, str]:
    """Formatted values by mark."""
    found = {}
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            case = json.loads(line)
            if case.get("group") == "methods":
                column = case["name"].removeprefix("methods-")
                for kind, values in ((column, case["values"]), ("trained", case["trained"])):
                    found |= {mark(kind, name): f"{value:{FORMS[kind]}}" for name, value in values.items()}
    return found


def mark(column: str, method: str) -> str:
    return f"methods-{column}-{re.sub('[ ,]+', '-', method.lower())}"


if __name__ == "__main__":
    sys.exit(main())

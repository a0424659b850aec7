"""Keeps README.md, docs/ and the picture to the measured figures of docs/figures.json.

    python tools/figures.py NAME=VALUE ...      # changes figures, the pages that quote them and the picture
    python tools/figures.py RESULTS.jsonl ...   # those of `make bench ARGS='--only ^methods'`

The file has the figures by name, as pages show them, and for each page its passages with figures, as {name}.
A passage without a name is one that looks like a measured figure and is none.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import bench_picture

ROOT, FILE = bench_picture.ROOT, bench_picture.FIGURES
PLACE = re.compile(r"\{([\w-]+)\}")
FORMS = {"bytes": ",.0f", "loss": ".3f", "trained": ",", "step": ".2f", "decode": ".2f"}


class Figures(NamedTuple):
    values: dict[str, str]
    passages: dict[str, list[str]]  # by page

    def pattern(self, passage: str) -> re.Pattern[str]:
        """Matches a passage with its present figures, over line breaks; the figures are the groups."""
        parts = PLACE.split(passage)
        parts[::2] = (r"\s+".join(map(re.escape, re.split(r"\s+", text))) for text in parts[::2])
        parts[1::2] = (f"({re.escape(self.values[name])})" for name in parts[1::2])
        return re.compile("".join(parts))

    def without_passages(self, page: str, text: str) -> tuple[str, list[str]]:
        """The text of a page without its passages, and the passages that it lacks."""
        lacking = []
        for passage in self.passages.get(page, ()):
            text, count = self.pattern(passage).subn(" ", text)
            lacking += [] if count else [passage]
        return text, lacking

    def changed(self, page: str, text: str, new: dict[str, str]) -> str:
        """The text of a page with new figures."""
        for passage in self.passages.get(page, ()):
            names = PLACE.findall(passage)

            def put(match: re.Match[str], names: list[str] = names) -> str:
                found, end = "", match.start()
                for group, name in enumerate(names, 1):
                    found += match.string[end : match.start(group)] + new.get(name, match[group])
                    end = match.end(group)
                return found + match.string[end : match.end()]

            text = self.pattern(passage).sub(put, text)
        return text


def load(path: Path = FILE) -> Figures:
    return Figures(**json.loads(path.read_text(encoding="utf-8")))


def lacking(root: Path = ROOT) -> dict[str, list[str]]:
    """The passages that pages lack, by page."""
    figures = load(root / FILE.relative_to(ROOT))
    texts = {page: (root / page).read_text(encoding="utf-8") for page in figures.passages}
    found = {page: figures.without_passages(page, text)[1] for page, text in texts.items()}
    return {page: passages for page, passages in found.items() if passages}


def update(new: dict[str, str], root: Path = ROOT) -> list[str]:
    """Changes the file and the pages. Returns the pages that changed."""
    figures, changed = load(root / FILE.relative_to(ROOT)), []
    if unknown := new.keys() - figures.values.keys():
        raise SystemExit(f"figures.py: not in {FILE.name}: {', '.join(sorted(unknown))}")
    for page in figures.passages:
        before = (root / page).read_text(encoding="utf-8")
        after = figures.changed(page, before, new)
        if after != before:
            (root / page).write_text(after, encoding="utf-8")
            changed.append(page)
    figures.values.update(new)
    text = json.dumps(figures._asdict(), indent=1, ensure_ascii=False)
    (root / FILE.relative_to(ROOT)).write_text(text + "\n", encoding="utf-8")
    return changed


def methods(paths: Iterable[Path]) -> dict[str, str]:
    """The figures of the benchmark's group `methods`, formatted, by name."""
    found = {}
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            case = json.loads(line)
            if case.get("group") == "methods":
                column = case["name"].removeprefix("methods-")
                for kind, values in ((column, case["values"]), ("trained", case["trained"])):
                    found |= {method(kind, name): f"{value:{FORMS[kind]}}" for name, value in values.items()}
    return found


def method(column: str, name: str) -> str:
    return f"methods-{column}-{re.sub('[ ,]+', '-', name.lower())}"


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"}.intersection(words):
        print((__doc__ or "").strip())
        return 0
    new = dict(word.split("=", 1) for word in words if "=" in word)
    new |= methods(Path(word) for word in words if "=" not in word)
    if not new:
        print("figures.py: expected NAME=VALUE, or results of `make bench` with methods", file=sys.stderr)
        return 1
    known = load().values
    if left_out := sorted(new.keys() - known.keys()):
        print(f"not in the documentation: {', '.join(left_out)}")
    changed = update({name: value for name, value in new.items() if name in known})
    print(f"changed: {', '.join(changed) or 'nothing'}")
    bench_picture.draw(load().values, bench_picture.PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())

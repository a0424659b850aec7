"""What commands print: for people, in colour where rich is installed and the terminal can; or JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class Output:
    """One command's. Sentences and tables go to stdout, unless JSON is asked for: then that alone."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self._console: Any = None
        if not as_json:
            try:
                from rich.console import Console
            except ImportError:
                pass
            else:
                # Names of files and tensors are shown as they are, brackets and colons too.
                self._console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)

    def say(self, text: str, style: str = "") -> None:
        if self._console is not None:
            self._console.print(text, style=style or None)
        elif not self.as_json:
            print(text)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Columns whose names end in ">" are aligned to the right."""
        names = [column.removesuffix(">") for column in columns]
        right = [column.endswith(">") for column in columns]
        if self._console is not None and self._console.is_terminal:
            from rich.table import Table

            table = Table(box=None, header_style="bold", pad_edge=False)
            for name, aligned in zip(names, right, strict=True):
                table.add_column(name, justify="right" if aligned else "left")
            for row in rows:
                table.add_row(*row)
            self._console.print(table)
        elif not self.as_json:
            widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
            for row in (names, *rows):
                cells = zip(row, widths, right, strict=True)
                line = "  ".join(text.rjust(n) if aligned else text.ljust(n) for text, n, aligned in cells)
                print(line.rstrip())

    def result(self, value: dict[str, Any]) -> None:
        """What `--json` prints."""
        if self.as_json:
            print(json.dumps(value, indent=2))

    def error(self, text: str) -> None:
        if self.as_json:
            print(json.dumps({"error": text}, indent=2))
        print(f"peft-kernels: {text}", file=sys.stderr)

    @contextmanager
    def progress(self, total: int, what: str) -> Iterator[Callable[[int], None]]:
        """A bar on stderr, where somebody watches, while `total` bytes go by. The function tells of more."""
        bar: Any = None
        if not self.as_json and sys.stderr.isatty():
            try:
                from rich import progress
                from rich.console import Console
            except ImportError:
                pass
            else:
                bar = progress.Progress(
                    progress.TextColumn("{task.description}"),
                    progress.BarColumn(),
                    progress.DownloadColumn(),
                    progress.TimeRemainingColumn(),
                    console=Console(stderr=True),
                )
        if bar is None:
            yield lambda nbytes: None
            return
        with bar:
            task = bar.add_task(what, total=total)
            yield lambda nbytes: bar.advance(task, nbytes)


def size(nbytes: float) -> str:
    """In GB or MB (powers of ten), as disks and frameworks count."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(nbytes) >= scale:
            return f"{nbytes / scale:.3g} {unit}" if nbytes < 100 * scale else f"{nbytes / scale:.0f} {unit}"
    return f"{nbytes:.0f} B"

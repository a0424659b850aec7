"""Output of commands: text, in colour if rich is installed and the terminal supports it, or JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class Output:
    """The output of one command: text and tables on stdout, or with `as_json` only JSON."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self._console: Any = None
        if not as_json:
            try:
                from rich.console import Console
            except ImportError:
                pass
            else:
                # No markup: names of files and tensors may contain brackets and colons.
                self._console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)

    def say(self, text: str, style: str = "") -> None:
        if self._console is not None:
            self._console.print(text, style=style or None)
        elif not self.as_json:
            print(text)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Prints a table. Columns whose names end in ">" are right-aligned."""
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

    def written(self, done: Any) -> None:
        """Reports a folder that was written; `done` is a Conversion or a Merge."""
        copied = f"; copied {', '.join(done.copied)}" if done.copied else ""
        self.say(f"{done.destination}: {size(done.bytes_after)} of {size(done.bytes_before)}{copied}", "bold")

    def result(self, value: dict[str, Any]) -> None:
        """Prints the result of `--json`."""
        if self.as_json:
            print(json.dumps(value, indent=2))

    def error(self, text: str) -> None:
        if self.as_json:
            print(json.dumps({"error": text}, indent=2))
        print(f"peft-kernels: {text}", file=sys.stderr)

    @contextmanager
    def progress(self, total: int, what: str) -> Iterator[Callable[[int], None]]:
        """A progress bar on stderr, if that is a terminal. Yields a function that adds processed bytes."""
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
    """Text in GB, MB or kB (powers of ten)."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(nbytes) >= scale:
            return f"{nbytes / scale:.3g} {unit}" if nbytes < 100 * scale else f"{nbytes / scale:.0f} {unit}"
    return f"{nbytes:.0f} B"


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"

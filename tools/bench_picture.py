"""Draws the README's picture, docs/images/bench.svg, from the tables of docs/benchmarks.md.

    python tools/bench_picture.py [OUTPUT.svg]

Bars are ratios of times, the other implementation / ours, from 1 on a logarithmic axis; losing ones have
another colour. A test compares the picture with the tables.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TABLES, PICTURE = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "images" / "bench.svg"
LARGE = "4096x4096"
WINS_COLOUR, LOSES_COLOUR = "#0072B2", "#D55E00"  # distinguishable by colour-blind readers


class Bar(NamedTuple):
    label: str
    ratio: float


class Panel(NamedTuple):
    title: str
    bars: list[Bar]


def tables(text: str) -> list[list[list[str]]]:
    """All tables of a page as rows of cells without markup; the first row has the titles."""
    found: list[list[list[str]]] = []
    before = ""
    for line in re.sub(r"<!--.*?-->", "", text).splitlines():
        if line.startswith("|"):
            cells = [cell.strip().strip("*") for cell in line.strip("|").split("|")]
            if not before.startswith("|"):
                found.append([])
            if not set("".join(cells)) <= set("-: "):
                found[-1].append(cells)
        before = line
    return found


def row(table: list[list[str]], title: str, columns: slice = slice(None)) -> list[Bar]:
    """One row of a table, with a bar per column."""
    (cells,) = [cells[1:] for cells in table if cells[0] == title]
    names = [name.removeprefix(LARGE).strip() for name in table[0][1:]]
    names = [name if re.match(r"\D", name) or "x" in name else f"M={name}" for name in names]
    return [Bar(name, float(cell)) for name, cell in zip(names[columns], cells[columns], strict=True)]


def panels(text: str) -> list[Panel]:
    """The panels: for each peer its most common use, with all timed numbers of rows."""
    forward, training, block = tables(text)[:3]
    names = {
        "LoRA": "LoRA, dense base: stock PEFT",
        "QLoRA": "LoRA, NF4 base: stock PEFT on bitsandbytes",
        "LoRA, dropout": "LoRA with dropout 0.05, dense base: stock PEFT",
        "DoRA": "DoRA, dense base: stock PEFT",
    }
    return [
        Panel(
            f"QLoRA layer, {LARGE}, forward + backward\nbeside PEFT on bitsandbytes",
            row(training, "NF4 base: stock PEFT on bitsandbytes", slice(4)),
        ),
        Panel(
            f"NF4 layer, {LARGE}, forward\nbeside torch's dense bf16 layer",
            row(forward, f"{LARGE}, torch dense bf16"),
        ),
        Panel(
            f"NF4 layer, {LARGE}, forward\nbeside bitsandbytes in evaluation mode",
            row(forward, f"{LARGE}, bitsandbytes in evaluation"),
        ),
        Panel(
            "Decoder block of SmolLM2-135M, forward + backward\nbeside stock PEFT",
            [
                Bar(f"{name}, {bar.label}", bar.ratio)
                for name, title in names.items()
                for bar in row(block, title)[1:]
            ],
        ),
    ]


def draw(shown: Sequence[Panel], path: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    settings = {
        "svg.fonttype": "none",  # text stays text: small, searchable, and the test can read it
        "svg.hashsalt": "peft_kernels",
        "font.family": "sans-serif",
    }
    longest = max(bar.ratio for panel in shown for bar in panel.bars)  # one scale, so that bars compare
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(10.5, 5.6), layout="constrained", facecolor="white")
        for axes, panel in zip(figure.subplots(2, 2).flat, shown, strict=True):
            _panel(axes, panel, longest, WINS_COLOUR, LOSES_COLOUR)
        figure.suptitle(
            "Speed-up by peft_kernels (orange: slower). 2 cores of a Zen 5 CPU, bf16, M rows of input",
            fontsize=11,
        )
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _panel(axes: Any, panel: Panel, longest: float, wins: str, loses: str) -> None:
    axes.set_xscale("log")
    for y, bar in enumerate(panel.bars):
        colour = loses if bar.ratio < 1.0 else wins
        axes.barh(y, bar.ratio - 1.0, left=1.0, color=colour, height=0.7)
        axes.text(max(bar.ratio, 1.0) * 1.03, y, f"{bar.ratio:.2f}", va="center", fontsize=9, color=colour)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(panel.bars)), [bar.label for bar in panel.bars], fontsize=9)
    axes.set_ylim(len(panel.bars) - 0.4, -0.6)
    axes.set_xlim(0.85, longest * 1.2)
    ticks = [tick for tick in (1, 1.5, 2, 3, 4, 6, 8, 12, 16) if tick <= longest]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
    axes.minorticks_off()
    axes.set_title(panel.title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def main(arguments: Sequence[str]) -> int:
    path = Path(arguments[0]) if arguments else PICTURE
    draw(panels(TABLES.read_text(encoding="utf-8")), path)
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

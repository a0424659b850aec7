"""ratios.png: a bar for every ratio, losing ones in another colour."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .harness import Result
from .report import OURS, loses, unique

WINS_COLOUR, LOSES_COLOUR = "#0072B2", "#D55E00"  # distinguishable by colour-blind readers
BAR_INCHES, MARGIN_INCHES, PANEL_INCHES = 0.24, 1.1, 4.6


def draw(results: Sequence[Result], path: Path, title: str) -> str | None:
    """Writes the picture. Returns why it cannot, or None."""
    if importlib.util.find_spec("matplotlib") is None:
        return "matplotlib is not installed"
    from matplotlib.figure import Figure

    groups = {
        group: [r for r in results if r.case.group == group] for group in (r.case.group for r in results)
    }
    panels = {g: unique(n for r in found for n in (*r.peers, *r.yardsticks)) for g, found in groups.items()}
    columns = max(map(len, panels.values()), default=0)
    if columns == 0:
        return "there is nothing to draw"
    heights = [len(groups[group]) * BAR_INCHES + MARGIN_INCHES for group in panels]
    figure = Figure(figsize=(columns * PANEL_INCHES, sum(heights) + 0.8), layout="constrained")
    figure.suptitle(title, fontsize=10)
    strips = figure.subfigures(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    for strip, (group, names) in zip(strips, panels.items(), strict=True):
        strip.suptitle(groups[group][0].case.title or group, fontsize=11, fontweight="bold")
        row = strip.subplots(1, columns, squeeze=False)[0]
        for axes, name in zip(row, names, strict=False):
            _panel(axes, groups[group], name)
        for axes in row[len(names) :]:
            axes.set_axis_off()
    figure.savefig(path, dpi=110)
    return None


def _panel(axes: Any, results: Sequence[Result], name: str) -> None:
    """Bars from 1 on a logarithmic axis: to the right we are faster than a peer, or cost more than a
    yardstick. Dashed lines are goals."""
    cost = any(name in result.yardsticks for result in results)
    goals = unique(goal for r in results for goal in r.case.goals if goal.against == name)
    axes.set_xscale("log")
    for y, result in enumerate(results):
        ratio, text = result.against(name), result.cell(name).partition(" (")[0]
        if ratio is None:
            axes.text(1.05, y, text, va="center", fontsize=8, color="dimgray")
            continue
        bad = not all(goal.met(ratio) for goal in goals) if cost else loses(ratio)
        colour = LOSES_COLOUR if bad else WINS_COLOUR
        axes.barh(y, ratio.median - 1.0, left=1.0, color=colour, height=0.7)
        axes.plot([ratio.q1, ratio.q3], [y, y], color="black", linewidth=1)
        axes.text(max(ratio.q3, 1.0) * 1.05, y, text, va="center", fontsize=8, color=colour)
    axes.axvline(1.0, color="black", linewidth=0.8)
    for goal in goals:
        axes.axvline(goal.limit, color="dimgray", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(results)), [f"{r.case.shape}  {r.case.rows}" for r in results], fontsize=8)
    axes.set_ylim(len(results) - 0.4, -0.6)
    left, right = axes.get_xlim()
    axes.set_xlim(left / 1.2, right * 1.5)
    ticks = [tick for tick in (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64) if left <= tick <= right]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
    axes.minorticks_off()
    title = f"cost: {OURS} / {name}" if cost else f"{name} / {OURS}"
    axes.set_title("; goal ".join([title, *map(str, goals)]), fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)

"""The picture: a bar for every ratio, losing ones in another colour."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .cases import TITLES
from .harness import OURS, Result
from .report import WRONG, loses, ratio_cell, unique

WINS_COLOUR, LOSES_COLOUR = "#0072B2", "#D55E00"  # told apart by colour-blind readers too
BAR_INCHES, MARGIN_INCHES, PANEL_INCHES = 0.24, 1.1, 4.6


def draw(results: Sequence[Result], path: Path, title: str) -> str | None:
    """Write the picture. Returns why there is none, or None."""
    if importlib.util.find_spec("matplotlib") is None:
        return "matplotlib is not installed"
    from matplotlib.figure import Figure

    groups = unique(result.case.group for result in results)
    by_group = {group: [r for r in results if r.case.group == group] for group in groups}
    panels = {
        group: unique(name for r in members for name in (*r.peers, *r.yardsticks))
        for group, members in by_group.items()
    }
    columns = max(map(len, panels.values()), default=0)
    if columns == 0:
        return "there is nothing to draw"
    heights = [len(by_group[group]) * BAR_INCHES + MARGIN_INCHES for group in panels]
    figure = Figure(figsize=(columns * PANEL_INCHES, sum(heights) + 0.8), layout="constrained")
    figure.suptitle(title, fontsize=10)
    strips = figure.subfigures(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    for strip, (group, names) in zip(strips, panels.items(), strict=True):
        strip.suptitle(TITLES[group], fontsize=11, fontweight="bold")
        row = strip.subplots(1, columns, squeeze=False)[0]
        for axes, name in zip(row, names, strict=False):
            _panel(axes, by_group[group], name)
        for axes in row[len(names) :]:
            axes.set_axis_off()
    figure.savefig(path, dpi=110)
    return None


def _panel(axes: Any, results: Sequence[Result], name: str) -> None:
    """Horizontal bars from 1, on a logarithmic axis: to the right we are faster than a peer, or cost more
    than a yardstick. A dashed line is the goal."""
    cost = any(name in result.yardsticks for result in results)
    goals = unique(goal for r in results for goal in r.case.goals if goal.against == name)
    labels = [f"{r.case.shape}  {r.case.rows}".rstrip() for r in results]
    ratios = [result.against(name) for result in results]
    known = [ratio for ratio in ratios if ratio is not None]
    # Room for the bars, and for quartiles unless they are wild.
    ends = [*(r.median for r in known), *(goal.limit for goal in goals)]
    low, high = min([0.8, *ends]), max([1.25, *ends])
    low, high = (
        max(low / 2, min([low, *(r.q1 for r in known)])),
        min(high * 2, max([high, *(r.q3 for r in known)])),
    )
    left, right = low / 1.3, high * 1.9
    axes.set_xscale("log")
    axes.set_xlim(left, right)
    for y, (result, ratio) in enumerate(zip(results, ratios, strict=True)):
        text = ratio_cell(result, name)[0]
        if ratio is None:
            axes.text(1.05, y, text, va="center", fontsize=8, color="crimson" if text == WRONG else "dimgray")
            continue
        bad = not all(goal.met(ratio) for goal in goals) if cost else loses(ratio)
        colour = LOSES_COLOUR if bad else WINS_COLOUR
        axes.barh(y, ratio.median - 1.0, left=1.0, color=colour, height=0.7)
        axes.plot([max(ratio.q1, low), min(ratio.q3, high)], [y, y], color="black", linewidth=1)
        place = max(min(ratio.q3, high), 1.0) * 1.05
        axes.text(place, y, text, va="center", fontsize=8, color=colour)
    axes.axvline(1.0, color="black", linewidth=0.8)
    for goal in goals:
        axes.axvline(goal.limit, color="dimgray", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(results)), labels, fontsize=8)
    axes.set_ylim(len(results) - 0.4, -0.6)
    ticks = [tick for tick in (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64) if left <= tick <= right]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
    axes.minorticks_off()
    title = f"cost: {OURS} / {name}" if cost else f"{name} / {OURS}"
    axes.set_title("; goal ".join([title, *map(str, goals)]), fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)

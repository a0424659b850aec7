"""Reports of finetune.py: a run, two runs side by side, and their loss curves."""

from __future__ import annotations

import importlib.util
import textwrap
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

LOSS_TOLERANCE = 0.01
"""The losses of two back ends must agree to this fraction at every step."""

Metrics = dict[str, Any]  # the content of metrics.json
FIGURES = {
    "validation loss before": ("loss_before", ".4f"),
    "validation loss after": ("loss_after", ".4f"),
    "tokens/s (median)": ("tokens_per_second", ",.0f"),
    "seconds a step (median)": ("seconds_per_step", ".2f"),
    "peak memory while training, MB": ("peak_memory_mb", ",.0f"),
}


def table(*titles: str) -> Table:
    found = Table(box=None, pad_edge=False)
    for title in titles:
        found.add_column(title, justify="right" if title else "left", overflow="fold")
    return found


def show(found: Table) -> None:
    Console(width=100).print(found)


def print_run(metrics: Metrics) -> None:
    sample, check = metrics["sample"], metrics.get("check")
    print("\nsample prompt\n" + textwrap.indent(sample["prompt"].strip(), "    "))
    for name in ("reference", "before", "after"):
        print(f"  {name:<10} {sample[name]}")
    print()
    figures = table("", " ")
    for label, (key, form) in FIGURES.items():
        figures.add_row(label, f"{metrics[key]:{form}}")
    trained, total = metrics["trainable_parameters"], metrics["total_parameters"]
    figures.add_row("trainable parameters", f"{trained:,} of {total:,}")
    show(figures)
    if check is None:
        return
    forms = table("", "logits' relative RMS error", "same top token", "validation loss")
    for form, found in check["forms"].items():
        loss = found.get("loss")
        percent = "" if loss is None else f"{loss:.3f} ({loss / metrics['loss_after'] - 1:+.1%})"
        forms.add_row(form, f"{found['relative_rms']:.2e}", f"{found['same_top_token']:.1%}", percent)
    print("\nagainst the trained model")
    show(forms)
    for problem in check["problems"]:
        print(f"CHECK FAILED: {problem}")


def print_comparison(ours: Metrics, theirs: Metrics) -> bool:
    """Prints loss curves, speed and memory of two runs. Returns whether the curves agree."""
    pairs = zip(ours["losses"], theirs["losses"], strict=True)
    differences = [abs(a - b) / abs(b) for a, b in pairs]
    names = ours["backend"], theirs["backend"]
    figures = table("", *names, "ratio")
    for label, (key, form) in FIGURES.items():
        a, b = ours[key], theirs[key]
        figures.add_row(label, f"{a:{form}}", f"{b:{form}}", f"{a / b:.2f}")
    print()
    show(figures)
    worst = max(differences)
    agree = worst <= LOSS_TOLERANCE
    print(
        f"\nlargest difference of the losses: {worst:.2%} at step {differences.index(worst) + 1} "
        f"({'within' if agree else 'ABOVE'} {LOSS_TOLERANCE:.0%})"
    )
    faster, share = (ours[key] / theirs[key] for key in ("tokens_per_second", "peak_memory_mb"))
    print(
        f"On this machine {names[0]} trains {faster:.1f} times as fast as PEFT + {names[1]}, "
        f"with {share:.0%} of the peak memory."
    )
    return agree


def plot(runs: list[Metrics], path: Path) -> None:
    """The training loss of each run, smoothed, with its validation losses and its peak memory."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no picture drawn: pip install matplotlib (or peft_kernels[demo])")
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    axes, bars = figure.subplots(1, 2, width_ratios=[4, 1])
    # The curves overlap: a wide pale line under a thin dark one shows both.
    styles = [("#0072B2", 1.5, 1.0, -16), ("#E69F00", 5.0, 0.6, 9)]
    for run, (colour, width, alpha, below) in reversed(list(zip(runs, styles, strict=False))):
        losses = run["losses"]
        steps = range(1, len(losses) + 1)
        axes.plot(steps, losses, color=colour, linewidth=0.8, alpha=0.3)
        label = f"{run['backend']}: {run['tokens_per_second']:,.0f} tokens/s"
        axes.plot(steps, smoothed(losses), color=colour, linewidth=width, alpha=alpha, label=label)
        ends = [run["loss_before"], run["loss_after"]]
        axes.plot([0, len(losses)], ends, "o", color=colour, alpha=alpha, markersize=6 + width)
        for step, loss in zip((0, len(losses)), ends, strict=True):
            axes.annotate(
                f"{loss:.2f}", (step, loss), xytext=(0, below), textcoords="offset points", ha="center"
            )
        bar = bars.bar(run["backend"].replace("_", "\n"), run["peak_memory_mb"], color=colour, width=0.6)
        bars.bar_label(bar, fmt="{:,.0f}", padding=2)
    axes.plot([], [], "o", color="grey", label="validation, before and after")
    axes.set(
        xlabel="step",
        ylabel="loss (nats per response token), mean of 9 steps",
        title=f"QLoRA of {Path(runs[0]['model']).name}",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    bars.set(title="peak memory, MB")
    bars.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def smoothed(values: list[float], width: int = 9) -> list[float]:
    """The mean of up to `width` values around each."""
    half = width // 2
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]

"""What finetune.py shows: stages as they end, the final report, two runs side by side, the picture."""

from __future__ import annotations

import importlib.util
import json
import textwrap
import time
from pathlib import Path
from typing import Any

# The losses of two back ends must agree to this fraction at every step.
LOSS_TOLERANCE = 0.01

Metrics = dict[str, Any]  # the content of metrics.json


class Stages:
    """Prints a line with the seconds taken as each stage of a run ends, and keeps them for metrics.json."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    def done(self, name: str, text: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = round(now - self._start, 3)
        print(f"{name:<10} {text} ({now - self._start:.1f} s)", flush=True)
        self._start = now


def write_metrics(metrics: Metrics, path: Path) -> None:
    path.write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")


def read_metrics(path: Path) -> Metrics:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def print_report(metrics: Metrics) -> None:
    before, after, sample = metrics["loss_before"], metrics["loss_after"], metrics["sample"]
    trained, total = metrics["trainable_parameters"], metrics["total_parameters"]
    print("\nsample prompt\n" + textwrap.indent(sample["prompt"].strip(), "    "))
    for name in ("reference", "before", "after"):
        print(f"  {name:<10} {sample[name]}")
    print()
    print(f"validation loss       {before:.3f} before, {after:.3f} after ({after / before - 1:+.1%})")
    print(f"speed                 {_speed(metrics)}")
    print(f"peak memory           {_memory(metrics)}")
    print(f"trainable parameters  {trained:,} of {total:,} ({trained / total:.2%})")
    if "check" in metrics:
        _print_check(metrics["check"])


def _print_check(check: dict[str, Any]) -> None:
    print("logits, against the trained model")
    forms = {
        "reloaded": "reloaded",
        "merged": "merged",
        "merged_nf4": "merged into NF4",
        "base_only": "base only",
    }
    for name, label in forms.items():
        error = check[name]
        print(
            f"  {label:<20}relative RMS {error['relative_rms']:.2e}, "
            f"largest {error['max_abs']:.3f}, same top token {error['argmax_agreement']:.1%}"
        )
    for problem in check["problems"]:
        print(f"CHECK FAILED: {problem}")
    if not check["problems"]:
        print(f"  within the limits: {check['reload_limit']:g} reloaded, {check['merge_limit']:g} merged")
    if check["base_only"]["relative_rms"] <= check["merge_limit"]:
        print("  note: the adapter changes the logits too little for a lost merge to show")
    trained, merged, packed = (check["losses"][name] for name in ("trained", "merged", "merged_nf4"))
    print(
        f"validation loss merged {merged:.3f} ({merged / trained - 1:+.1%} against the trained model), "
        f"merged back into NF4 {packed:.3f} ({packed / trained - 1:+.1%})"
    )


def _speed(metrics: Metrics) -> str:
    return f"{metrics['tokens_per_second']:.0f} tokens/s, {metrics['seconds_per_step']:.2f} s a step"


def _memory(metrics: Metrics) -> str:
    scope = "on the GPU" if metrics["device"].startswith("cuda") else "the whole process"
    return f"{metrics['peak_memory_mb']:,.0f} MB while training ({scope})"


def relative_differences(ours: list[float], theirs: list[float]) -> list[float]:
    """|ours - theirs| / theirs, step by step."""
    return [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]


def print_comparison(ours: Metrics, theirs: Metrics) -> bool:
    """Print the loss curves, speed and memory of two runs; True if the curves agree."""
    differences = relative_differences(ours["losses"], theirs["losses"])
    print(f"\n{'step':>4} {ours['backend']:>14} {theirs['backend']:>14} {'difference':>11}")
    every = max(1, len(differences) // 20)
    for step, (a, b, difference) in enumerate(
        zip(ours["losses"], theirs["losses"], differences, strict=True), 1
    ):
        if step == 1 or step % every == 0 or step == len(differences):
            print(f"{step:>4} {a:>14.4f} {b:>14.4f} {difference:>11.2%}")

    rows = {
        "validation loss before": ("loss_before", "{:.4f}"),
        "validation loss after": ("loss_after", "{:.4f}"),
        "tokens/s": ("tokens_per_second", "{:,.0f}"),
        "seconds a step (median)": ("seconds_per_step", "{:.2f}"),
        "peak memory, MB": ("peak_memory_mb", "{:,.0f}"),
    }
    print(f"\n{'':<24}{ours['backend']:>14} {theirs['backend']:>14} {'ratio':>8}")
    for label, (key, form) in rows.items():
        ratio = ours[key] / theirs[key]
        print(f"{label:<24}{form.format(ours[key]):>14} {form.format(theirs[key]):>14} {ratio:>8.2f}")

    worst = max(differences)
    agree = worst <= LOSS_TOLERANCE
    print(
        f"\nlargest difference of the losses: {worst:.2%} at step {differences.index(worst) + 1} "
        f"({'within' if agree else 'ABOVE'} {LOSS_TOLERANCE:.0%})"
    )
    return agree


def plot_run(metrics: Metrics, path: Path) -> None:
    """Training loss by step, with the validation loss before and after."""
    if not _have_matplotlib():
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    steps = range(1, len(metrics["losses"]) + 1)
    axes.plot(steps, metrics["losses"], color="tab:blue", linewidth=1.5, label="training, one batch a step")
    axes.plot(
        [0, len(metrics["losses"])],
        [metrics["loss_before"], metrics["loss_after"]],
        color="tab:orange",
        marker="o",
        linestyle=":",
        label="validation, before and after",
    )
    axes.set(xlabel="step", ylabel="loss (nats per response token)", title=_title(metrics))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def plot_comparison(ours: Metrics, theirs: Metrics, path: Path) -> None:
    """Both loss curves above, their relative difference below."""
    if not _have_matplotlib():
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    steps = range(1, len(ours["losses"]) + 1)
    # The curves cover each other: a wide pale line under a thin dark one shows both.
    upper.plot(
        steps, theirs["losses"], color="tab:orange", linewidth=5, alpha=0.5, label=_curve_label(theirs)
    )
    upper.plot(steps, ours["losses"], color="tab:blue", linewidth=1.5, label=_curve_label(ours))
    upper.set(ylabel="training loss\n(nats per response token)", title=_title(ours))
    upper.legend()
    differences = [100 * difference for difference in relative_differences(ours["losses"], theirs["losses"])]
    lower.plot(steps, differences, color="tab:gray", linewidth=1.5)
    lower.axhline(100 * LOSS_TOLERANCE, color="tab:red", linestyle="--", linewidth=1, label="limit")
    lower.set(xlabel="step", ylabel="difference, %", ylim=(0, None))
    lower.legend(loc="upper left")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _title(metrics: Metrics) -> str:
    run = metrics["run"]
    return f"QLoRA (r={run['r']}, {run['dtype']}) of {Path(metrics['model']).name}"


def _curve_label(metrics: Metrics) -> str:
    speed, memory = metrics["tokens_per_second"], metrics["peak_memory_mb"]
    return f"{metrics['backend']}: {speed:.0f} tokens/s, {memory:,.0f} MB"


def _have_matplotlib() -> bool:
    if importlib.util.find_spec("matplotlib") is None:
        print("no picture drawn: pip install matplotlib (or peft_kernels[demo])")
        return False
    return True

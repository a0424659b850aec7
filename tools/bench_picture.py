"""Draws the README's picture, docs/images/bench.svg, from docs/figures.json.

Training step, decoded token and peak memory against tokens, beside PEFT on bitsandbytes.

    python tools/bench_picture.py [OUTPUT.svg]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FIGURES, PICTURE = ROOT / "docs" / "figures.json", ROOT / "docs" / "images" / "bench.svg"
TOKENS = (1024, 2048, 4096, 8192)
CONTENDERS = {"stock": ("PEFT + bitsandbytes", "#E69F00"), "ours": ("peft_kernels", "#0072B2")}
"""Names and colours, which colour-blind readers can tell apart."""


def names() -> list[str]:
    """The figures that the picture shows, in its order."""
    bars = [f"{case}-{contender}" for case in ("step", "decode") for contender in CONTENDERS]
    return [*bars, *(f"peak-{tokens}-{contender}" for contender in CONTENDERS for tokens in TOKENS)]


def draw(values: Mapping[str, str], path: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    settings = {
        "svg.fonttype": "none",  # text stays text: small, searchable, and a test can read it
        "svg.hashsalt": "peft_kernels",
        "font.family": "sans-serif",
        "font.size": 10,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(10.5, 3.6), layout="constrained", facecolor="white")
        step, decode, memory = figure.subplots(1, 3, width_ratios=[1, 1, 2])
        bars = [values[name] for name in names()[:4]]
        _bars(step, f"Training step of 1,024 tokens, ms\n{values['step-whole']} times as fast", bars[:2])
        _bars(decode, f"One decoded token, ms\n{values['decode-zen4']} times as fast", bars[2:])
        _lines(memory, values)
        figure.suptitle("QLoRA of SmolLM2-135M, bf16, two cores of a Zen 4 CPU. Less is better", fontsize=11)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def number(text: str) -> float:
    return float(text.replace(",", ""))


def _bars(axes: Any, title: str, shown: Sequence[str]) -> None:
    for at, (text, (name, colour)) in enumerate(zip(shown, CONTENDERS.values(), strict=True)):
        axes.bar(at, number(text), color=colour, width=0.6, label=name)
        axes.text(at, number(text), text, ha="center", va="bottom")
    axes.set_xticks(range(2), ["PEFT +\nbitsandbytes", "peft_kernels"])
    axes.set_yticks([])
    axes.set_ylim(0, max(map(number, shown)) * 1.15)
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _lines(axes: Any, values: Mapping[str, str]) -> None:
    # The figures of the upper line stand above and to the left of its points, those of the lower line below.
    places: list[dict[str, Any]] = [
        {"xytext": (-6, 5), "ha": "right", "va": "bottom"},
        {"xytext": (0, -5), "ha": "center", "va": "top"},
    ]
    for (contender, (name, colour)), place in zip(CONTENDERS.items(), places, strict=True):
        shown = [values[f"peak-{tokens}-{contender}"] for tokens in TOKENS]
        axes.plot(range(len(TOKENS)), list(map(number, shown)), "o-", color=colour, label=name)
        for at, text in enumerate(shown):
            axes.annotate(text, (at, number(text)), textcoords="offset points", color=colour, **place)
    axes.set_xticks(range(len(TOKENS)), [f"{tokens:,}" for tokens in TOKENS])
    axes.set_yticks([])
    axes.set_xlim(-0.5, len(TOKENS) - 0.7)
    axes.set_ylim(0, 18000)
    axes.set_xlabel("tokens of a training step")
    axes.set_title(
        f"Peak memory of the process, MB\n{values['peak-4096-share']}% at 4,096 tokens", fontsize=10
    )
    axes.legend(loc="upper left", frameon=False)
    axes.spines[["top", "right", "left"]].set_visible(False)


def main(arguments: Sequence[str]) -> int:
    path = Path(arguments[0]) if arguments else PICTURE
    draw(json.loads(FIGURES.read_text(encoding="utf-8"))["values"], path)
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Writes docs/families.md: what `pk.patch` fuses in each causal language model of the installed transformers.

    python tools/families.py            # a minute; prints the rows that have changed
    python tools/families.py llama phi3 # prints these rows

Models are the tiny ones of tests/flows, with LoRA on all linear layers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "flows"))

import flow_families
import peft
import transformers

import peft_kernels as pk

PAGE = Path(__file__).resolve().parents[1] / "docs" / "families.md"
COLUMNS = {
    "layer": "LoRA layers", "gated MLP": "MLP", "attention": "attention", "norm": "norms",
    "decoder layer": "residuals", "loss without logits": "loss",
}  # fmt: skip
"""Families of fused forwards, and the heads of their columns."""
INTRODUCTION = """# Families of models

What `pk.patch` fuses in the causal language models of transformers {version}, with LoRA on all linear layers:
all of a kind (yes), some of them (part), none (no); a dash where a model has none. "Part" of attention is
often the attention function alone, without projections and rotary embeddings. `pk.patch(model, dry_run=True)`
says the same of your model, with the reasons. `tools/families.py` writes this page. It leaves out models that
the tests cannot make tiny.
"""


def cell(entries: Sequence[Any]) -> str:
    if not entries:
        return "–"
    fused = [one for one in entries if one.fused]
    alone = any(one.kind.startswith("attention function of") for one in entries)
    return "no" if not fused else "part" if alone or len(fused) < len(entries) else "yes"


def rows(families: Sequence[str]) -> dict[str, str]:
    """The rows of the table by family."""
    found = {}
    for family in families:
        try:
            model = flow_families.tiny(family)
            model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=2))
        except Exception:  # it wants other libraries, or PEFT refuses it
            continue
        entries = pk.patch(model, dry_run=True).entries
        cells = (cell([one for one in entries if one.family == name]) for name in COLUMNS)
        found[family] = f"| {family} | {' | '.join(cells)} |"
    return found


def main(families: list[str]) -> int:
    found = rows(families or sorted(flow_families.families()))
    if families:
        print("\n".join(found.values()))
        return 0
    before = PAGE.read_text(encoding="utf-8").splitlines() if PAGE.exists() else []
    head = [f"| Family | {' | '.join(COLUMNS.values())} |", f"|---{'|---' * len(COLUMNS)}|"]
    text = INTRODUCTION.format(version=transformers.__version__)
    PAGE.write_text("\n".join([text, *head, *found.values(), ""]), encoding="utf-8")
    changed = [row for row in found.values() if row not in before]
    print("\n".join(changed) or "nothing has changed")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

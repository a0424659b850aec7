"""The table of methods, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rounding import ONE_MODEL
from test_example_finetune import tiny  # noqa: F401
from tool_modules import tool_module

from bench.lib import report
from bench.models import methods
from bench.models.methods import BASE, DENSE, KEPT, LORA, METHODS, Case, Measured

ROOT = Path(__file__).resolve().parent.parent.parent
SHORT = ("nf4", "nvfp4", "mxfp4")
"""Formats whose blocks fit into the tiny model."""
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def columns(tiny: Path) -> dict[str, Measured]:  # noqa: F811
    """Small enough for a model of 64 positions."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"PROMPT": 8, "TOKENS": 16, "LENGTHS": (8, 16), "MAX_LENGTH": 24}.items():
            patch.setattr(methods, name, value)
        patch.setattr(methods, "FORMATS", SHORT)
        own = {"steps": 4, "model": tiny / "model", "data": tiny / "pairs.jsonl"}
        timing = report.Timing(0.0, 2)
        return {column: Case(column, **own).run(timing) for column in (*methods.TITLES, methods.FORMAT)}


def values(found: Measured) -> dict[str, float]:
    return found.data()["values"]


def test_every_method_has_every_figure(columns: dict[str, Measured]) -> None:
    extra = {"bytes": set(), "step": set(), "decode": {BASE, DENSE, KEPT}, "loss": {BASE, DENSE}}
    for column, others in extra.items():
        found = columns[column]
        assert not found.absent and not found.wrong, column
        left_out = {"full fine-tuning"} if column == "decode" else set()
        assert set(found.values) == (METHODS.keys() | others) - left_out, column
        assert all(value > 0 for value in values(found).values()), found.values
    assert values(columns["step"])[LORA] == values(columns["decode"])[BASE] == 1.0
    text = report.render(list(columns.values()))
    assert all(name in text for name in METHODS) and "held-out loss" in text


def test_every_format_has_every_figure(columns: dict[str, Measured]) -> None:
    found = columns[methods.FORMAT]
    assert not found.absent and not found.wrong and found.values.keys() == {"bf16", *SHORT}
    bits = [found.value(name, methods.BITS) for name in ("bf16", *SHORT)]
    assert bits[0] == 16 and all(4 < packed < 8 for packed in bits[1:])
    assert found.value("nf4", methods.TIME) == 1.0
    for row in found.values.values():
        assert list(row) == list(methods.FORMATS_FORMS) and row[methods.AFTER] < row[methods.BEFORE]


def test_figures_are_those_of_the_methods(columns: dict[str, Measured]) -> None:
    trained = columns["bytes"].data()["trained"]
    assert trained == columns["step"].data()["trained"] == columns["loss"].data()["trained"]
    assert trained["LoRA"] == trained[LORA] < trained["QDoRA"]
    assert trained["prompt tuning"] == methods.VIRTUAL * 64
    assert trained["Houlsby"] > trained["Pfeiffer"] == trained["parallel"]
    assert trained["full fine-tuning"] == 69_824  # all of the model
    saved = values(columns["bytes"])
    assert saved[LORA] < saved["QDoRA"] and saved["prompt tuning"] < saved[LORA]
    losses = values(columns["loss"])
    for name in METHODS:
        start = losses[DENSE if METHODS[name].base != "nf4" else BASE]
        assert losses[name] != pytest.approx(start, rel=1e-6), name


def test_virtual_tokens_do_not_shift_the_loss(tiny: Path) -> None:  # noqa: F811
    """Labels are aligned as in PEFT, after the virtual tokens."""
    import torch

    models = methods.Models(Case("loss", model=tiny / "model"), tiny)
    model = models.make("prompt tuning").eval()
    batch = {"input_ids": models.tokens(2, 12), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, :5] = -100
    with torch.no_grad():
        want = model(**batch).loss.item()
    assert models.lib.loss_of(model, [batch], methods.VIRTUAL) == pytest.approx(want, rel=ONE_MODEL)


def test_the_documentation_has_the_figures_of_the_methods(
    columns: dict[str, Measured], tmp_path: Path
) -> None:
    tool = tool_module("figures")
    lines = [json.dumps(report.json_data(found, {})) for found in columns.values()]
    (tmp_path / "results.jsonl").write_text("\n".join(lines) + '\n{"group": "memory"}\n')
    found = tool.methods([tmp_path / "results.jsonl"])
    assert found["methods-trained-full-fine-tuning"] == "69,824"
    documented = {name for name in tool.load().values if name.startswith("methods-")}
    assert len(documented) >= 50 and documented <= found.keys(), documented - found.keys()

"""The estimate of a whole step on a GPU (`--only ^estimate`): what it counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bench.gpu import step_estimate as estimate
from bench.gpu.roofline import BY_ARCHITECTURE

H100 = estimate.reached(BY_ARCHITECTURE[90])
ROWS = 64


def test_what_counts() -> None:
    """A view and an allocation are no kernels; an expanded operand is read once."""

    def call(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x.view(-1)[None] * torch.empty_like(y)[:, :1].expand(8, ROWS) + y

    forward, _ = estimate.counted(H100, call, (ROWS,), (8, ROWS))
    matrix = 8 * ROWS
    assert forward.launches == 2
    assert forward.bytes == 2 * (ROWS + 8 + matrix + matrix + matrix + matrix)


def test_a_gemm_is_bound_by_flops() -> None:
    weight = torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta")
    forward, backward = estimate.counted(H100, lambda x: F.linear(x, weight), (8192, 4096))
    assert forward.launches == backward.launches == 1
    assert forward.seconds == pytest.approx(2 * 8192 * 4096 * 4096 / H100.flops)


def test_our_norms_and_rotary_embedding_move_each_element_once() -> None:
    ours = estimate.Ours(H100)
    elements = estimate.prod(estimate.LLAMA.states)
    for (forward, _), least in ((ours.norm(), 4), (ours.add_norm(), 8)):
        assert forward.launches == 1
        assert least <= forward.bytes / elements < 1.01 * least
    forward, backward = ours.rotary()
    elements = estimate.prod(estimate.LLAMA.queries) + estimate.prod(estimate.LLAMA.keys)
    assert forward.launches == backward.launches == 1
    assert 4 <= forward.bytes / elements < 4.1 and 4 <= backward.bytes / elements < 4.1


def test_a_step() -> None:
    found = estimate.Case(BY_ARCHITECTURE[90]).run()
    assert not found.absent, found.absent
    stock, ours = found.steps[estimate.STOCK], found.steps[estimate.OURS]
    assert list(stock) == list(ours) == [name for name, _ in (*estimate.OF_A_LAYER, *estimate.OTHERS)]
    for name in stock:
        assert 0 < ours[name].seconds <= stock[name].seconds, name
    assert stock["attention"] == ours["attention"]
    ((_, met),) = found.goals()
    assert met


def test_the_page_on_gpus_has_these_figures() -> None:
    """Time and bytes of each part, and the launches of operations that the script counts."""
    page = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text(encoding="utf-8")
    section = page.partition("### A whole step")[2].partition("### Launches")[0]
    rows = {cells[0]: cells[1:] for line in section.splitlines() if (cells := _cells(line))}
    models = estimate.Stock(H100), estimate.Ours(H100)
    stock, ours = map(estimate.step, models)
    for name in stock:
        if name != "last norm":
            (ms, gb, _), (our_ms, our_gb, _) = stock[name].cells(), ours[name].cells()
            assert rows[name] == [ms, our_ms, gb, our_gb], name
    for name, of in {
        "norm": lambda model: model.norm(),
        "residual sum with norm": lambda model: model.add_norm(),
        "rotary embedding of q and k": lambda model: model.rotary(),
        "gated activation of an MLP": lambda model: model.activation(),
    }.items():
        counts = [" + ".join(str(cost.launches) for cost in of(model)) for model in models]
        assert [rows[name][0], rows[name][-1]] == counts, name


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("| ") else []

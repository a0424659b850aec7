"""The estimate of a whole step on a GPU (`--only ^estimate`): what it counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bench.gpu import step_estimate as estimate
from bench.gpu.roofline import BY_ARCHITECTURE, GPUS, NF4_BYTES, Gpu
from peft_kernels.core.backends.crossovers import Card
from peft_kernels.core.backends.crossovers import estimate as packaged

H100 = estimate.reached(BY_ARCHITECTURE[90])
ROWS = 64


def test_what_counts() -> None:
    """A view and an allocation are no kernels; an expanded operand is read once."""

    def call(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x.view(-1)[None] * torch.empty_like(y)[:, :1].expand(8, ROWS) + y

    forward, _ = estimate.counted(H100, call, (ROWS,), (8, ROWS))
    matrix = 8 * ROWS
    assert forward.ops == 2
    moved = 2 * (ROWS + 8 + matrix + matrix + matrix + matrix)
    assert forward.seconds == pytest.approx(moved / H100.bandwidth)


def test_a_gemm_is_bound_by_flops() -> None:
    weight = torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta")
    forward, backward = estimate.counted(H100, lambda x: F.linear(x, weight), (8192, 4096))
    assert forward.ops == backward.ops == 1
    assert forward.seconds == pytest.approx(2 * 8192 * 4096 * 4096 / H100.flops)


def test_our_gemms_have_the_flops_of_their_ops() -> None:
    """Weights are dequantised, and what adapters add is written, by kernels of their own."""
    n, k, rank, tokens = 14336, 4096, estimate.RANK, estimate.LLAMA.tokens
    rest = [n * k * (NF4_BYTES + 2) / H100.bandwidth + 2 * tokens * size / H100.bandwidth for size in (n, k)]
    forward, backward = estimate.Ours(H100).linear([(n, k)])
    of_base, of_adapter = 2 * tokens * n * k, 2 * tokens * rank * (n + k)
    assert forward.seconds - rest[0] == pytest.approx((of_base + of_adapter) / H100.flops)
    assert backward.seconds - rest[1] == pytest.approx((of_base + 2 * of_adapter) / H100.flops)


def test_a_step() -> None:
    found = estimate.Case(BY_ARCHITECTURE[90]).run()
    assert list(found.values) == [
        *(name for name, _ in (*estimate.OF_A_LAYER, *estimate.OTHERS)),
        estimate.WHOLE,
    ]
    for name, row in found.values.items():
        assert 0 < row["ours ms"] <= row["stock ms"], name
    assert len(set(found.values["attention"].values())) == 1


@pytest.mark.parametrize("gpu", [gpu for gpu in GPUS if gpu.architecture != 86], ids=lambda gpu: gpu.name)
def test_gemms_are_not_fused_beyond_the_estimate(gpu: Gpu) -> None:
    """crossovers.json has fewer rows: the last tiles may be nearly empty."""
    (rows, _), gpu = packaged(Card("", f"{gpu.architecture / 10}", 0)).limits, estimate.reached(gpu)
    for shape in ((2048, 4096), (8192, 4096), (28672, 8192)):
        row = next(row for row in rows if shape[0] * shape[1] <= row.weights)
        most = max(row.forward, row.backward), max(row.forward_wgmma.most, row.backward_wgmma.most)
        for fused, share in zip(most, (gpu.mma_sync, estimate.WGMMA_REACHED), strict=True):
            assert fused <= estimate.fused_up_to(gpu, *shape, share), shape


def test_where_a_fused_gemm_takes_as_long_as_another_way() -> None:
    """With 7.5 TFLOP/s instead of 10, and one second to dequantise."""
    n, k = 1 << 15, 1 << 15
    gpu = Gpu("a card", 90, 1, n * k * (NF4_BYTES + 2), 1e13, 0)
    rows = (1 + estimate.LAUNCH) / (2 * n * k * (1 / 7.5e12 - 1 / 1e13))
    assert estimate.fused_up_to(gpu, n, k, 0.75) == rows // 32 * 32


def test_the_page_on_gpus_has_these_figures() -> None:
    """The time of each part, and the launches of operations that the script counts."""
    page = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text(encoding="utf-8")
    section = page.partition("### A whole step")[2].partition("### Launches")[0]
    rows = {cells[0]: cells[1:] for line in section.splitlines() if (cells := _cells(line))}
    models = estimate.Stock(H100), estimate.Ours(H100)
    stock, ours = map(estimate.step, models)
    for name in stock:
        if name != "last norm":
            assert rows[name] == [stock[name].ms, ours[name].ms], name
    for name, of in {
        "norm": lambda model: model.norm(),
        "residual sum with norm": lambda model: model.add_norm(),
        "rotary embedding of q and k": lambda model: model.rotary(),
        "gated activation of an MLP": lambda model: model.activation(),
    }.items():
        counts = [" + ".join(str(cost.ops) for cost in of(model)) for model in models]
        assert [rows[name][0], rows[name][-1]] == counts, name


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("| ") else []

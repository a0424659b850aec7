"""The estimate of where wgmma is fastest (`--only ^crossovers`), which crossovers.json has."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.gpu import crossover_estimate as script
from bench.gpu.crossover_estimate import SHAPES, Case, dense, dequantised, fused, packaged
from bench.gpu.roofline import BY_ARCHITECTURE, NF4_BYTES
from bench.gpu.step_estimate import reached
from bench.gpu.wave_quantization import planner
from bench.lib import report
from peft_kernels.core.backends.cuda import CudaLibrary

H100 = reached(BY_ARCHITECTURE[90])
LARGE = 14336, 4096
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def plans() -> CudaLibrary:
    found = planner()
    if isinstance(found, str):
        pytest.skip(found)
    if (
        "wgmma"
        not in found.plan_for(64, *LARGE, 64, "bfloat16", 90, 132, H100.block_shared, kernels="wgmma")[0]
    ):
        pytest.skip("built without LinearWgmma")
    return found


def test_the_packaged_table_is_what_is_estimated(plans: CudaLibrary) -> None:
    found = script.ranges(script.cells(plans, H100))
    assert list(found) == [n * k for n, k in SHAPES]
    assert {size: packaged(size)[3:] for size in found} == found


@pytest.mark.parametrize("is_dx", [False, True])
def test_wgmma_wins_where_the_table_takes_it(plans: CudaLibrary, is_dx: bool) -> None:
    """On average. Between the rows that the table is made from, the last tiles may be nearly empty."""
    for n, k in SHAPES:
        row = packaged(n * k)
        rows, limit = row[3 + is_dx], row[1 + is_dx]
        ratios = []
        for m in range(rows.least, rows.most + 1, 97):
            other = (
                fused(plans, H100, n, k, m, is_dx, "mma.sync") if m <= limit else dequantised(H100, n, k, m)
            )
            ratios.append(fused(plans, H100, n, k, m, is_dx, "wgmma") / other)
        assert not ratios or (max(ratios) < 1.2 and statistics.geometric_mean(ratios) < 0.97), ratios


def test_times_by_hand(plans: CudaLibrary) -> None:
    n, k = LARGE
    # 112 tiles of 64 stages, one a multiprocessor, at 90% of cuBLAS' 81% of 2048 multiply-adds a clock.
    clock = 0.9 * H100.flops / (2 * 2048 * 132)
    assert fused(plans, H100, n, k, 64, False, "wgmma") == pytest.approx(2e-6 + 64 * 336 / clock)
    # 896 tiles of 128 x 256: at most 7 whole ones a multiprocessor. Equal shares would take as long.
    assert fused(plans, H100, n, k, 2048, False, "wgmma") == pytest.approx(2e-6 + 7 * 64 * 1024 / clock)
    # The weight takes longer than the multiply-adds of 16 rows.
    weight = (n * k * NF4_BYTES + 32 * (n + k)) / (0.9 * 3.35e12)
    assert fused(plans, H100, n, k, 16, False, "mma.sync") == pytest.approx(2e-6 + weight)
    assert dense(H100, n, k, 2048) == pytest.approx(2e-6 + 2 * 2048 * n * k / 800e12)
    extra = 2e-6 + n * k * (NF4_BYTES + 2) / (0.9 * 3.35e12)
    assert dequantised(H100, n, k, 2048) - dense(H100, n, k, 2048) == pytest.approx(extra)


def test_stages_cost_what_the_plan_says() -> None:
    source = (ROOT / "csrc" / "cuda" / "linear" / "linear.h").read_text(encoding="utf-8")
    few, more, most = script.STAGE_CLOCKS.values()
    assert (
        f"stage_cost() const {{ return tokens == 64 ? {few} : tokens == 128 ? {more} : {most}; }}" in source
    )
    assert f"kSharingStages = {script.SHARED_STAGES['wgmma']};" in source


def test_the_table_is_shown(plans: CudaLibrary) -> None:
    outcome = Case(BY_ARCHITECTURE[90]).run()
    assert "58,720,256 weights: wgmma for 64 to 1760 rows, dx for 64 to 1760 rows" in outcome.line()
    assert "4,194,304 weights: wgmma for no rows, dx" in outcome.line()
    text = report.render([outcome])
    assert "14336x4096 dx" in text and "dequantise + cuBLAS us" in text
    assert len(outcome.data()["cells"]) == len(SHAPES) * 2 * len(script.ROWS)


def test_without_a_library_the_reason_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "planner", lambda: "not built")
    outcome = Case(BY_ARCHITECTURE[90]).run()
    assert "not built" in outcome.line() and "not built" in report.render([outcome])


def test_the_page_on_gpus_has_these_figures(plans: CudaLibrary) -> None:
    """The times of the largest weight, and the rows of the packaged table."""
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    section = page.partition("### wgmma on H100")[2].partition("### A plan")[0]
    rows = {cells[0]: cells[1:] for line in section.splitlines() if (cells := _cells(line))}
    times: dict[str, Callable[[int], float]] = {
        "kernel for `mma.sync`": lambda m: fused(plans, H100, *LARGE, m, False, "mma.sync"),
        "`LinearWgmma`": lambda m: fused(plans, H100, *LARGE, m, False, "wgmma"),
        "dequantise + cuBLAS": lambda m: dequantised(H100, *LARGE, m),
        "cuBLAS, dense bf16 weight": lambda m: dense(H100, *LARGE, m),
    }
    columns = [int(m) for m in rows["us, y = x W^T, 14336x4096"]]
    for name, seconds in times.items():
        shown = [cell.replace(",", "") for cell in rows[name]]
        assert shown == [report.three_digits(1e6 * seconds(m)) for m in columns], name
    sizes = {"weights up to 8 million": 1, "weights up to 34 million": 2**24, "larger weights": 2**30}
    for words, size in sizes.items():
        shown = [
            script.shown(found).removeprefix("for ").removesuffix(" rows") for found in packaged(size)[3:]
        ]
        assert f"| {words:<48} | {shown[0].replace('no', 'none'):<10} | {shown[1]:<10} |" in page


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("| ") else []

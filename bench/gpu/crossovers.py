"""Times NF4 GEMMs fused, on compute capability 9.0 by wgmma too, and by dequantise + cuBLAS on this GPU, and
those of experts by torch's grouped GEMM. Writes for how many rows of activations each is fastest, as a file
for PEFT_KERNELS_CROSSOVERS.

    python bench/gpu/crossovers.py crossovers.json
    python bench/gpu/crossovers.py --rehearse crossovers.json   # small shapes on the stub device, no GPU

Exits with 2 if the back end cannot be used here.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent.parent))

import torch

import bench  # noqa: F401  (for the path of `testing`)
import peft_kernels as pk
import ptx_backend as ptx
import testing
from bench.gpu.crossover_timing import Cell, Target, crossovers, device_clock, time_cells
from bench.gpu.device_cases import SHAPES
from bench.lib import report
from peft_kernels.core.backends import cuda
from peft_kernels.core.backends.crossovers import ANY, MEASURED, NO_ROWS, WGMMA_RANGES, Card, Limits, Rows

ROWS = (64, 96, 128, 192, 256, 384, 512, 768, 1024)
EXPERTS_SHAPES = ((1536, 2048), (2048, 768))
EXPERTS = 32
EXPERTS_ROWS = (64, 128, 192, 256, 384, 512, 768, 1024, 2048)
"""Of an expert: of Qwen3-30B-A3B, whose layers have four times as many."""
TINY = ((64, 128), (128, 64), (128, 192))


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    backend = ptx.BACKEND if options.rehearse else cuda.BACKEND
    if options.rehearse:
        testing.register_ptx()
    if reason := backend.probe():
        print(
            f"bench/gpu/crossovers.py: back end {backend.name} cannot be used here: {reason}", file=sys.stderr
        )
        return 2
    card, cells, of_experts = rehearsed() if options.rehearse else timed()
    limits = Limits(crossovers(cells), crossovers(of_experts))
    text = json.dumps({"tables": [entry(card, limits)]}, indent=2)
    options.output.write_text(text, encoding="utf-8")
    print(render(card.name, cells, limits.rows))
    if of_experts:
        print(f"\n{render(f'{card.name}, rows and weights of an expert', of_experts, limits.experts)}")
    return 0


def timed() -> tuple[Card, list[Cell], list[Cell]]:
    on = card_here()
    return on.card, time_cells(on, SHAPES, ROWS), time_cells(on, EXPERTS_SHAPES, EXPERTS_ROWS, EXPERTS)


def card_here() -> Target:
    return Target(
        cuda.BACKEND.extension,
        getattr(torch.ops, cuda.BACKEND.namespace),
        cuda.BACKEND.card(0),
        torch.device("cuda", 0),
        torch.cuda.get_device_properties(0).L2_cache_size,
        device_clock,
        cuda.BACKEND.has_wgmma(0),
    )


def rehearsed() -> tuple[Card, list[Cell], list[Cell]]:
    from stub_device import H100, stub_device

    card = Card("stub device", "9.0", H100[1])
    with stub_device(H100):
        ops = torch.ops.peft_kernels_ptx
        on = Target(ptx.BACKEND.extension, ops, card, torch.device("cpu"), 0, wall_clock)
        return card, time_cells(on, TINY, ROWS), time_cells(on, TINY, ROWS, experts=2)


def wall_clock(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def entry(card: Card, limits: Limits) -> dict[str, Any]:
    """The table of a card in a file, and what was measured with."""
    driver = Path("/proc/driver/nvidia/version")  # on Linux
    conditions = {"peft_kernels": pk.__version__, "torch": torch.__version__}
    with suppress(OSError, IndexError):
        conditions["driver"] = driver.read_text(encoding="utf-8").splitlines()[0]
    tables = {name: [*map(_row, rows)] for name, rows in limits._asdict().items() if rows}
    return {
        "compute_capability": card.compute_capability,
        "source": MEASURED,
        "card": card.name,
        "measured_with": conditions,
        **tables,
    }


def _row(row: Rows) -> dict[str, Any]:
    ranges = {name: list(getattr(row, name)) for name in WGMMA_RANGES if getattr(row, name) != NO_ROWS}
    weights = None if row.weights == ANY else row.weights
    return {"weights": weights, "forward": row.forward, "backward": row.backward, **ranges}


def render(title: str, cells: Sequence[Cell], rows: Sequence[Rows]) -> str:
    """The times of all cells, and the crossovers."""
    times: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        name = f"{cell.out_features}x{cell.in_features}", "dx" if cell.is_backward else "forward"
        ways = cell.fused, cell.wgmma, cell.dequantised
        times.setdefault(name, []).append(" / ".join(f"{way * 1e6:.0f}" for way in ways if way is not None))
    columns = ["weight", "", *(f"M={m}" for m in sorted({cell.rows for cell in cells}))]
    lines = [[*name, *values] for name, values in times.items()]
    limits = [
        [
            "any" if row.weights == ANY else f"{row.weights:,}", str(row.forward), str(row.backward),
            *("-" if found == NO_ROWS else f"{found.least} to {found.most}"
              for found in (getattr(row, name) for name in WGMMA_RANGES)),
        ]
        for row in rows
    ]  # fmt: skip
    wgmma = " / by wgmma" if any(cell.wgmma is not None for cell in cells) else ""
    return "\n".join(
        (
            f"{title}: us fused{wgmma} / by dequantise + cuBLAS",
            report.table(columns, lines),
            "",
            "fused up to so many rows; by wgmma",
            report.table(("weights up to", "forward", "dx", "wgmma", "wgmma dx"), limits),
        )
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--rehearse", action="store_true", help="on the stub device")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())

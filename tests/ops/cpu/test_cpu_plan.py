"""Which CPU kernel a GEMM uses. A slow choice is correct too, so no other test would notice it."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from skips import needs
from torch.utils.data import DataLoader, Dataset

import peft_kernels as pk
import testing
from peft_kernels.core.backends import cpu
from peft_kernels.core.formats import FORMATS

pytestmark = needs("cpu")

NF4_64, NF4_32 = FORMATS["nf4"].layout(64), FORMATS["nf4"].layout(32)
MXFP4, NVFP4 = FORMATS["mxfp4"].layout(32), FORMATS["nvfp4"].layout(16)
FP8, FP8_ROWS = FORMATS["fp8"].layout(128), FORMATS["fp8"].layout(0)


def isas() -> list[Any]:
    names = [name.removeprefix("cpu-") for name in testing.backend_ids() if name.startswith("cpu-")]
    missing = {name: testing.unavailable(f"cpu-{name}") for name in names}
    return [
        pytest.param(name, marks=pytest.mark.skipif(missing[name] is not None, reason=str(missing[name])))
        for name in names
    ]


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize(
    "rows, in_features, form, is_bf16, expected",
    [
        (1, 4096, NF4_64, True, "gemv"),
        (8, 4096, NF4_64, False, "gemv"),
        (8, 28672, NF4_64, False, "floats"),  # exceeds the GEMV scratch
        (1, 28672, NF4_64, False, "gemv"),
        (16, 4096, NF4_64, True, "gemv"),
        (16, 28672, NF4_64, True, "pairs"),  # exceeds the GEMV scratch
        (9, 4096, NF4_32, True, "pairs"),  # its tables need blocks of 64
        (16, 4096, MXFP4, True, "gemv"),  # short blocks are slow to decode for packed lhs
        (17, 4096, MXFP4, True, "pairs"),
        (9, 4096, NVFP4, False, "floats"),
        (6, 4096, FP8, True, "gemv"),
        (15, 4096, FP8, True, "gemv"),
        (15, 4096, FP8_ROWS, False, "gemv"),
        (15, 4112, FP8, False, "dots"),  # no whole steps
        (33, 4096, FP8, True, "pairs"),
        (33, 4096, FP8, False, "floats"),
        (17, 4096, NF4_64, True, "pairs"),
        (2048, 576, NF4_64, True, "pairs"),
        (9, 4096, NF4_64, False, "floats"),
        (512, 96, NF4_64, False, "floats"),
        (4, 96, NF4_64, False, "floats"),
        (512, 100, NF4_64, True, "pairs"),
        (512, 100, NF4_64, False, "dots"),
    ],
)
def test_the_fast_kernel_is_chosen(
    isa: str, rows: int, in_features: int, form: int, is_bf16: bool, expected: str
) -> None:
    has_pairs = isa.startswith(("avx512_bf16", "amx", "neon_bf16"))
    with cpu.BACKEND.use_isa(isa):
        plan = cpu.BACKEND.extension.linear_plan(rows, 4096, in_features, form, is_bf16)
    if rows == 16 and isa != "avx512_bf16":  # tiles are faster, or a register does not hold two tables
        expected = "pairs"
    if isa.startswith("amx") and (rows, form, is_bf16) == (15, FP8, True):  # tiles, from 7 rows on
        expected = "pairs"
    if expected == "pairs" and not has_pairs:
        expected = "floats" if in_features % 32 == 0 else "dots"
    assert plan == expected


class Gemms(Dataset[dict[str, Any]]):
    """Items that a worker computes with the library, like an encoder in front of a model."""

    def __init__(self) -> None:
        self.weight = testing.nf4_weight(512, 256)
        self.x = testing.tensor(64, 256)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Any]:
        before = len(os.listdir("/proc/self/task"))
        y = pk.nf4_linear(self.x, self.weight)
        threads = len(os.listdir("/proc/self/task")) - before
        # As bytes: to share a tensor's memory a worker starts a thread.
        return {"y": y.numpy().tobytes(), "threads": threads}


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="no /proc: threads cannot be counted")
def test_a_data_loader_worker_starts_no_threads() -> None:
    """Workers are forked without the threads of their parent, and share the cores with it."""
    data = Gemms()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        want = pk.nf4_linear(data.x, data.weight)
        for item in DataLoader(data, batch_size=None, num_workers=2):
            assert item["threads"] == 0
            assert item["y"] == want.numpy().tobytes()
    finally:
        torch.set_num_threads(before)

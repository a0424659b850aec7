"""How a product with an NF4 weight is cut into programs: tables by the number of rows of x or dy."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from .launch import config, target


class Tiles(NamedTuple):
    """Tiles of programs for up to `rows` rows."""

    rows: int
    groups: int  # runs of weights that a program reads at a time, at most
    configs: list[triton.Config]


# Beyond the last row of a table the weight is dequantised, piece by piece, for torch's product.
FORWARD = [
    Tiles(8, 4, [config(4, 3, BLOCK_M=8, BLOCK_N=64), config(4, 2, BLOCK_M=8, BLOCK_N=64)]),
    Tiles(16, 4, [config(4, 3, BLOCK_M=16, BLOCK_N=64), config(4, 2, BLOCK_M=16, BLOCK_N=64)]),
    Tiles(32, 2, [config(4, 3, BLOCK_M=32, BLOCK_N=64), config(8, 3, BLOCK_M=32, BLOCK_N=128)]),
    Tiles(64, 1, [config(8, 3, BLOCK_M=64, BLOCK_N=128), config(4, 3, BLOCK_M=64, BLOCK_N=64)]),
    Tiles(256, 1, [config(8, 3, BLOCK_M=64, BLOCK_N=128), config(8, 3, BLOCK_M=128, BLOCK_N=64)]),
]
BACKWARD = [
    Tiles(16, 1, [config(4, 3, BLOCK_M=16, BLOCK_K=64)]),
    Tiles(32, 1, [config(4, 3, BLOCK_M=32, BLOCK_K=64)]),
    Tiles(64, 1, [config(8, 2, BLOCK_M=64, BLOCK_K=64), config(8, 3, BLOCK_M=64, BLOCK_K=128)]),
    Tiles(256, 1, [config(8, 3, BLOCK_M=128, BLOCK_K=128), config(8, 3, BLOCK_M=128, BLOCK_K=64)]),
]
# fp32 goes without tensor cores, and torch's products do better from few rows on.
FORWARD_F32 = [Tiles(16, 1, [config(4, 2, BLOCK_M=16, BLOCK_N=32)])]
BACKWARD_F32 = [Tiles(16, 1, [config(8, 2, BLOCK_M=16, BLOCK_K=32)])]


def tiles_for(table: list[Tiles], rows: int) -> Tiles | None:
    least = 16 if target() == "hip" else 8  # columns of a matrix instruction
    return next((t for t in table if rows <= t.rows and least <= t.configs[0].kwargs["BLOCK_M"]), None)


def table_for(dtype: torch.dtype, backward: bool) -> list[Tiles]:
    if dtype == torch.float32:
        return BACKWARD_F32 if backward else FORWARD_F32
    return BACKWARD if backward else FORWARD

"""How a product with an NF4 weight is cut into programs: tables by the number of rows of x or dy.

What changes the order of a sum depends on shapes and the card's size alone, not on how long anything took.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton

from .launch import target


class Tiles(NamedTuple):
    """Tiles of programs for up to `rows` rows."""

    rows: int
    groups: int  # runs of weights that a program reads at a time, at most
    configs: list[triton.Config]


def _config(warps: int, stages: int, **blocks: int) -> triton.Config:
    return triton.Config(blocks, num_warps=warps, num_stages=stages)


# Beyond the last row of a table the weight is dequantised, piece by piece, for torch's product.
FORWARD = [
    Tiles(8, 4, [_config(4, 3, BLOCK_M=8, BLOCK_N=64), _config(4, 2, BLOCK_M=8, BLOCK_N=64)]),
    Tiles(16, 4, [_config(4, 3, BLOCK_M=16, BLOCK_N=64), _config(4, 2, BLOCK_M=16, BLOCK_N=64)]),
    Tiles(32, 2, [_config(4, 3, BLOCK_M=32, BLOCK_N=64), _config(8, 3, BLOCK_M=32, BLOCK_N=128)]),
    Tiles(64, 1, [_config(8, 3, BLOCK_M=64, BLOCK_N=128), _config(4, 3, BLOCK_M=64, BLOCK_N=64)]),
    Tiles(256, 1, [_config(8, 3, BLOCK_M=64, BLOCK_N=128), _config(8, 3, BLOCK_M=128, BLOCK_N=64)]),
]
BACKWARD = [
    Tiles(16, 1, [_config(4, 3, BLOCK_M=16, BLOCK_K=64)]),
    Tiles(32, 1, [_config(4, 3, BLOCK_M=32, BLOCK_K=64)]),
    Tiles(64, 1, [_config(8, 2, BLOCK_M=64, BLOCK_K=64), _config(8, 3, BLOCK_M=64, BLOCK_K=128)]),
    Tiles(256, 1, [_config(8, 3, BLOCK_M=128, BLOCK_K=128), _config(8, 3, BLOCK_M=128, BLOCK_K=64)]),
]
# fp32 goes without tensor cores, and torch's products do better from few rows on.
FORWARD_F32 = [Tiles(16, 1, [_config(4, 2, BLOCK_M=16, BLOCK_N=32)])]
BACKWARD_F32 = [Tiles(16, 1, [_config(8, 2, BLOCK_M=16, BLOCK_K=32)])]


def tiles_for(table: list[Tiles], rows: int) -> Tiles | None:
    least = 16 if target() == "hip" else 8  # columns of a matrix instruction
    return next((t for t in table if rows <= t.rows and least <= t.configs[0].kwargs["BLOCK_M"]), None)


def table_for(dtype: torch.dtype, backward: bool) -> list[Tiles]:
    if dtype == torch.float32:
        return BACKWARD_F32 if backward else FORWARD_F32
    return BACKWARD if backward else FORWARD


PROGRAMS_PER_PROCESSOR = 4
LEAST_DEPTH = 512  # of a split's sum


def depth_of_split(programs: int, depth: int, unit: int, device: torch.device) -> int:
    """How much of a sum over `depth` a program takes, a multiple of `unit`: so that all processors work."""
    splits = max(processors(device) * PROGRAMS_PER_PROCESSOR // max(programs, 1), 1)
    units = triton.cdiv(triton.cdiv(depth, splits), unit)
    return max(units, triton.cdiv(min(LEAST_DEPTH, depth), unit), 1) * unit


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors, or compute units, of a card; where there is none, few."""
    return 2 if device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count

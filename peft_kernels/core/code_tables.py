"""The values of codes, for Python (for C++: ``csrc/common/nf4.h`` and ``codes.h``).

Source: QLoRA (Dettmers et al. 2023, section 3) for NF4, "8-bit Approximations for Parallelism in Deep
Learning" (Dettmers 2015) for the dynamic map; values as in bitsandbytes. A test compares the three.
"""

from __future__ import annotations

from functools import lru_cache

import torch

NF4_CODE: tuple[float, ...] = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Values of NF4."""

FP4_CODE: tuple[float, ...] = tuple(sign * n / 12 for sign in (1, -1) for n in (0, 1 / 16, 8, 12, 4, 6, 2, 3))
"""Values of bitsandbytes' FP4, whose largest magnitude is 1. It has no -0.0."""

E2M1_CODE: tuple[float, ...] = tuple(sign * x for sign in (1.0, -1.0) for x in (0, 0.5, 1, 1.5, 2, 3, 4, 6))
"""Values of the 4-bit elements of the OCP Microscaling formats (MX 1.0, section 5.3.3)."""

ZERO_POINT = 8
"""Zero point of int4 weights that have none of their own."""

INT4_CODE: tuple[float, ...] = tuple(float(code - ZERO_POINT) for code in range(16))
"""Values of int4 with that zero point."""

NF4_THRESHOLDS: tuple[float, ...] = (
    -0.8480964303016663,
    -0.6106328964233398,
    -0.4599952697753906,
    -0.33967941999435425,
    -0.23460739850997925,
    -0.13791173696517944,
    -0.045525018125772476,
    0.03979014977812767,
    0.1202552542090416,
    0.2035212516784668,
    0.2920137643814087,
    0.3893125355243683,
    0.5016633868217468,
    0.6427869200706482,
    0.8614783883094788,
)
"""The code of x is the number of thresholds t with x > t, so a tie takes the lower code.

Exactly the fp32 values that bitsandbytes' CUDA kernels compare with: its source writes -0.8480964004993439f
and so on, which C++ rounds to fp32 once. Python would round those digits twice, through fp64, and miss three
of the fifteen by one unit in the last place.
"""

BLOCKSIZES: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Allowed numbers of weights that share one absmax."""

WEIGHT_DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that a weight may have before it is quantised."""

NESTED_BLOCKSIZE = 256
"""Number of absmax values that share one second-level absmax (double quantisation)."""


@lru_cache(maxsize=16)
def nf4_thresholds(device: torch.device) -> torch.Tensor:
    """NF4 decision thresholds, fp32 (15,), on `device`."""
    return torch.tensor(NF4_THRESHOLDS, dtype=torch.float32, device=device)


@lru_cache(maxsize=16)
def dynamic_map(device: torch.device, signed: bool = True) -> torch.Tensor:
    """The dynamic 8-bit map, ascending, fp32 (256,), on `device`.

    Signed: seven decades; decade i holds the 2^i midpoints of linspace(0.1, 1, 2^i + 1), scaled by
    10^(i - 6), with both signs; then 0 and 1. Unsigned: 2^(i + 1) positive midpoints instead.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = _edges(2 ** (i if signed else i + 1))
        magnitudes = (10.0 ** (i - 6)) * ((edges[:-1] + edges[1:]) / 2.0)
        values += magnitudes.tolist() + ((-magnitudes).tolist() if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def is_dynamic_map(table: torch.Tensor, signed: bool = True) -> bool:
    """Whether a table is a dynamic map but for the last bits, in which those of bitsandbytes differ between
    CPUs. Values that we compute are those of our own map."""
    expected, found = dynamic_map(torch.device("cpu"), signed), table.detach().float().cpu().view(-1)
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-6, atol=0)


def _edges(n: int) -> torch.Tensor:
    """torch.linspace(0.1, 1, n + 1) in fp32, as torch computes it on CPUs with fused multiply-adds. On others
    torch's values differ, and a file must mean the same everywhere."""
    first, last = torch.tensor([0.1, 1.0]).double()
    step = ((last - first).float() / n).double()
    i = torch.arange(n + 1)
    return torch.where(i < (n + 1) // 2, first + step * i, last - step * (n - i)).float()


@lru_cache(maxsize=16)
def moment_values(device: torch.device, signed: bool) -> torch.Tensor:
    """Values of the codes of an optimizer's moments, fp32 (256,): a dynamic map, signed for the first moment.
    Code 0 of the second moment, which covers all values up to the first midpoint, is read as half of that
    midpoint: with 0, a nonzero first moment would be divided by eps alone, and the parameter thrown far
    off."""
    values = dynamic_map(torch.device("cpu"), signed).clone()
    if not signed:
        values[0] = dynamic_thresholds(torch.device("cpu"), signed)[0] * 0.5
    return values.to(device)


@lru_cache(maxsize=16)
def dynamic_thresholds(device: torch.device, signed: bool = True) -> torch.Tensor:
    """Midpoints of a dynamic map, fp32 (255,): the code of x is the number of midpoints m with x > m, so that
    a tie takes the lower code."""
    table = dynamic_map(torch.device("cpu"), signed)
    return ((table[:-1] + table[1:]) * 0.5).to(device)

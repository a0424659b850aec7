"""Fingerprints of tensors, by a hash of their bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Constants of splitmix64, as signed 64-bit integers.
_STEP, _MIX1, _MIX2 = -7046029254386353131, -4658895280553007687, -7723592293110705685
_CHUNK = {"cpu": 1 << 16}
_LARGE_CHUNK = 1 << 20


def fingerprint(value: Any) -> Any:
    """Dtype, shape and a 64-bit hash of a tensor's bits; type and value of a number. The same in every
    run."""
    if not isinstance(value, Tensor):
        return (type(value).__name__, value)
    if value.layout == torch.sparse_coo:  # SHiRA adds these
        value = value.detach().coalesce()
        return ("sparse", tuple(value.shape), fingerprint(value.indices()), fingerprint(value.values()))
    if value.numel() == 0 or value.dim() == 0:
        return (value.dtype, tuple(value.shape), value.tolist())
    return (value.dtype, tuple(value.shape), int(_bits_hash(value)))


def _bits_hash(value: Tensor) -> Tensor:
    """A 64-bit hash of the bits of a dense tensor, int64 () on its device. Needs 8 MB of scratch for a
    contiguous tensor, on a CPU less than the cache."""
    bits = value.detach().contiguous().view(-1)
    total = torch.zeros((), dtype=torch.int64, device=value.device)
    itemsize = next((n for n in (8, 4, 2, 1) if bits.nbytes % n == 0 and bits.data_ptr() % n == 0), 1)
    words = bits.view(torch.uint8).view(
        {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[itemsize]
    )
    size = _CHUNK.get(value.device.type, _LARGE_CHUNK)
    keys = torch.arange(min(size, words.numel()), device=value.device) * _STEP
    for start in range(0, words.numel(), size):
        chunk = words[start : start + size].to(torch.int64)
        mixed = (chunk ^ keys[: chunk.numel()]).mul_(_MIX1)
        mixed.bitwise_xor_(mixed >> 29).mul_(_MIX2)
        mixed.bitwise_xor_(mixed >> 32)
        total += mixed.sum()
        keys += (size * _STEP + 2**63) % 2**64 - 2**63
    return total

"""Dropout masks by an independent Philox4x32-10 in numpy (Salmon et al. 2011)."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


def philox4x32(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Four words per counter, both (count, 4); words of counters and key are below 2^32."""
    c0, c1, c2, c3 = counter.astype(np.uint64).T
    for i in range(10):
        k0, k1 = (np.uint64((k + i * w) % 2**32) for k, w in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True))
        p0, p2 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = ((p2 >> HALF) ^ c1 ^ k0, p2 & LOW, (p0 >> HALF) ^ c3 ^ k1, p0 & LOW)
    return np.stack((c0, c1, c2, c3), 1)


@functools.lru_cache(maxsize=4096)
def words(numel: int, seed: int, stream: int = 0) -> np.ndarray:
    """The random word of every element: block by block, the stream in the third word of the counter."""
    blocks = (numel + 3) // 4
    counter = np.zeros((blocks, 4), np.uint64)
    counter[:, 0], counter[:, 2] = np.arange(blocks), stream
    return philox4x32(counter, (seed % 2**32, (seed >> 32) % 2**32)).reshape(-1)[:numel].astype(np.uint32)


def kept(shape: tuple[int, ...], p: float, seed: int, stream: int = 0) -> Tensor:
    """Bool: which elements dropout keeps."""
    threshold = min(round(p * 2**32), 2**32 - 1)
    return torch.from_numpy(words(int(np.prod(shape)), seed, stream) >= threshold).view(shape)


def factors(shape: tuple[int, ...], p: float, seed: int, stream: int = 0) -> Tensor:
    """fp64: what dropout multiplies elements by, 0 or 1 / (1 - p)."""
    return kept(shape, p, seed, stream).double() * (1 / (1 - p) if p < 1 else 0.0)

"""What a GPU allows at best, by its bandwidth and its matrix peak: the arithmetic of all estimates."""

from __future__ import annotations

from dataclasses import dataclass

NF4_BYTES = 0.5 + 1 / 64 + 4 / 256 / 64
"""Bytes per weight: a 4-bit code, and its share of an 8-bit absmax and of that one's fp32 scale."""
KIB, MIB = 2**10, 2**20
REGISTERS = 65536
"""Of a multiprocessor, on every card here."""
RESERVED_SHARED = KIB
"""Bytes of shared memory that the driver takes from each block."""


@dataclass(frozen=True)
class Gpu:
    name: str
    architecture: int
    sms: int
    bandwidth: float  # bytes/s
    flops: float
    """Of dense bf16 GEMMs with fp32 accumulation: about 0.8 of the data sheet, which large ones reach."""
    l2: int  # bytes
    shared: int = 0
    """Bytes of a multiprocessor (CUDA programming guide, table of compute capabilities)."""
    warps: int = 0
    """Resident on a multiprocessor at most."""
    blocks: int = 0
    """Resident on a multiprocessor at most."""

    mma_sync: float = 0.65 / 0.8
    """Share of `flops` that our kernels for mma.sync are taken to reach: 65% of the peak of mma.sync."""

    @property
    def slug(self) -> str:
        """The name in names of cases."""
        return self.name.lower().replace(" sxm", "").replace(" ", "-")

    @property
    def block_shared(self) -> int:
        """Bytes of shared memory that one block can have."""
        return self.shared - RESERVED_SHARED

    def seconds(self, nbytes: float, flops: float = 0.0, share: float = 1.0) -> float:
        """Of a kernel, which takes as long as memory or the matrix units need, whichever is longer. `share`:
        of `flops`, that it reaches."""
        return max(nbytes / self.bandwidth, flops / (share * self.flops))

    def linear(self, n: int, k: int, m: int, share: float = 1.0, weight: float = NF4_BYTES) -> float:
        """Of [m, k] x [n, k]^T with 16-bit activations and `weight` bytes per weight."""
        return self.seconds(n * k * weight + 2 * m * (k + n), 2 * m * n * k, share)

    def dequantize(self, n: int, k: int) -> float:
        """Of reading an NF4 weight and writing it in 16 bits."""
        return self.seconds(n * k * (NF4_BYTES + 2))


GPUS = (
    Gpu("A100 SXM", 80, 108, 2.04e12, 250e12, 40 * MIB, 164 * KIB, 64, 32),
    Gpu("RTX 3090", 86, 82, 0.936e12, 57e12, 6 * MIB, 100 * KIB, 48, 16),
    Gpu("RTX 4090", 89, 128, 1.01e12, 132e12, 72 * MIB, 100 * KIB, 48, 24),
    Gpu("H100 SXM", 90, 132, 3.35e12, 800e12, 50 * MIB, 228 * KIB, 64, 32, 0.65 * 645 / 800),
    Gpu("B200", 100, 148, 8.0e12, 1800e12, 126 * MIB, 228 * KIB, 64, 32, 0.65 * 1463 / 1800),
    Gpu("RTX 5090", 120, 170, 1.79e12, 168e12, 96 * MIB, 100 * KIB, 48, 24),
)
BY_ARCHITECTURE = {gpu.architecture: gpu for gpu in GPUS}

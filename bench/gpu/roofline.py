"""What a GPU allows at best, by its bandwidth, its matrix peak and the instructions it can issue."""

from __future__ import annotations

from dataclasses import dataclass

NF4_BYTES = 0.5 + 1 / 64 + 4 / 256 / 64
"""Bytes per weight: a 4-bit code, and its share of an 8-bit absmax and of that one's fp32 scale."""
LANES = 32 * 4
"""Of a multiprocessor: its four schedulers each issue one instruction of 32 lanes per cycle."""
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
    clock: float  # Hz, boost
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

    @property
    def slug(self) -> str:
        """The name in names of cases."""
        return self.name.lower().replace(" sxm", "").replace(" ", "-")

    @property
    def block_shared(self) -> int:
        """Bytes of shared memory that one block can have."""
        return self.shared - RESERVED_SHARED

    def linear(self, n: int, k: int, m: int) -> float:
        """Seconds of [m, k] x [n, k]^T with NF4 weights and 16-bit activations."""
        memory = (n * k * NF4_BYTES + 2 * m * (k + n)) / self.bandwidth
        return max(memory, 2 * m * n * k / self.flops)

    def dequantize(self, n: int, k: int) -> float:
        """Seconds to read the NF4 weight and write it out in 16 bits."""
        return n * k * (NF4_BYTES + 2) / self.bandwidth

    def issue_share(self, per_weight: float, weight_bytes: float) -> float:
        """Share of all issue slots that so many instructions per weight take at full bandwidth."""
        return per_weight * self.bandwidth / weight_bytes / (self.sms * LANES * self.clock)


GPUS = (
    Gpu("A100 SXM", 80, 108, 1.41e9, 2.04e12, 250e12, 40 * MIB, 164 * KIB, 64, 32),
    Gpu("RTX 3090", 86, 82, 1.70e9, 0.936e12, 57e12, 6 * MIB, 100 * KIB, 48, 16),
    Gpu("RTX 4090", 89, 128, 2.52e9, 1.01e12, 132e12, 72 * MIB, 100 * KIB, 48, 24),
    Gpu("H100 SXM", 90, 132, 1.83e9, 3.35e12, 800e12, 50 * MIB, 228 * KIB, 64, 32),
    Gpu("B200", 100, 148, 1.85e9, 8.0e12, 1800e12, 126 * MIB, 228 * KIB, 64, 32),
    Gpu("RTX 5090", 120, 170, 2.41e9, 1.79e12, 168e12, 96 * MIB, 100 * KIB, 48, 24),
)
BY_ARCHITECTURE = {gpu.architecture: gpu for gpu in GPUS}

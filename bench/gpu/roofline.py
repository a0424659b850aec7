"""What a GPU allows at best, by its bandwidth, its matrix peak and the instructions it can start."""

from __future__ import annotations

from dataclasses import dataclass

NF4_BYTES = 0.5 + 1 / 64 + 4 / 256 / 64
"""Of a weight: its code, its share of an 8-bit absmax, and that one's share of a scale."""
LANES = 32 * 4
"""Of a multiprocessor, whose four schedulers start one instruction of 32 lanes in a cycle."""
MATRIX_FLOP = 2 * 16 * 8 * 16


@dataclass(frozen=True)
class Gpu:
    name: str
    architecture: int
    sms: int
    clock: float  # Hz, boost
    bandwidth: float  # bytes/s
    flops: float
    """Of dense bf16 products with fp32 sums: about 0.8 of the data sheet, which is what large ones reach."""
    l2: int  # bytes

    @property
    def lanes(self) -> float:
        """Instructions of a lane that can be started in a second."""
        return self.sms * LANES * self.clock

    @property
    def matrix_cycles(self) -> float:
        """Between two matrix instructions of one scheduler at that peak."""
        return MATRIX_FLOP / (self.flops / (self.sms * 4 * self.clock))

    def linear(self, n: int, k: int, m: int, weight_bytes: float = NF4_BYTES) -> tuple[float, str]:
        """Seconds of [m, k] x [n, k]^T, 16-bit activations, and m or c: does memory or compute take them."""
        memory = (n * k * weight_bytes + 2 * m * (k + n)) / self.bandwidth
        compute = 2 * m * n * k / self.flops
        return (memory, "m") if memory >= compute else (compute, "c")

    def dequantize(self, n: int, k: int, size: int = 2) -> float:
        """Seconds to write the weight out in elements of `size` bytes."""
        return n * k * (NF4_BYTES + size) / self.bandwidth

    def slots(self, per_weight: float, weight_bytes: float) -> float:
        """The part of all issue slots that so many instructions per weight take at full bandwidth."""
        return per_weight * self.bandwidth / weight_bytes / self.lanes


KIB, MIB = 2**10, 2**20
GPUS = (
    Gpu("A100 SXM", 80, 108, 1.41e9, 2.04e12, 250e12, 40 * MIB),
    Gpu("RTX 3090", 86, 82, 1.70e9, 0.936e12, 57e12, 6 * MIB),
    Gpu("RTX 4090", 89, 128, 2.52e9, 1.01e12, 132e12, 72 * MIB),
    Gpu("H100 SXM", 90, 132, 1.83e9, 3.35e12, 800e12, 50 * MIB),
    Gpu("B200", 100, 148, 1.85e9, 8.0e12, 1800e12, 126 * MIB),
    Gpu("RTX 5090", 120, 170, 2.41e9, 1.79e12, 168e12, 96 * MIB),
)
BY_ARCHITECTURE = {gpu.architecture: gpu for gpu in GPUS}

SHAPES = ((1024, 4096), (4096, 4096), (14336, 4096), (4096, 14336))
ROWS = (1, 16, 128, 2048, 8192)

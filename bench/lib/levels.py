"""Limits torch and the peers to one of our instruction sets, to measure as on an older machine.

torch, oneDNN and MKL read the environment when they are imported. bitsandbytes checks for AVX-512 BF16 itself
and uses torch for the rest; its C++ loops that unpack a whole weight detect the CPU and cannot be limited.
"""

from __future__ import annotations

import importlib.util
import os
import sys

VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
LEVELS = {
    "scalar": ("default", "SSE41", "SSE4_2"),
    "avx2": ("avx2", "AVX2", "AVX2"),
    "avx512": ("avx512", "AVX512_CORE", "AVX512"),
    "avx512_bf16": ("avx512", "AVX512_CORE_BF16", "AVX512_E1"),
}
"""Values of the variables by level."""


def limit(level: str) -> None:
    """Limits everything in this process but our kernels. RuntimeError if torch is already imported."""
    if "torch" in sys.modules:
        raise RuntimeError("level: torch reads it when it is imported, and is already imported")
    os.environ |= zip(VARIABLES, LEVELS[level], strict=True)
    if level != "avx512_bf16" and importlib.util.find_spec("bitsandbytes"):
        import bitsandbytes.backends.cpu.ops
        import bitsandbytes.nn.modules

        for module in (bitsandbytes.backends.cpu.ops, bitsandbytes.nn.modules):
            if not hasattr(module, "has_avx512bf16"):
                raise RuntimeError(f"level: {module.__name__} has no has_avx512bf16 to limit")
            module.has_avx512bf16 = lambda: False

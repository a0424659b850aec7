"""Limits torch and the peers to one of our instruction sets, to measure as on an older machine.

torch, oneDNN and MKL read the environment when they are imported. bitsandbytes checks for AVX-512 BF16 itself
and uses torch for the rest; its C++ loops that unpack a whole weight detect the CPU and cannot be limited.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping

LEVELS: Mapping[str, Mapping[str, str]] = {
    "scalar": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
    "avx512_bf16": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512_E1",
    },
}
WITH_BF16 = ("avx512_bf16",)


def limit(level: str) -> None:
    """Limits everything in this process but our kernels. RuntimeError if torch is already imported."""
    if "torch" in sys.modules:
        raise RuntimeError("level: torch reads it when it is imported, and is already imported")
    os.environ |= LEVELS[level]
    if level not in WITH_BF16 and importlib.util.find_spec("bitsandbytes"):
        import bitsandbytes.backends.cpu.ops
        import bitsandbytes.nn.modules

        for module in (bitsandbytes.backends.cpu.ops, bitsandbytes.nn.modules):
            if not hasattr(module, "has_avx512bf16"):
                raise RuntimeError(f"level: {module.__name__} has no has_avx512bf16 to limit")
            module.has_avx512bf16 = lambda: False

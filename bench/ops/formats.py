"""Linear layers in packed formats other than NF4, compared with torch's dense layer."""

from __future__ import annotations

from peft_kernels.core.formats import FORMATS

from ..lib.cases import LARGE, forward
from ..lib.harness import Case

ROWS = (1, 4, 16, 64, 512)


def standard(dtype: str) -> list[Case]:
    formats = [format for format in FORMATS if format != "nf4"]
    return [forward(LARGE, m, dtype, format) for format in formats for m in ROWS]

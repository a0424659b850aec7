"""The layouts that kernels take, and which of them GEMMs read packed."""

from __future__ import annotations

from ...core.code_tables import BLOCKSIZES
from ...core.formats import FORMATS, blocksize_of, byte_format, codes_of
from .common import check

FUSED = ("nf4", "fp4", "mxfp4", "nvfp4")
"""Keys of `formats.FORMATS` whose weights GEMMs read packed. Others are dequantised for torch's GEMM."""

FUSED_CODES = tuple(sorted({FORMATS[name].codes for name in FUSED}))
"""The codes of those weights: indices of `formats.CODE_VALUES`."""

SMALLEST_BLOCKS = {
    codes: min(size for one in FORMATS.values() if one.codes == codes for size in one.blocksizes)
    for codes in sorted({one.codes for one in FORMATS.values() if one.bits == 4})
}
"""Of codes of 4 bits, by their index in `formats.CODE_VALUES`."""


def check_layout(layout: int) -> None:
    """Raises RuntimeError unless kernels take it."""
    codes, blocksize = codes_of(layout), blocksize_of(layout)
    if (form := byte_format(layout)) is not None:
        sizes = ", ".join(str(size) for size in form.blocksizes if size)
        expected, right = f"{sizes}, or 0 for a scale per row", blocksize in form.blocksizes
    else:
        *names, last = FORMATS
        known = f"{', '.join(names)} or {last}, which back end triton has kernels for"
        check(codes in SMALLEST_BLOCKS, "format", known, f"codes {codes}")
        least = SMALLEST_BLOCKS[codes]
        right = least <= blocksize <= BLOCKSIZES[-1] and blocksize & (blocksize - 1) == 0
        expected = f"a power of two from {least} to {BLOCKSIZES[-1]}"
    check(right, "blocksize", expected, f"{blocksize} for codes {codes}")

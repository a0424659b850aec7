"""The formats that kernels read, and their layouts. Without Triton: the back end names them before it imports
it."""

from __future__ import annotations

from ...core.code_tables import BLOCKSIZES
from ...core.formats import FORMATS, blocksize_of, codes_of
from .common import check

READ = ("nf4", "fp4", "mxfp4", "nvfp4")
"""Keys of `formats.FORMATS`. Weights of others are refused."""

SMALLEST_BLOCKS = {
    codes: min(size for name in READ if FORMATS[name].codes == codes for size in FORMATS[name].blocksizes)
    for codes in sorted({FORMATS[name].codes for name in READ})
}
"""Of the codes that kernels read, by their index in `formats.CODE_VALUES`."""


def check_layout(layout: int) -> None:
    """Raises RuntimeError unless kernels read it."""
    codes, blocksize = codes_of(layout), blocksize_of(layout)
    if codes not in SMALLEST_BLOCKS:
        got = " or ".join(name for name, one in FORMATS.items() if one.codes == codes) or f"codes {codes}"
        known = f"{', '.join(READ[:-1])} or {READ[-1]}"
        check(False, "format", f"{known}, which back end triton has kernels for", got)
    least = SMALLEST_BLOCKS[codes]
    right = least <= blocksize <= BLOCKSIZES[-1] and blocksize & (blocksize - 1) == 0
    expected = f"a power of two from {least} to {BLOCKSIZES[-1]}"
    check(right, "blocksize", expected, f"{blocksize} for codes {codes}")

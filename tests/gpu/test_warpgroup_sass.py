"""The limits on compiled kernels whose matrix instructions are those of a warpgroup."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_sass import LISTING, LOG

from bench.gpu import limits, sass
from bench.gpu.limits import Rule
from bench.gpu.sass import Cubin

SERIALISED = """ptxas info    : (C7514) Potential Performance Loss: wgmma.mma_async instructions are \
serialized due to non wgmma instructions reading accumulator registers of a wgmma in the function 'k'
"""


def test_instructions_of_a_warpgroup(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each multiplies 64 x 16 weights by all tokens; single warps' in the loop are a fault, and that ptxas
    serialises."""
    monkeypatch.setattr(limits, "RULES", [Rule("k", 9.0, tokens=128, warpgroup=True)])
    rest = LISTING[LISTING.index(".L_x_9:") :].replace("HMMA", "HGMMA")
    text = LISTING[: LISTING.index(".L_x_9:")].replace("HMMA.16816.F32.BF16", "HGMMA.64x128x16") + rest
    for log, listing, fault in (
        (LOG, text, None),
        (SERIALISED + LOG, text, "serialises its instructions of a warpgroup"),
        (LOG, LISTING, "has no HGMMA"),
        (LOG, text.replace("HGMMA", "HMMA", 1), "has matrix instructions of single warps in the main loop"),
    ):
        kernel, _ = sass.parse(Cubin(Path("a.cu"), 90, Path("a.cubin"), log), listing)
        finding = limits.check(kernel)
        assert finding.faults[0] == "spills 16 bytes"
        assert (fault in finding.faults) if fault else len(finding.faults) == 1, finding.faults
        if log is LOG and listing is text:
            assert finding.per_weight == 6 / 16

"""The limits on compiled kernels whose matrix instructions are those of a warpgroup."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from test_sass import LISTING, LOG, TOOLS, needs_tools

from bench.gpu import limits, other_ptxas, sass
from bench.gpu.limits import Rule
from bench.gpu.sass import Cubin, Kernel, Tools

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
        (SERIALISED + LOG, text, f"ptxas: {SERIALISED[SERIALISED.index('(') : SERIALISED.index(' in the')]}"),
        (LOG, LISTING, "has no HGMMA"),
        (LOG, text.replace("HGMMA", "HMMA", 1), "has matrix instructions of single warps in the main loop"),
    ):
        kernel, _ = sass.parse(Cubin(Path("a.cu"), 90, Path("a.cubin"), log), listing)
        finding = limits.check(kernel)
        assert finding.faults[0] == "spills 16 bytes"
        assert (fault in finding.faults) if fault else len(finding.faults) == 1, finding.faults
        if log is LOG and listing is text:
            assert finding.per_weight == 6 / 16


ROLES = """
	.section	.text.k,"ax",@progbits
        /*0000*/               @P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0010*/                   USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe8 ;
        /*0020*/              @!P1 BRA `(.L_x_1) ;
        /*0030*/                   HGMMA.64x256x16.F32.BF16 R24, R152, gdesc[UR4], R24 ;
        /*0040*/                   EXIT ;
.L_x_2:
        /*0050*/                   USETMAXREG.DEALLOC.CTAPOOL 0x28 ;
        /*0060*/                   LDG.E.128 R36, desc[UR6][R4.64] ;
        /*0070*/                   EXIT ;
"""


@pytest.mark.parametrize(
    "before,after,fault",
    [
        ("", "", None),
        ("R36", "R40", "uses R40 of 40 registers"),
        ("R24, R152", "R108, R24", "uses R235 of 232 registers"),  # the last of 128 sums
        ("0xe8", "0xf0", "takes 66560 registers of 168 x 384"),
        ("USETMAXREG.DEALLOC.CTAPOOL 0x28", "NOP", "has roles of [] and [232] registers"),
    ],
)
def test_registers_of_roles(before: str, after: str, fault: str | None) -> None:
    """A role uses only what it has, and all roles have no more than the block."""
    (kernel,) = sass.parse(Cubin(Path("a.cu"), 90, Path("a.cubin"), ""), ROLES.replace(before, after))
    kernel.threads, kernel.registers = 384, 168
    assert limits.check(kernel).faults == (() if fault is None else (fault,))


def older_ptxas() -> str | None:
    """Triton has one."""
    assert isinstance(TOOLS, Tools)
    found = Path(TOOLS.nvdisasm).with_name("ptxas")
    return str(found) if found.exists() and "triton" in found.parts else None


@needs_tools
@pytest.mark.parametrize("which", ["installed", "older"])
def test_producers_give_registers_to_consumers(which: str) -> None:
    """In the kernels that need it, by the toolkit's ptxas and by an older one."""
    assert isinstance(TOOLS, Tools)
    tools = TOOLS
    if which == "older":
        if (ptxas := older_ptxas()) is None:
            pytest.skip("no other ptxas")
        tools = dataclasses.replace(TOOLS, ptxas=ptxas)
    files = [path for path in sass.sources() if path.stem in sass.HOPPER]
    kernels = sass.read(tools, sass.compile_all(tools, files))
    assert [(kernel.name, fault) for kernel in kernels for fault in limits.check(kernel).faults] == []
    found = {name.partition("<")[0] + name[-5:]: roles for name, roles in map(registers, kernels) if roles}
    linear, experts = ({40, 232}, {88, 208})
    assert found == {
        "LinearWgmma 256>": linear,
        "LinearWgmmaDx 256>": linear,
        "ExpertsWgmma 128>": experts,
        "ExpertsWgmmaDx 128>": experts,
    }


def registers(kernel: Kernel) -> tuple[str, set[int]]:
    return kernel.name, {role.registers for role in limits.roles(kernel)}


def test_ptx_is_lowered_to_the_newest_version_that_is_known() -> None:
    text = ".version 9.0\n.target sm_80\n"
    assert other_ptxas.lowered(text, "8.10") == ".version 8.10\n.target sm_80\n"
    assert other_ptxas.lowered(text, "10.0") == text

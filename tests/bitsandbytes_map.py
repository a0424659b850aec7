"""bitsandbytes' table of 8-bit codes, made as on other CPUs.

It makes the table by torch.linspace, whose last bits differ on CPUs without fused multiply-adds. What it
packs there has other values elsewhere, and in our kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels.core import code_tables

IS_OURS = torch.equal(torch.linspace(0.1, 1, 65), code_tables._edges(64))
"""Whether torch.linspace gives the values of most CPUs here."""


def install() -> None:
    """Gives bitsandbytes the table of other CPUs."""
    try:
        from bitsandbytes import functional
    except ImportError:
        return

    def ours(signed: bool = True) -> Tensor:
        return code_tables.dynamic_map(torch.device("cpu"), signed).clone()

    functional.create_dynamic_map = ours

"""What fuzzers share: a fresh copy, what they expect of an accepted weight, and of a refusal's sentence."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from peft_kernels.core.formats import FORMATS

LONGEST_SENTENCE = 700
_LARGEST = 448.0
"""Of the codes of all formats: E4M3's."""


def fill(folder: Path, files: Mapping[str, bytes]) -> None:
    """Makes a folder of these files alone."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)


def check_values(weight: Any) -> None:
    """Of an accepted weight. Its scales may be so large that products with codes are infinite."""
    form = FORMATS[weight._state.format]
    scales = weight.absmax2 if weight.absmax2 is not None else weight.absmax
    if form.by_code:
        used = torch.bincount(weight.absmax.view(-1), minlength=256) > 0
        scales = weight.absmax2.view(-1, 256)[:, used]
    signed = form.scale in ("half", "fp32")
    assert bool(scales.isfinite().all() and (signed or (scales >= 0).all())), "scales that no weight has"
    values = weight.dequantize(torch.float32)
    may_overflow = form.scale != "absmax" and not bool((scales.float() * _LARGEST).isfinite().all())
    if not may_overflow:
        assert bool(values.isfinite().all()), "weights that are not finite"


def check_sentence(text: str) -> None:
    assert text.isprintable() and 10 < len(text) < LONGEST_SENTENCE, f"no sentence: {text[:1000]!r}"

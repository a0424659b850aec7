"""Mixtures of experts in int4 and NVFP4 that cannot be read: loading, `inspect` and `plan` say the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_damage import change_tensors
from experts_folders import EXPERTS, in_file, make_moe
from owned_folders import FILE, nvfp4_parts
from packed_models import gptq, packed_int4
from test_fp8_experts_refused import KINDS, NONE, Change, assert_refused
from torch import Tensor

Captured = pytest.CaptureFixture[str]


def _without(*names: str) -> Change:
    return lambda t: [t.pop(name) for name in [*t] if name.startswith(names)]


def _pop(name: str) -> Change:
    return lambda t: t.pop(name)


def _new(parts: dict[str, Tensor], *stems: str) -> Change:
    return lambda t: t.update({stem + part: each.clone() for stem in stems for part, each in parts.items()})


def _as(name: str, change: Callable[[Tensor], Any]) -> Change:
    return lambda t: t.update({name: change(t[name]).contiguous()})


def broken(kind: str) -> dict[str, tuple[str, Change, str]]:
    """The format, the damage and the error."""
    stems = [f"{in_file(kind, 1, layer)}." for layer in range(3)]
    gate, up, down = stems
    first, first_up = (f"{in_file(kind, 0, layer)}." for layer in range(2))
    weights = EXPERTS[kind]
    fp16, half = "blocks of 32 with scales in torch.float16", "blocks of 64 with scales in torch.float16"
    found: dict[str, tuple[str, Change, str]] = {}
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        found[f"no {part}"] = "gptq", _without(down + part), f"{down}{part}: {NONE}"
    for part in ("weight_packed", "weight_scale", "weight_global_scale"):
        found[f"no {part}"] = "nvfp4 of compressed-tensors", _without(up + part), f"{up}{part}: {NONE}"
    for part in ("weight", "weight_scale", "weight_scale_2"):
        found[f"no {part} of modelopt"] = "nvfp4 of modelopt", _pop(up + part), f"{up}{part}: {NONE}"
    return found | {
        "no layer": ("awq", _without(up), f"{up}qweight: {NONE}"),
        "no kind of layer": (
            "awq",
            _without(*(f"{in_file(kind, e, 0)}." for e in range(4))),
            f"{first}qweight: {NONE}",
        ),
        "a dense layer": (
            "packed",
            lambda t: (_without(up)(t), t.update({f"{up}weight": torch.zeros(128, 128).bfloat16()})),
            f"{up}weight_packed: {NONE}",
        ),
        "fewer rows": (
            "gptq",
            _new(gptq(64, 128)[0], up),
            f"{up}weight: expected shape (128, 128) in {fp16}, as {first_up}weight has it, got shape "
            f"(64, 128) in {fp16}",
        ),
        "other groups of an expert": (
            "gptq",
            _new(gptq(128, 128, 64)[0], down),
            f"{down}weight: expected shape (128, 128) in {fp16}, as {in_file(kind, 0, 2)}.weight has it, got "
            f"shape (128, 128) in {half}",
        ),
        "other groups of gates": (
            "gptq",
            _new(gptq(128, 128, 64)[0], *(f"{in_file(kind, e, 0)}." for e in range(4))),
            f"{first_up}weight: expected 128 input features in {half}, as {first}weight has it, got 128 "
            f"input features in {fp16}",
        ),
        "other dtype of scales": (
            "gptq",
            _as(f"{gate}scales", torch.Tensor.bfloat16),
            f"{gate}weight: expected shape (128, 128) in {fp16}, as {first}weight has it, got shape "
            "(128, 128) in blocks of 32 with scales in torch.bfloat16",
        ),
        "act-order": (
            "gptq",
            _as(f"{up}g_idx", lambda x: x.flip(0)),
            f"{up}g_idx: expected groups of consecutive input features, got another order (desc_act, or "
            "actorder), which cannot be read; quantise the model without it",
        ),
        "zero points of one layer": (
            "packed",
            _new(packed_int4(128, 128, symmetric=False)[0], up),
            f"{first}weight_zero_point: {NONE}",
        ),
        "no zero points of one layer": (
            "packed zeros", _without(f"{up}weight_zero_point"), f"{up}weight_zero_point: {NONE}",
        ),
        "NaN scale": (
            "awq",
            lambda t: t[f"{gate}scales"][0, 3:4].fill_(torch.nan),
            f"{gate}scales: expected finite scales, got 1 NaN or Inf among 512",
        ),
        "negative scale": (
            "nvfp4 of compressed-tensors",
            _as(f"{gate}weight_scale", lambda x: (x.view(torch.uint8) | 128).view(x.dtype)),
            f"{gate}weight_scale: expected finite scales of 0 or more, got 1024 NaN, Inf or negative among "
            "1024",
        ),
        "scale of the whole is 0": (
            "nvfp4 of modelopt",
            _as(f"{gate}weight_scale_2", torch.zeros_like),
            f"{gate}weight_scale_2: expected a number above 0, got 0.0",
        ),
        "fewer rows in NVFP4": (
            "nvfp4 of modelopt",
            _new(nvfp4_parts(64, 128, "modelopt"), up),
            f"{up}weight: expected shape (128, 128) in blocks of 16, as {first_up}weight has it, got shape "
            "(64, 128) in blocks of 16",
        ),
        "no last expert": (
            "packed",
            _without(*(f"{in_file(kind, 3, layer)}." for layer in range(3))),
            f"{weights}.down_proj: expected shape (4, 128, 128), got (3, 128, 128)",
        ),
    }  # fmt: skip


UNSEEN = ("act-order", "NaN scale", "negative scale")
"""Faults of values, which headers do not show."""


@pytest.mark.parametrize("what", broken("qwen"))
def test_damaged(what: str, tmp_path: Path, capsys: Captured) -> None:
    several = what == "no last expert"
    for kind in KINDS if not several else KINDS[:1]:
        form, change, expected = broken(kind)[what]
        make_moe(tmp_path / kind, kind, form)
        change_tensors(tmp_path / kind / FILE, change)
        assert_refused(tmp_path / kind, capsys, expected, what not in UNSEEN, not several)

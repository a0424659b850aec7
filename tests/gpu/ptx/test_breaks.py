"""Mutation tests: each break of the kernels' PTX must turn the op tests named with it red.

The sources are unchanged; the PTX text is edited before it runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from lora_cases import check_lora_linear, check_lora_linear_backward, check_nf4_linear, check_nf4_linear_dx
from lora_multi_cases import check_backward as check_masked_backward
from lora_multi_cases import check_forward as check_masked
from lora_multi_cases import multi_case
from test_parts import check_part

import ptx_backend as ptx

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def case(m: int, n: int, k: int, dtype: torch.dtype = BF16, bs: int = 64) -> dict[str, Any]:
    sizes = {"m": m, "n": n, "k": k, "r": 16, "bs": bs, "base": "nested", "nested": True, "dtype": dtype}
    return sizes | {"adapter": "same", "bias": "fp32", "layout": "contiguous", "needs": "xab"}


def both(given: dict[str, Any]) -> None:
    check_nf4_linear(given)
    check_nf4_linear_dx(given)


def adapters(given: dict[str, Any]) -> None:
    check_lora_linear(given)
    check_lora_linear_backward(given)


def masks(dtype: torch.dtype, k: int) -> None:
    given = multi_case(m=17, k=k, n=32, layers=1, adapters="0", dtype=dtype, base="dense", r=8)
    check_masked(given)
    check_masked_backward(given)


CHECKS: dict[str, Callable[[], None]] = {
    "few-bf16": lambda: both(case(3, 64, 320)),
    "few-fp16": lambda: both(case(3, 64, 320, FP16)),
    "tiles-bf16": lambda: both(case(70, 136, 320)),
    "tiles-fp16": lambda: both(case(70, 136, 320, FP16)),
    "shared-tiles": lambda: both(case(70, 48, 2560)),
    "adapters-bf16": lambda: adapters(case(17, 64, 128)),
    "adapters-fp16": lambda: adapters(case(17, 64, 128, FP16)),
    "masks-bf16": lambda: masks(BF16, 96),
    "masks-odd": lambda: masks(BF16, 35),
    "parts": lambda: check_part(ptx.BACKEND.extension, "columns", FP32),
}

REGISTER = r"%\w+"
MMA = r"(mma\.sync\S+\.{k}\.{k}\.f32 \{{[^}}]*\}}, \{{)({r}),({r}),({r}),({r})(\}}, \{{)({r}),({r})"


def fragments(kind: str, order: str) -> Callable[[str], str]:
    """Permutes the registers of a and b of matrix instructions."""
    a, b = order.split()
    pattern = re.compile(MMA.format(k=kind, r=REGISTER))

    def edit(text: str) -> str:
        return pattern.sub(
            lambda found: (
                found[1]
                + ",".join(found[2 + int(i)] for i in a)
                + found[6]
                + ",".join(found[7 + int(i)] for i in b)
            ),
            text,
        )

    return edit


def replaced(pattern: str, by: str | Callable[[re.Match[str]], str]) -> Callable[[str], str]:
    compiled = re.compile(pattern, re.MULTILINE)
    return lambda text: compiled.sub(by, text)


def without_barrier(which: int) -> Callable[[str], str]:
    """Removes the barrier with this index from each kernel; negative: counted from the end."""

    def edit(text: str) -> str:
        kernels = re.split(r"(?=^\.(?:visible|weak)? ?\.?entry)", text, flags=re.MULTILINE)
        for i, kernel in enumerate(kernels):
            barriers = list(re.finditer(r"^\s*bar\.sync[^;]*;", kernel, re.MULTILINE))
            if -len(barriers) <= which < len(barriers):
                found = barriers[which]
                kernels[i] = kernel[: found.start()] + kernel[found.end() :]
        return "".join(kernels)

    return edit


LOAD = r"(ld\.global\.nc\S*\.v2\.\w+\s+\{)(%\w+), ?(%\w+)\}"
LOAD4 = r"(ld\.global\.nc\S*\.v4\.\w+\s+\{)(%\w+), ?(%\w+), ?(%\w+), ?(%\w+)\}"
BREAKS: dict[str, tuple[Callable[[str], str], tuple[str, ...]]] = {
    "a-of-bf16-swapped": (fragments("bf16", "0213 01"), ("few-bf16", "tiles-bf16")),
    "b-of-bf16-swapped": (fragments("bf16", "0123 10"), ("few-bf16", "tiles-bf16")),
    "a-of-fp16-swapped": (fragments("f16", "1032 01"), ("few-fp16", "tiles-fp16")),
    "b-of-fp16-swapped": (fragments("f16", "0123 10"), ("few-fp16", "tiles-fp16")),
    "a-of-tf32-swapped": (fragments("tf32", "1032 01"), ("adapters-bf16", "adapters-fp16")),
    "b-of-tf32-swapped": (fragments("tf32", "0123 10"), ("adapters-bf16", "adapters-fp16")),
    "one-copy-group-too-few": (
        replaced(r"cp\.async\.wait_group\s+(\d+)", lambda m: f"cp.async.wait_group {int(m[1]) + 1}"),
        ("few-bf16", "tiles-bf16"),
    ),
    "zero-fill-lost": (
        replaced(r"(cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 16), %r\d+;", r"\1;"),
        ("tiles-bf16",),
    ),
    "zero-fill-always": (
        replaced(r"(cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 16), %r\d+;", r"\1, 0;"),
        ("few-bf16", "tiles-bf16"),
    ),
    "another-lop3-table": (replaced(r"(lop3\.b32 .*), 0xe4;", r"\1, 0xd8;"), ("tiles-bf16",)),
    "shuffle-over-segments": (replaced(r", 0x31f, 0xffffffff", ", 0x1f, 0xffffffff"), ("few-bf16",)),
    "relaxed-atomic": (replaced(r"atom\.acq_rel\.", "atom.relaxed."), ("shared-tiles",)),
    "words-of-a-load-swapped": (replaced(LOAD, r"\1\3, \2}"), ("few-bf16", "tiles-bf16")),
    "words-of-four-swapped": (replaced(LOAD4, r"\1\2, \4, \3, \5}"), ("masks-bf16", "adapters-fp16")),
    "prmt-swapped": (
        replaced(r"(prmt\.b32 %r\d+), (%r\d+), (%r\d+),", r"\1, \3, \2,"),
        ("few-bf16", "tiles-bf16"),
    ),
    "first-barrier-lost": (without_barrier(0), ("few-bf16", "tiles-bf16", "adapters-bf16", "parts")),
    "last-barrier-lost": (without_barrier(-1), ("shared-tiles", "adapters-bf16")),
    "philox-multiplier": (
        replaced(r"3528531795|-766435501", lambda m: str(int(m[0]) ^ 1)),
        ("masks-bf16", "masks-odd"),
    ),
    "philox-other-multiplier": (
        replaced(r"3449720151|-845247145", lambda m: str(int(m[0]) ^ 2)),
        ("masks-bf16", "masks-odd"),
    ),
    "high-product-is-the-low": (replaced(r"mul\.hi\.u32", "mul.lo.u32"), ("parts",)),
    "product-of-pairs-unscaled": (
        replaced(r"fma\.rn\.bf16x2 (%r\d+), (%r\d+), (%r\d+),", r"fma.rn.bf16x2 \1, \2, \2,"),
        ("few-bf16", "tiles-bf16"),
    ),
}


@contextmanager
def edited(extension: ModuleType, edit: Callable[[str], str]) -> Iterator[list[int]]:
    """Applies `edit` to the PTX of all kernels. Yields a list with the number of texts changed so far."""
    changed = [0]

    def apply(text: str) -> str:
        after = edit(text)
        changed[0] += after != text
        return after

    extension.set_edit(apply)
    try:
        yield changed
    finally:
        extension.set_edit(None)
        ptx.BACKEND.reset()  # a kernel that was stopped has left counters that are not zero


@pytest.mark.parametrize("check", CHECKS)
def test_unedited_it_is_green(extension: ModuleType, check: str) -> None:
    CHECKS[check]()


@pytest.mark.parametrize(
    "name,check", [(name, check) for name, (_, checks) in BREAKS.items() for check in checks]
)
def test_broken_it_is_red(extension: ModuleType, name: str, check: str) -> None:
    with edited(extension, BREAKS[name][0]) as changed:
        with pytest.raises((AssertionError, RuntimeError)):
            CHECKS[check]()
        assert changed[0], "the edit changed nothing"
    CHECKS[check]()  # the state that a stopped kernel leaves does not harm the next one

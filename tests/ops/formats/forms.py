"""The formats of packed weights other than NF4, as axes of cases."""

from __future__ import annotations

from typing import Any

import testing
from peft_kernels import NF4Weight
from peft_kernels.core.formats import FORMATS

FORMS: dict[str, dict[str, Any]] = {
    "fp4": {"format": "fp4", "bs": 64, "nested": False},
    "fp4-nested": {"format": "fp4", "bs": 32, "nested": True},
    "mxfp4": {"format": "mxfp4", "bs": 32, "nested": False},
    "nvfp4": {"format": "nvfp4", "bs": 16, "nested": False},
    "int4": {"format": "int4", "bs": 32, "nested": True},
    "int4-symmetric": {"format": "int4", "bs": 64, "nested": False},
    "int4-64": {"format": "int4", "bs": 64, "nested": True},
    "int4-128": {"format": "int4", "bs": 128, "nested": True},
    "int4-symmetric-128": {"format": "int4", "bs": 128, "nested": False},
    "fp8": {"format": "fp8", "bs": 128, "nested": False},
    "fp8-rows": {"format": "fp8", "bs": 0, "nested": False},
    "int8": {"format": "int8", "bs": 64, "nested": False},
    "int8-rows": {"format": "int8", "bs": 0, "nested": False},
}
"""`nested`: with double quantisation, or zero points."""
ROWS = (*range(1, 10), 12, 16, 17, 70, 200)
DEPTHS = (48, 96, 160, 192, 208, 1056)
"""Whole blocks, 192 also of FP4. 48 and 208 only in NVFP4, and in FP4, whose blocks may cross rows."""


def cases(**axes: Any) -> list[dict[str, Any]]:
    """`testing.pairwise` with FORMS, without rows that are no whole blocks."""
    found = testing.pairwise(form=tuple(FORMS), **axes)
    return [case for case in found if fits(case["form"], case["k"])]


def fits(form: str, k: int) -> bool:
    """Whether rows of `k` values are whole blocks, where they have to be."""
    kind = FORMS[form]
    return not FORMATS[kind["format"]].rows_have_blocks or k % kind["bs"] == 0


def weight_of(form: str, n: int, k: int) -> NF4Weight:
    """`testing.nf4_weight` in one of FORMS."""
    kind = FORMS[form]
    return testing.nf4_weight(n, k, kind["bs"], kind["nested"], format=kind["format"])


def full(case: dict[str, Any]) -> dict[str, Any]:
    """A case as the Case classes take it."""
    form = FORMS[case["form"]]
    return case | form | {"base": "nested" if form["nested"] else "nf4"}

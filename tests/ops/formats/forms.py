"""The formats of packed weights besides NF4, as axes of cases."""

from __future__ import annotations

from typing import Any

import pytest

import testing

FORMS: dict[str, dict[str, Any]] = {
    "fp4": {"format": "fp4", "bs": 64, "nested": False},
    "fp4-nested": {"format": "fp4", "bs": 32, "nested": True},
    "mxfp4": {"format": "mxfp4", "bs": 32, "nested": False},
    "nvfp4": {"format": "nvfp4", "bs": 16, "nested": False},
}
ROWS = (*range(1, 10), 12, 16, 17, 70, 200)
DEPTHS = (48, 96, 160, 192, 208, 1056)
"""Whole blocks, 192 also of FP4. 48 and 208 only in NVFP4, and in FP4, whose blocks may cross rows."""

each_backend = pytest.mark.parametrize(
    "backend",
    [name for name in testing.backend_ids() if name != "triton"],
    indirect=True,
)
"""All but Triton, which has kernels for NF4 alone."""


def cases(**axes: Any) -> list[dict[str, Any]]:
    """`testing.pairwise` with FORMS, without rows that are no whole blocks."""
    found = testing.pairwise(form=tuple(FORMS), **axes)
    return [case for case in found if case["form"] != "mxfp4" or case["k"] % 32 == 0]


def full(case: dict[str, Any]) -> dict[str, Any]:
    """A case as the Case classes take it."""
    form = FORMS[case["form"]]
    return case | form | {"base": "nested" if form["nested"] else "nf4"}

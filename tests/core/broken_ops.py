"""Broken ops, to test that tests notice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from peft_kernels.core import dispatch


def break_op(monkeypatch: pytest.MonkeyPatch, op: str, change: Callable[[Any], Any]) -> None:
    """Changes the result of one op called through the public functions."""
    original = dispatch.call

    def call(name: str, *args: Any, **more: Any) -> Any:
        result = original(name, *args, **more)
        return change(result) if name == op else result

    monkeypatch.setattr(dispatch, "call", call)

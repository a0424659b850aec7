"""int4 as AutoAWQ writes it for its "gemm" kernels: eight codes of a column in a word, in an order of their
own."""

from __future__ import annotations

from typing import Any

from .int4 import Int4
from .owner import Config

_VERSION = "gemm"


class Awq(Int4):
    method, title = "awq", "AWQ"
    codes, scale, zeros = "qweight", "scales", "qzeros"
    parts = marks = (codes, zeros, scale)
    axis, transposed = 0, True
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def check(self, config: Config) -> None:
        bits = config.get("bits", config.get("w_bit", 4))
        if bits != 4:
            raise ValueError(f"bits: expected 4, for AWQ, got {bits!r}")
        version = config.get("version") or config.get("format") or _VERSION
        if str(getattr(version, "value", version)).lower() != _VERSION:
            raise ValueError(f"version: expected {_VERSION!r} of AWQ, got {version!r}")

    def configuration(self, config: Config, dense: list[str]) -> dict[str, Any]:
        new = dict(config)
        if dense:
            new["modules_to_not_convert"] = [*(config.get("modules_to_not_convert") or ()), *dense]
        return new

"""What the configurations of compressed-tensors and modelopt have in common: `config_groups`, which say how
groups of layers are quantised.

Activations are not quantised here, so what groups say of them has no effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from .owner import Config, Owner, one_of


class Grouped(Owner):
    allowed: ClassVar[Mapping[str, tuple[Any, ...]]]
    """What a group may say of weights."""

    def check(self, config: Config) -> None:
        groups, kind = config.get("config_groups"), self.format.upper()
        if not isinstance(groups, Mapping) or not groups:
            raise ValueError(f"config_groups: expected groups of {kind} weights, got {groups!r}")
        for name, group in groups.items():
            key = f"config_groups.{name}.weights"
            weights = group.get("weights") if isinstance(group, Mapping) else None
            if not isinstance(weights, Mapping):
                raise ValueError(f"{key}: expected {kind} weights, got {weights!r}")
            for what, values in self.allowed.items():
                got = ({"symmetric": True} | dict(weights)).get(what)
                if got not in values:
                    raise ValueError(f"{key}.{what}: expected {one_of(values)}, for {kind}, got {got!r}")

    def configuration(self, config: Config, dense: list[str]) -> dict[str, Any]:
        new = dict(config)
        if dense:
            new["ignore"] = [*(config.get("ignore") or ()), *dense]
        return new

    def unused(self, config: Config) -> str:
        groups = config.get("config_groups") or {}
        activations = any(
            group.get("input_activations") or group.get("output_activations") for group in groups.values()
        )
        found = [
            "the quantisation of activations" * activations,
            "the quantisation of the cache" * bool(config.get("kv_cache_scheme")),
        ]
        return " and ".join(filter(None, found))

"""Weighted averages of adapters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import reduce

import torch
from torch import Tensor, nn

from .config import AdapterConfig
from .manage import build, checked, insert, whole


def average(
    model: nn.Module,
    name: str,
    names: Sequence[str],
    weights: Sequence[float] | None = None,
    normalize_weights: bool = True,
) -> None:
    """Adds an adapter whose parameters are a weighted mean of others', like AdapterHub's `average_adapter`
    (Chronopoulou et al. 2023). It is inactive, and frozen until `train`.

    This is meaningful for adapters trained from the same initialisation, or trained little: bottleneck
    features of unrelated adapters do not correspond.

    Parameters
    ----------
    name : str
        Name of the new adapter.
    names : sequence of str
        One or more adapters, of the same config.
    weights : sequence of float, optional
        One for each of `names`; equal by default.
    normalize_weights : bool
        Divide the weights by their sum. False allows sums and differences of adapters.

    Raises
    ------
    ValueError
        Unknown or existing name; different configs; wrong number of weights, NaN or Inf, or a sum of zero.
        Nothing is changed.
    """
    if isinstance(names, str) or not names:
        raise ValueError(f"names: expected a sequence of adapters, got {names!r}")
    parts = [dict(whole(model, one)) for one in checked(model, names)]
    configs = [next(iter(part.values())).config for part in parts]
    for one, config in zip(names, configs, strict=True):
        _check_same(names[0], configs[0], one, config)
    factors = _factors(weights, len(names), normalize_weights)
    built = build(model, name, configs[0])
    for site, adapter in built:
        for key, parameter in adapter.named_parameters():
            values = [part[site].get_parameter(key).detach() for part in parts]
            parameter.data = _mean(values, factors)
    insert(model, name, built)


def _check_same(first: str, want: AdapterConfig, other: str, got: AdapterConfig) -> None:
    for field, value in asdict(want).items():
        if asdict(got)[field] != value:
            raise ValueError(
                f"names: expected adapters of one config, got {field}={value!r} of {first!r} and "
                f"{asdict(got)[field]!r} of {other!r}"
            )


def _factors(weights: Sequence[float] | None, count: int, normalize: bool) -> list[float]:
    if weights is None:
        return [1 / count] * count
    factors = [float(weight) for weight in weights]
    if len(factors) != count or not all(map(math.isfinite, factors)):
        raise ValueError(f"weights: expected {count} finite numbers, one for each of names, got {factors}")
    if not normalize:
        return factors
    total = sum(factors)
    scaled = [factor / total for factor in factors] if total else []
    if not scaled or not all(map(math.isfinite, [total, *scaled])):
        raise ValueError(f"weights: expected finite shares of their sum, got sum {total} of {factors}")
    return scaled


def _mean(values: list[Tensor], factors: list[float]) -> Tensor:
    """The weighted sum in fp64, rounded once to the widest dtype."""
    dtype = reduce(torch.promote_types, [value.dtype for value in values])
    terms = [factor * value.double() for value, factor in zip(values, factors, strict=True)]
    return torch.stack(terms).sum(0).to(dtype)

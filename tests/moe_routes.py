"""Mixtures of experts that are compared all take the same routes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor

Result = TypeVar("Result")


def on_same_routes(run: Callable[[Any], Result], *models: Any) -> list[Result]:
    """run(model) for each. The first model, which should be that in fp64, chooses experts and the others take
    the same ones, since one rounding could send a token elsewhere. Weights are of each model's own scores."""
    topk, routes, results = torch.topk, list[Tensor](), list[Result]()
    for model in models:
        calls = 0

        def follow(scores: Tensor, k: int, dim: int = -1, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if not results:
                routes.append(topk(scores, k, dim, **options).indices)
            at = routes[calls - 1]
            return torch.return_types.topk((scores.gather(dim, at), at))

        with mock.patch.object(torch, "topk", follow), mock.patch.object(Tensor, "topk", follow):
            results.append(run(model))
        assert calls == len(routes) > 0, "no router has called torch.topk, or not all as often"
    return results

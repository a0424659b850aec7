"""A model for tests of optimizers, and its training loop."""

from __future__ import annotations

from typing import Any

import torch
from rounding import ONE_STEP
from torch import Tensor, nn

import testing


class Model(nn.Module):
    """Two parameters in 8 bits, one with a tail, and small ones in fp32."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.a = nn.Parameter(testing.tensor(70, 100, dtype=dtype, scale=0.1))
        self.b = nn.Parameter(testing.tensor(100, 64, dtype=dtype, scale=0.1))
        self.bias = nn.Parameter(testing.tensor(64, dtype=dtype))

    def loss(self, step: int) -> Tensor:
        x = testing.tensor(16, 70, dtype=self.a.dtype, seed=step)
        y = torch.tanh(x @ self.a) @ self.b + self.bias
        return (y.float() - testing.tensor(16, 64, seed=1000 + step)).pow(2).mean()


def train(model: Model, optimizer: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = model.loss(step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_near(ours: Model, theirs: Model, moved: float = 0.0) -> None:
    """Equal, or after steps of AdamW that differ by rounding: a step moves an element by its lr, all of them
    by `moved`, and rounds it."""
    atol, rtol = ONE_STEP * moved, 4 * torch.finfo(torch.float32).eps if moved else 0.0
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")

"""Heads, labels and the definition of the loss, for tests of ops and calls."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import peft_kernels as pk
import testing

IGNORED = -100


def labels_of(rows: int, vocabulary: int, seed: int = 0) -> Tensor:
    """Every fifth label is ignored; the first and the last token occur among the others."""
    labels = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(seed))
    labels[:2] = torch.tensor([0, vocabulary - 1])[:rows]
    labels[4::5] = IGNORED
    return labels


def weight_of(base: str, vocabulary: int, features: int, dtype: torch.dtype) -> Any:
    if base == "dense":
        return testing.tensor(vocabulary, features, dtype=dtype, seed=1, scale=2 * features**-0.5)
    return testing.nf4_weight(vocabulary, features, 32, base == "nested")


def wide(weight: Any) -> Tensor:
    return (
        (weight.dequantize(torch.float32) if isinstance(weight, pk.NF4Weight) else weight).detach().double()
    )


def defined(
    x: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, logit_scale: float = 1.0,
    softcap: float | None = None, label_smoothing: float = 0.0, z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Losses and entropies in torch functions."""
    z = F.linear(x, weight, bias) * logit_scale
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    losses = F.cross_entropy(z, labels, label_smoothing=label_smoothing, reduction="none")
    valid = labels != IGNORED
    entropy = torch.distributions.Categorical(logits=z).entropy() if len(z) else z.new_empty(0)
    return losses + z_loss * z.logsumexp(-1) ** 2 * valid, entropy * valid

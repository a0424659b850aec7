"""Models for the tests of training, and the comparison of two runs."""

from __future__ import annotations

import copy
from typing import Any

import models
import pytest
import torch
from peft_models import lora
from torch import Tensor, nn

import peft_kernels as pk

BASES = pytest.mark.parametrize("base", models.BASES)
ROWS = 24  # for a batch that is halved


def net(base: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return lora(models.base_model(base, dtype), **options)


def plain_llama(base: str = "nf4") -> Any:
    """A Llama whose weights are large enough that a different forward changes the losses."""
    model = models.tiny_llama(
        intermediate_size=128, attention_bias=True, initializer_range=0.2, pad_token_id=0
    )
    for name, parameter in model.named_parameters():
        if name.endswith("proj.bias"):
            nn.init.normal_(parameter)
    return models.to_base(model, base)


def llama(base: str = "nf4", **options: Any) -> Any:
    return lora(plain_llama(base), target_modules="all-linear", **options).train()


def patched_copy(stock: nn.Module) -> tuple[Any, pk.patch.PatchReport]:
    model = copy.deepcopy(stock)
    report = pk.patch(model)
    assert report.fused and not report.original, report.details()
    return model, report


def assert_no_fallback(report: Any) -> None:
    assert not any(layer.fallbacks for layer in report.layers), str(report)


def labels(rows: int = ROWS) -> Tensor:
    return torch.arange(rows) % 10


def net_loss(model: nn.Module, x: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x).float(), labels(len(x)))


def ids(seed: int = 1) -> Tensor:
    return torch.randint(3, 128, (4, 10), generator=torch.Generator().manual_seed(seed))


def llama_loss(model: nn.Module, batch: Tensor | None = None) -> Tensor:
    batch = ids() if batch is None else batch
    return model(input_ids=batch, labels=batch).loss


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys() and len(got) > 1
    for name in want:
        assert torch.equal(got[name], want[name]), name

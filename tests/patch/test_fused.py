"""Every fused LoRA option on every base and dtype: patched against unpatched PEFT."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from numbers_policy import pairs
from peft_models import DTYPES, REGIMES, add_adapter, assert_same_numbers, lora, run
from torch import Tensor, nn

import peft_kernels as pk
import testing
from peft_kernels.ops.lora.dropout import apply_dropout

pytestmark = pytest.mark.filterwarnings("ignore:.*lora_bias=True.*has no bias")


@pytest.fixture(autouse=True)
def _seeded_dropout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives PEFT's own forward, which calls F.dropout, the masks of the fused one: one seed per layer, one
    stream per adapter."""
    case = request.node.callspec.params.get("case", "")
    streams = itertools.cycle(range(2 if case.startswith("two_active") else 1))
    seed = torch.tensor(0)

    def dropout(x: Tensor, p: float, training: bool, inplace: bool) -> Tensor:
        nonlocal seed
        stream = next(streams)
        if stream == 0:
            seed = torch.randint(0, 2**63 - 1, ())
        return apply_dropout(x, p, seed, stream).to(x.dtype) if training else x

    monkeypatch.setattr(nn.functional, "dropout", dropout)


def two_active(model: Any) -> None:
    add_adapter(model, "other", r=4, lora_alpha=2)
    model.base_model.set_adapter(["default", "other"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def two_active_with_dropout(model: Any) -> None:
    add_adapter(model, "other", r=4, lora_alpha=2, lora_dropout=0.3)
    model.base_model.set_adapter(["default", "other"])


def bias_values(model: Any) -> None:
    """lora_bias starts at zero, which would hide errors."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name and name.endswith("bias"):
            parameter.data = testing.tensor(*parameter.shape, dtype=parameter.dtype, seed=2, scale=0.3)


def moved_magnitudes(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + testing.tensor(*parameter.shape, seed=4, scale=0.2)


CASES: dict[str, tuple[dict[str, Any], Callable[[Any], None] | None]] = {
    "plain": ({}, None),
    "rslora": ({"use_rslora": True}, None),
    "bias_all": ({"bias": "all"}, None),
    "bias_lora_only": ({"bias": "lora_only"}, None),
    "lora_bias": ({"lora_bias": True}, bias_values),
    "dropout": ({"lora_dropout": 0.3}, None),
    "dropout_lora_bias": ({"lora_dropout": 0.3, "lora_bias": True}, bias_values),
    "dora": ({"use_dora": True}, moved_magnitudes),
    "dora_rslora": ({"use_dora": True, "use_rslora": True, "bias": "all"}, moved_magnitudes),
    "two_active": ({}, two_active),
    "two_active_dropout": ({"lora_dropout": 0.3}, two_active_with_dropout),
}


def build(case: str, base: str, dtype: torch.dtype) -> Any:
    options, change = CASES[case]
    model = lora(models.base_model(base, dtype), **options)
    if change is not None:
        change(model)
    return model


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", models.BASES)
@pytest.mark.parametrize("case", CASES)
def test_same_outputs_and_gradients(case: str, base: str, dtype: torch.dtype) -> None:
    assert_same_numbers(build(case, base, dtype), testing.tensor(17, 64, dtype=dtype))


@pairs(case=tuple(CASES), base=models.BASES, regime=tuple(REGIMES))
def test_gradients_under_every_regime(case: str, base: str, regime: str) -> None:
    model, x = build(case, base, torch.float32), testing.tensor(9, 64)
    report = pk.patch(model)
    want, got = run(model, x), run(model, x, REGIMES[regime](model))
    assert got.keys() == want.keys() and len(want) >= 6
    for name in want:
        assert torch.equal(got[name], want[name]), name
    assert not any(layer.fallbacks for layer in report.layers), str(report)


@pairs(case=tuple(CASES), base=models.BASES, dtype=DTYPES)
def test_ten_steps_of_training(case: str, base: str, dtype: torch.dtype) -> None:
    stock = build(case, base, dtype)
    ours = copy.deepcopy(stock)
    report = pk.patch(ours)
    curves = [train(model, dtype) for model in (stock, ours)]
    assert not any(layer.fallbacks for layer in report.layers), str(report)
    allowed = 1e-4 if dtype == torch.float32 else 0.01
    assert curves[1] == pytest.approx(curves[0], rel=allowed)
    assert curves[0][-1] < 0.97 * curves[0][0], f"a flat curve compares nothing: {curves[0]}"


def train(model: Any, dtype: torch.dtype) -> list[float]:
    torch.manual_seed(11)
    x, target = testing.tensor(32, 64, dtype=dtype, seed=6), testing.tensor(32, 10, seed=7)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, eps=1e-4)
    losses = []
    for _ in range(10):
        loss = nn.functional.mse_loss(model(x).float(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses

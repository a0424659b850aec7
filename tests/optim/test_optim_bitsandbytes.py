"""Optimizer steps compared with bitsandbytes', each from the same weights and states."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from optim_models import Model, train
from torch import Tensor

import peft_kernels as pk
from peft_kernels.core.code_tables import dynamic_map, dynamic_thresholds

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

CPU = torch.device("cpu")
ROUNDING = 2.0**-20
"""Rounding of an fp32 moment in a few operations, relative to its terms."""
HALF_A_BIN = 2.0**-16 * (1 + 1e-4)
"""bitsandbytes' CPU code looks codes up in 65,536 bins from -1 to 1, each with the code of one value."""

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


def flat_state(state: dict[str, Any], i: int) -> tuple[Tensor, Tensor]:
    """Codes, and the absmax of each code in fp64."""
    codes = state[f"state{i}"].flatten().long()
    return codes, state[f"absmax{i}"].double().repeat_interleave(256)[: codes.numel()]


def distance(x: Tensor, codes: Tensor, signed: bool) -> Tensor:
    """Distance of values from those with the given codes; 0 where they round to them."""
    thresholds = dynamic_thresholds(CPU, signed).double()
    ends = torch.full((1,), torch.inf, dtype=torch.float64)
    low, high = torch.cat([-ends, thresholds])[codes], torch.cat([thresholds, ends])[codes]
    return torch.maximum(low - x, x - high).clamp(min=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["AdamW8bit", "Adam8bit", "PagedAdamW8bit", "PagedAdamW", "Lion8bit"])
def test_every_step_equals_bitsandbytes(name: str, dtype: torch.dtype) -> None:
    """Weights agree within one rounding. Where codes differ, ours belongs to the exact moment, and
    bitsandbytes' to a value in the same bin."""
    ours, theirs = Model(dtype), Model(dtype)
    options = {"lr": 1e-3, "weight_decay": 0.1}
    optimizer = getattr(pk.optim, name)(ours.parameters(), **options)
    other = getattr(bnb.optim, name)(theirs.parameters(), **options)
    unequal = total = 0
    for step in range(6):
        ours.load_state_dict(theirs.state_dict())
        if step:
            optimizer.load_state_dict(other.state_dict())
        before = copy.deepcopy({n: dict(optimizer.state[p]) for n, p in ours.named_parameters()})
        assert train(ours, optimizer, range(step, step + 1)) == train(theirs, other, range(step, step + 1))
        for (key, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            rtol = torch.finfo(dtype).eps
            torch.testing.assert_close(p, q, rtol=rtol, atol=1e-3 * ROUNDING)
            unequal, total = unequal + int((p != q).sum()), total + p.numel()
            for i in (1, 2):
                if f"state{i}" in other.state[q]:
                    states = before[key], optimizer.state[p], other.state[q]
                    beta = optimizer.param_groups[0]["betas"][1 if name == "Lion8bit" else i - 1]
                    check_moment(i, p.grad, beta, *states)
    assert unequal < 0.05 * total if dtype == torch.float32 else unequal < 1e-3 * total


def check_moment(i: int, grad: Tensor, beta: float, *states: dict[str, Any]) -> None:
    before, ours, theirs = states
    g = grad.double().flatten()
    terms = (1 - beta) * (g if i == 1 else g * g), torch.zeros_like(g)
    if ours[f"state{i}"].dtype != torch.uint8:
        if before:
            terms = terms[0], beta * before[f"state{i}"].double().flatten()
        off = (ours[f"state{i}"] - theirs[f"state{i}"]).double().flatten().abs()
        assert (off <= ROUNDING * (terms[0].abs() + terms[1].abs())).all(), i
        return
    if before:
        codes, absmax = flat_state(before, i)
        terms = terms[0], beta * dynamic_map(CPU, i == 1)[codes].double() * absmax
    (codes, absmax), (other_codes, other_absmax) = flat_state(ours, i), flat_state(theirs, i)
    torch.testing.assert_close(absmax, other_absmax, rtol=ROUNDING, atol=0)
    x, rounding = (terms[0] + terms[1]) / absmax, ROUNDING * (terms[0].abs() + terms[1].abs()) / absmax
    unequal = codes != other_codes
    assert (distance(x, codes, i == 1) <= rounding).all(), i
    assert (distance(x, other_codes, i == 1)[unequal] <= HALF_A_BIN + rounding[unequal]).all(), i

"""The average of a frozen NF4 weight with itself stays packed, however it is computed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nf4_weights import DTYPES, assert_equal_weights, make, parts
from torch import Tensor, nn
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
    get_swa_multi_avg_fn,
)

import peft_kernels as pk
import testing
from peft_kernels.nf4.sharded.fsdp_tensor import NF4Shard
from peft_kernels.nf4.sharded.local_rows import LocalRows

DECAY = 0.999


def custom_ema(averaged: Tensor, current: Tensor, count: Any) -> Tensor:
    share = 1 / (count + 1)
    return averaged * (1 - share) + current * share


AVERAGES: dict[str, dict[str, Any]] = {
    "swa": {},
    "swa-avg": {"avg_fn": get_swa_avg_fn()},
    "swa-multi": {"multi_avg_fn": get_swa_multi_avg_fn()},
    "ema-avg": {"avg_fn": get_ema_avg_fn(DECAY)},
    "ema-multi": {"multi_avg_fn": get_ema_multi_avg_fn(DECAY)},
    "own": {"avg_fn": custom_ema},
    "buffers": {"avg_fn": get_ema_avg_fn(DECAY), "use_buffers": True},
}


def small_model(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    layers = [nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Linear(32, 64)]
    return pk.quantize_model(nn.Sequential(*layers).to(dtype), blocksize=32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", AVERAGES)
def test_averaged_model(how: str, dtype: torch.dtype) -> None:
    model = small_model(dtype)
    stock = model[0].bias.detach().clone()
    averaged = AveragedModel(model, **AVERAGES[how])
    for _ in range(4):
        with torch.no_grad():
            model[0].bias += 1
        averaged.update_parameters(model)
    for layer, own in zip(averaged.module, model, strict=True):
        if isinstance(own, pk.nn.NF4Linear):
            assert_equal_weights(layer.weight, own.weight)
            assert not layer.weight.is_dense
    assert not torch.equal(averaged.module[0].bias, stock), "what trains is averaged"


def mul_add(ema: Tensor, current: Tensor) -> None:
    ema.mul_(DECAY).add_(current, alpha=1 - DECAY)


def through_data(ema: Tensor, current: Tensor) -> None:
    ema.data.mul_(DECAY)
    ema.data.add_((1 - DECAY) * current.data)


def assign_data(ema: Tensor, current: Tensor) -> None:
    ema.data = DECAY * ema.data + (1 - DECAY) * current.data


def subtract_in_place(ema: Tensor, current: Tensor) -> None:
    difference = ema - current  # as torch-ema does
    difference.mul_(1 - DECAY)
    ema.sub_(difference)


def copy_detached(ema: Tensor, current: Tensor) -> None:
    ema.copy_((current * (1 - DECAY) + ema * DECAY).detach())


def in_fp32(ema: Tensor, current: Tensor) -> None:
    ema.copy_((DECAY * ema.float() + (1 - DECAY) * current.float()).to(ema.dtype))


def by_tensors(ema: Tensor, current: Tensor) -> None:
    decay = torch.tensor(DECAY)
    ema.copy_(ema * decay + current * (1 - decay))


def foreach(ema: Tensor, current: Tensor) -> None:
    plain = torch.ones(3)
    torch._foreach_mul_([plain, ema], DECAY)
    torch._foreach_add_([ema, plain], [current, torch.ones(3)], alpha=1 - DECAY)
    torch.testing.assert_close(plain, torch.ones(3))


def foreach_differences(ema: Tensor, current: Tensor) -> None:
    differences = torch._foreach_sub([ema], [current])
    torch._foreach_mul_(differences, 1 - DECAY)
    torch._foreach_sub_([ema], differences)


LOOPS: dict[str, Callable[[Any, Any], None]] = {
    "mul-add": mul_add,
    "data": through_data,
    "data-assign": assign_data,
    "subtract": subtract_in_place,
    "detach": copy_detached,
    "fp32": in_fp32,
    "tensors": by_tensors,
    "lerp": lambda ema, current: ema.lerp_(current, 1 - DECAY),
    "lerp-tensor": lambda ema, current: ema.copy_(torch.lerp(ema, current, torch.tensor(1 - DECAY))),
    "foreach": foreach,
    "foreach-sub": foreach_differences,
    "foreach-lerp": lambda ema, current: torch._foreach_lerp_([ema], [current], 1 - DECAY),
    "division": lambda ema, current: ema.copy_(ema / 4 + 3 * current / 4),
}


@pytest.mark.parametrize("experts", [False, True], ids=["linear", "experts"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", LOOPS)
@torch.no_grad()
def test_custom_ema_loops(how: str, dtype: torch.dtype, experts: bool) -> None:
    weight = (
        pk.NF4Weight.quantize(testing.tensor(3, 12, 64, dtype=dtype), 32) if experts else make(dtype=dtype)
    )
    current = nn.Parameter(weight, requires_grad=False)
    ema = nn.Parameter(copy.deepcopy(weight), requires_grad=False)
    for _ in range(3):
        LOOPS[how](ema, current)
        assert_equal_weights(ema, weight)
    assert not ema.is_dense  # type: ignore[attr-defined]


@pytest.mark.parametrize("how", LOOPS)
@torch.no_grad()
def test_average_of_two_weights_stays_dense(how: str) -> None:
    ema, current = make(seed=1), make(seed=2)
    dense_ema, dense_current = ema.dequantize(), current.dequantize()
    LOOPS[how](ema, current)
    LOOPS[how](dense_ema, dense_current)
    assert ema.is_dense
    torch.testing.assert_close(ema.dequantize(), dense_ema)


@torch.no_grad()
def test_fsdp_local_rows() -> None:
    """FSDP2's local rows, which only averages may write to."""
    weight = make()
    ema, current = (
        NF4Shard(LocalRows.of(copy.deepcopy(weight)._state).narrow(2, 7), weight.dtype) for _ in "ab"
    )
    want = ema.dequantize()
    ema.copy_(DECAY * ema + (1 - DECAY) * current)
    torch._foreach_lerp_([ema], [current], 1 - DECAY)
    assert torch.equal(ema.dequantize(), want)
    with pytest.raises(NotImplementedError, match="rows 2 to 7 of an NF4 weight"):
        ema.copy_(DECAY * current)


@torch.no_grad()
def test_close_values_are_a_write() -> None:
    """Other values as close to the weight as an average are a write."""
    for dtype in DTYPES:
        weight, near = make(dtype=dtype), make(dtype=dtype).dequantize()
        near.copy_((near.double() * (1 + torch.finfo(dtype).eps)).to(dtype))
        weight.copy_(near)
        assert weight.is_dense and torch.equal(weight.dequantize(), near)


def changed_in_place(values: Tensor) -> None:
    values += 1


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "in-place": changed_in_place,
    "row": lambda values: values[0].fill_(2),
    "view": lambda values: values.view(-1).add_(1),
    "detached": lambda values: values.detach().add_(1),
    "numpy": lambda values: values.numpy().fill(3),
    "out": lambda values: torch.zeros(values.shape, out=values),
}


@pytest.mark.parametrize("how", CHANGES)
@torch.no_grad()
def test_changed_average_stays_dense(how: str) -> None:
    weight = make()
    average = 0.5 * weight + 0.5 * weight
    CHANGES[how](average)
    want = torch.Tensor(average.numpy())
    weight.copy_(average)
    assert weight.is_dense and torch.equal(weight.dequantize(), want)
    assert not torch.equal(want, make().dequantize())


@torch.no_grad()
def test_partial_average() -> None:
    """Dense until the other half is added, then packed; dense for good if something else is added."""
    weight, want = make(), make().dequantize()
    weight.mul_(0.5)
    assert weight.is_merged and torch.equal(weight.dequantize(), want * 0.5)
    weight.add_(make(), alpha=0.25)
    assert weight.is_merged and torch.equal(weight.dequantize(), want * 0.75)
    other = copy.deepcopy(weight)
    weight.add_(make(), alpha=0.25)
    assert_equal_weights(weight, make())
    other.add_(1)
    other.sub_(1)
    assert other.is_dense and parts(other).keys() == {"dense"}
    torch.testing.assert_close(other.dequantize(), want * 0.75)


def test_multiples_are_dense() -> None:
    weight = make()
    doubled = weight * 2
    want = weight.dequantize() * 2
    assert torch.equal(doubled, want) and torch.equal(doubled.clone() + 1, want + 1)
    assert type(copy.deepcopy(doubled)) is Tensor and type(doubled + 1) is Tensor
    scale = torch.ones((), requires_grad=True)
    (weight * scale).sum().backward()
    torch.testing.assert_close(scale.grad, weight.dequantize().sum())
    assert weight.packed is not None

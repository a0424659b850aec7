"""Training a patched PEFT model with checkpointing, dropout, copies and gradient scalers, against stock or
against the patched model without them. Trainers are in tests/flows."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from flow_checks import Calls, assert_near, train
from models import inputs, pickled, saved_and_loaded
from peft_models import in_fp64, step, trained_values
from rounding import BF16, FAR, ONE_MODEL
from torch import Tensor, nn
from training_models import (
    BASES,
    assert_equal,
    assert_no_fallback,
    ids,
    llama,
    llama_loss,
    net,
    net_loss,
    patched_copy,
)

import peft_kernels as pk
import testing

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning"),
    pytest.mark.usefixtures("one_thread"),
]


# Gradient checkpointing.


@contextmanager
def checkpointing(model: Any, reentrant: bool) -> Iterator[None]:
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    yield
    model.gradient_checkpointing_disable()
    model.disable_input_require_grads()


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["no-dropout", "dropout"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
@BASES
def test_checkpointing_changes_no_bit(base: str, reentrant: bool, dropout: float) -> None:
    stock = llama(base, lora_dropout=dropout)
    model, report = patched_copy(stock)
    calls: list[int] = []
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    layer.register_forward_hook(lambda *_: calls.append(1))

    plain = step(model, lambda: llama_loss(model))
    assert len(calls) == 1
    with checkpointing(model, reentrant):
        checkpointed = step(model, lambda: llama_loss(model))
    assert len(calls) == 3, "forward runs again in backward"
    assert len(plain) == 29
    assert_equal(checkpointed, plain)
    if dropout == 0:
        assert_no_fallback(report)
        with checkpointing(stock, reentrant):
            assert_near(checkpointed, step(stock, lambda: llama_loss(stock)))


# Dropout. Masks may differ from stock PEFT's, so elements are not compared with it.


@BASES
def test_dropout_is_reproducible(base: str) -> None:
    model, _ = patched_copy(net(base, lora_dropout=0.5).train())
    first, again, other = (step(model, lambda: net_loss(model, inputs()), seed) for seed in (5, 5, 6))
    assert_equal(again, first)
    for name in first:
        assert testing.relative_error(other[name], first[name]) > 1e-3, name


@BASES
def test_no_dropout_in_evaluation(base: str) -> None:
    stock = net(base, lora_dropout=0.5)
    model, report = patched_copy(stock)
    got = model.eval()(inputs().requires_grad_())  # bitsandbytes repacks weights if no gradient is needed
    assert torch.equal(model(inputs().requires_grad_()), got)
    assert testing.relative_error(got, stock.eval()(inputs().requires_grad_())) < ONE_MODEL
    assert_no_fallback(report)


@pytest.mark.parametrize("p", [0.1, 0.5])
@BASES
def test_dropout_keeps_the_mean(base: str, p: float) -> None:
    layer = patched_copy(net(base, lora_dropout=p).train())[0].base_model.model.q
    x = inputs(1)
    expected = layer.eval()(x.clone().requires_grad_()).detach()
    y = layer.train()(x.expand(8000, 64).clone().requires_grad_()).detach()
    deviation = y.std(0)
    assert bool((deviation > 0).all())
    worst = ((y.mean(0) - expected[0]) / deviation).abs().max().item() * math.sqrt(8000)
    assert worst < 5, f"{worst:.1f} standard errors away"


@pytest.mark.parametrize("p", [0.0, 0.5])
@BASES
def test_backward_uses_the_mask_of_forward(base: str, p: float) -> None:
    """The delta is linear in A, in B and in x: <gradient, argument> is <dy, delta> for each."""
    layer = patched_copy(net(base, lora_dropout=p).train())[0].base_model.model.q
    x = inputs().requires_grad_()
    y = layer(x)
    base_y = layer.base_layer(x).detach()
    dy = testing.tensor(*y.shape, seed=9)
    y.backward(dy)
    delta = (dy * (y.detach() - base_y)).double().sum().item()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert abs(delta) > 1
    for got in ((a.grad * a).sum(), (b.grad * b).sum()):
        assert got.item() == pytest.approx(delta, rel=FAR)
    linear = (dy * (y.detach() - layer.base_layer.bias)).double().sum().item()
    assert (x.grad * x).sum().item() == pytest.approx(linear, rel=FAR, abs=FAR)


# Autograd.


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
@BASES
def test_a_parameter_changed_before_backward_raises(base: str, part: str) -> None:
    """As in torch; else gradients would be those at values that forward did not use."""
    model, _ = patched_copy(net(base))
    loss = net_loss(model, inputs().requires_grad_())
    with torch.no_grad():
        model.get_submodule("base_model.model.o")._modules[part]["default"].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Copies.


def net_batch(model: nn.Module, i: int) -> Tensor:
    return net_loss(model, inputs(seed=i % 3))


@pytest.mark.parametrize("copying", [copy.deepcopy, pickled, saved_and_loaded])
@BASES
def test_training_a_copy_leaves_the_original_alone(base: str, copying: Any) -> None:
    """A pickle holds the unpatched model."""
    model, _ = patched_copy(net(base))
    x = inputs().requires_grad_()
    before, state = model(x).detach(), trained_values(model)
    count = pk.unpatch(copy.deepcopy(model))
    assert count > 0 and pk.unpatch(copying(model)) == (count if copying is copy.deepcopy else 0)
    twin = copying(model)
    report = pk.patch(twin)
    with Calls() as calls:
        assert torch.equal(twin(x), before)
    assert calls.fused == 2
    losses = train(twin, net_batch, 3)
    assert_no_fallback(report)
    assert_equal(trained_values(model), state)
    assert torch.equal(model(x), before)
    assert not torch.equal(twin(x), before)
    assert train(model, net_batch, 3) == losses, "the original trains as the copy did"

    after = twin(x)
    assert pk.unpatch(twin) == count
    assert testing.relative_error(twin(x), after) < ONE_MODEL
    with Calls() as calls:
        twin(x)
        assert calls.fused == 0
        model(x)
        assert calls.fused == 2, "the original stays patched"


# Precision.


@BASES
def test_fp16_with_a_gradient_scaler(base: str) -> None:
    stock = net(base, torch.float16)
    model, report = patched_copy(stock)

    def run(model: nn.Module) -> tuple[list[float], list[float]]:
        """Losses and scales. The first scale overflows fp16 gradients: that step must be skipped."""
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=3, backoff_factor=2.0**-30)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses, scales = [], []
        for i in range(8):
            before = trained_values(model)
            optimizer.zero_grad()
            loss = net_loss(model, inputs(dtype=torch.float16, seed=i % 2))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            skipped = all(torch.equal(value, before[name]) for name, value in trained_values(model).items())
            assert skipped == (i == 0)
            losses.append(loss.item())
            scales.append(scaler.get_scale())
        return losses, scales

    losses, scales = run(model)
    expected_losses, expected_scales = run(stock)
    assert all(math.isfinite(loss) for loss in losses) and losses[-1] < losses[0] - 0.1
    assert losses == pytest.approx(expected_losses, rel=BF16)
    assert scales == expected_scales == [2.0**10] * 3 + [2.0**11] * 3 + [2.0**12] * 2
    assert_no_fallback(report)


@BASES
def test_autocast(base: str) -> None:
    stock = llama(base)
    model, report = patched_copy(stock)

    def autocast_step(model: Any) -> tuple[dict[str, Tensor], torch.dtype]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            dtype = model.base_model.model.model.layers[0].mlp.up_proj(testing.tensor(3, 64)).dtype
            found = step(model, lambda: llama_loss(model))
            return found | {"losses": losses(model)}, dtype

    def losses(model: Any) -> Tensor:
        """Over several batches, because the error of a single value is luck."""
        with torch.no_grad():
            return torch.stack([llama_loss(model, ids(seed)) for seed in range(16)])

    (got, dtype), (plain, expected_dtype) = autocast_step(model), autocast_step(stock)
    assert dtype == expected_dtype
    exact = in_fp64(stock)
    truth = step(exact, lambda: llama_loss(exact)) | {"losses": losses(exact)}
    assert got.keys() == plain.keys() == truth.keys() and len(got) == 30
    for name in got.keys() - {"loss"}:
        testing.assert_close(got[name], plain[name], truth[name], name)
    assert_no_fallback(report)

"""Optimizers equal those of torch and bitsandbytes: training, checkpoints, errors."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from optim_models import Model, assert_near, train
from rounding import ONE_STEP
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import peft_kernels as pk
import testing
from peft_kernels.core import code_tables
from peft_kernels.core.backends import cpu
from peft_kernels.optim import pager

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

CLASSES = ("AdamW8bit", "Adam8bit", "PagedAdamW8bit", "PagedAdamW", "Lion8bit")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU"),
    pytest.mark.filterwarnings("ignore:.*torch.distributed:UserWarning"),
]


@pytest.mark.parametrize("name", CLASSES)
def test_default_arguments_are_those_of_bitsandbytes(name: str) -> None:
    parameter = nn.Parameter(torch.zeros(8192))
    ours, theirs = getattr(pk.optim, name)([parameter]), getattr(bnb.optim, name)([parameter])
    for key in ("lr", "betas", "weight_decay", "eps"):
        assert ours.defaults[key] == theirs.defaults[key], key
    parameter.grad = torch.ones(8192)
    ours.step()
    theirs.step()
    mine, other = ours.state[parameter], theirs.state[parameter]
    assert set(mine) == set(other)
    for key, value in other.items():
        if isinstance(value, Tensor):
            assert mine[key].dtype == value.dtype and torch.equal(mine[key], value), key


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("way", ["bnb-ours", "ours-bnb", "ours-ours"])
def test_checkpoints_resume_in_bitsandbytes_and_back(name: str, way: str) -> None:
    first, second = (bnb.optim if half == "bnb" else pk.optim for half in way.split("-"))
    model = Model()
    optimizer = getattr(first, name)(model.parameters(), lr=1e-3)
    train(model, optimizer, range(10))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = Model()
    resumed.load_state_dict(saved["model"])
    other = getattr(second, name)(resumed.parameters(), lr=0.5)
    other.load_state_dict(saved["optimizer"])
    assert other.param_groups[0]["lr"] == 1e-3
    want = train(model, optimizer, range(10, 20))
    got = train(resumed, other, range(10, 20))
    if way == "ours-ours":
        assert got == want
        assert_near(resumed, model)
    else:
        assert got == pytest.approx(want, rel=ONE_STEP)


def test_equals_torch_adamw_with_groups_and_a_schedule() -> None:
    ours, theirs = Model(), Model()

    def run(model: Model, make: Callable[..., Any]) -> None:
        groups = [{"params": [model.a, model.bias], "lr": 3e-3}, {"params": [model.b], "weight_decay": 0.3}]
        optimizer = make(groups, lr=1e-3, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
        for step in range(20):
            train(model, optimizer, range(step, step + 1))
            schedule.step()

    run(ours, pk.optim.PagedAdamW)
    run(theirs, torch.optim.AdamW)
    assert_near(ours, theirs, moved=20 * 3e-3)


def test_coupled_decay_equals_torch_adam() -> None:
    ours, theirs = Model(), Model()
    options = {"lr": 1e-3, "weight_decay": 0.2}
    in_32 = {"min_8bit_size": 10**6, "decoupled_weight_decay": False}
    train(ours, pk.optim.Adam8bit(ours.parameters(), **in_32, **options), range(20))
    train(theirs, torch.optim.Adam(theirs.parameters(), **options), range(20))
    assert_near(ours, theirs, moved=20 * 1e-3)


def test_parameter_without_gradient_keeps_its_step() -> None:
    model = Model()
    optimizer = pk.optim.AdamW8bit(model.parameters())
    for step in range(6):
        optimizer.zero_grad()
        model.loss(step).backward()
        if step % 2:
            model.b.grad = None
        before = model.b.detach().clone()
        optimizer.step()
        assert torch.equal(before, model.b) is bool(step % 2)
    steps = [optimizer.state_dict()["state"][i]["step"] for i in range(3)]
    assert steps == [6, 3, 6]


@pytest.mark.parametrize("bad", [False, True])
def test_grad_scaler(bad: bool) -> None:
    model, plain = Model(), Model()
    optimizer, other = pk.optim.AdamW8bit(model.parameters()), pk.optim.AdamW8bit(plain.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(model.loss(0)).backward()
    plain.loss(0).backward()
    if bad:
        model.a.grad[3, 4] = float("inf")
    else:
        other.step()
    scaler.step(optimizer)
    scaler.update()
    assert_near(model, plain)
    assert optimizer.state_dict()["state"][0]["step"] == int(not bad)
    assert scaler.get_scale() == (512.0 if bad else 1024.0)


def test_closure_and_max_grad_norm() -> None:
    model, plain = Model(), Model()
    clipped = pk.optim.PagedAdamW(model.parameters(), eps=1e-3, max_grad_norm=0.01)
    stock = torch.optim.AdamW(plain.parameters(), eps=1e-3)

    def closure() -> Tensor:
        clipped.zero_grad()
        loss = model.loss(0)
        loss.backward()
        return loss

    assert clipped.step(closure).item() == plain.loss(0).item()
    plain.loss(0).backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.01)
    stock.step()
    assert_near(model, plain, moved=1e-3)


def test_overrides_by_parameter() -> None:
    model = Model()
    optimizer = pk.optim.AdamW8bit(model.parameters(), lr=1e-3)
    optimizer.override_config(model.a, "optim_bits", 32)
    optimizer.override_config([model.b], key_value_dict={"lr": 0.0, "weight_decay": 0.0})
    before = model.b.detach().clone()
    train(model, optimizer, range(2))
    assert optimizer.state[model.a]["state1"].dtype == torch.float32
    assert optimizer.state[model.b]["state1"].dtype == torch.uint8
    assert torch.equal(before, model.b)
    with pytest.raises(ValueError, match="before the first step"):
        optimizer.override_config(model.a, "optim_bits", 8)
    with pytest.raises(ValueError, match="key: expected one of lr"):
        optimizer.override_config(model.a, "momentum", 8)


def test_lora_plus_groups() -> None:
    layer = pk.nn.NF4LoRALinear(nn.Linear(128, 128), r=64)
    optimizer = pk.optim.AdamW8bit(pk.optim.lora_plus_groups(layer, lr=1e-3))
    before = layer.lora_B.detach().clone()
    layer(testing.tensor(4, 128)).sum().backward()
    optimizer.step()
    assert (layer.lora_B - before).detach().abs().max() == pytest.approx(16e-3, rel=1e-3)


def test_unsigned_map_is_equal_in_python_and_cpp() -> None:
    if (reason := testing.unavailable("cpu-scalar")) is not None:
        pytest.skip(reason)
    ours = code_tables.dynamic_map(torch.device("cpu"), signed=False).tolist()
    assert cpu.BACKEND.extension.unsigned_dynamic_map() == ours


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_small_steps_are_not_lost_in_bf16(rounding: str) -> None:
    parameter = nn.Parameter(torch.full((8192,), 100.0, dtype=torch.bfloat16))
    optimizer = pk.optim.AdamW8bit([parameter], lr=0.01, weight_decay=0.0, rounding=rounding)
    for _ in range(100):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert parameter.detach().float().mean() == pytest.approx(99.0, abs=0.05)


def test_states_take_two_bytes_a_parameter() -> None:
    parameter = nn.Parameter(torch.zeros(2**20))
    optimizer = pk.optim.AdamW8bit([parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    own = {k: v for k, v in optimizer.state[parameter].items() if "qmap" not in k and k != "step"}
    assert sum(v.nbytes for v in own.values()) / parameter.numel() == 2 + 2 * 4 / 256


def test_distributed_checkpoint(tmp_path: Any) -> None:
    model = Model()
    optimizer = pk.optim.AdamW8bit(model.parameters(), lr=1e-3)
    train(model, optimizer, range(5))
    weights, states = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=tmp_path, no_dist=True)
    resumed = Model()
    other = pk.optim.AdamW8bit(resumed.parameters(), lr=1e-3)
    weights, states = get_state_dict(resumed, other)
    found = {"model": weights, "optimizer": states}
    dcp.load(found, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(resumed, other, model_state_dict=found["model"], optim_state_dict=found["optimizer"])
    assert train(resumed, other, range(5, 10)) == train(model, optimizer, range(5, 10))


def test_model_to() -> None:
    model = Model()
    optimizer = pk.optim.AdamW8bit(model.parameters())
    model.to(torch.bfloat16)
    train(model, optimizer, range(2))
    model.to("cpu")
    train(model, optimizer, range(2))
    assert optimizer.state_dict()["state"][0]["step"] == 4


def test_paging_on_a_cpu_warns_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pager, "_warned", set())
    with caplog.at_level(logging.WARNING, "peft_kernels"):
        for _ in range(2):
            model = Model()
            train(model, pk.optim.PagedAdamW8bit(model.parameters()), range(1))
    assert [record.message for record in caplog.records] == [
        "paging has no effect on a CPU: the optimizer's states are in ordinary memory"
    ]


def test_transposed_parameters_and_gradients() -> None:
    base = testing.tensor(100, 70)
    turned = nn.Parameter(base.t())
    plain = nn.Parameter(base.t().contiguous())
    optimizer = pk.optim.AdamW8bit([turned, plain])
    for step in range(3):
        grad = testing.tensor(100, 70, seed=step)
        turned.grad, plain.grad = grad.t(), grad.t().contiguous()
        optimizer.step()
    assert torch.equal(turned, plain)

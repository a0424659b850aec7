"""Optimizers with hooks, schedulers, compiled loops, CUDA graphs and accelerate."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import chain
from typing import Any

import models
import pytest
import torch
from optim_models import Model, assert_near, train
from stub_device import H100, stub_device
from torch import Tensor, nn

import peft_kernels as pk
import testing


def needs_stub(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that runs the CUDA kernels on a simulated device."""
    reason = testing.unavailable("ptx")
    return pytest.mark.ptx(pytest.mark.skipif(reason is not None, reason=f"ptx: {reason}")(test))


def test_step_in_a_compiled_loop() -> None:
    """The step is in no graph: the code around it is compiled."""
    model, plain = Model(), Model()
    optimizer, other = (pk.optim.AdamW8bit(m.parameters(), max_grad_norm=1.0) for m in (model, plain))
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    step = torch.compile(optimizer.step, backend=backend)
    for at in range(3):
        optimizer.zero_grad()
        model.loss(at).backward()
        step()
    train(plain, other, range(3))
    assert_near(model, plain)
    assert not graphs


@pytest.mark.parametrize("copying", [copy.deepcopy, models.pickled, models.saved_and_loaded])
def test_copied_with_its_model(copying: Any) -> None:
    model = Model()
    optimizer = pk.optim.AdamW8bit(model.parameters(), rounding="kahan", max_grad_norm=1.0)
    optimizer.override_config(model.b, "lr", 3e-3)
    train(model, optimizer, range(2))
    copied, other = copying((model, optimizer))
    assert train(copied, other, range(2, 5)) == train(model, optimizer, range(2, 5))


def test_hooks_are_called() -> None:
    model, called = Model(), []
    optimizer = pk.optim.AdamW8bit(model.parameters())
    optimizer.register_step_pre_hook(lambda *_: called.append("before a step"))
    optimizer.register_step_post_hook(lambda *_: called.append("after a step"))
    optimizer.register_state_dict_pre_hook(lambda *_: called.append("before a save"))
    optimizer.register_state_dict_post_hook(lambda *_: called.append("after a save"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: called.append("before a load"))
    optimizer.register_load_state_dict_post_hook(lambda *_: called.append("after a load"))
    train(model, optimizer, range(1))
    optimizer.load_state_dict(optimizer.state_dict())
    order = [f"{when} a {what}" for what in ("step", "save", "load") for when in ("before", "after")]
    assert called == order


@pytest.mark.parametrize("schedule", ["LambdaLR", "OneCycleLR", "ReduceLROnPlateau"])
def test_tensor_learning_rate(schedule: str) -> None:
    """The scheduler changes it in place."""
    options: dict[str, Any] = {
        "LambdaLR": {"lr_lambda": lambda step: 1 / (step + 1)},
        "OneCycleLR": {"max_lr": 3e-3, "total_steps": 10},
        "ReduceLROnPlateau": {"patience": 0},
    }[schedule]
    pair = Model(), Model()
    for model, lr in zip(pair, (1e-3, torch.tensor(1e-3)), strict=True):
        optimizer = pk.optim.AdamW8bit(model.parameters(), lr=lr)
        scheduler = getattr(torch.optim.lr_scheduler, schedule)(optimizer, **options)
        for step in range(4):
            train(model, optimizer, range(step, step + 1))
            scheduler.step(*[1.0] if schedule == "ReduceLROnPlateau" else [])
    assert_near(*pair, moved=4 * 3e-3)
    assert (pair[0].a - Model().a).abs().max() > 1e-3


def test_groups_that_change_between_steps() -> None:
    """Added groups, and parameters added to a group, use the group's options from then on."""
    model, plain = Model(), Model()
    optimizer = pk.optim.AdamW8bit([model.a, model.b], lr=1e-3)
    other = pk.optim.AdamW8bit([plain.a, plain.b], lr=1e-3)
    train(model, optimizer, range(2))
    train(plain, other, range(2))
    optimizer.add_param_group({"params": [model.bias], "lr": 0.0, "weight_decay": 0.0})
    other.add_param_group({"params": [plain.bias], "lr": 0.0, "weight_decay": 0.0})
    optimizer.param_groups[1]["params"].insert(0, optimizer.param_groups[0]["params"].pop())
    before = model.b.detach().clone(), model.bias.detach().clone()
    train(model, optimizer, range(2, 4))
    other.override_config(plain.b, key_value_dict={"lr": 0.0, "weight_decay": 0.0})
    train(plain, other, range(2, 4))
    assert torch.equal(model.b, before[0]) and torch.equal(model.bias, before[1])
    assert_near(model, plain)
    assert optimizer.state[model.bias]["step"] == 2 and optimizer.state[model.b]["step"] == 4


RESETS: dict[str, Callable[[Any, Tensor], Any]] = {
    "clear": lambda optimizer, p: optimizer.state.clear(),
    "another": lambda optimizer, p: setattr(optimizer, "state", defaultdict(dict)),
    "pop": lambda optimizer, p: optimizer.state.pop(p),
    "empty": lambda optimizer, p: optimizer.state.update({p: {}}),
}


@pytest.mark.parametrize("reset", RESETS)
def test_cleared_states_restart(reset: str) -> None:
    p, q = (nn.Parameter(testing.tensor(5000)) for _ in range(2))
    optimizer, fresh = pk.optim.AdamW8bit([p]), pk.optim.AdamW8bit([q])
    p.grad = q.grad = testing.tensor(5000, seed=1)
    for _ in range(2):
        optimizer.step()
    RESETS[reset](optimizer, p)
    with torch.no_grad():
        p.copy_(q)
    optimizer.step()
    fresh.step()
    assert torch.equal(p, q)
    assert optimizer.state_dict()["state"][0]["step"] == 1


def test_replaced_moments_are_stepped() -> None:
    """For code that moves states off the GPU between steps, and back."""
    model, plain = Model(), Model()
    optimizer, other = pk.optim.AdamW8bit(model.parameters()), pk.optim.AdamW8bit(plain.parameters())
    train(plain, other, range(4))
    train(model, optimizer, range(2))
    for state in optimizer.state.values():
        state.update({name: value.clone() for name, value in state.items() if name != "step"})
    train(model, optimizer, range(2, 4))
    assert_near(model, plain)
    assert torch.equal(optimizer.state[model.a]["state1"], other.state[plain.a]["state1"])


def test_replaced_parameters_are_freed() -> None:
    """For code that prunes or adds rows: the state is assigned to the new parameter."""
    p = nn.Parameter(testing.tensor(5000))
    optimizer = pk.optim.AdamW8bit([p], min_8bit_size=10**6)
    p.grad = torch.ones_like(p)
    optimizer.step()
    state = optimizer.state.pop(p)
    q = nn.Parameter(p.detach()[:4000].clone())
    q.grad = torch.ones_like(q)
    optimizer.param_groups[0]["params"] = [q]
    optimizer.state[q] = state | {name: state[name][:4000].clone() for name in ("state1", "state2")}
    old = weakref.ref(p)
    del p
    optimizer.step()
    gc.collect()
    assert old() is None
    assert optimizer.state_dict()["state"][0]["step"] == 2


def test_prepared_by_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model, plain = Model(), Model()
    other = pk.optim.AdamW8bit(plain.parameters())
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    prepared, optimizer = accelerator.prepare(model, pk.optim.AdamW8bit(model.parameters()))
    for step in range(4):
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared.loss(step))
            optimizer.step()
            optimizer.zero_grad()
    for step in (0, 2):
        other.zero_grad()
        for each in (step, step + 1):
            (plain.loss(each) / 2).backward()
        other.step()
    assert_near(model, plain)


# CUDA graphs


@needs_stub
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"rounding": "stochastic"}], ids=str)
def test_second_step_can_be_captured(options: dict[str, Any]) -> None:
    """The step reads nothing on the host, and writes from it only once, the tensor addresses. Gradients stay
    in place, as in captures; `found_inf` and the learning rate are on the device."""
    from test_cuda_graphs import nothing_read

    layer = nn.Linear(128, 64).to(torch.bfloat16)
    lr = torch.tensor(1e-3)
    optimizer = pk.optim.AdamW8bit(layer.parameters(), lr=lr, **options)
    optimizer.found_inf = torch.zeros(1)
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    with stub_device(H100) as launches:
        optimizer.step()
        seen, places = [], []
        for _ in range(2):
            launches()
            with nothing_read():
                optimizer.step()
            seen.append(Counter(one.kernel.split("::")[-1].split("<")[0] for one in launches()))
            (plan,) = optimizer._plans
            places.append([t.data_ptr() for t in (plan.steps, *chain(*plan.states))])
    assert seen[0]["AdamWStep"] == 1 and "StoreTable" not in seen[1]
    assert places[0] == places[1]
    assert plan.steps.tolist() == [3, 3]


def test_changed_learning_rate_reaches_captured_graphs() -> None:
    """Python learning rates: a captured graph reads the value that the last step outside it wrote."""
    model = Model()
    optimizer = pk.optim.AdamW8bit(model.parameters(), lr=1e-3)
    train(model, optimizer, range(1))
    (plan,) = optimizer._plans
    there = plan.lr.data_ptr()
    optimizer.param_groups[0]["lr"] = 2e-3
    train(model, optimizer, range(1, 2))
    assert plan.lr.data_ptr() == there and plan.lr.tolist() == pytest.approx([2e-3])

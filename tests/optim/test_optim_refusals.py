"""Optimizers refuse invalid input with a sentence, and leave parameters and states unchanged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from optim_models import Model, train
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.utils._pytree import tree_flatten

import peft_kernels as pk
from peft_kernels.core import code_tables

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.distributed:UserWarning")


def trained(kind: str = "AdamW8bit", **options: Any) -> tuple[Model, Any]:
    model = Model()
    optimizer = getattr(pk.optim, kind)(model.parameters(), **options)
    train(model, optimizer, range(2))
    return model, optimizer


def everything(optimizer: Any, parameters: Any) -> Any:
    """A copy of an optimizer's state and parameters, without gradients."""
    kept = {p: copy.deepcopy(state) for p, state in optimizer.state.items()}
    return [kept.get(p) for p in parameters], [p.detach().clone() for p in parameters]


def assert_same(got: Any, want: Any) -> None:
    (leaves, tree), (others, other) = map(tree_flatten, (got, want))
    assert tree == other
    for a, b in zip(leaves, others, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def entry(i: int, **changes: Any) -> Callable[[Any], Any]:
    return lambda saved: saved["state"][i].update(changes)


def nan_at_3(x: Tensor, value: float = float("nan")) -> Tensor:
    x = x.clone()
    x[3] = value
    return x


ABSMAX = torch.ones(28)
OF_TORCH = {"exp_avg": torch.zeros(70, 100), "exp_avg_sq": torch.zeros(70, 100), "step": torch.tensor(2.0)}


@pytest.mark.parametrize("change, sentence", [
    (lambda s: s["state"][0].pop("state2"), r"parameter 0 of group 0: its state has no state2"),
    (lambda s: s["state"][0].pop("step"), r"parameter 0 of group 0: its state has no step"),
    (lambda s: s["state"].update({0: OF_TORCH}), r"has no state1, state2; has exp_avg, exp_avg_sq, step"),
    (lambda s: s["state"].update({0: torch.ones(3)}), r"parameter 0 .*: its state: expected a dict, got T"),
    (lambda s: s["state"][0].pop("absmax1"), r"parameter 0 of group 0: absmax1: expected a tensor, got None"),
    (entry(0, absmax1=ABSMAX[:27]), r"absmax1: expected 28 values, one for each 256 elements, got 27"),
    (entry(1, absmax2=torch.zeros(4)), r"parameter 1 .*: absmax2: expected 25 .* blocks of about 1600"),
    (entry(0, absmax1=nan_at_3(ABSMAX)), r"absmax1: expected finite numbers of at least 0, got 1 of 28"),
    (entry(0, absmax2=nan_at_3(ABSMAX, -1.0)), r"absmax2: expected finite numbers of at least 0, got 1 of"),
    (entry(0, absmax2=ABSMAX.int()), r"absmax2: expected float32, got torch.int32"),
    (entry(0, absmax2=ABSMAX.to("meta")), r"absmax2: expected a tensor with data, got one on device meta"),
    (entry(1, state1=torch.zeros(3)), r"parameter 1 of group 0: state1: expected shape \(100, 64\) like the"),
    (entry(0, state1=torch.zeros(70, 100).int()), r"state1: expected uint8 or float32, got torch.int32"),
    (entry(0, state1=torch.zeros(70, 100)), r"both in 8 bits or both in 32"),
    (entry(0, qmap1=torch.zeros(256)), r"qmap1: expected the signed dynamic map"),
    (entry(0, qmap2=code_tables.dynamic_map(torch.device("cpu"))), r"qmap2: expected the unsigned dynamic"),
    (entry(0, step=-1), r"parameter 0 .*: step: expected a whole number of at least 0, got -1"),
    (entry(0, step=2.5), r"step: expected a whole number of at least 0, got 2.5"),
    (entry(0, step=torch.tensor(float("nan"))), r"step: expected a whole number of at least 0, got nan"),
    (entry(0, step="2"), r"step: expected a whole number of at least 0, got 2"),
    (lambda s: s["state"].update({9: {}}), r"state: expected entries for .*, got \[9\]"),
    (lambda s: s["param_groups"][0]["params"].pop(), r"expected groups of \[3\] parameters, got \[2\]"),
    (lambda s: s["param_groups"].append(s["param_groups"][0]), r"groups of \[3\] parameters, got \[3, 3\]"),
    (lambda s: s["param_groups"][0].pop("lr"), r"param_groups: a group has no lr"),
    (lambda s: [s["param_groups"][0].pop(n) for n in ("betas", "weight_decay")], r"no betas, weight_decay"),
    (lambda s: s["param_groups"][0].update(maximize=True), "maximize: is not supported, expected False in a"),
    (lambda s: s["param_groups"][0].update(lr=float("nan")), r"lr: expected a finite number of at least 0"),
    (lambda s: s["param_groups"][0].update(betas=(0.9, 1.5)), r"betas: expected two numbers from 0 to below"),
    (lambda s: s.pop("param_groups"), r"state_dict: expected state and param_groups, got no param_groups"),
])  # fmt: skip
def test_damaged_checkpoint_changes_nothing(change: Any, sentence: str) -> None:
    model, optimizer = trained()
    state = copy.deepcopy(optimizer.state_dict())
    change(state)
    parameters = list(model.parameters())
    before, groups = everything(optimizer, parameters), copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(ValueError, match=sentence):
        optimizer.load_state_dict(state)
    assert_same(everything(optimizer, parameters), before)
    assert optimizer.state_dict()["param_groups"] == groups
    train(model, optimizer, range(1))


def test_loading_another_quant_map_in_place(tmp_path: Path) -> None:
    """torch.distributed.checkpoint writes into the tensors of the state dict passed to it."""
    model, optimizer = trained()
    saved = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    saved["optimizer"]["state"]["a"]["qmap1"] = torch.zeros(256)
    dcp.save(saved, checkpoint_id=tmp_path, no_dist=True)
    found = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(found, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(ValueError, match="qmap1: expected the signed dynamic map"):
        set_optimizer_state_dict(model, optimizer, found["optimizer"])
    assert code_tables.dynamic_map(torch.device("cpu"))[-1] == 1


def give_bf16_gradient(model: Model) -> None:
    model.b.grad = None
    model.b.grad_dtype = None
    model.b.grad = torch.ones(100, 64, dtype=torch.bfloat16)


MISFITS: list[tuple[Callable[[Model], Any], Any, str]] = [
    (lambda m: m.b.untyped_storage().resize_(0), ValueError, r"parameter 1 .*its memory has been freed"),
    (lambda m: m.b.grad.untyped_storage().resize_(0), ValueError, r"1 .*: gradient: .*has been freed"),
    (lambda m: setattr(m.b, "grad", m.b.detach().to_sparse()), RuntimeError, "parameter 1 .*gradient is sp"),
    (lambda m: setattr(m.b, "data", torch.zeros(1, 1).expand(100, 64)), ValueError, "memory of their own"),
    (give_bf16_gradient, ValueError, "1 .*: gradient: expected torch.float32 of .*, got torch.bfloat16 of"),
]  # fmt: skip
AFTERWARDS: list[tuple[Callable[[Model], Any], Any, str]] = [
    (lambda m: m.to(torch.bfloat16), ValueError, r"parameter 0 of .*: was torch.float32 .* is torch.bfl"),
    (lambda m: setattr(m.b, "data", torch.zeros(0)), ValueError, r"parameter 1 of .*: was .* shape \(0,\)"),
    (lambda m: setattr(m.b, "data", torch.zeros(64, 100)), ValueError, r"is .* of shape \(64, 100\) now"),
]  # fmt: skip


@pytest.mark.parametrize("change, error, sentence, is_first", [
    *((*case, is_first) for case in MISFITS for is_first in (True, False)),
    *((*case, False) for case in AFTERWARDS),
])  # fmt: skip
def test_failed_step_changes_nothing(change: Any, error: Any, sentence: str, is_first: bool) -> None:
    """A first step creates no states either, so the error can be corrected."""
    model = Model()
    optimizer = pk.optim.AdamW8bit(model.parameters())
    if not is_first:
        train(model, optimizer, range(2))
    model.loss(3).backward()
    change(model)
    kept = [p for p in model.parameters() if p.untyped_storage().nbytes()]
    before = everything(optimizer, kept)
    with pytest.raises(error, match=sentence):
        optimizer.step()
    assert_same(everything(optimizer, kept), before)
    assert not (is_first and optimizer.state)


def test_meta_parameter() -> None:
    parameter = nn.Parameter(torch.empty(5000, device="meta"))
    parameter.grad = torch.empty(5000, device="meta")
    with pytest.raises(ValueError, match=r"parameter 0 of group 0: expected a tensor with data, .* meta"):
        pk.optim.AdamW8bit([parameter]).step()


def test_removed_parameters() -> None:
    model, optimizer = trained()
    optimizer.override_config(model.b, "lr", 1e-4)
    optimizer.param_groups[0]["params"].pop(1)
    with pytest.raises(ValueError, match="state_dict: 1 parameters with a state are in no group any more"):
        optimizer.state_dict()
    model.loss(3).backward()
    before = everything(optimizer, [model.a, model.b])
    with pytest.raises(
        ValueError, match="override_config: 1 overridden parameters are no longer in any group"
    ):
        optimizer.step()
    assert_same(everything(optimizer, [model.a, model.b]), before)


@pytest.mark.parametrize("options, error, sentence", [
    ({"lr": -1.0}, ValueError, "lr: expected a finite number of at least 0, got -1.0"),
    ({"betas": (0.9, 1.0)}, ValueError, "betas: expected two numbers from 0 to below 1"),
    ({"amsgrad": True}, ValueError, "amsgrad: AdamW8bit does not support it"),
    ({"optim_bits": 8}, ValueError, "optim_bits: expected 32, as AdamW8bit"),
    ({"rounding": "up"}, ValueError, "rounding: expected one of nearest, stochastic, kahan"),
    ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm: expected a positive number or None"),
    ({"seed": 1.5}, ValueError, "seed: expected a whole number, got 1.5"),
    ({"page_budget": 1e9}, ValueError, "page_budget: expected a whole number of bytes, .*, got 1000000000.0"),
    ({"lr": torch.tensor(-1.0)}, ValueError, "lr: expected a finite number of at least 0, got -1.0"),
    ({"lr": torch.ones(2)}, ValueError, r"lr: expected one number, got a tensor of shape \(2,\)"),
    ({"weight_decay": torch.tensor(-1.0)}, ValueError, "weight_decay: expected a finite number of at least"),
    *(({name: True}, TypeError, name) for name in ("foreach", "fused", "maximize", "capturable")),
])  # fmt: skip
def test_arguments_out_of_range(options: dict[str, Any], error: Any, sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        pk.optim.AdamW8bit([nn.Parameter(torch.zeros(3))], **options)


NO_NUMBERS: dict[str, tuple[dict[str, Any], str]] = {
    "lr-text": ({"lr": "2e-4"}, "^lr: expected a number, got the text '2e-4'; YAML reads .* write 2.0e-4"),
    "lr-word": ({"lr": "fast"}, "^lr: expected a number, got the text 'fast'$"),
    "lr-none": ({"lr": None}, "^lr: expected a number, got None"),
    "eps": ({"eps": "1e-8"}, "^eps: expected a number, got the text '1e-8'"),
    "weight_decay": ({"weight_decay": [0.1]}, r"^weight_decay: expected a number, got \[0.1\]"),
    "betas-text": ({"betas": "(0.9, 0.999)"}, r"^betas: expected two numbers, got '\(0.9, 0.999\)'"),
    "betas-none": ({"betas": None}, "^betas: expected two numbers, got None"),
    "beta": ({"betas": (0.9, "0.95")}, r"^betas\[1\]: expected a number, got the text '0.95'"),
}


@pytest.mark.parametrize("case", NO_NUMBERS)
def test_non_numbers_are_named(case: str) -> None:
    """As an argument, in a group, in an added group, in a checkpoint, and through override_config."""
    options, sentence = NO_NUMBERS[case]
    parameter, other = (nn.Parameter(torch.zeros(3)) for _ in "ab")
    good = pk.optim.AdamW8bit([parameter])
    bad = good.state_dict()
    bad["param_groups"][0].update(options)
    for make in (
        lambda: pk.optim.AdamW8bit([parameter], **options),
        lambda: pk.optim.AdamW8bit([{"params": [parameter], **options}]),
        lambda: good.add_param_group({"params": [other], **options}),
        lambda: good.load_state_dict(bad),
        lambda: good.override_config(parameter, key_value_dict=options),
    ):
        with pytest.raises(TypeError, match=sentence):
            make()
    assert len(good.param_groups) == 1 and good.param_groups[0]["lr"] == 1e-3


def test_non_numbers_in_a_step() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = pk.optim.AdamW8bit([parameter])
    parameter.grad = torch.ones(3)
    for name in ("lr", "weight_decay"):
        before = optimizer.param_groups[0][name]
        for wrong in ("1e-3", None):
            optimizer.param_groups[0][name] = wrong
            with pytest.raises(TypeError, match=f"^{name}: expected a number, got"):
                optimizer.step()
        optimizer.param_groups[0][name] = before
    assert not parameter.any()
    optimizer.step()
    assert parameter.all()


@pytest.mark.parametrize("name", ["lr", "lr_ratio", "weight_decay", "lr_embedding"])
def test_non_numbers_in_lora_plus(name: str) -> None:
    with pytest.raises(TypeError, match=f"^{name}: expected a number, got the text '1e-4'; YAML"):
        pk.optim.lora_plus_groups(nn.Linear(3, 3), **{"lr": 1e-4} | {name: "1e-4"})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["amsgrad", "maximize", "differentiable"])
def test_unsupported_group_options(name: str) -> None:
    parameters = [nn.Parameter(torch.zeros(3)) for _ in range(2)]
    optimizer = pk.optim.AdamW8bit([{"params": parameters[:1], name: False}])
    with pytest.raises(ValueError, match=f"{name}: is not supported, expected False in a group, got True"):
        optimizer.add_param_group({"params": parameters[1:], name: True})
    assert len(optimizer.param_groups) == 1


def test_max_grad_norm_in_a_group() -> None:
    group = {"params": [nn.Parameter(torch.zeros(3))], "max_grad_norm": None}
    pk.optim.AdamW8bit([group])
    with pytest.raises(ValueError, match=r"max_grad_norm: a group cannot have its own; .*clip_grad_norm_"):
        pk.optim.AdamW8bit([group | {"max_grad_norm": 1.0}])

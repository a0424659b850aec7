"""PEFT models over the small models of `models`, and comparison of patched with unpatched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peft_kernels as pk
import testing

peft = pytest.importorskip("peft", reason="PEFT is not installed")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def config(**options: Any) -> Any:
    """A LoraConfig for q and o whose adapters are not zero."""
    defaults = {"r": 8, "lora_alpha": 16, "target_modules": ["q", "o"], "init_lora_weights": False}
    return peft.LoraConfig(**defaults | options)


def lora(model: nn.Module, adapter_dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A PEFT model with one adapter, of `config(**options)`."""
    torch.manual_seed(3)
    model = peft.get_peft_model(model, config(**options))
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            # Drawn again: PEFT draws in the dtype of the base, and a bf16 base would round fp32 adapters.
            parameter.data = testing.tensor(*parameter.shape, dtype=adapter_dtype, seed=len(name), scale=0.1)
    return model


def add_adapter(model: Any, name: str, **options: Any) -> None:
    """Adds an adapter with other values."""
    model.add_adapter(name, config(**options))
    for key, parameter in model.named_parameters():
        if f".{name}." in key:
            parameter.data = testing.tensor(*parameter.shape, dtype=parameter.dtype, seed=len(key), scale=0.1)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def trained_values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def step(model: nn.Module, loss: Callable[[], Tensor], seed: int = 5) -> dict[str, Tensor]:
    """Loss and gradients of one step, with the random seed `seed`."""
    model.zero_grad()
    torch.manual_seed(seed)
    value = loss()
    value.backward()
    return {"loss": value.detach(), **gradients(model)}


def run(
    model: nn.Module, x: Tensor, call: Callable[..., Tensor] | None = None, **kwargs: Any
) -> dict[str, Tensor]:
    """Output, input gradient and parameter gradients of one step; `call` replaces the model if given."""
    model.zero_grad()
    torch.manual_seed(7)  # of dropout
    x = x.detach().requires_grad_()
    y = (model if call is None else call)(x, **kwargs)
    y.backward(testing.tensor(*y.shape, dtype=y.dtype, seed=9))
    return {"y": y.detach(), "x": x.grad, **gradients(model)}


Call = Callable[[Tensor], Tensor]


def checkpointed(use_reentrant: bool) -> Callable[[Any], Call]:
    return lambda model: lambda x: checkpoint(model, x, use_reentrant=use_reentrant)


def unpacked_once(model: Any) -> Call:
    def call(x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: [t.clone()], list.pop):
            return model(x)

    return call


def saved_on_cpu(model: Any) -> Call:
    def call(x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return model(x)

    return call


def second_backward(model: Any) -> Call:
    """Runs a first backward with retain_graph and discards its gradients."""

    def call(x: Tensor) -> Tensor:
        y = model(x)
        y.square().sum().backward(retain_graph=True)
        x.grad = None
        model.zero_grad()
        return y

    return call


# Checkpointing, saved-tensor hooks and repeated backward, as in training loops; each returns a forward.
REGIMES: dict[str, Callable[[Any], Call]] = {
    "reentrant": checkpointed(True),
    "not-reentrant": checkpointed(False),
    "unpacked-once": unpacked_once,
    "saved-on-cpu": saved_on_cpu,
    "second-backward": second_backward,
}


def in_fp64(model: nn.Module) -> nn.Module:
    """The same model in fp64 with dequantised weights, the ground truth."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if not isinstance(child, nn.Linear) or type(child) is nn.Linear:
                continue
            packed = isinstance(child.weight, pk.NF4Weight)
            weight = child.weight if packed else pk.NF4Weight.from_bnb(child.weight)
            dense = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
            dense.weight = nn.Parameter(weight.dequantize(torch.float32), requires_grad=False)
            dense.bias = child.bias
            setattr(module, name, dense)
    return model.double()


def assert_same_numbers(model: Any, x: Tensor, peer: float = 0.02, **options: Any) -> Any:
    """Compares patched with unpatched PEFT by the numbers policy, and returns the report."""
    truth, plain = run(in_fp64(model), x.double()), run(model, x)
    with pk.patched(model, **options) as report:
        got = run(model, x)
    assert report.fused and not report.original, report.details()
    assert not any(entry.fallbacks for entry in (*report.layers, *report.blocks)), str(report)
    assert got.keys() == plain.keys() == truth.keys()
    for name in got:
        # A wrong peer would widen the bound: its error must be of rounding size.
        assert testing.relative_error(plain[name], truth[name]) < peer, name
        testing.assert_close(got[name], plain[name], truth[name], name)
    return report

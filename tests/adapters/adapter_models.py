"""A model with several adapters, and comparisons of patched with unpatched models."""

from __future__ import annotations

import copy
from typing import Any

import models
import torch
from peft_models import config, in_fp64, peft, run
from torch import Tensor, nn

import peft_kernels as pk
import testing

# Ranks, alphas and target layers differ; "narrow" is on one of the two layers.
ADAPTERS: dict[str, dict[str, Any]] = {
    "one": {"r": 8, "lora_alpha": 16},
    "two": {"r": 3, "lora_alpha": 7},
    "three": {
        "r": 16,
        "lora_alpha": 4,
        "use_rslora": True,
        "rank_pattern": {"o": 5},
        "alpha_pattern": {"o": 9},
    },
    "narrow": {"r": 4, "lora_alpha": 8, "target_modules": ["q"]},
}


def stir(model: nn.Module, scale: float = 0.1) -> None:
    """Redraws every parameter of every adapter, so that each has an effect."""
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(testing.tensor(*parameter.shape, seed=seed, scale=scale))


def adapted(
    base: str | nn.Module = "dense", dtype: torch.dtype = torch.float32, **options: dict[str, Any]
) -> Any:
    """A PEFT model with all of ADAPTERS, "one" active. `options`: more options of an adapter, by its name."""
    model = models.base_model(base, dtype) if isinstance(base, str) else base
    for name, defaults in ADAPTERS.items():
        adapter = config(**defaults | options.get(name, {}) | options.get("all", {}))
        if name == "one":
            model = peft.get_peft_model(model, adapter, adapter_name=name)
        else:
            model.add_adapter(name, adapter)
    stir(model)
    return model


def activate(model: Any, names: str | list[str]) -> None:
    if isinstance(names, str):
        model.set_adapter(names)
    else:
        model.base_model.set_adapter(names)  # PeftModel's takes one name


def assert_fused(report: Any) -> None:
    assert report.fused and not report.original, report.details()
    assert not any(layer.fallbacks for layer in report.layers), str(report)


def assert_same(got: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor] | None) -> None:
    """Compares outputs and gradients of patched and unpatched models; 16 bits by errors against fp64."""
    assert got.keys() == plain.keys()
    for name, value in got.items():
        assert value.dtype == plain[name].dtype, name
        if truth is None:
            error, allowed = testing.relative_error(value, plain[name]), 1e-5
        else:
            peer = testing.relative_error(plain[name], truth[name])
            assert peer < 0.05, f"{name}: a peer this far off ({peer:.3g}) would widen the bound"
            error = testing.relative_error(value, truth[name])
            allowed = 2 * peer + torch.finfo(got["y"].dtype).eps
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def stock(model: Any) -> Any:
    """An unpatched copy. bitsandbytes' evaluation without gradients would change a weight for good."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module._parameters.get("weight"), "quant_state"):
            # In mixed batches PEFT adds to this output in place, which autograd refuses for bitsandbytes.
            module.register_forward_hook(lambda module, args, y: y.clone())
    return model


def compare(model: Any, x: Tensor, **kwargs: Any) -> dict[str, Tensor]:
    """Compares one step of the patched model with that of unpatched copies."""
    plain = run(stock(model), x, **kwargs)
    truth = None if x.dtype == torch.float32 else run(in_fp64(model), x.double(), **kwargs)
    with pk.patched(model) as report:
        got = run(model, x, **kwargs)
    assert_fused(report)
    assert_same(got, plain, truth)
    return got

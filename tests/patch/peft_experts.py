"""PEFT's adapters on experts' weights: the modules of `moe_models` with routers."""

from __future__ import annotations

import copy
from typing import Any

import moe_models
import pytest
import torch
from installed import before
from moe_models import EXPERTS, HIDDEN
from peft_models import run
from torch import Tensor, nn

import peft_kernels as pk
import testing
from peft_kernels.nf4.experts_packing import NF4Experts, unpack

peft = pytest.importorskip("peft", reason="PEFT is not installed")

FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss", "nemotron_h")
"""Two plain kinds, one transposed with biases and its own gate, one without a gate."""
TOP_K = 2
WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")


class Mixture(nn.Module):
    """Experts and a router that depends on the row index only, so that rounding changes no choice. The last
    expert gets no row."""

    def __init__(self, family: str, dtype: torch.dtype, implementation: str = "grouped_mm") -> None:
        super().__init__()
        self.experts = moe_models.experts(family, dtype, implementation)
        self.config = self.experts.config

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, HIDDEN)
        row = torch.arange(rows.shape[0], device=x.device)[:, None]
        index = (row * row + torch.arange(TOP_K, device=x.device) * 2) % (EXPERTS - 1)
        weights = rows[:, :TOP_K].sigmoid()
        return self.experts(rows, index, weights).view(x.shape)


def mixture(base: str, family: str = "qwen3_moe", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model = Mixture(family, dtype, **options)
    return pk.quantize_model(model, experts=True) if base == "nf4" else model


def weights_of(model: nn.Module) -> dict[str, Any]:
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[2] in WEIGHTS and parameter.dim() == 3
    }


def skip_stored_transposed(model: nn.Module) -> None:
    """Skips where PEFT takes the sides of packed experts for those of the dense ones."""
    turned = (getattr(module, "stored_transposed", False) for module in model.modules())
    if before("peft", "0.19") and any(turned):
        pytest.skip("PEFT before 0.19 ignores is_transposed")


def skip_second_adapter() -> None:
    if before("peft", "0.20"):
        pytest.skip("PEFT before 0.20 allows one adapter on parameters")


def adapt(model: nn.Module, **options: Any) -> Any:
    skip_stored_transposed(model)
    torch.manual_seed(3)
    model = peft.get_peft_model(model, lora_config(model, **options))
    fill(model)
    return model


def lora_config(model: nn.Module, **options: Any) -> Any:
    found = sorted({name.removeprefix("base_model.model.") for name in weights_of(model)})
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": [], "target_parameters": found}
    return peft.LoraConfig(**defaults | options)


def fill(model: nn.Module, adapter: str = "default") -> None:
    for name, parameter in model.named_parameters():
        if f".{adapter}." in name:
            values = testing.tensor(*parameter.shape, seed=len(name), scale=0.1)
            parameter.data = values.to(parameter.dtype)


def dequantized(model: Any, dtype: torch.dtype | None = None) -> Any:
    """A copy with dense instead of NF4 experts, by default in their dtype: stock PEFT on the same values."""
    model = copy.deepcopy(model)
    pk.unpatch(model)
    for module in model.modules():
        if isinstance(module, NF4Experts):
            unpack(module, dtype)
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.layer.ParamWrapper) and module.get_base_layer().is_transposed:
            module._did_swap_in_out_features = False  # keeps transposed weights transposed
    return model


def in_fp64(model: Any) -> Any:
    """A copy in fp64, the ground truth."""
    model = dequantized(model, torch.float32)
    for module in model.modules():
        if hasattr(module, "is_transposed"):
            module.config = copy.copy(module.config)
            module.config._experts_implementation = "eager"  # grouped_mm has no fp64
    return model.double()


ROWS = 13


def experts_of(model: Any) -> Any:
    return model.base_model.model.experts.get_base_layer()


def tokens(dtype: torch.dtype = torch.float32, rows: int = ROWS, seed: int = 2) -> Tensor:
    return testing.tensor(rows, HIDDEN, dtype=dtype, seed=seed)


def fallbacks(report: Any) -> list[str]:
    return [reason for layer in report.layers for reason in layer.fallbacks]


def assert_same_numbers(model: Any, call: Any = None, dtype: torch.dtype | None = None) -> None:
    """Patched against stock PEFT over dense weights, by the numbers policy."""
    x = tokens(dtype or next(iter(weights_of(model).values())).dtype)
    truth, plain = run(in_fp64(model), x.double()), run(dequantized(model), x)
    with pk.patched(model) as report:
        got = run(model, x, None if call is None else call(model))
    assert report.layers and not report.original and not fallbacks(report), str(report)
    compare(got, plain, truth)


def compare(got: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    assert got.keys() == plain.keys() == truth.keys()
    for name, value in got.items():
        # A peer that is wrong would widen the bound.
        assert testing.relative_error(plain[name], truth[name]) < 0.2, name
        testing.assert_close(value, plain[name], truth[name], name)

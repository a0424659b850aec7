"""Adapters with other initialisations than LoRA's default: patched as unpatched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from adapter_models import activate, adapted, compare
from models import inputs
from peft_models import DTYPES, config, peft
from rounding import ONE_STEP
from torch import Tensor

import peft_kernels as pk
import testing


def eva_initialise(model: Any) -> None:
    """A takes the directions in which a layer's inputs vary most: two for q, so that o gets a larger rank."""
    scale = torch.cat([torch.ones(2), torch.full((62,), 0.01)])
    batches = [testing.tensor(64, 64, seed=seed) * scale for seed in range(4)]
    peft.initialize_lora_eva_weights(
        model,
        batches,
        forward_fn=lambda model, x: model(x.to(model.base_model.model.lm_head.weight.dtype)),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda layer_input, model_input, name: layer_input[0].float(),
        show_progress_bar=False,
    )


def loftq_config() -> Any:
    """The option is set afterwards, as LoraConfig would import scipy, which nothing uses."""
    lora = config(lora_alpha=8)  # LoftQ assumes a scaling of 1
    lora.init_lora_weights, lora.loftq_config = "loftq", {"loftq_bits": 4, "loftq_iter": 2}
    return lora


@pytest.fixture
def loftq_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's LoftQ computes on "cuda" wherever the model is. Without a GPU, map that to "cpu"."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    if torch.cuda.is_available():
        return

    def on_cpu(to: Callable[..., Any]) -> Callable[..., Any]:
        def moved(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            kwargs = {key: "cpu" if str(value) == "cuda" else value for key, value in kwargs.items()}
            return to(tensor, *("cpu" if str(arg) == "cuda" else arg for arg in args), **kwargs)

        return moved

    for owner in (torch.Tensor, bnb.nn.Params4bit):
        monkeypatch.setattr(owner, "to", on_cpu(owner.to))


INITIALISED: dict[str, Callable[[], Any]] = {
    **{
        init: (lambda init=init: config(init_lora_weights=init))
        for init in ("pissa", "pissa_niter_4", "olora", "gaussian", "orthogonal")
    },
    "eva": lambda: config(init_lora_weights="eva", eva_config=peft.EvaConfig(rho=2.0)),
}


def compare_from_the_start(model: Any, dtype: torch.dtype) -> None:
    """Compares at initialisation, where B may be zero and A has no gradient, and at other values."""
    compare(model, inputs(dtype=dtype))
    with torch.no_grad():
        for seed, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter += testing.tensor(*parameter.shape, dtype=parameter.dtype, seed=seed, scale=0.05)
    got = compare(model, inputs(dtype=dtype))
    assert all(value.count_nonzero() for value in got.values())


@pytest.mark.parametrize("init", INITIALISED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore:.*eva initialization")
def test_initialised_adapters(dtype: torch.dtype, init: str) -> None:
    model = peft.get_peft_model(models.base_model("dense", dtype), INITIALISED[init]())
    if init == "eva":
        with pk.patched(model):  # PEFT replaces adapters by ones of another rank under the fused forward
            eva_initialise(model)
        ranks = [model.base_model.model.get_submodule(name).r["default"] for name in ("q", "o")]
        assert ranks[0] < ranks[1] and sum(ranks) == 16, ranks
    compare_from_the_start(model, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loftq(loftq_without_gpu: None, dtype: torch.dtype) -> None:
    base = models.base_model("dense", dtype)
    weight = base.q.weight.detach().clone()
    model = peft.get_peft_model(base, loftq_config())
    layer = model.base_model.model.q
    assert not torch.equal(layer.base_layer.weight, weight), "the base is what NF4 makes of it"
    each = torch.eye(64, dtype=dtype)
    with pk.patched(layer):
        error = testing.relative_error(layer(each) - layer.base_layer.bias, weight.T)
    without = testing.relative_error(layer.base_layer.weight, weight)
    assert error < 0.9 * without, f"the adapter gives back a part of what packing took: {error}, {without}"
    compare_from_the_start(model, dtype)


def test_loftq_then_packed(loftq_without_gpu: None) -> None:
    """The values of the base are exactly representable in NF4."""
    model = peft.get_peft_model(models.base_model("dense"), loftq_config())
    layer = model.base_model.model.q.base_layer
    dense = layer.weight.detach().clone()
    assert not torch.equal(pk.NF4Weight.quantize(models.base_model("dense").q.weight).dequantize(), dense)
    pk.quantize_model(model, double_quant=False)
    assert torch.equal(model.base_model.model.q.base_layer.weight.dequantize(), dense)
    compare_from_the_start(model, torch.float32)


@pytest.mark.parametrize("method", ["ipm", "kpm"])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_corda(base: str, method: str) -> None:
    """A packed base becomes dense where the adapter is subtracted from it."""
    corda = pytest.importorskip("peft.tuners.lora.corda", reason="this PEFT has no CorDA")
    options = peft.tuners.lora.config.CordaConfig
    model, lora = models.base_model(base), config(lora_alpha=8)
    lora.init_lora_weights, lora.corda_config = "corda", options(corda_method=method)
    before = model(inputs()).detach()

    def run() -> None:
        for seed in range(4):
            model(testing.tensor(64, 64, seed=seed))

    corda.preprocess_corda(model, lora, run_model=run)
    model = peft.get_peft_model(model, lora)
    assert testing.relative_error(model(inputs()), before) < ONE_STEP
    compare_from_the_start(model, torch.float32)


@pytest.mark.filterwarnings("ignore:.*lora_bias=True.*has no bias")
def test_lora_biases_of_several_adapters_and_of_mixed_batches() -> None:
    model = adapted(two={"lora_bias": True}, three={"lora_bias": True})
    activate(model, ["one", "two", "three"])
    got = compare(model, inputs())
    assert len(got) == 2 + 3 * 2 * 2 + 2 * 2
    names = ["two", "one", "__base__", "three"]
    compare(model.eval(), testing.tensor(4, 3, 64), adapter_names=names)

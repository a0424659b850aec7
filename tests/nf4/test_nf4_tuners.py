"""Every PEFT tuner over NF4 equals the tuner over dense layers of the same values, or raises one sentence."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from rounding import ONE_STEP
from torch import nn

import peft_kernels as pk
import testing
from peft_kernels.nn import NF4Linear

peft = pytest.importorskip("peft", reason="PEFT is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")

# Models with task ids or several adapters, and layers that are not linear.
OPTIONS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "ADAPTION_PROMPT": {"adapter_layers": 2, "adapter_len": 4, "target_modules": None},
    "BOFT": {"boft_block_size": 8},
    "C3A": {"block_size": 16},
    "FOURIERFT": {"n_frequency": 20},
    "IA3": {"feedforward_modules": []},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "OFT": {"oft_block_size": 8, "r": 0},
    "ROAD": {"group_size": 16},
    "SHIRA": {"r": 4},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [1, 2]},
    "VBLORA": {"vector_length": 16, "num_vectors": 8},
}
NOT_ALONE = {"XLORA": "it is made of saved LoRA adapters", "POLY": "it asks for task ids"} | {
    "MULTITASK_PROMPT_TUNING": "it asks for task ids",
    "ADAMSS": "it asks for scikit-learn",
    "CPT": "its loss is NaN without a prompt that has labels",
}
# Tuners that raise over NF4 and work over dense layers.
SENTENCES = {
    ("GLORA", "make"): "is not a plain torch.nn.Linear",
    ("IA3", "unload"): "Cannot merge ia3 layers when the model is loaded in 4-bit mode",
    ("SUPERTUNING", "cycle"): "an NF4 weight has no writable views of its values",
    ("SUPERTUNING", "unload"): "an NF4 weight has no writable views of its values",
}
# Merging only adds: unmerging restores the 4 bits.
ADDS = {"LORA", "ADALORA", "LOHA", "LOKR", "VERA", "FOURIERFT", "VBLORA", "WAVEFT", "RANDLORA"}

TUNERS = sorted(kind.value for kind in peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING)
IDS = torch.arange(24).view(2, 12)


def dense_twin(model: nn.Module) -> Any:
    twin = copy.deepcopy(model)
    for module in list(twin.modules()):
        if isinstance(module, NF4Linear):
            module.weight.data = module.weight.dequantize()
            module.revert_to_linear_if_dense()
    return twin


def adapt(base: nn.Module, tuner: str) -> Any:
    kind = next(k for k in peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING if k.value == tuner)
    config = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    known = config.__dataclass_fields__
    defaults = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    options = {k: v for k, v in defaults.items() if k in known} | OPTIONS.get(tuner, {})
    torch.manual_seed(0)
    model = peft.get_peft_model(base, config(**options))
    for name, p in model.named_parameters():  # tuners start as the identity
        if p.requires_grad and p.is_floating_point():
            p.data += testing.tensor(*p.shape, dtype=p.dtype, seed=len(name), scale=0.02)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model.eval()(input_ids=IDS).logits
    return out


def train(model: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    loss = model.train()(input_ids=IDS, labels=IDS).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "logits": logits(model), **grads}


def cycle(model: Any) -> dict[str, torch.Tensor]:
    model.merge_adapter()
    merged = logits(model)
    model.unmerge_adapter()
    return {"merged": merged, "unmerged": logits(model)}


def unload(model: Any) -> dict[str, torch.Tensor]:
    return {"unloaded": logits(model.merge_and_unload())}


def run_both(step: str, tuner: str, call: Callable[[Any], Any], nf4: Any, dense: Any) -> tuple[Any, Any]:
    """Results over both bases, or (None, None) if NF4 raises the same error or an expected one."""
    outcomes: list[Any] = []
    for model in (nf4, dense):
        try:
            outcomes.append(call(model))
        except Exception as error:
            outcomes.append(error)
    got, want = outcomes
    sentence = SENTENCES.get((tuner, step))
    if sentence is not None and isinstance(got, Exception):
        assert sentence in str(got)
        return None, None
    assert isinstance(got, Exception) == isinstance(want, Exception), f"{step}: {got!r}, dense {want!r}"
    if isinstance(got, Exception):
        assert type(got) is type(want), f"{step}: {got!r}, dense {want!r}"
        return None, None
    return got, want


@pytest.mark.parametrize("tuner", TUNERS)
def test_tuner(tuner: str) -> None:
    if tuner in NOT_ALONE:
        pytest.skip(NOT_ALONE[tuner])
    base = pk.quantize_model(models.tiny_llama())
    nf4, dense = run_both("make", tuner, lambda b: adapt(b, tuner), base, dense_twin(base))
    if nf4 is None:
        return
    for step, call in {"train": train, "cycle": cycle, "unload": unload}.items():
        got, want = run_both(step, tuner, call, nf4, dense)
        if got is None:
            continue
        assert got.keys() == want.keys() and len(got) > (2 if step == "train" else 0)
        for name, value in want.items():
            scale = value.abs().max().clamp_min(1e-3)
            assert (got[name] - value).abs().max() < 2 * ONE_STEP * scale, f"{step}: {name}"
        if step == "cycle" and tuner in ADDS:
            assert not any(p.is_dense for p in nf4.parameters() if isinstance(p, pk.NF4Weight))

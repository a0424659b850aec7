"""Several adapters on one model: active, disabled, switched, of equal names; patched as unpatched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from adapter_models import activate, adapted, assert_fused, assert_same, compare, stir, stock
from models import inputs
from numbers_policy import pairs
from peft_models import DTYPES, config, gradients, run
from rounding import ONE_STEP
from torch import Tensor, nn

import peft_kernels as pk
import testing

# One adapter trains; nothing else changes


@pytest.mark.parametrize("heads", [False, True], ids=["", "with-heads"])
@pytest.mark.parametrize("base", models.BASES)
def test_training_one_adapter_changes_nothing_else(base: str, heads: bool) -> None:
    options = {"modules_to_save": ["lm_head"]} if heads else {}
    model = adapted(base, all=options)
    report = pk.patch(model)
    # All parameters are in the optimizer with weight decay: only a gradient of None keeps one unchanged.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    several = [] if heads else [["one", "two"]]  # PEFT allows one active head
    for trained in (["one"], ["three"], ["narrow"], *several):
        activate(model, trained if len(trained) > 1 else trained[0])
        before = copy.deepcopy(model.state_dict())
        for step in range(2):
            optimizer.zero_grad()
            model(testing.tensor(9, 64, seed=step)).square().sum().backward()
            optimizer.step()
        changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
        own = {
            name
            for name, _ in model.named_parameters()
            if set(name.split(".")) & set(trained) and ("lora_" in name or "modules_to_save" in name)
        }
        assert changed == own, trained
        assert {name for name, p in model.named_parameters() if p.grad is not None} == own, trained
    assert_fused(report)


# Ranks and alphas of all kinds; one active adapter, several, none

ACTIVE = (
    "two",
    "three",
    "narrow",
    ("one", "two"),
    ("two", "one"),
    ("narrow", "three"),
    ("one", "two", "three", "narrow"),
)


@pairs(active=ACTIVE, dtype=DTYPES, base=models.BASES)
def test_active_adapters(active: str | tuple[str, ...], dtype: torch.dtype, base: str) -> None:
    model, names = adapted(base, dtype), [active] if isinstance(active, str) else list(active)
    activate(model, active if isinstance(active, str) else names)
    got = compare(model, inputs(dtype=dtype))
    layers = sum(2 if name != "narrow" else 1 for name in names)
    assert len(got) == 2 + 2 * layers, "output, x.grad, and gradients of A and B"


@pytest.mark.parametrize("active", ["two", ["one", "two"]], ids=["one-active", "several"])
@pytest.mark.parametrize("base", models.BASES)
def test_adapters_of_different_dtypes(base: str, active: str | list[str]) -> None:
    """fp32 adapters with bf16 ones, on a bf16 model."""
    model = adapted(base, torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_" in name and ".two." in name:
            parameter.data = parameter.data.bfloat16()
    activate(model, active)
    compare(model, inputs(dtype=torch.bfloat16))


@pytest.mark.parametrize("base", models.BASES)
def test_switching_adapters_drops_the_previous_one(base: str) -> None:
    model, x = adapted(base), inputs()
    plain = stock(model)
    report = pk.patch(model)
    first: dict[str, dict[str, Tensor]] = {}
    for names in ("one", "two", ["one", "three"], "one", "narrow", "two", ["one", "three"]):
        activate(model, names)
        activate(plain, names)
        got = run(model, x)
        assert_same(got, run(plain, x), None)
        for key, value in first.setdefault(str(names), got).items():
            assert torch.equal(got[key], value), (names, key)
    outputs = [entry["y"] for entry in first.values()]
    for i, y in enumerate(outputs):
        assert all(testing.relative_error(y, other) > 1e-2 for other in outputs[:i])
    assert_fused(report)


def test_scales_of_several_adapters_are_read_in_each_call() -> None:
    model = adapted()
    activate(model, ["one", "two"])
    before = compare(model, inputs())
    model.base_model.model.q.set_scale("two", 3.0)
    after = compare(model, inputs())
    assert testing.relative_error(after["y"], before["y"]) > 1e-2


@pytest.mark.filterwarnings("ignore:Adapter one was active which is now deleted")
def test_adding_and_deleting_adapters_while_patched() -> None:
    model = adapted()
    plain, x = stock(model), inputs()
    pk.patch(model)
    for each in (model, plain):
        each.add_adapter("four", config(r=6, lora_alpha=3))
        stir(each)
        each.delete_adapter("one")
    for names in ("four", ["four", "two"]):
        activate(model, names)
        activate(plain, names)
        assert_same(run(model, x), run(plain, x), None)
    assert pk.unpatch(model) == 2


def test_weighted_sums_of_adapters() -> None:
    """add_weighted_adapter writes the new adapter while the model is patched."""
    model = adapted(all={"target_modules": ["q", "o"]})
    pk.patch(model)
    model.add_weighted_adapter(["one", "two"], [0.7, -0.4], "sum", combination_type="cat")
    activate(model, "sum")
    pk.unpatch(model)
    compare(model, inputs())
    for name, layer in (("q", model.base_model.model.q), ("o", model.base_model.model.o)):
        delta = 0.7 * layer.get_delta_weight("one") - 0.4 * layer.get_delta_weight("two")
        x = testing.tensor(5, layer.in_features)
        with pk.patched(layer):
            assert testing.relative_error(layer(x) - layer.base_layer(x), x @ delta.T) < ONE_STEP, name


# Disabled adapters give the base model, which is also the reference model of DPO and PPO


@pytest.mark.parametrize("active", ["two", ["one", "two"]], ids=["one-active", "several"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", models.BASES)
def test_disabled_adapters_give_the_base_model_to_the_bit(
    base: str, dtype: torch.dtype, active: str | list[str]
) -> None:
    bare, x = models.base_model(base, dtype), inputs(dtype=dtype)
    pk.patch(bare)  # Linear4bit alone is patched too, and rounds differently from bitsandbytes
    expected = run(bare, x)
    model = adapted(base, dtype)
    activate(model, active)
    with model.disable_adapter():
        plain = run(stock(model), x)
    pk.patch(model)
    enabled = run(model, x)
    with model.disable_adapter():
        got = run(model, x)
    assert got.keys() == {"y", "x"}, "nothing of an adapter has a gradient"
    for key, value in got.items():
        assert torch.equal(value, expected[key]), key
        if base != "bnb":
            assert torch.equal(value, plain[key]), key
    for key, value in run(model, x).items():
        assert torch.equal(value, enabled[key]), f"{key}: enabled again, the adapters are as before"


def policy_gradients(model: Any, x: Tensor, reference: Callable[[], Tensor]) -> dict[str, Tensor]:
    """One DPO step: the reference model runs between the policy's forward and backward."""
    model.zero_grad()
    policy = model(x).log_softmax(-1)
    with torch.no_grad():
        ratio = policy - reference().log_softmax(-1)
    loss = -nn.functional.logsigmoid(0.1 * (policy * ratio.sign()).sum(-1)).mean()
    loss.backward()
    return {"y": policy.detach(), "ratio": ratio, **gradients(model)}


@pytest.mark.parametrize("reference", ["disabled", "frozen-adapter"])
@pytest.mark.parametrize("base", models.BASES)
def test_reference_logits_within_a_step(base: str, reference: str) -> None:
    def logits(model: Any, x: Tensor) -> Tensor:
        if reference == "disabled":
            with model.disable_adapter():
                return model(x)
        model.set_adapter("three", inference_mode=True)
        try:
            return model(x)
        finally:
            model.set_adapter("two")

    model, x = adapted(base), inputs()
    model.set_adapter("two")
    plain = stock(model)
    report = pk.patch(model)
    with torch.no_grad():
        first = logits(model, x)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    got = policy_gradients(model, x, lambda: logits(model, x))
    if base == "bnb":  # its evaluation without gradients changes the weight, which then cannot train
        plain_logits = logits(stock(plain), x.clone().requires_grad_()).detach()
        expected = policy_gradients(plain, x, lambda: plain_logits)
    else:
        expected = policy_gradients(plain, x, lambda: logits(plain, x))
    assert_same(got, expected, None)
    assert len(got) == 6, "gradients of the policy's two A and two B, and of nothing else"
    optimizer.step()
    with torch.no_grad():
        assert torch.equal(logits(model, x), first), "the reference does not train"
        assert testing.relative_error(model(x).log_softmax(-1), got["y"]) > 1e-6, "the policy does"
    assert_fused(report)


# Names


@pytest.mark.parametrize("base", models.BASES)
def test_one_adapter_active_twice_raises(base: str) -> None:
    """PEFT silently adds that adapter twice."""
    model, x = adapted(base), inputs()
    activate(model, ["two", "one", "two"])
    with pytest.raises(ValueError, match="two"), pk.patched(model):
        model(x)


def test_loading_under_an_existing_name_overwrites(tmp_path: Path) -> None:
    """PEFT's intended behaviour: transformers' Trainer resumes and restores the best checkpoint with it."""
    model, x = adapted(), inputs()
    model.set_adapter("two")
    pk.patch(model)
    y = model(x)
    model.save_pretrained(tmp_path, selected_adapters=["two"])
    stir(model, scale=0.3)
    assert testing.relative_error(model(x), y) > 0.1
    parameter = model.base_model.model.q.lora_A.two.weight
    model.load_adapter(tmp_path / "two", "two")
    assert model.base_model.model.q.lora_A.two.weight is parameter
    assert torch.equal(model(x), y)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_adapter(tmp_path / "two", "one")
    assert torch.equal(model(x), y)

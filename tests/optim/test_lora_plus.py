"""LoRA+ parameter groups: the same groups and learning rates as PEFT's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn

import peft_kernels as pk

LR, RATIO, DECAY, LR_EMBEDDING = 1e-3, 8.0, 0.1, 1e-5


class Model(nn.Module):
    """One layer for each case of the rules."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 64)
        self.q, self.k = nn.Linear(64, 64), nn.Linear(64, 64, bias=False)
        self.conv = nn.Conv2d(1, 4, 1)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 10)
        self.scale = nn.Parameter(torch.ones(64))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.k(self.q(self.embed(ids))) * self.scale))


CONFIGS: dict[str, dict[str, Any]] = {
    "linear": {},
    "embedding": {"target_modules": ["q", "k", "embed"]},
    "embedding-only": {"target_modules": ["embed"]},
    "convolution": {"target_modules": ["q", "conv"]},
    "bias-all": {"bias": "all"},
    "bias-lora-only": {"bias": "lora_only", "target_modules": ["q", "embed"]},
    "lora-bias": {"lora_bias": True, "target_modules": ["q"]},
    "modules-to-save": {"modules_to_save": ["head", "norm"]},
    "saved-embedding": {"modules_to_save": ["embed"]},
    "tokens": {"trainable_token_indices": {"embed": [1, 3]}},
    "dora": {"use_dora": True},
    "dora-embedding": {"use_dora": True, "target_modules": ["q", "embed"]},
    "everything": {
        "use_dora": True,
        "bias": "all",
        "target_modules": ["q", "k", "embed", "conv"],
        "modules_to_save": ["head", "norm"],
    },
}


def adapted(model: nn.Module | None = None, **options: Any) -> Any:
    peft_models = pytest.importorskip("peft_models")  # skips without PEFT
    return peft_models.lora(model or Model(), **{"r": 4, "target_modules": ["q", "k"]} | options)


def assert_partition(model: nn.Module, groups: list[dict[str, Any]]) -> None:
    """Every trainable parameter once, no other, and no empty group."""
    grouped = [id(p) for group in groups for p in group["params"]]
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert len(grouped) == len(set(grouped)) and set(grouped) == trainable
    assert all(group["params"] for group in groups)
    assert all(group.keys() == {"name", "params", "lr", "weight_decay"} for group in groups)


def assert_as_peft(model: Any) -> dict[str, dict[str, Any]]:
    """Asserts the parameters and rates of PEFT's optimizer. Returns the groups by name."""
    optimizers = pytest.importorskip("peft.optimizers", reason="PEFT is not installed")
    peer = optimizers.create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=LR,
        loraplus_lr_ratio=RATIO,
        loraplus_weight_decay=DECAY,
        loraplus_lr_embedding=LR_EMBEDDING,
    )
    groups = pk.optim.lora_plus_groups(model, LR, RATIO, DECAY, LR_EMBEDDING)
    assert_partition(model, groups)
    expected = [group for group in peer.param_groups if group["params"]]
    got = torch.optim.AdamW(groups).param_groups
    assert len(got) == len(expected)
    for mine, theirs in zip(got, expected, strict=True):
        assert [id(p) for p in mine["params"]] == [id(p) for p in theirs["params"]], mine["name"]
        assert (mine["lr"], mine["weight_decay"]) == (theirs["lr"], theirs["weight_decay"]), mine["name"]
    return {group["name"]: group for group in groups}


@pytest.mark.parametrize("case", CONFIGS)
def test_groups_and_rates_equal_peft(case: str) -> None:
    model = adapted(**CONFIGS[case])
    if case == "everything":
        model.base_model.model.scale.requires_grad_(True)  # a parameter in no layer
    groups = assert_as_peft(model)
    if case == "everything":
        assert list(groups) == ["groupA", "embedding", "groupB", "groupB_no_decay"]


def test_frozen_adapters_are_left_out() -> None:
    model = adapted()
    model.add_adapter("second", replace(model.peft_config["default"], r=2, target_modules=["q"]))
    assert sum(len(group["params"]) for group in assert_as_peft(model).values()) == 4
    model.set_adapter("second")
    assert sum(len(group["params"]) for group in assert_as_peft(model).values()) == 2
    model.base_model.set_adapter(["default", "second"])
    assert sum(len(group["params"]) for group in assert_as_peft(model).values()) == 6


@pytest.mark.parametrize("base", models.BASES)
def test_patched_models(base: str) -> None:
    model = adapted(models.base_model(base), target_modules=["q", "o"])
    pk.patch(model)
    groups = assert_as_peft(model)
    assert list(groups) == ["groupA", "groupB"]
    assert {tuple(p.shape) for p in groups["groupB"]["params"]} == {(128, 4), (64, 4)}


@pytest.mark.parametrize("layer", [pk.nn.LoRALinear, pk.nn.NF4LoRALinear])
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "in-a-model"])
def test_own_modules(layer: Any, alone: bool) -> None:
    lora = layer(nn.Linear(64, 32), r=4)
    model = lora if alone else nn.Sequential(nn.Linear(64, 64).requires_grad_(False), lora)
    groups = pk.optim.lora_plus_groups(model, LR)
    assert_partition(model, groups)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("groupA", LR, 0.0),
        ("groupB", LR * 16, 0.0),
    ]
    assert groups[0]["params"][0] is lora.lora_A and groups[1]["params"][0] is lora.lora_B
    lora.lora_A.requires_grad_(False)
    assert [group["name"] for group in pk.optim.lora_plus_groups(model, LR)] == ["groupB"]


def test_shared_parameter_is_listed_once() -> None:
    model = nn.ModuleList([pk.nn.LoRALinear(nn.Linear(8, 8), r=2) for _ in range(2)])
    model[1].lora_A = model[0].lora_A
    groups = pk.optim.lora_plus_groups(model, LR)
    assert_partition(model, groups)
    assert [len(group["params"]) for group in groups] == [1, 2]


def test_lr_ratio_of_b() -> None:
    model = pk.nn.NF4LoRALinear(nn.Linear(64, 64), r=4)
    optimizer = torch.optim.AdamW(pk.optim.lora_plus_groups(model, LR, lr_ratio=4.0))
    before = [p.detach().clone() for p in (model.lora_A, model.lora_B)]
    for p in (model.lora_A, model.lora_B):
        p.grad = torch.full_like(p, 0.5)
    optimizer.step()
    for p, old, expected in zip((model.lora_A, model.lora_B), before, (LR, 4 * LR), strict=True):
        torch.testing.assert_close(old - p.detach(), torch.full_like(p, expected), rtol=1e-3, atol=0)


def test_optimizer_state_round_trip() -> None:
    model = pk.nn.LoRALinear(nn.Linear(8, 8), r=2)
    optimizer = torch.optim.AdamW(pk.optim.lora_plus_groups(model, LR))
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    other = torch.optim.AdamW(pk.optim.lora_plus_groups(model, 1.0))
    other.load_state_dict(optimizer.state_dict())
    assert [(g["name"], g["lr"]) for g in other.param_groups] == [("groupA", LR), ("groupB", 16 * LR)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1e-4}, "lr: expected a finite number of at least 0, got -0.0001"),
        ({"lr": float("nan")}, "lr: expected a finite number of at least 0, got nan"),
        ({"lr_ratio": 0}, "lr_ratio: expected a finite number above 0, got 0"),
        ({"lr_ratio": -16.0}, "lr_ratio: expected a finite number above 0, got -16.0"),
        ({"lr_ratio": float("inf")}, "lr_ratio: expected a finite number above 0, got inf"),
        ({"weight_decay": -0.1}, "weight_decay: expected a finite number of at least 0, got -0.1"),
        ({"lr_embedding": -1.0}, "lr_embedding: expected a finite number of at least 0, got -1.0"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_invalid_arguments(arguments: dict[str, float], message: str) -> None:
    model = pk.nn.LoRALinear(nn.Linear(8, 8), r=2)
    with pytest.raises(ValueError) as error:
        pk.optim.lora_plus_groups(model, **{"lr": LR} | arguments)
    assert str(error.value) == message


def test_model_without_trainable_parameters() -> None:
    for model in (nn.Linear(4, 4).requires_grad_(False), nn.Module()):
        with pytest.raises(ValueError, match=r"^model: expected at least one parameter with requires_grad"):
            pk.optim.lora_plus_groups(model, LR)

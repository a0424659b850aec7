"""bitsandbytes' optimizers on our kernel, by the names that Trainer uses."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft_kernels as pk
import testing
from peft_kernels.integrations import bitsandbytes as ours
from peft_kernels.integrations.bitsandbytes import ops as bitsandbytes_ops

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((40, 130), (5, 7))  # in 8 bits; too small for 8 bits
COVERED = [f"{paged}{kind}" for paged in ("", "paged_") for kind in ("adamw_8bit", "lion_8bit", "lion_32bit")]
COVERED += ["adamw_bnb_8bit", "paged_adamw_32bit"]
LEFT = ["ademamix_8bit", "paged_ademamix_32bit", "rmsprop_bnb_8bit"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Counts the calls that our kernel served and those it left, from the next `enable` on."""
    counts: Counter[str] = Counter()

    def counted(kernel: Callable[..., Any], *args: Any) -> Any:
        result = kernel(*args)
        counts["left" if result is NotImplemented else "served"] += 1
        return result

    for name, kernel in list(bitsandbytes_ops._KERNELS.items()):
        monkeypatch.setitem(bitsandbytes_ops._KERNELS, name, functools.partial(counted, kernel))
    yield counts
    ours.disable()


def by_name(name: str, parameters: list[Tensor], **more: Any) -> Any:
    """The optimizer that Trainer makes for `TrainingArguments(optim=name)`."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    given = {"rmsprop": {}}.get(name.split("_")[0], {"adam_beta2": 0.98})
    arguments = transformers.TrainingArguments(
        output_dir="unused", optim=name, learning_rate=1e-2, use_cpu=True, report_to="none", **given
    )
    kind, options = transformers.Trainer.get_optimizer_cls_and_kwargs(arguments)
    return kind(parameters, **options | more)


def parameters(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [nn.Parameter(testing.tensor(*shape, dtype=dtype, seed=i)) for i, shape in enumerate(SHAPES)]


def train(optimizer: Any, params: list[Tensor], steps: int, first: int = 0) -> list[Tensor]:
    for step in range(first, first + steps):
        for i, p in enumerate(params):
            p.grad = testing.tensor(*p.shape, dtype=p.dtype, seed=100 * step + i)
        optimizer.step()
    return [p.detach().clone() for p in params]


def trained(name: str, dtype: torch.dtype = torch.float32, **more: Any) -> list[Tensor]:
    params = parameters(dtype)
    return train(by_name(name, params, **more), params, 4)


def near(got: list[Tensor], want: list[Tensor], dtype: torch.dtype) -> None:
    """bitsandbytes rounds its 8-bit codes more coarsely on a CPU; may flip a sign of Lion's: 3e-4 each."""
    for a, b in zip(got, want, strict=True):
        assert testing.relative_error(a, b) < 20 * torch.finfo(dtype).eps + 1e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", COVERED)
def test_enable_and_disable_switch_the_kernel(name: str, dtype: torch.dtype, calls: Counter[str]) -> None:
    stock = trained(name, dtype, weight_decay=0.1)
    with ours.enable():
        got = trained(name, dtype, weight_decay=0.1)
    assert calls == {"served": 4 * len(SHAPES)}
    near(got, stock, dtype)
    assert all(map(torch.equal, trained(name, dtype, weight_decay=0.1), stock)), "disable() gives theirs back"
    assert calls == {"served": 4 * len(SHAPES)}


@pytest.mark.parametrize("name", LEFT)
def test_other_optimizers_are_left_to_bitsandbytes(name: str, calls: Counter[str]) -> None:
    stock = trained(name)
    with ours.enable():
        got = trained(name)
    assert calls == {"left": 4 * len(SHAPES)} and all(map(torch.equal, got, stock))


@pytest.mark.parametrize("kind, own", [("AdamW8bit", pk.optim.AdamW8bit), ("Lion8bit", pk.optim.Lion8bit)])
def test_bits_equal_our_optimizer_classes(kind: str, own: Any, calls: Counter[str]) -> None:
    theirs, mine = parameters(), parameters()
    with ours.enable():
        got = train(getattr(bnb.optim, kind)(theirs, lr=1e-2, weight_decay=0.1), theirs, 5)
    assert all(map(torch.equal, got, train(own(mine, lr=1e-2, weight_decay=0.1), mine, 5)))


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_32bit", "lion_8bit"])
def test_state_dicts_load_both_ways(name: str, calls: Counter[str]) -> None:
    stock = trained(name)
    for ours_first in (True, False):
        params = parameters()
        optimizer = by_name(name, params)
        with ours.enable() if ours_first else torch.enable_grad():
            train(optimizer, params, 2)
        saved, other = copy.deepcopy(optimizer.state_dict()), by_name(name, params)
        other.load_state_dict(saved)
        with ours.enable() if not ours_first else torch.enable_grad():
            got = train(other, params, 2, first=2)
        near(got, stock, torch.float32)
        assert other.state_dict()["state"][0]["step"] == 4
    assert calls == {"served": 4 * len(SHAPES)}


def test_clipping_and_other_quant_maps_are_left_to_bitsandbytes(calls: Counter[str]) -> None:
    for change in ({"max_unorm": 0.5}, {}):
        params, again = parameters(), parameters()
        stock, optimizer = (
            bnb.optim.Adam(p, lr=1e-2, optim_bits=32 if change else 8) for p in (params, again)
        )
        for one in (stock, optimizer):
            if change:
                one.args.max_unorm = 0.5
            else:
                one.name2qmap["dynamic"] = one.name2qmap["dynamic"] * 0.5
        want = train(stock, params, 2)
        calls.clear()
        with ours.enable():
            got = train(optimizer, again, 2)
        assert calls["left"] == (4 if change else 2) and torch.equal(got[0], want[0])


def test_trainer_by_name(calls: Counter[str], tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    # Trainer asks for fp32 states for embeddings; bitsandbytes records that by index, for later optimizers.
    monkeypatch.setattr(bnb.optim.GlobalOptimManager, "_instance", None)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
        )
    )
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), optim="adamw_8bit", max_steps=2, use_cpu=True, report_to="none"
    )
    rows = [{"input_ids": list(range(8)), "labels": list(range(8))}] * 4
    with ours.enable():
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train()
    assert calls["served"] == 2 * len(list(model.parameters())) and not calls["left"]

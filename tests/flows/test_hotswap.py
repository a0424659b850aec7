"""PEFT's hotswap of adapter weights in a patched model, eager and compiled, without graph breaks and with no
more compilations than stock."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flow_checks import Calls, assert_fused, assert_near
from flow_models import adapted, ids, llama
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch._dynamo.testing import CompileCounterWithBackend

import peft_kernels as pk

OWN = pytest.mark.parametrize("base", ["dense", "nf4"])
TARGETS = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 8


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def first(base: str) -> Any:
    model = adapted(llama(base, num_hidden_layers=1), target_modules=TARGETS, r=RANK, lora_alpha=16).eval()
    model.config.use_cache = False
    prepare_model_for_compiled_hotswap(model, target_rank=RANK)
    return model


@pytest.fixture(params=["same-scaling", "other-scaling", "other-rank"])
def second(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with another adapter: other weights, and another scaling or rank."""
    options = {
        "same-scaling": {"r": RANK, "lora_alpha": 16},
        "other-scaling": {"r": RANK, "lora_alpha": 40},
        "other-rank": {"r": 4, "lora_alpha": 16},
    }[request.param]
    model = adapted(llama("dense", num_hidden_layers=1), target_modules=TARGETS, **options)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.mul_(-1.3)
    model.save_pretrained(tmp_path / "second")
    return tmp_path / "second"


def answer(model: Any, seed: int = 1) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids(seed)).logits


def swapped_answers(model: Any, call: Any, folder: Path) -> list[torch.Tensor]:
    """Outputs before and after the swap, and on another input."""
    before = answer(call)
    hotswap_adapter(model, str(folder), adapter_name="default")
    return [before, answer(call), answer(call, 2)]


def assert_all_near(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    assert (want[1] - want[0]).norm() > 0.01 * want[0].norm(), "the adapters are to differ"
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_near({f"answer {i}": a}, {f"answer {i}": b})


@OWN
def test_eager(base: str, second: Path) -> None:
    stock, model = first(base), first(base)
    report = pk.patch(model)
    with Calls() as calls:
        got = swapped_answers(model, model, second)
    assert_all_near(got, swapped_answers(stock, stock, second))
    assert calls.counts["gated_mlp"] == 3, calls.counts
    assert_fused(model, report, blocks=1)


def compilations(model: Any, folder: Path) -> tuple[list[torch.Tensor], int]:
    """The outputs of a compiled model, and how often it was compiled; a graph break raises."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    answers = swapped_answers(model, compiled, folder)
    return answers, counter.frame_count


@pytest.mark.slow
@OWN
def test_compiled(base: str, second: Path) -> None:
    stock, model, eager = (first(base) for _ in range(3))
    report = pk.patch(model)
    got, count = compilations(model, second)
    want, stock_count = compilations(stock, second) if base == "dense" else (None, 1)
    assert_all_near(got, swapped_answers(eager, eager, second))
    if want is not None:
        assert_all_near(got, want)
    assert count <= stock_count, f"compiled {count} times, stock {stock_count}"
    assert_fused(model, report, blocks=1)

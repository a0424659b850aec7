"""Memory that a forward saves for its backward."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import models
import pytest
import torch
from skips import require_bf16_attention
from torch import Tensor, nn

import peft_kernels as pk
import testing

ROWS, FEATURES, RANK = 37, 64, 8
BLOCK_BOUND = 0.6
"""Saved bytes of the patched decoder block, as a fraction of those of PEFT."""


def tensors_of(module: nn.Module) -> Iterable[Tensor]:
    return [*module.parameters(), *module.buffers()]


def test_a_storage_counts_once_and_in_full() -> None:
    x = torch.ones(10, 4, requires_grad=True)
    assert testing.saved_bytes(lambda: x[:5] * x[5:], []) == x.nbytes
    assert testing.saved_bytes(lambda: x.exp() + x.exp(), []) == 2 * x.nbytes


def test_excluded_tensors_and_their_views_do_not_count() -> None:
    layer, x = nn.Linear(4, 3), torch.ones(10, 4, requires_grad=True)
    assert testing.saved_bytes(lambda: layer(x), tensors_of(layer)) == x.nbytes
    assert testing.saved_bytes(lambda: layer(x), [*tensors_of(layer), x]) == 0


def test_a_released_graph_holds_nothing() -> None:
    x = torch.ones(10, 4, requires_grad=True)

    def run() -> Tensor:
        return x * x.exp().sum().detach()  # four bytes

    assert testing.saved_bytes(run, []) == 4


def test_backward_works_inside() -> None:
    x = torch.ones(10, 4, requires_grad=True)
    assert testing.saved_bytes(lambda: x.exp().sum().backward(), []) == 0
    assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("base", models.BASES)
@pytest.mark.parametrize("adapters", ["fp32", "same"])
def test_a_lora_layer_saves_x_and_h(adapters: str, base: str, dtype: torch.dtype) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    config = peft.LoraConfig(r=RANK, target_modules=["q", "o"], init_lora_weights=False)
    model = peft.get_peft_model(
        models.base_model(base, dtype), config, autocast_adapter_dtype=adapters == "fp32"
    )
    pk.patch(model)
    layer = model.base_model.model.o  # has no bias
    x = testing.tensor(ROWS, layer.in_features, dtype=dtype).requires_grad_()
    h_bytes = ROWS * RANK * 4
    assert testing.saved_bytes(lambda: layer(x), tensors_of(layer)) == x.nbytes + h_bytes


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("adapter", ["lora", "dropout", "dora"])
def test_a_decoder_block_saves_little(adapter: str, base: str) -> None:
    pytest.importorskip("peft", reason="PEFT is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    if base == "nf4":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from bench.models import memory

    require_bf16_attention()
    saved = memory.Case(memory.BLOCK, base, adapter, "bf16").run()
    assert saved.ratio is not None, saved.absent
    assert saved.ratio <= BLOCK_BOUND, saved


class Fills(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts bytes of tensors filled with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "zero" in func.__name__ or "fill" in func.__name__:
            self.nbytes += out.nbytes
        return out


def test_outputs_that_are_only_saved_get_no_zero_gradients(backend: str) -> None:
    x = testing.tensor(ROWS, FEATURES, dtype=torch.bfloat16).requires_grad_()
    gate, up, down = (testing.tensor(FEATURES, FEATURES, dtype=torch.bfloat16, seed=i) for i in range(3))
    y = pk.gated_mlp(x, *(pk.AdaptedLinear(weight) for weight in (gate, up, down)))
    with Fills() as fills:
        y.backward(torch.ones_like(y.detach()))
    assert x.grad is not None and fills.nbytes == 0


def test_fills_counts_zero_gradients() -> None:
    class Two(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Any:
            ctx.mark_non_differentiable(saved := x + 1)
            return x.clone(), saved

        @staticmethod
        def backward(ctx: Any, dy: Tensor, _: Tensor) -> Tensor:
            return dy

    y, saved = Two.apply(x := torch.ones(10, requires_grad=True))
    with Fills() as fills:
        y.backward(torch.ones_like(y.detach()))
    assert x.grad is not None and fills.nbytes == saved.nbytes


def test_unused_outputs_have_no_gradient(backend: str) -> None:
    """Layers that no loss depends on have none, as in torch. That of x is the same."""
    x = testing.tensor(ROWS, FEATURES).requires_grad_()
    layers = [
        pk.AdaptedLinear(
            testing.tensor(8, FEATURES, seed=i),
            None,
            [
                pk.Adapter(
                    testing.tensor(RANK, FEATURES, seed=10 + i).requires_grad_(),
                    testing.tensor(8, RANK, seed=20 + i).requires_grad_(),
                    1.0,
                )
            ],
        )
        for i in range(3)
    ]
    parameters = [p for layer in layers for a in layer.adapters for p in (a.lora_a, a.lora_b)]
    gradients = []
    for unused in (True, False):
        y = pk.multi_lora_linear(x, layers)
        loss = y[1].square().sum() if unused else y[1].square().sum() + 0.0 * (y[0].sum() + y[2].sum())
        gradients.append(torch.autograd.grad(loss, [x, *parameters], allow_unused=True))
    assert [i for i, got in enumerate(gradients[0]) if got is None] == [1, 2, 5, 6]
    for got, expected in zip(*gradients, strict=True):
        assert not expected.any() if got is None else torch.equal(got, expected)

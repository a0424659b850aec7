"""Outputs and gradients of experts in 4 bits."""

from __future__ import annotations

import functools
from typing import Any

import moe_models as moe
import pytest
import torch
from installed import before
from moe_models import EXPERTS, HIDDEN, IMPLEMENTATIONS, KINDS, packed, sample, unpacked
from test_gradient_needs import Unused
from torch import Tensor

import peft_kernels.nf4.experts_forward
import testing
from peft_kernels.nf4.experts_forward import experts_forward, has_gate, weight_names
from peft_kernels.nf4.experts_packing import pack

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def run(call: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Output and gradients."""
    x, w = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
    y = call(x, index, w)
    dx, dw = torch.autograd.grad(y, (x, w), testing.tensor(*y.shape, seed=9).to(y.dtype))
    return {"y": y.detach(), "dx": dx, "dw": dw}


# Forward and backward


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_gradient_where_no_loss_depends_on_them(implementation: str) -> None:
    """As with transformers' own implementations: zeros would let weight decay move the experts."""
    hidden, index, weights = sample()
    for ours in (False, True):
        module = unpacked(packed(), implementation=implementation).requires_grad_()
        leaves = [hidden.clone().requires_grad_(), weights.clone().requires_grad_()]
        call = functools.partial(experts_forward, module) if ours else module
        y = call(leaves[0], index, leaves[1])
        (Unused.apply(y).sum() + torch.ones((), requires_grad=True)).backward()
        assert all(t.grad is None for t in (*leaves, *module.parameters())), ours


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_dense_experts(kind: str, dtype: torch.dtype, implementation: str) -> None:
    module = packed(kind, dtype)
    hidden, index, weights = sample(dtype=dtype)
    weights = weights.to(dtype)  # else eager experts raise
    truth = run(unpacked(module, torch.float64), hidden.double(), index, weights.double())
    plain = run(unpacked(module, implementation=implementation), hidden, index, weights)
    for what, got in run(module, hidden, index, weights).items():
        testing.assert_close(got, plain[what], truth[what], what)


def test_custom_gate_with_a_known_activation() -> None:
    """As in DeepSeek V4. Eager experts ignore the gate."""
    cls = type(moe.experts("qwen3_moe"))

    class Clamped(cls):  # type: ignore[misc, valid-type]
        def _apply_gate(self, gate_up: Tensor) -> Any:
            gate, up = gate_up.chunk(2, dim=-1)
            return self.act_fn(gate.clamp(max=0.5)) * up.clamp(-0.5, 0.5)

    module = moe.experts("qwen3_moe")
    module.__class__ = Clamped
    pack(module)
    hidden, index, weights = sample()
    truth = run(unpacked(module, torch.float64, "batched_mm"), hidden.double(), index, weights.double())
    plain = run(unpacked(module, implementation="batched_mm"), hidden, index, weights)
    for what, got in run(module, hidden, index, weights).items():
        testing.assert_close(got, plain[what], truth[what], what)


def test_every_back_end(backend: str) -> None:
    module = packed("gpt_oss")
    hidden, index, weights = sample()
    truth = run(unpacked(module, torch.float64), hidden.double(), index, weights.double())
    plain = run(unpacked(module), hidden, index, weights)
    for what, got in run(module, hidden, index, weights).items():
        testing.assert_close(got, plain[what], truth[what], what)


@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_few_tokens(kind: str, tokens: int) -> None:
    module = packed(kind)
    hidden, index, weights = sample(tokens)
    truth = run(unpacked(module, torch.float64, "batched_mm"), hidden.double(), index, weights.double())
    plain = run(unpacked(module, implementation="batched_mm"), hidden, index, weights)
    for what, got in run(module, hidden, index, weights).items():
        testing.assert_close(got, plain[what], truth[what], what)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_remote_experts_give_zeros(kind: str) -> None:
    """Expert parallelism marks experts on other ranks by index `num_experts` and weight zero."""
    if before("transformers", "5.10"):
        pytest.skip("transformers before 5.10 has no index of remote experts")
    module = packed(kind)
    hidden, index, weights = sample()
    away = index == 2
    away[5] = True
    index, weights = index.masked_fill(away, EXPERTS), weights.masked_fill(away, 0)
    dense, wide = unpacked(module), unpacked(module, torch.float64)
    for one in dense, wide:
        one.config._experts_implementation, one._is_expert_parallel = "batched_mm", True
    truth = run(wide, hidden.double(), index, weights.double())
    plain, got = run(dense, hidden, index, weights), run(module, hidden, index, weights)
    for what in got:
        testing.assert_close(got[what], plain[what], truth[what], what)
    assert got["y"][5].count_nonzero() == 0 and got["dx"][5].count_nonzero() == 0


@pytest.mark.parametrize("compute_dtype", [None, torch.float16], ids=str)
def test_wider_activations_are_cast_to_the_weight_dtype(compute_dtype: torch.dtype | None) -> None:
    module = packed(dtype=torch.bfloat16, compute_dtype=compute_dtype)
    hidden, index, weights = sample()
    dtype = compute_dtype or torch.bfloat16
    narrow = experts_forward(module, hidden.to(dtype), index, weights)
    wide = module(hidden, index, weights)
    assert wide.dtype == torch.float32
    assert torch.equal(wide.to(dtype), narrow) and not torch.equal(wide, narrow.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunk_size_changes_no_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    module, inputs = packed(dtype=dtype), sample(dtype=dtype)
    want = run(module, *inputs)  # small: one chunk
    for rows in (1, 6, 10):
        monkeypatch.setattr(peft_kernels.nf4.experts_forward, "_PART", rows * HIDDEN)
        for what, got in run(module, *inputs).items():
            assert torch.equal(got, want[what]), f"{rows} rows: {what}"


def test_under_autocast() -> None:
    module = packed()
    hidden, index, weights = sample()
    with torch.autocast("cpu", torch.bfloat16):
        got = run(module, hidden, index, weights)
        plain = run(unpacked(module, torch.bfloat16), hidden.bfloat16(), index, weights)
    truth = run(unpacked(module, torch.float64), hidden.double(), index, weights.double())
    assert got["y"].dtype == torch.float32
    testing.assert_close(got["y"].bfloat16(), plain["y"], truth["y"])
    testing.assert_close(got["dx"].bfloat16(), plain["dx"], truth["dx"])


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_compiled_in_one_graph(kind: str) -> None:
    module = packed(kind)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for rows in (19, 23):
        plain, got = run(module, *sample(rows)), run(compiled, *sample(rows))
        for what in got:
            torch.testing.assert_close(got[what], plain[what])


def test_checkpointed() -> None:
    module, (hidden, index, weights) = packed(), sample()

    def call(x: Tensor, index: Tensor, w: Tensor) -> Any:
        return torch.utils.checkpoint.checkpoint(module, x, index, w, use_reentrant=False)

    plain, got = run(module, hidden, index, weights), run(call, hidden, index, weights)
    assert all(torch.equal(got[what], plain[what]) for what in got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic(dtype: torch.dtype) -> None:
    """With enough tokens that several threads add to one row of a gradient."""
    module, given = packed(dtype=dtype), sample(2000, dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        first = run(module, *given)
        for _ in range(3):
            again = run(module, *given)
            assert all(torch.equal(again[what], first[what]) for what in first)
    finally:
        torch.set_num_threads(threads)


def test_memory_saved_for_backward() -> None:
    """Backward saves the rows that enter and leave the experts, gate and up: no fp32, no dense weight."""
    dtype, rows = torch.bfloat16, 400
    module = packed(dtype=dtype)
    hidden, index, weights = sample(rows, dtype)
    x = hidden.requires_grad_()
    state = [t for name in weight_names(module) for t in getattr(module, name)._state.tensors().values()]
    saved = testing.saved_bytes(lambda: module(x, index, weights), [x, index, weights, *state])
    row = 2 * moe.INNER + HIDDEN  # gate and up for the activation, the output for the routing weight
    index_numel = 2 * 8 + 4  # permutation, its inverse and the offsets
    assert saved <= rows * moe.TOP_K * (row * dtype.itemsize + index_numel) + 4 * EXPERTS


def test_bias_gradients() -> None:
    module = packed("gpt_oss")
    hidden, index, weights = sample()
    found = []
    for one in (module, unpacked(module), unpacked(module, torch.float64)):
        biases = [one.gate_up_proj_bias.requires_grad_(), one.down_proj_bias.requires_grad_()]
        y = one(hidden.to(biases[0].dtype), index, weights.to(biases[0].dtype))
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), biases)])
    for got, plain, truth in zip(*found, strict=True):
        testing.assert_close(got, plain, truth)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "nemotron_h"])
@pytest.mark.parametrize("base", ["nf4", "dense"])
def test_adapters_of_each_expert(kind: str, base: str) -> None:
    module = packed(kind)
    hidden, index, weights = sample()
    lora = {}
    for seed, name in enumerate(weight_names(module)):
        experts, out_features, in_features = getattr(module, name).shape
        a = testing.tensor(experts, 4, in_features, seed=seed, scale=0.1).requires_grad_()
        b = testing.tensor(experts, out_features, 4, seed=seed + 5, scale=0.1).requires_grad_()
        lora[name] = (a, b, 0.5)
    adapters = [t for a, b, _ in lora.values() for t in (a, b)]
    dy = testing.tensor(*hidden.shape, seed=9)
    y = experts_forward(module if base == "nf4" else unpacked(module), hidden, index, weights, lora)
    found = [[y.detach(), *torch.autograd.grad(y, adapters, dy)]]
    for dtype in (torch.float32, torch.float64):
        adapters = [t.detach().to(dtype).requires_grad_() for t in adapters]
        y = dense_reference(unpacked(module, dtype), hidden.to(dtype), index, weights.to(dtype), adapters)
        found.append([y.detach(), *torch.autograd.grad(y, adapters, dy.to(dtype))])
    for got, plain, truth in zip(*found, strict=True):
        testing.assert_close(got, plain, truth)


def dense_reference(
    dense: Any, hidden: Tensor, index: Tensor, weights: Tensor, adapters: list[Tensor]
) -> Tensor:
    """Dense experts with adapters, in plain torch."""
    y = torch.zeros_like(hidden)
    for e in range(EXPERTS):
        rows, place = (index == e).nonzero(as_tuple=True)
        x = hidden[rows]
        for i, name in enumerate(weight_names(dense)):
            weight, (a, b) = getattr(dense, name)[e], adapters[2 * i : 2 * i + 2]
            product = x @ (weight if dense.is_transposed else weight.T)
            if dense.has_bias:
                product = product + getattr(dense, f"{name}_bias")[e]
            x = product + 0.5 * (x @ a[e].T) @ b[e].T
            if i == 0:
                x = dense._apply_gate(x) if has_gate(dense) else dense.act_fn(x)
        y = y.index_add(0, rows, x * weights[rows, place, None])
    return y

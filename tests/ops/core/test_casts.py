"""Casts of lists, sums of two dtypes, and adapters rounded by a call, bit-equal to torch."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from numbers_policy import DTYPES, each_dtype, same_with_any_threads, short
from test_gradient_needs import saved_by
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import peft_kernels as pk
import testing
from peft_kernels.core import dispatch, registry
from peft_kernels.ops.casts import add_residual

ops = torch.ops.peft_kernels
half = torch.bfloat16
N, K, R = 24, 64, 4

EDGES = [0.0, -0.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8, 1e-40, 1e38, 3.4e38, float("inf"), float("nan")]


@pytest.mark.usefixtures("nan_outputs")
@each_dtype
@pytest.mark.parametrize("of", DTYPES, ids=short)
def test_cast(backend: str, of: torch.dtype, dtype: torch.dtype) -> None:
    sizes = [(0,), (3, 5), (1,), (64, 17), (40000,), (1, 1), (2, 0), (30011,)]
    given = [testing.tensor(*size, dtype=of, seed=i) for i, size in enumerate(sizes)]
    given += [torch.tensor(EDGES).to(of), testing.tensor(6, 9, dtype=of).t()]
    got = ops.cast(given, dtype)
    for one, mine in zip(given, got, strict=True):
        assert mine.is_contiguous() and mine.dtype == dtype
        assert mine.data_ptr() != one.data_ptr() or not one.numel()
        torch.testing.assert_close(mine, one.to(dtype), rtol=0, atol=0, equal_nan=True)
    assert ops.cast([], dtype) == []
    same_with_any_threads(lambda: ops.cast(given[:8], dtype))


@pytest.mark.usefixtures("nan_outputs")
@each_dtype
@pytest.mark.parametrize("of", DTYPES, ids=short)
def test_add_residual(backend: str, of: torch.dtype, dtype: torch.dtype) -> None:
    for shape in ((0, 4), (3,), (2, 5, 7), (300, 301)):
        x, residual = testing.tensor(*shape, dtype=of), testing.tensor(*shape, dtype=dtype, seed=1)
        got = add_residual(x, residual)
        assert got.dtype == torch.promote_types(of, dtype) and torch.equal(got, x + residual)
    x = testing.tensor(7, 5, dtype=of).t()
    assert torch.equal(add_residual(x, x.to(dtype)), x + x.to(dtype))


def test_gradients_of_a_sum() -> None:
    x, residual = testing.tensor(3, 5, dtype=half).requires_grad_(), testing.tensor(3, 5).requires_grad_()
    dy = testing.tensor(3, 5, seed=1)
    y = add_residual(x, residual)
    dx, d_residual = torch.autograd.grad(y, (x, residual), dy)
    assert torch.equal(dx, dy.to(half)) and torch.equal(d_residual, dy)


def test_unsupported_sums_are_refused() -> None:
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"residual: expected shape \(2, 3\) like x, got \(3,\)"):
        add_residual(x, torch.ones(3))
    with pytest.raises(ValueError, match=r"x: expected a floating dtype, got torch.int64"):
        add_residual(torch.ones(2, 3, dtype=torch.int64), x)
    with pytest.raises(ValueError, match="residual: expected device cpu like x, got meta"):
        add_residual(x, torch.ones(2, 3, device="meta"))


def adapted(op: str, rounds: bool, frozen: bool = False) -> tuple[Any, list[Tensor]]:
    """A call as a function of x, and its fp32 adapters."""
    shapes = {"lora_linear": [(N, K)], "multi_lora_linear": [(N, K), (2 * N, K)]}
    of_op = shapes.get(op, [(N, K), (N, K), (K, N)])
    weights = [testing.nf4_weight(n, k, 32, seed=j) for j, (n, k) in enumerate(of_op)]
    trained = [
        testing.tensor(*shape, seed=20 + 2 * j + i, scale=0.3).requires_grad_(not (frozen and i == j == 0))
        for j, (n, k) in enumerate(of_op)
        for i, shape in enumerate(((R, k), (n, R)))
    ]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        given = parameters if rounds else [p.to(half) for p in parameters]
        layers = [
            pk.AdaptedLinear(w, None, [pk.Adapter(given[2 * j], given[2 * j + 1], 0.5, rounds=rounds)])
            for j, w in enumerate(weights)
        ]
        if op == "multi_lora_linear":
            return torch.cat(pk.multi_lora_linear(x, layers), -1)
        if op == "gated_mlp":
            return pk.gated_mlp(x, *layers)
        base = weights[0]._state.op_args
        args = (*base, None, *given, 0.5, 0.0, None, None)
        found: Tensor = dispatch.call(op, x, *args, rounds=half if rounds else None)[0]
        return found

    return call, trained


each_op = pytest.mark.parametrize("op", ["lora_linear", "multi_lora_linear", "gated_mlp"])


def results(call: Any, trained: list[Tensor], **options: Any) -> list[Tensor]:
    x = testing.tensor(5, K, dtype=half).requires_grad_()
    leaves = [x, *(t for t in trained if t.requires_grad)]
    y = call(x, *trained)
    dy = testing.tensor(*y.shape, dtype=half, seed=3)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy, **options)]


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype and torch.equal(g, w)


@each_op
@pytest.mark.parametrize("frozen", [False, True], ids=["", "one-frozen"])
def test_rounded_as_autocast_does(backend: str, op: str, frozen: bool) -> None:
    got, want = (results(*adapted(op, rounds, frozen)) for rounds in (True, False))
    assert_same(got, want)
    assert all(t.dtype == torch.float32 for t in got[2:])
    call, trained = adapted(op, True)
    with torch.no_grad():
        assert torch.equal(call(testing.tensor(5, K, dtype=half), *trained), want[0])


@each_op
def test_no_rounding_without_16_bit_activations(op: str) -> None:
    if op == "lora_linear":
        pytest.skip("its typed call has no such argument")
    x = testing.tensor(5, K)
    call, trained = adapted(op, True)
    plain = adapted(op, False)[0]
    assert not torch.equal(call(x, *trained), plain(x.to(half), *trained))
    assert call(x, *trained).dtype == torch.float32


@each_op
def test_parameters_are_inputs_of_the_node(op: str) -> None:
    """Hooks on them run."""
    call, trained = adapted(op, True)
    seen: list[torch.dtype] = []
    for one in trained:
        one.register_hook(lambda g: seen.append(g.dtype))
    y = call(testing.tensor(5, K, dtype=half), *trained)
    y.sum().backward()
    assert seen == [torch.float32] * len(trained)
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in trained)
    storages = [t.grad.untyped_storage().data_ptr() for t in trained if t.grad is not None]
    assert len(set(storages)) == len(trained)


@each_op
def test_the_rounded_adapters_are_saved(op: str) -> None:
    call, trained = adapted(op, True)
    y, saved = saved_by(lambda: call(testing.tensor(5, K, dtype=half), *trained))
    y.sum().backward()
    assert sum(t.dtype == half for t in saved) >= len(trained)


@each_op
def test_gradients_of_gradients_are_refused(op: str) -> None:
    call, trained = adapted(op, True)
    found = results(call, trained, create_graph=True)
    assert_same([t.detach() for t in found], results(*adapted(op, False)))
    with pytest.raises(RuntimeError, match=f"{op}: a gradient of its gradients was asked for"):
        found[2].sum().backward()


@each_op
def test_under_transforms(op: str) -> None:
    (call, trained), (plain, _) = adapted(op, True), adapted(op, False)
    x = testing.tensor(5, K, dtype=half)
    everything = tuple(t.detach() for t in trained)

    def gradients(call: Any) -> Any:
        places = tuple(range(1, len(everything) + 1))
        return torch.func.grad(lambda x, *p: call(x, *p).float().sum(), places)(x, *everything)

    assert_same(list(gradients(call)), list(gradients(plain)))


@pytest.mark.parametrize("op", ["multi_lora_linear", "gated_mlp"])
def test_compiled(op: str) -> None:
    call, trained = adapted(op, True)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert_same(results(compiled, trained), results(*adapted(op, False)))


def test_checkpointing() -> None:
    call, trained = adapted("gated_mlp", True)
    checkpointed = functools.partial(torch.utils.checkpoint.checkpoint, call, use_reentrant=False)
    assert_same(results(checkpointed, trained), results(call, trained))


class Casts(TorchDispatchMode):
    """Counts the tensors of each call of `cast`."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().endswith("::cast"):
            self.given.append(len(args[0]))
        return func(*args, **kwargs or {})


def test_one_call_casts_all() -> None:
    with Casts() as casts:
        results(*adapted("gated_mlp", True))
    assert casts.given == [6, 6]  # forward and backward


def test_rounded_arguments_are_differentiable() -> None:
    assert {op.name for op in registry.OPS.values() if op.rounding} == {
        "lora_linear", "multi_lora_linear", "gated_mlp",
    }  # fmt: skip
    assert all(set(op.rounding) <= set(op.differentiable) for op in registry.OPS.values())


def test_patched_layers_leave_rounding_to_the_call() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    stock = peft.get_peft_model(nn.Sequential(nn.Linear(K, N)), peft.LoraConfig(r=R, target_modules=["0"]))
    for name, p in stock.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    pk.patch(stock)
    x = testing.tensor(5, K, dtype=half)
    with Casts() as casts, torch.autocast("cpu", half):
        stock(x).sum().backward()
    assert casts.given == [2, 2]

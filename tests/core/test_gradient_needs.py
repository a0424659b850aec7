"""Only the needed gradients are computed, and only what they need is saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_cases import SCALING, Mlp, MultiLora, N, call, gradients, gradients_of, inputs, leaf
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import peft_kernels as pk
import testing


@pytest.mark.parametrize("trained", ["x", "lora_a", "lora_b", "bias", "weight", "lora_a lora_b", "x bias"])
def test_only_trainable_tensors_get_a_gradient(backend: str, trained: str) -> None:
    leaves = inputs(torch.float32, "dense", torch.float32, torch.float32)
    dy = testing.tensor(5, 3, N, seed=6)
    everything = gradients(leaves, dy)
    for name, value in leaves.items():
        value.requires_grad_(name in trained.split())
    got = gradients(leaves, dy)
    assert got.keys() == set(trained.split())
    for name, value in got.items():
        assert torch.equal(value, everything[name]), name


def test_no_gradient_leaks_into_h_or_the_weight(backend: str) -> None:
    leaves = inputs(torch.float32, "nested", torch.float32, None)
    state = leaves["weight"]._state
    y, h = torch.ops.peft_kernels.lora_linear(
        leaves["x"], *state.op_args, None, leaves["lora_a"], leaves["lora_b"], SCALING, 0.0, None, None
    )
    assert y.requires_grad and not h.requires_grad
    with torch.no_grad():
        assert not call(leaves).requires_grad


ops = torch.ops.peft_kernels


class Spy(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        if namespace == "peft_kernels":
            self.calls.append((name.partition(".")[0], args))
        return func(*args, **(kwargs or {}))


def flat(*values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        found.extend(t for t in (value if isinstance(value, list) else [value]) if t is not None)
    return found


def case_of(kind: str, base: str, dtype: torch.dtype) -> Any:
    return MultiLora(base, dtype, True) if kind == "multi_lora_linear" else Mlp(base, dtype)


@pytest.mark.parametrize("trained", ["x", "a0", "b1", "a1 b1", "w1", "bias2", "x a2", "a0 a1 a2 b0 b1 b2"])
@pytest.mark.parametrize("kind", ["multi_lora_linear", "gated_mlp"])
def test_only_needed_gradients_of_lists_are_computed(backend: str, kind: str, trained: str) -> None:
    _, everything = gradients_of(case_of(kind, "dense", torch.float32))
    c, names = case_of(kind, "dense", torch.float32), set(trained.split())
    for name, value in c.leaves().items():
        value.requires_grad_(name in names)
    y = c.call()
    dy = [testing.tensor(*t.shape, dtype=t.dtype, seed=60 + j) for j, t in enumerate(y)]
    with Spy() as spy:
        # An output that depends on nothing trained does not require a gradient.
        sources = [(t, d) for t, d in zip(y, dy, strict=True) if t.requires_grad]
        torch.autograd.backward([t for t, _ in sources], [d for _, d in sources])
    got = {name: value.grad for name, value in c.leaves().items() if value.grad is not None}
    assert got.keys() == names
    for name, value in got.items():
        assert torch.equal(value, everything[name]), name
    calls = [args for name, args in spy.calls if name == "multi_lora_linear_backward"]
    computed_a = sum(sum(args[-2]) for args in calls)
    computed_b = sum(sum(args[-1]) for args in calls)
    assert computed_a == sum(name[0] == "a" for name in names)
    assert computed_b == sum(name[0] == "b" and name[:2] != "bi" for name in names)
    assert calls[-1][-3] is ("x" in names)


def outputs_of(kind: str) -> tuple[dict[str, Tensor], list[Tensor], list[set[str]]]:
    """Leaves of a call with several outputs, the outputs, and the names of what each depends on."""
    if kind == "multi_lora_linear":
        c = case_of(kind, "dense", torch.float32)
        of = [{"x", "w0", "a1", "b1", "a2", "b2"}, {"x", "w1", "bias1", "a0", "b0"}, {"x", "w2", "bias2"}]
        return c.leaves(), c.call(), of
    if kind == "add_rms_norm":
        named = {n: leaf(*s, dtype=torch.float32, seed=1) for n, s in (("x", (3, 8)), ("residual", (3, 8)))}
        named["weight"] = leaf(8, dtype=torch.float32, seed=2)
        return named, list(pk.add_rms_norm(**named)), [{"x", "residual", "weight"}, {"x", "residual"}]
    named = {name: leaf(1, 2, 3, 4, dtype=torch.float32, seed=1) for name in "qk"}
    if kind == "cast":
        return named, ops.cast(list(named.values()), torch.bfloat16), [{"q"}, {"k"}]
    angles = testing.tensor(1, 2, 4, seed=3)
    return named, list(pk.rotary(**named, cos=angles.cos(), sin=angles.sin())), [{"q"}, {"k"}]


class Unused(torch.autograd.Function):
    """Returns its argument, and no gradient of it, like torch's int8 ops."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        return None


@pytest.mark.parametrize("kind", ["multi_lora_linear", "add_rms_norm", "rotary", "cast"])
def test_what_a_loss_does_not_depend_on_has_no_gradient(backend: str, kind: str) -> None:
    """Zeros in its place would let weight decay and momentum move a parameter."""
    for used in range(len(outputs_of(kind)[1]) + 1):
        leaves, outputs, of = outputs_of(kind)
        loss: Any = sum(Unused.apply(y).sum() for y in outputs)
        if used < len(outputs):
            loss = loss + outputs[used].sum()
        loss.backward()
        got = {name for name, value in leaves.items() if value.grad is not None}
        assert got == (of[used] if used < len(outputs) else set())


def test_autograd_functions_pass_no_zeros_on() -> None:
    """Ops' own are in the file of their base class."""
    sources = {path.name: path.read_text() for path in Path(pk.__file__).parent.rglob("*.py")}
    assert sum("(AutogradFunction):" in text for text in sources.values()) > 3
    assert {name for name, text in sources.items() if "autograd.Function)" in text} == {"gradient.py"}


def saved_by(call: Callable[[], Any]) -> tuple[Any, list[Tensor]]:
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        return call(), saved


def assert_saved(saved: list[Tensor], allowed: dict[str, Tensor]) -> None:
    assert saved
    known = {(t.data_ptr(), t.numel()) for t in allowed.values()}
    for t in saved:
        assert t.numel() == 0 or (t.data_ptr(), t.numel()) in known, f"saved: {tuple(t.shape)} {t.dtype}"


@pytest.mark.parametrize("base", ["dense", "nested"])
def test_lora_linear_with_dropout_saves_no_mask(backend: str, base: str) -> None:
    leaves = inputs(torch.bfloat16, base, torch.float32, torch.float32)
    weight = leaves["weight"]
    group = (weight, None, None, None, 0) if base == "dense" else weight._state.op_args
    x, a, b, bias = (leaves[name] for name in ("x", "lora_a", "lora_b", "bias"))
    seed = torch.tensor(5)
    (y, h), saved = saved_by(lambda: ops.lora_linear(x, *group, bias, a, b, SCALING, 0.3, seed, None))
    parameters = {f"weight{i}": t for i, t in enumerate(group) if isinstance(t, Tensor)}
    assert_saved(saved, {"x": x, "h": h, "seed": seed, "a": a, "b": b} | parameters)
    assert y.requires_grad


@pytest.mark.parametrize("base", ["dense", "nested"])
@pytest.mark.parametrize("kind", ["multi_lora_linear", "gated_mlp"])
def test_lists_of_layers_save_no_mask_and_no_gemm_result(backend: str, kind: str, base: str) -> None:
    c = case_of(kind, base, torch.bfloat16)
    outputs, saved = saved_by(lambda: getattr(ops, kind)(*c.args()))
    allowed = {"x": c.x, "seed": c.seed}
    if kind == "gated_mlp":
        allowed |= dict(zip(("gate", "up", "h", "h_down"), outputs[1:], strict=True))
    else:
        allowed |= {"h": outputs[1], "row_group": c.row_group}
    parameters = flat(c.weight, *c.quantised[:3], c.a, c.b)
    assert_saved(saved, allowed | {f"parameter{i}": t for i, t in enumerate(parameters)})
    assert not any(t.requires_grad for t in outputs[1:])


def test_elementwise_ops_save_no_mask(backend: str) -> None:
    x, up, scale = (leaf(*s, dtype=torch.float32, seed=1) for s in ((6, 5), (6, 5), (5,)))
    seed, bias = torch.tensor(4), leaf(5, dtype=torch.float32, seed=3)
    assert_saved(saved_by(lambda: ops.dropout(x, 0.5, seed))[1], {"seed": seed})
    assert_saved(saved_by(lambda: ops.gated_activation(x, up, "gelu"))[1], {"gate": x, "up": up})
    assert_saved(saved_by(lambda: ops.dora_scale(x, scale, bias))[1], {"z": x, "scale": scale, "bias": bias})

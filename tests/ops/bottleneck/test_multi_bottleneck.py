"""Bottleneck adapters for groups of rows, against single adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import pytest
import test_bottleneck
import torch
from lora_cases import BEYOND_FP16
from multi_bottleneck_cases import GROUPS as KINDS
from multi_bottleneck_cases import arguments, case_of, judge
from numbers_policy import case_id, in_range, same_with_any_threads, short
from rounding import ONE_MODEL
from skips import require
from torch import Tensor
from torch.autograd import gradcheck

import peft_kernels as pk
import testing
from peft_kernels import BottleneckParameters, multi_bottleneck

K = 40
GROUPS = torch.tensor([2, 0, -1, 2, 0, 4, 7, 0, 1, 4, 2])
PARAMETERS = ("down", "up", "down_bias", "up_bias", "norm_weight", "norm_bias")
DTYPES = (torch.float32, torch.bfloat16)

pytestmark = pytest.mark.usefixtures("nan_outputs", "one_thread")


def adapters(dtype: torch.dtype, features: int = K) -> list[BottleneckParameters]:
    """Adapters of all kinds; the fourth has no rows."""

    def one(i: int, r: int, activation: str, kind: str, kept: torch.dtype) -> BottleneckParameters:
        def vector(n: int, seed: int, centre: float = 0.0) -> Tensor:
            return (centre + testing.tensor(n, seed=10 * i + seed)).to(kept)

        return BottleneckParameters(
            down=testing.tensor(r, K, dtype=kept, seed=10 * i + 1, scale=K**-0.5),
            up=testing.tensor(features, r, dtype=kept, seed=10 * i + 2, scale=r**-0.5),
            down_bias=vector(r, 3) if "biases" in kind else None,
            up_bias=vector(features, 4) if "biases" in kind else None,
            activation=activation,
            scaling=0.5 + i,
            norm_weight=vector(K, 5, 1.0) if "norm" in kind else None,
            norm_bias=vector(K, 6) if "norm" in kind and "biases" in kind else None,
        )

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [
        one(0, 5, "relu", "", dtype),
        one(1, 16, "gelu", "biases", wide),
        one(2, 3, "silu", "norm biases", wide),
        one(3, 9, "relu", "norm", dtype),
        one(4, 8, "gelu_tanh", "norm", dtype),
    ]


def inputs(dtype: torch.dtype, beside: bool) -> tuple[Tensor, Tensor | None, list[BottleneckParameters]]:
    features = K + 3 if beside else K
    x = testing.tensor(len(GROUPS), K, dtype=dtype)
    residual = testing.tensor(len(GROUPS), features, dtype=dtype, seed=1) if beside else None
    return x, residual, adapters(dtype, features)


def alone(x: Tensor, adapter: BottleneckParameters, residual: Tensor | None) -> Tensor:
    values = {field.name: getattr(adapter, field.name) for field in fields(adapter)}
    return pk.bottleneck(x, residual=residual, **values)


def leaves_of(adapters: Sequence[BottleneckParameters]) -> tuple[list[Tensor], list[BottleneckParameters]]:
    leaves, copies = [], []
    for one in adapters:
        with_grad = {name: t.detach().clone().requires_grad_() for name in PARAMETERS
                if (t := getattr(one, name)) is not None}  # fmt: skip
        leaves += with_grad.values()
        copies.append(replace(one, **with_grad))
    return leaves, copies


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("beside", [False, True])
def test_values_equal_single_adapters(backend: str, beside: bool, dtype: torch.dtype) -> None:
    x, residual, every = inputs(dtype, beside)
    before = x.clone(), GROUPS.clone()
    y = multi_bottleneck(x, every, GROUPS, residual)
    for row, group in enumerate(GROUPS.tolist()):
        one = slice(row, row + 1)
        beside_it = None if residual is None else residual[one]
        if group in range(len(every)):
            want = alone(x[one], every[group], beside_it)
        else:
            want = x[one] if beside_it is None else beside_it
        if backend.startswith("cpu"):
            assert torch.equal(y[one], want), row
        else:  # torch's GEMM may sum in another order for more rows
            assert testing.relative_error(y[one], want.double()) < 4 * torch.finfo(dtype).eps, row
    assert torch.equal(x, before[0]) and torch.equal(GROUPS, before[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("beside", [False, True])
def test_gradients_equal_single_adapters(backend: str, beside: bool, dtype: torch.dtype) -> None:
    x, residual, every = inputs(dtype, beside)
    leaves, with_grad = leaves_of(every)
    leaves += [t.requires_grad_() for t in (x, residual) if t is not None]
    y = multi_bottleneck(x, with_grad, GROUPS, residual)
    dy = testing.tensor(*y.shape, dtype=dtype, seed=3)
    got = torch.autograd.grad(y, leaves, dy)
    rows = [torch.nonzero(torch.eq(GROUPS, i))[:, 0] for i in range(len(every))]
    parts = [
        alone(x[r], one, None if residual is None else residual[r])
        for one, r in zip(with_grad, rows, strict=True)
    ]
    no_adapter = torch.tensor([2, 6])
    parts.append((x if residual is None else residual)[no_adapter])
    whole = torch.cat([*rows, no_adapter])
    want = torch.autograd.grad(torch.cat(parts), leaves, dy[whole], materialize_grads=True)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


CASES = testing.pairwise(
    groups=KINDS,
    beside=(False, True),
    biases=(True, False),
    dtype=(torch.bfloat16, torch.float16, torch.float32),
    parameters=("same", "fp32"),
    p=(0.0, 0.3, 1.0),
    m=(7, 130, 0),
    k=(33, 96),
    ranks=((5, 12, 8), (48,), (16, 4, 1, 20, 8, 130)),
)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_without_layer_norms(backend: str, case: dict[str, Any]) -> None:
    """Kernels that serve all adapters at once take none."""
    judge(case)


@pytest.mark.parametrize("large", BEYOND_FP16)
@pytest.mark.parametrize("activation,m", [("relu", 7), ("silu", 130)])
def test_single_bottlenecks_beyond_fp16(backend: str, activation: str, m: int, large: str) -> None:
    """Of z, dz or scaling times the value; with a norm, the layer norm's rows too."""
    ranges = BEYOND_FP16[large]
    case = {"dtype": torch.float16, "m": m, "k": 96, "r": 48, "p": 0.3, "biases": True, "beside": m == 7}
    case |= {"activation": activation, "parameters": ranges["adapter"], "large": ranges["large"]}
    for norm in (False, True):
        for name, (got, plain, truth) in test_bottleneck.results(case | {"norm": norm}).items():
            if in_range(truth, got.dtype) or name in ("y", "x", "residual"):
                testing.assert_close(got, plain, truth, name)


@pytest.mark.parametrize("large", BEYOND_FP16)
@pytest.mark.parametrize("m", [7, 130])
def test_bottlenecks_beyond_fp16(backend: str, m: int, large: str) -> None:
    ranges = BEYOND_FP16[large]
    case = case_of(dtype=torch.float16, m=m, beside=m == 7, parameters=ranges["adapter"])
    judge(case | {"large": ranges["large"]})


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("beside", [False, True])
def test_rows_of_no_adapter_are_copied(backend: str, beside: bool, dtype: torch.dtype) -> None:
    """To the bit, whatever x holds if there is a residual. So are their gradients."""
    case = case_of(dtype=dtype, beside=beside, m=45)
    x, residual, groups, *rest = arguments(case)["multi_bottleneck"]
    mine = (groups < 0) | (groups >= 3)
    kept = (x if residual is None else residual)[0, mine]
    kept[:, ::3], kept[:, 1::3] = 0.0, -0.0
    (x if residual is None else residual)[0, mine] = kept
    if residual is not None:
        x[0, mine] = torch.nan
    y = torch.ops.peft_kernels.multi_bottleneck(x, residual, groups, *rest)[0][0, mine]
    assert torch.equal(y, kept) and torch.equal(y.signbit(), kept.signbit())
    args = arguments(case)["multi_bottleneck_backward"]
    dx = torch.ops.peft_kernels.multi_bottleneck_backward(*args)[0][0, mine]
    assert mine.any() and torch.equal(dx, torch.zeros_like(dx) if beside else args[0][0, mine])


def test_only_trainable_tensors_get_a_gradient(backend: str) -> None:
    x, residual, every = inputs(torch.float32, True)
    leaves, with_grad = leaves_of(every)
    y = multi_bottleneck(x, with_grad, GROUPS, residual)
    everything = dict(zip(map(id, leaves), torch.autograd.grad(y.sum(), leaves), strict=True))
    for name in PARAMETERS:
        for leaf in leaves:
            leaf.requires_grad_(any(leaf is getattr(with_grad[i], name) for i in (1, 2)))
        trained = [leaf for leaf in leaves if leaf.requires_grad]
        assert trained, name
        got = torch.autograd.grad(multi_bottleneck(x, with_grad, GROUPS, residual).sum(), trained)
        for leaf, gradient in zip(trained, got, strict=True):
            assert torch.equal(gradient, everything[id(leaf)]), name


@pytest.mark.parametrize("leading", [(), (0,), (6,), (2, 3), (2, 0)], ids=str)
def test_leading_sizes_groups_of_32_bits_and_no_adapters(backend: str, leading: tuple[int, ...]) -> None:
    x = testing.tensor(*leading, K).requires_grad_()
    groups = torch.arange(x.numel() // K, dtype=torch.int32) % 3 - 1
    y = multi_bottleneck(x, adapters(torch.float32)[:2], groups)
    flat = multi_bottleneck(x.reshape(-1, K), adapters(torch.float32)[:2], groups.long())
    assert y.shape == x.shape and torch.equal(y, flat.reshape(x.shape))
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape and x.grad.isfinite().all()
    assert torch.equal(multi_bottleneck(x, [], groups), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_nothing_spreads_to_other_rows(backend: str, dtype: torch.dtype) -> None:
    """NaN in rows of one adapter, or of none, reaches neither results of the others nor their gradients."""
    case = case_of(dtype=dtype, m=70, beside=True)

    def results(spoilt: int | None) -> tuple[Tensor, Any, Any]:
        forward, backward = arguments(case).values()
        there = forward[2] == spoilt
        for t in (forward[0], *backward[:3]):
            t[0, there] = torch.nan
        ops = torch.ops.peft_kernels
        return ~there, ops.multi_bottleneck(*forward), ops.multi_bottleneck_backward(*backward)

    _, want, want_back = results(None)
    for spoilt in (1, -1):
        kept, got, got_back = results(spoilt)
        for a, b in zip((*got, got_back[0]), (*want, want_back[0]), strict=True):
            assert torch.equal(a[0, kept], b[0, kept])
        for a, b in zip(got_back[3:], want_back[3:], strict=True):
            assert all(torch.equal(a[i], b[i]) for i in range(3) if i != spoilt)


def test_other_rows_reach_no_gradient(backend: str) -> None:
    """Values in rows of other adapters, or of none, have no effect."""
    x, _, every = inputs(torch.float32, False)
    leaves, with_grad = leaves_of(every[:1])

    def gradients() -> Sequence[Tensor]:
        y = multi_bottleneck(x, with_grad + every[1:], GROUPS)
        return torch.autograd.grad(y[GROUPS == 0].sum(), leaves)

    clean = gradients()
    x[GROUPS != 0] = float("nan")
    assert all(map(torch.equal, gradients(), clean))


def test_dropout(backend: str) -> None:
    """Each adapter draws the mask that it draws alone."""
    x = testing.tensor(8, K)
    one = replace(adapters(torch.float32)[1], dropout_p=0.5)
    groups = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])
    torch.manual_seed(3)
    y = multi_bottleneck(x, [one, one], groups)
    torch.manual_seed(3)
    first, second = alone(x[::2], one, None), alone(x[1::2], one, None)
    assert torch.equal(y[::2], first) and torch.equal(y[1::2], second)
    assert not torch.equal(multi_bottleneck(x, [one, one], groups * 0), y)
    torch.manual_seed(3)
    same = multi_bottleneck(x[:2] * 0 + x[0], [one, one], groups[:2])
    assert not torch.equal(same[0], same[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_any_number_of_threads(backend: str, dtype: torch.dtype) -> None:
    if not backend.startswith("cpu"):
        pytest.skip(f"{backend}: torch's own functions may split their work by threads")

    def run() -> list[Tensor]:
        x, residual, every = inputs(dtype, True)
        leaves, with_grad = leaves_of(every)
        y = multi_bottleneck(x, with_grad, GROUPS, residual)
        return [y.detach(), *torch.autograd.grad(y.sum(), leaves)]

    same_with_any_threads(run)


def test_gradcheck() -> None:
    x, residual, every = inputs(torch.float64, True)
    every = [replace(one, activation="silu" if one.activation == "relu" else one.activation) for one in every]
    assert residual is not None
    leaves, _ = leaves_of(every)

    def call(x: Tensor, residual: Tensor, *values: Tensor) -> Tensor:
        left = iter(values)
        with_grad = [
            replace(one, **{name: next(left) for name in PARAMETERS if getattr(one, name) is not None})
            for one in every
        ]
        return multi_bottleneck(x, with_grad, GROUPS[:4], residual)

    with pk.use_backend("reference"):
        assert gradcheck(call, [x[:4].requires_grad_(), residual[:4].requires_grad_(), *leaves])


def test_compiled_and_transformed() -> None:
    x, _, every = inputs(torch.float32, False)
    want = multi_bottleneck(x, every, GROUPS)
    compiled: Any = torch.compile(
        lambda x, g: multi_bottleneck(x, every, g).sin(), backend="eager", fullgraph=True
    )
    assert torch.equal(compiled(x, GROUPS), want.sin())
    if torch.__version__ < (2, 10):
        return  # 2.9 has no tolist() of a result under torch.func
    got = torch.func.grad(lambda x: multi_bottleneck(x, every, GROUPS).square().sum())(x)
    x.requires_grad_()
    multi_bottleneck(x, every, GROUPS).square().sum().backward()
    assert x.grad is not None and testing.relative_error(got, x.grad) <= ONE_MODEL


def test_a_launch_per_adapter_each_way_in_triton() -> None:
    """And some for the gradients of factors, up to two in each; with a layer norm the op is composed."""
    require("triton")
    from peft_kernels.triton_kernels.core import launch

    noted: list[str] = []
    forward, backward = arguments(case_of(m=45)).values()
    with testing.running_on("triton"), launch.recording(lambda kernel, *_: noted.append(kernel.__name__)):
        torch.ops.peft_kernels.multi_bottleneck(*forward)
        assert noted == ["bottleneck_kernel"] * 3
        noted.clear()
        torch.ops.peft_kernels.multi_bottleneck_backward(*backward)
        assert noted == ["bottleneck_backward_kernel"] * 3 + ["over_rows_kernel"] * 3
        noted.clear()
        norms = [None, torch.ones(40), None]
        torch.ops.peft_kernels.multi_bottleneck(*forward[:3], norms, *forward[4:])
        assert noted == ["bottleneck_kernel"] * 2


ONE = BottleneckParameters(torch.ones(3, 6), torch.ones(6, 3))
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "down": (r"adapters\[1\].down: expected shape \(r, 6\), got \(3, 5\)",
             {"adapters": [ONE, replace(ONE, down=torch.ones(3, 5))]}),
    "bias": (r"adapters\[1\].up_bias: expected shape \(6,\), got \(3,\)",
             {"adapters": [ONE, replace(ONE, up_bias=torch.ones(3))]}),
    "width": (r"adapters\[0\].up: expected 6 output features like x, its residual, got 5",
              {"adapters": [replace(ONE, up=torch.ones(5, 3))]}),
    "groups": (r"row_group: expected int64 or int32 of shape \(2,\), got torch.int64 of shape \(3,\)",
               {"row_group": torch.zeros(3, dtype=torch.int64)}),
    "dtype": (r"row_group: expected int64 or int32 of shape \(2,\), got torch.float32 of shape \(2,\)",
              {"row_group": torch.zeros(2)}),
    "residual": ("residual: expected torch.float32 of shape", {"residual": torch.ones(3, 6), "adapters": []}),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    message, options = REFUSED[name]
    arguments = {"x": torch.ones(2, 6), "adapters": [ONE], "row_group": torch.tensor([0, 0])} | options
    with pytest.raises(ValueError, match=message):
        multi_bottleneck(**arguments)

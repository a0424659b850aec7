"""x wider than the dtype of the base GEMM, as in models quantised by bitsandbytes: against fp64, and against
Linear4bit and PEFT in plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lora_multi_cases import MultiCase, multi_case, multi_lora_case, named_gradients, named_outputs
from numbers_policy import assert_within_rounding, case_id, short
from rounding import ONE_LAYER
from torch import Tensor

import peft_kernels as pk
import testing
from peft_kernels import AdaptedLinear, Adapter

ops = torch.ops.peft_kernels
N, K, R, SCALING = 48, 96, 8, 0.8
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

CASES = testing.pairwise(
    m=(0, 1, 3, 9, 17, 70),
    k=(33, 96, 576),
    n=(1, 33, 100),
    layers=(1, 2, 3),
    adapters=("", "0", "010", "0120"),
    base=("dense", "nf4", "nested", "various"),
    bs=(32, 64),
    dtype=(FP32, BF16),
    compute=(BF16, FP16, FP32),
    adapter=("fp32", "same"),
    bias=("none", "same", "fp32"),
    layout=("contiguous", "3-d", "transposed"),
    p=(0.0, 0.5),
    groups=("none", "runs"),
    needs=("xab", "x", "some"),
)
CASES = [case | {"r": 8} for case in CASES if case["dtype"] != case["compute"]]
each_case = pytest.mark.parametrize("case", CASES, ids=case_id)


def check(c: MultiCase, got: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    """Base GEMM results may be off by roundings in its dtype; the adapters' sums may not."""
    for name, value in got.items():
        testing.assert_close(value, plain[name], c.truth[name], name)
        of_base = name[0] == "y" or name == "dx"
        product = c.case["compute"] if of_base else value.dtype
        assert_within_rounding(value, c.truth[name], c.magnitude[name], c.depth, name, product)


@each_case
def test_multi_lora_linear(backend: str, case: dict[str, Any]) -> None:
    c = multi_lora_case(case)
    check(c, named_outputs(*ops.multi_lora_linear(*c.forward_args)), c.plain_outputs)


@each_case
def test_multi_lora_linear_backward(backend: str, case: dict[str, Any]) -> None:
    c, needs = multi_lora_case(case), case["needs"]
    args = c.backward_args(c.truth["h"].float(), needs)
    check(c, named_gradients(c, needs, *ops.multi_lora_linear_backward(*args)), c.plain_gradients)


def test_bias_dtypes(backend: str) -> None:
    """x's dtype, the base GEMM's and fp32 are accepted; others raise, in the op too."""
    for dtype, compute in ((FP32, BF16), (BF16, FP16), (BF16, FP32)):
        c = MultiCase(multi_case(dtype=dtype, compute=compute, bias="fp32", adapters="0", layers=1))
        exact, at = c.bias[0].to(BF16).to(FP16), 7  # exact in every dtype
        assert c.forward_args[at] is c.bias
        results = []
        for bias in (exact.to(dtype), exact.to(compute), exact.float()):
            (y,), _ = ops.multi_lora_linear(*c.forward_args[:at], [bias], *c.forward_args[at + 1 :])
            results.append(y)
        assert all(torch.equal(y, results[0]) for y in results)
    x, weight = testing.tensor(3, K), testing.nf4_weight(N, K)
    with pytest.raises(
        ValueError, match=r"bias: expected torch.float32 like x, torch.bfloat16 or float32, got"
    ):
        pk.nf4_linear(x, weight, testing.tensor(N, dtype=FP16), compute_dtype=BF16)


def leaves(dtype: torch.dtype, base: str, bias: torch.dtype | None) -> dict[str, Any]:
    dense = testing.tensor(N, K, dtype=BF16, seed=1, scale=K**-0.5)
    return {
        "x": testing.tensor(5, 3, K, dtype=dtype, seed=2).requires_grad_(),
        "weight": dense.requires_grad_() if base == "dense" else testing.nf4_weight(N, K),
        "bias": None if bias is None else testing.tensor(N, dtype=bias, seed=5).requires_grad_(),
        "lora_a": testing.tensor(R, K, seed=3, scale=K**-0.5).requires_grad_(),
        "lora_b": testing.tensor(N, R, seed=4, scale=R**-0.5).requires_grad_(),
        "magnitude": testing.tensor(N, seed=6).abs().add(0.5).requires_grad_(),
    }


def dense_of(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.dequantize(dtype) if isinstance(weight, pk.NF4Weight) else weight.to(dtype)


def base_of(v: dict[str, Any], x: Tensor, compute: torch.dtype | None, bias: bool = True) -> Tensor:
    """Linear4bit's forward: x, weight and bias in the compute dtype, the result in x's."""
    compute, b = compute or x.dtype, v["bias"] if bias else None
    weight = dense_of(v["weight"], FP32 if compute == torch.float64 else compute).to(compute)
    return F.linear(x.to(compute), weight, None if b is None else b.to(compute)).to(x.dtype)


def stock(kind: str, v: dict[str, Any], compute: torch.dtype | None) -> Tensor:
    """bitsandbytes' layer within PEFT's."""
    x = v["x"]
    if kind == "nf4_linear":
        return base_of(v, x, compute)
    delta = F.linear(F.linear(x, v["lora_a"].to(x.dtype)), v["lora_b"].to(x.dtype)) * SCALING
    if kind == "lora_linear":
        return base_of(v, x, compute) + delta
    acc = torch.float64 if x.dtype == torch.float64 else FP32
    weight = dense_of(v["weight"], FP32).detach().to(acc)
    norm = (weight + SCALING * v["lora_b"].detach() @ v["lora_a"].detach()).norm(dim=1)
    scale = v["magnitude"] / norm
    whole = base_of(v, x, compute)
    return whole + (scale - 1) * base_of(v, x, compute, bias=False) + scale * delta


def ours(kind: str, v: dict[str, Any], compute: torch.dtype) -> Tensor:
    if kind == "nf4_linear":
        return pk.nf4_linear(v["x"], v["weight"], v["bias"], compute_dtype=compute)
    rest = (SCALING, v["bias"], 0.0, compute)
    if kind == "lora_linear":
        return pk.lora_linear(v["x"], v["weight"], v["lora_a"], v["lora_b"], *rest)
    return pk.dora_linear(v["x"], v["weight"], v["lora_a"], v["lora_b"], v["magnitude"], *rest)


def gradients(y: Tensor, v: dict[str, Any]) -> dict[str, Tensor | None]:
    wanted = {name: t for name, t in v.items() if t is not None and t.requires_grad}
    dy = testing.tensor(*y.shape, seed=7).to(y.dtype)
    found = torch.autograd.grad(y, list(wanted.values()), dy, allow_unused=True)
    return dict(zip(wanted, found, strict=True))


def wide(v: dict[str, Any]) -> dict[str, Any]:
    return {
        name: t if t is None or isinstance(t, pk.NF4Weight) else t.detach().double().requires_grad_()
        for name, t in v.items()
    }


@pytest.mark.parametrize("bias", [None, FP32, BF16], ids=["none", "fp32", "bf16"])
@pytest.mark.parametrize("base", ["nested", "dense"])
@pytest.mark.parametrize("kind", ["nf4_linear", "lora_linear", "dora_linear"])
def test_like_bitsandbytes_under_peft(backend: str, kind: str, base: str, bias: Any) -> None:
    """Outputs and all gradients are as close to fp64 as the stock layers'."""
    if kind == "nf4_linear" and base == "dense":
        base = "nested"
    v = leaves(FP32, base, bias)
    exact = wide(v)
    y, plain, truth = ours(kind, v, BF16), stock(kind, v, BF16), stock(kind, exact, None)
    assert y.dtype == FP32
    testing.assert_close(y.detach(), plain.detach(), truth.detach(), "y")
    got, want, true = gradients(y, v), gradients(plain, v), gradients(truth, exact)
    for name, value in got.items():
        assert (value is None) == (want[name] is None), name
        if value is not None:
            assert value.dtype == v[name].dtype
            testing.assert_close(value, want[name], true[name], f"gradient of {name}")


def test_delta_uses_the_unrounded_x(backend: str) -> None:
    """h, and with it dB, is computed from the unrounded x."""
    v = leaves(FP32, "nested", None)
    _, h = ops.lora_linear(
        v["x"], *v["weight"]._state.op_args, None, v["lora_a"], v["lora_b"], SCALING, 0.0, None, BF16
    )
    truth = v["x"].double() @ v["lora_a"].double().t()
    assert testing.relative_error(h, truth) < ONE_LAYER
    assert testing.relative_error(v["x"].bfloat16().double() @ v["lora_a"].double().t(), truth) > 1e-4


def layer(n: int, k: int, seed: int) -> AdaptedLinear:
    a = testing.tensor(R, k, seed=seed, scale=k**-0.5).requires_grad_()
    b = testing.tensor(n, R, seed=seed + 1, scale=R**-0.5).requires_grad_()
    bias = testing.tensor(n, seed=seed + 2).requires_grad_()
    return AdaptedLinear(testing.nf4_weight(n, k, seed=seed), bias, [Adapter(a, b, SCALING)])


def test_gated_mlp_uses_the_compute_dtype_throughout(backend: str) -> None:
    """Bit-equal to a call with x cast to the compute dtype."""
    mlp = [layer(N, K, 1), layer(N, K, 11), layer(K, N, 21)]
    x = testing.tensor(6, K).requires_grad_()
    y = pk.gated_mlp(x, *mlp, compute_dtype=BF16)
    want = pk.gated_mlp(x.bfloat16(), *mlp).float()
    assert y.dtype == FP32 and torch.equal(y, want)
    trained = [x, *(t for item in mlp for t in (item.bias, item.adapters[0].lora_a, item.adapters[0].lora_b))]
    dy = testing.tensor(6, K, seed=9)
    for got, expected in zip(
        torch.autograd.grad(y, trained, dy), torch.autograd.grad(want, trained, dy), strict=True
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("kind", ["lora_linear", "multi_lora_linear", "dora_linear", "gated_mlp"])
def test_x_is_saved_once(backend: str, kind: str) -> None:
    """No 16-bit copy of x is saved as well; a gated MLP saves only that copy."""
    rows, mlp = 64, [layer(N, K, 1), layer(N, K, 11), layer(K, N, 21)]
    x, item = testing.tensor(rows, K).requires_grad_(), mlp[0]
    adapter, magnitude = item.adapters[0], torch.ones(N).requires_grad_()
    rest = (item.weight, adapter.lora_a, adapter.lora_b)
    calls = {
        "lora_linear": lambda: pk.lora_linear(x, *rest, SCALING, compute_dtype=BF16),
        "multi_lora_linear": lambda: pk.multi_lora_linear(x, mlp[:2], compute_dtype=BF16),
        "dora_linear": lambda: pk.dora_linear(x, *rest, magnitude, SCALING, compute_dtype=BF16),
        "gated_mlp": lambda: pk.gated_mlp(x, *mlp, compute_dtype=BF16),
    }
    there = [magnitude, *(t for m in mlp for t in (m.weight, m.adapters[0].lora_a, m.adapters[0].lora_b))]
    h = rows * R * 4
    expected = {
        "lora_linear": 4 * rows * K + h,
        "multi_lora_linear": 4 * rows * K + 2 * h,
        "dora_linear": 4 * rows * K + h + 4 * rows * N + 2 * 4 * N,  # plus the scale and the norm
        "gated_mlp": 2 * rows * (K + 2 * N) + 3 * h,
    }[kind]
    assert testing.saved_bytes(calls[kind], there) == expected


@pytest.mark.parametrize("compute", [torch.float64, torch.int8, torch.float8_e4m3fn], ids=short)
def test_other_compute_dtypes_are_refused(compute: torch.dtype) -> None:
    v, mlp = leaves(FP32, "nested", None), [layer(N, K, 1), layer(N, K, 11), layer(K, N, 21)]
    sentence = (
        r"^compute_dtype: expected torch\.float32, torch\.bfloat16 or torch\.float16, "
        rf"got {compute!s}$"
    )
    for kind in ("nf4_linear", "lora_linear", "dora_linear"):
        with pytest.raises(ValueError, match=sentence):
            ours(kind, v, compute)
    for call in (
        lambda: pk.multi_lora_linear(v["x"], mlp[:2], compute_dtype=compute),
        lambda: pk.gated_mlp(v["x"], *mlp, compute_dtype=compute),
    ):
        with pytest.raises(ValueError, match=sentence):
            call()


def test_dense_weight_must_have_the_compute_dtype() -> None:
    x, w = testing.tensor(3, K), testing.tensor(N, K)
    a, b = testing.tensor(R, K), testing.tensor(N, R)
    with pytest.raises(
        ValueError, match=r"^weight: expected torch.bfloat16 like compute_dtype, got torch.float32$"
    ):
        pk.lora_linear(x, w, a, b, 1.0, compute_dtype=BF16)
    with pytest.raises(ValueError, match=r"^weight: expected torch.float32 like x, got torch.bfloat16$"):
        pk.lora_linear(x, w.bfloat16(), a, b, 1.0)
    sizes = ((N, K, FP32), (N, K, BF16), (K, N, BF16))
    mlp = [AdaptedLinear(testing.tensor(n, k, dtype=dtype)) for n, k, dtype in sizes]
    with pytest.raises(ValueError, match=r"^weight: expected torch.bfloat16 like compute_dtype, got torch.f"):
        pk.gated_mlp(x, *mlp, compute_dtype=BF16)
    mlp[0] = AdaptedLinear(w.bfloat16(), None, [Adapter(a.half(), b, 1.0)])
    with pytest.raises(
        ValueError, match=r"^lora_a: expected torch.bfloat16 like compute_dtype or float32, got torch.float16"
    ):
        pk.gated_mlp(x, *mlp, compute_dtype=BF16)


def test_bias_dtypes_of_a_gated_mlp(backend: str) -> None:
    x, results = testing.tensor(3, K, dtype=FP16), []
    for dtype in (FP16, BF16, FP32):
        mlp = [layer(N, K, 1), layer(N, K, 11), layer(K, N, 21)]
        for item in mlp:
            assert item.bias is not None
            item.bias = item.bias.detach().to(BF16).to(FP16).to(dtype)  # exact in all of them
        results.append(pk.gated_mlp(x, *mlp, compute_dtype=BF16))
    assert results[0].dtype == FP16 and all(torch.equal(y, results[0]) for y in results)


def test_merged_weight_is_rounded_to_the_compute_dtype(backend: str) -> None:
    """An NF4 weight that was made dense is used in the compute dtype like a packed one."""
    v = leaves(FP32, "nested", FP32)
    want = ours("nf4_linear", v, BF16)
    v["weight"].add_(0.0)
    assert v["weight"]._state.dense is not None
    got = ours("nf4_linear", v, BF16)
    assert got.dtype == FP32 and torch.equal(got, got.bfloat16().float())
    assert testing.relative_error(got, want) < 0.01


@pytest.mark.parametrize("kind", ["nf4_linear", "lora_linear", "dora_linear"])
def test_compiled(kind: str) -> None:
    torch.compiler.reset()
    v = leaves(FP32, "nested", BF16)
    compiled = torch.compile(lambda x: ours(kind, v | {"x": x}, BF16), fullgraph=True, backend="aot_eager")
    y, got = ours(kind, v, BF16), compiled(v["x"])
    assert testing.relative_error(got, y) <= ONE_LAYER
    for g, w in zip(gradients(got, v).values(), gradients(y, v).values(), strict=True):
        assert (g is None) == (w is None)
        assert g is None or w is None or testing.relative_error(g, w) <= ONE_LAYER

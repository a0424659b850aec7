"""rms_norm and its gradients on every back end, against transformers' norms and fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numbers_policy import DTYPES, check_odd_addresses, each_dtype, same_with_any_threads, short, transposed
from skips import require
from test_gradient_needs import saved_by
from torch import Tensor

import peft_kernels as pk
import testing
from peft_kernels.core.backends import BACKENDS

ops = torch.ops.peft_kernels
EPS = 1e-5
SHAPES: dict[str, tuple[int, ...]] = {
    "no-rows": (0, 5), "one": (1, 1), "vector": (33,), "odd": (3, 7), "lanes": (5, 64), "chains": (70, 333),
    "chunks": (2, 65, 100),
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("nan_outputs")


KINDS: dict[str, dict[str, Any]] = {
    "llama": {}, "gemma": {"offset": 1.0, "casting": "gemma"}, "olmo2": {"casting": "gemma"},
}  # fmt: skip


def stock(x: Tensor, weight: Tensor, eps: float = EPS, offset: float = 0.0, casting: str = "llama") -> Tensor:
    """LlamaRMSNorm rounds to x's dtype and then multiplies by the weight; GemmaRMSNorm and Olmo2RMSNorm
    multiply, then round. All compute in fp32, or in fp64 if x is fp64."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if casting == "gemma":
        return (normed * (offset + weight.to(normed.dtype))).to(x.dtype)
    return weight * normed.to(x.dtype)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, of_weight: torch.dtype) -> tuple[Tensor, ...]:
    x = testing.tensor(*shape, dtype=dtype, seed=1, scale=3.0)
    weight = 1 + 0.3 * testing.tensor(shape[-1], seed=2)
    result = torch.promote_types(dtype, of_weight)
    return x, weight.to(of_weight), testing.tensor(*shape, dtype=result, seed=3)


def results(forward: Any, x: Tensor, weight: Tensor, dy: Tensor) -> dict[str, Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, weight)]
    y = forward(*leaves)
    dx, dweight = torch.autograd.grad(y, leaves, dy)
    return {"y": y.detach(), "dx": dx, "dweight": dweight}


def check(got: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    for name, value in got.items():
        assert value.dtype == plain[name].dtype and value.shape == plain[name].shape, name
        assert value.is_contiguous()
        testing.assert_close(value, plain[name], truth[name], name)


@each_dtype
@pytest.mark.parametrize("of_weight", DTYPES, ids=lambda dtype: f"by_{short(dtype)}")
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(backend: str, shape: str, dtype: torch.dtype, of_weight: torch.dtype) -> None:
    given = inputs(SHAPES[shape], dtype, of_weight)
    before = [t.clone() for t in given]
    got = results(lambda x, weight: pk.rms_norm(x, weight, EPS), *given)
    plain, truth = results(stock, *given), results(stock, *(t.double() for t in given))
    for name, value in got.items():
        assert value.dtype == plain[name].dtype and value.shape == plain[name].shape, name
        assert value.is_contiguous()
        # dx is a difference: in a row of one feature only roundings remain.
        if value.numel() > 60:
            testing.assert_close(value, plain[name], truth[name], name)
        elif shape != "one":
            bound = 4 * max(torch.finfo(t).eps for t in (dtype, value.dtype))
            size = truth[name].abs().max() if value.numel() else 0.0
            assert torch.allclose(value.double(), truth[name], rtol=bound, atol=bound * float(size)), name
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True)), "an input was changed"


@pytest.mark.parametrize("of_weight", [torch.bfloat16, torch.float32], ids=short)
def test_x_over_rms_is_rounded(backend: str, of_weight: torch.dtype) -> None:
    """To x's dtype, before the weight: all but a few elements, in rows whose sums round differently, have
    stock's bits. Without that rounding many would differ."""
    x, weight, _ = inputs((64, 576), torch.bfloat16, of_weight)
    got, want = pk.rms_norm(x, weight, EPS), stock(x, weight)
    assert (got != want).double().mean() < 0.01


def test_the_gradient_of_the_weight_takes_the_rounded_x_over_rms(backend: str) -> None:
    """Over one row nothing is summed."""
    x, weight, dy = inputs((1, 576), torch.bfloat16, torch.float32)
    rounded = pk.rms_norm(x, torch.ones(576, dtype=torch.bfloat16), EPS)
    assert torch.equal(
        results(lambda *args: pk.rms_norm(*args, EPS), x, weight, dy)["dweight"], (dy * rounded)[0]
    )


@each_dtype
@pytest.mark.parametrize("kind", ["gemma", "olmo2"])
def test_other_castings(backend: str, kind: str, dtype: torch.dtype) -> None:
    """Only the result is rounded: nearly all elements have stock's bits."""
    options = KINDS[kind]
    x, weight, _ = inputs(SHAPES["chains"], dtype, dtype)
    dy = testing.tensor(*x.shape, dtype=dtype, seed=3)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return stock(x, weight, **options)

    got = results(lambda *args: pk.rms_norm(*args, EPS, **options), x, weight, dy)
    wanted, truth = results(plain, x, weight, dy), results(plain, *(t.double() for t in (x, weight, dy)))
    check(got, wanted, truth)
    if dtype != torch.float32:
        assert (got["y"] != wanted["y"]).double().mean() < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=short)
@pytest.mark.parametrize("of_x", [torch.float32, torch.bfloat16], ids=lambda dtype: f"of_{short(dtype)}")
def test_results_of_another_dtype(backend: str, of_x: torch.dtype, dtype: torch.dtype) -> None:
    """Bit-equal to a cast after the op, forward and backward."""
    x, weight, dy = inputs((70, 333), of_x, torch.float32)
    dy = dy.to(dtype)
    if dtype not in (of_x, torch.float32) and of_x != torch.float32:
        with pytest.raises(ValueError, match=r"dtype: expected torch\.float32 or torch\.bfloat16 like x"):
            pk.rms_norm(x, weight, EPS, dtype=dtype)
        return
    got = results(lambda *args: pk.rms_norm(*args, EPS, dtype=dtype), x, weight, dy)
    want = results(lambda *args: pk.rms_norm(*args, EPS).to(dtype), x, weight, dy)
    for name, value in got.items():
        assert value.dtype == (dtype if name == "y" else want[name].dtype) and torch.equal(
            value, want[name]
        ), name


def sums(forward: Any, x: Tensor, residual: Tensor, weight: Tensor, *grads: Tensor) -> dict[str, Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, residual, weight)]
    y, summed = forward(*leaves)
    dx, dresidual, dweight = torch.autograd.grad((y, summed), leaves, grads)
    found = {"y": y, "sum": summed, "dx": dx, "dresidual": dresidual, "dweight": dweight}
    return {name: value.detach() for name, value in found.items()}


def added(x: Tensor, residual: Tensor, weight: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    summed = x + residual
    return stock(summed, weight, **options), summed


@each_dtype
@pytest.mark.parametrize("of_residual", DTYPES, ids=lambda dtype: f"to_{short(dtype)}")
@pytest.mark.parametrize("kind", KINDS)
def test_add_rms_norm(backend: str, kind: str, of_residual: torch.dtype, dtype: torch.dtype) -> None:
    """Also with two dtypes, such as a branch under autocast and an fp32 residual stream."""
    options = KINDS[kind]
    total = torch.promote_types(dtype, of_residual)
    for shape in ("odd", "chains", "chunks"):
        x, weight, dy = inputs(SHAPES[shape], dtype, total)
        given = x, testing.tensor(*x.shape, dtype=of_residual, seed=4), weight, dy.to(total)
        given = *given, testing.tensor(*x.shape, dtype=total, seed=5)
        before = [t.clone() for t in given]
        got = sums(lambda *args: pk.add_rms_norm(*args, EPS, **options), *given)
        plain = sums(lambda *args: added(*args, **options), *given)
        truth = sums(lambda *args: added(*args, **options), *(t.double() for t in given))
        assert torch.equal(got["sum"], plain["sum"])
        if shape != "odd":
            check(got, plain, truth)
        assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True)), "an input was changed"


def test_the_sum_is_rounded_before_the_norm(backend: str) -> None:
    x, weight, residual = inputs((64, 576), torch.bfloat16, torch.float32)
    y, summed = pk.add_rms_norm(x, residual.bfloat16(), weight, EPS, casting="gemma")
    assert (y != pk.rms_norm(summed, weight, EPS, casting="gemma")).double().mean() < 0.01


def test_add_rms_norm_under_autocast(backend: str) -> None:
    """A bf16 branch and an fp32 residual stream, normalised for bf16 projections."""
    x, weight, _ = inputs((70, 576), torch.bfloat16, torch.float32)
    residual = testing.tensor(70, 576, seed=4)
    got = pk.add_rms_norm(x, residual, weight, EPS, dtype=torch.bfloat16)
    want = pk.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(got[0], want[0].bfloat16()) and torch.equal(got[1], want[1])
    assert got[0].dtype == torch.bfloat16 and got[1].dtype == torch.float32


@pytest.mark.parametrize("used", ["y", "sum", "neither"])
def test_unused_result(backend: str, used: str) -> None:
    """Its gradient is None and is not computed."""
    x, weight, dy = inputs((70, 40), torch.float32, torch.float32)
    leaves = [t.clone().requires_grad_() for t in (x, 2 * x, weight)]
    y, summed = pk.add_rms_norm(*leaves, EPS)
    if used == "neither":
        assert y.requires_grad and summed.requires_grad
        return
    got = torch.autograd.grad(y if used == "y" else summed, leaves, dy, allow_unused=True)
    if used == "sum":
        assert torch.equal(got[0], dy) and torch.equal(got[1], dy)
        assert got[2] is None or not got[2].any()
    else:
        want = results(lambda *args: pk.rms_norm(*args, EPS), 3 * x, weight, dy)
        for value, name in zip(got, ("dx", "dx", "dweight"), strict=True):
            torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-6)


def test_add_rms_norm_saves_the_sum_alone(backend: str) -> None:
    x, weight, _ = inputs((70, 33), torch.bfloat16, torch.float32)
    residual = testing.tensor(70, 33, seed=4).requires_grad_()
    _, saved = saved_by(lambda: pk.add_rms_norm(x.requires_grad_(), residual, weight, EPS))
    assert [(t.numel(), t.dtype) for t in saved] == [
        (33, torch.float32), (70 * 33, torch.float32), (70, torch.float32)
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
def test_the_gradient_of_the_sum_is_added_before_dx_is_rounded(backend: str, dtype: torch.dtype) -> None:
    """Where the two cancel, rounding dx first would lose the difference."""
    x, weight, dy = inputs((70, 333), dtype, torch.float32)
    rstd = (x.double().square().mean(-1) + EPS).rsqrt()
    op, how = torch.ops.peft_kernels.rms_norm_backward, (0.0, False, True, False)
    rounded, _ = op(dy, x, weight, rstd.float(), None, *how)
    got, _ = op(dy, x, weight, rstd.float(), -rounded, *how)
    normed, d = x.double() * rstd[:, None], dy.double() * weight.double()
    truth = rstd[:, None] * (d - normed * (d * normed).mean(-1, keepdim=True)) - rounded.double()
    assert testing.relative_error(got, truth) < 0.01


def test_eps_counts(backend: str) -> None:
    small = testing.tensor(4, 50, scale=1e-3)
    for eps in (0.0, 1e-6, 1e-2):
        got, want = pk.rms_norm(small, torch.ones(50), eps), stock(small.double(), torch.ones(50), eps)
        assert testing.relative_error(got, want) < 1e-6
    assert not pk.rms_norm(torch.zeros(2, 50), torch.ones(50)).any()


def test_rows_do_not_mix(backend: str) -> None:
    """NaN stays in its row, except in the sum over rows."""
    x, weight, dy = inputs((70, 40), torch.float32, torch.float32)
    clean = results(pk.rms_norm, x, weight, dy)
    for bad in (float("nan"), float("inf")):
        wrong = x.clone()
        wrong[3, 7] = bad
        got = results(pk.rms_norm, wrong, weight, dy)
        others = [i for i in range(70) if i != 3]
        for name in ("y", "dx"):
            assert torch.equal(got[name][others], clean[name][others])
            assert got[name][3].isnan().any()


@each_dtype
def test_only_trainable_tensors_get_a_gradient(backend: str, dtype: torch.dtype) -> None:
    x, weight, dy = inputs((70, 33), dtype, torch.float32)
    want = results(pk.rms_norm, x, weight, dy)
    for x_trained in (True, False):
        leaves = x.clone().requires_grad_(x_trained), weight.clone().requires_grad_(not x_trained)
        y, saved = saved_by(lambda leaves=leaves: pk.rms_norm(*leaves))
        y.backward(dy)
        got = leaves[0 if x_trained else 1].grad
        assert got is not None and torch.equal(got, want["dx" if x_trained else "dweight"])
        assert leaves[1 if x_trained else 0].grad is None
        assert [t.numel() for t in saved] == [x.numel(), 33, 70]  # and an fp32 value per row
        frozen = ops.rms_norm_backward(dy, x, weight, saved[2], None, 0.0, True, x_trained, not x_trained)
        assert [t.numel() > 0 for t in frozen] == [x_trained, not x_trained]


def test_rms_norm_reads_views(backend: str) -> None:
    x, weight, dy = inputs((70, 35), torch.float32, torch.float32)
    want = results(pk.rms_norm, x, weight, dy)
    wide = torch.stack((weight, weight), 1)[:, 0]
    for given in ((transposed(x), weight, transposed(dy)), (x, wide, dy), (x, weight, dy[:1].expand(70, 35))):
        got = results(pk.rms_norm, *given)
        if backend.startswith("cpu"):  # torch's sums depend on the memory layout
            assert torch.equal(got["y"], want["y"])
        assert all(t.is_contiguous() for t in got.values())
        if given[2] is not dy:
            continue
        for name in want:
            torch.testing.assert_close(got[name], want[name])


@each_dtype
def test_rms_norm_at_odd_addresses(backend: str, dtype: torch.dtype) -> None:
    x, weight, dy = inputs((24, 64), dtype, dtype)
    how = EPS, 0.0, True, dtype
    check_odd_addresses(backend, lambda *args: ops.rms_norm(*args, *how), (x, weight))
    check_odd_addresses(backend, lambda *args: ops.add_rms_norm(*args, *how), (x, dy, weight))
    rstd = ops.rms_norm(x, weight, *how)[1]

    def backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, add: Tensor) -> Any:
        return ops.rms_norm_backward(dy, x, weight, rstd, add, 0.0, True, True, True)

    check_odd_addresses(backend, backward, (dy, x, weight, rstd, x + 1))


def test_rms_norm_with_any_threads(backend: str) -> None:
    if backend == "reference":
        pytest.skip("reference: torch's own functions may split their work by threads")
    x, weight, dy = inputs((1000, 333), torch.bfloat16, torch.float32)
    same_with_any_threads(lambda: results(pk.rms_norm, x, weight, dy).values())


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "shape": (r"x: expected shape \(\.\.\., 8\), got \(3, 7\)", {"x": torch.ones(3, 7)}),
    "scalar": (r"x: expected shape \(\.\.\., 8\), got \(\)", {"x": torch.ones(())}),
    "integers": ("x: expected a floating dtype, got torch.int64", {"x": torch.ones(3, 8).long()}),
    "weight": (r"weight: expected shape \(features,\), got \(8, 1\)", {"weight": torch.ones(8, 1)}),
    "weight-dtype": ("weight: expected a floating dtype, got torch.int32", {"weight": torch.ones(8).int()}),
    "device": ("weight: expected device cpu like x, got meta", {"weight": torch.ones(8, device="meta")}),
    "eps": ("eps: expected a number that is not negative, got -1.0", {"eps": -1.0}),
    "nan": ("eps: expected a number that is not negative, got nan", {"eps": float("nan")}),
    "casting": ("casting: expected one of llama, gemma, got 'fp32'", {"casting": "fp32"}),
    "dtype": (
        "dtype: expected torch.float32 or torch.float32 like x, got torch.int64",
        {"dtype": torch.long},
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rms_norm_refuses(case: str) -> None:
    message, wrong = REFUSED[case]
    given: dict[str, Any] = {"x": torch.ones(3, 8), "weight": torch.ones(8), "eps": EPS}
    with pytest.raises(ValueError, match=message):
        pk.rms_norm(**given | wrong)


@pytest.mark.parametrize(
    "residual, message",
    [
        (torch.ones(8), r"residual: expected shape \(3, 8\) like x, got \(8,\)"),
        (torch.ones(3, 8).int(), "residual: expected a floating dtype, got torch.int32"),
        (torch.ones(3, 8, device="meta"), "residual: expected device cpu like x, got meta"),
    ],
    ids=["shape", "dtype", "device"],
)
def test_add_rms_norm_refuses(residual: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pk.add_rms_norm(torch.ones(3, 8), residual, torch.ones(8))


@pytest.mark.parametrize("name", ["cpu", "ptx"])
def test_compiled_op_refuses(name: str) -> None:
    """The op itself checks for memory safety, not only the typed call."""
    require(name)
    raw: Any = getattr(torch.ops, BACKENDS[name].namespace)
    x, weight, rstd = torch.ones(3, 8), torch.ones(8), torch.ones(3)
    how, rest = (EPS, 0.0, True, torch.float32), (None, 0.0, True, True, True)
    for message, call in (
        ("x: expected 7 features, got 8", lambda: raw.rms_norm(x, torch.ones(7), *how)),
        (r"weight: expected shape \(features,\)", lambda: raw.rms_norm(x, torch.ones(8, 1), *how)),
        ("x: expected float32, bfloat16 or float16", lambda: raw.rms_norm(x.double(), weight, *how)),
        (
            "dtype: expected float32, bfloat16 or",
            lambda: raw.rms_norm(x, weight, *how[:3], torch.double),
        ),
        (
            "dtype: expected Float or Half like x",
            lambda: raw.rms_norm(x.half(), weight, *how[:3], torch.bfloat16),
        ),
        (r"residual: expected shape \[3, 8\]", lambda: raw.add_rms_norm(x, x[:2], weight, *how)),
        ("x: expected 7 features, got 8", lambda: raw.add_rms_norm(x, x, torch.ones(7), *how)),
        (r"dy: expected shape \[3, 8\]", lambda: raw.rms_norm_backward(x[:2], x, weight, rstd, *rest)),
        (
            "dy: expected Float or",
            lambda: raw.rms_norm_backward(x.half(), x.bfloat16(), weight, rstd, *rest),
        ),
        (r"rstd: expected shape \[3\]", lambda: raw.rms_norm_backward(x, x, weight, rstd[:2], *rest)),
        ("add: expected Float", lambda: raw.rms_norm_backward(x, x, weight, rstd, x.half(), *rest[1:])),
        (
            r"add: expected shape \[3, 8\]",
            lambda: raw.rms_norm_backward(x, x, weight, rstd, x[:2], *rest[1:]),
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()

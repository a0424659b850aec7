"""The ops of a head's loss on every back end, against their definition in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loss_cases import IGNORED, OPTIONS, defined, labels_of, results_of, weight_of, wide
from numbers_policy import DTYPES, case_id, each_dtype, same_with_any_threads, short
from rounding import ONE_LAYER
from torch import Tensor
from torch.autograd import gradcheck

import peft_kernels as pk
import testing

SIZES = ((64, 5, 33), (64, 1, 32), (7, 700, 7), (1, 513, 96), (70, 1500, 64), (300, 1030, 64), (0, 40, 32))
"""Rows, vocabulary, hidden size: about the borders of pieces, of parts and of tasks."""

SLOW = ("ptx", "triton")
"""Back ends that run in an interpreter."""

pytestmark = pytest.mark.usefixtures("nan_outputs")

CASES = testing.pairwise(
    size=SIZES,
    dtype=DTYPES,
    base=("dense", "nested", "plain"),
    bias=("none", "same", "fp32"),
    options=(*OPTIONS,),
)


@pytest.mark.parametrize("case", CASES, ids=map(case_id, CASES))
def test_loss_and_gradient_of_a_frozen_head(backend: str, case: dict[str, Any]) -> None:
    rows, vocabulary, _ = case["size"]
    if backend == "triton" and rows > 100:
        pytest.skip("triton: each row is a program of its own, as where they are fewer")
    if backend == "ptx" and case["base"] != "dense" and rows * vocabulary > 10_000:
        pytest.skip("ptx: made of products that have their tests")
    for name, (got, plain, truth) in results_of(case).items():
        if vocabulary > 1:
            testing.assert_close(got, plain, truth, name)
        else:  # certain, whatever the logit; that is rounded, up to a cap of 5
            near = 16 * torch.finfo(case["dtype"]).eps
            torch.testing.assert_close(got, truth.to(got.dtype), atol=near, rtol=near, msg=name)


@each_dtype
@pytest.mark.parametrize("kind", ["frozen", "dense", "bias", "adapter", "all", "adapter-nf4"])
@pytest.mark.parametrize("options", ["plain", "all"])
def test_gradients_of_a_head_that_is_trained(
    backend: str, dtype: torch.dtype, kind: str, options: str
) -> None:
    for name, (got, plain, truth) in head_gradients(dtype, kind, options).items():
        # A label's row of lora_b's gradient is that of one logit, rounded to `dtype`, times a row of fp32.
        testing.assert_close(got, plain, truth, name, product=dtype)


def head_gradients(dtype: torch.dtype, kind: str, options: str) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Gradients of what is trained: the kernel's, plain torch's and those in fp64."""
    rows, vocabulary, features, r = 24, 600, 64, 4
    leaves: dict[str, Tensor] = {"hidden": testing.tensor(rows, features, dtype=dtype)}
    frozen = weight_of("nested" if "nf4" in kind else "dense", vocabulary, features, dtype)
    leaves["weight"] = frozen
    leaves["bias"] = testing.tensor(vocabulary, dtype=dtype, seed=3)
    if kind in ("adapter", "all", "adapter-nf4"):
        leaves["lora_a"] = testing.tensor(r, features, seed=4, scale=features**-0.5)
        leaves["lora_b"] = testing.tensor(vocabulary, r, seed=5)
    trained = {
        "dense": ("hidden", "weight"),
        "bias": ("bias",),
        "frozen": ("hidden",),
        "all": tuple(leaves),
    }.get(kind, ("hidden", "lora_a", "lora_b"))
    for name in trained:
        leaves[name] = leaves[name].requires_grad_()
    labels, dy = labels_of(rows, vocabulary), testing.tensor(rows, seed=9)

    def gradients(cast: torch.dtype | None) -> list[Tensor]:
        values = {
            n: t
            if cast is None and n in trained
            else (wide(t) if n == "weight" else t).detach().to(cast or t.dtype)
            for n, t in leaves.items()
        }
        if cast is None:
            values["weight"] = leaves["weight"]
            losses = pk.linear_cross_entropy(
                labels=labels, reduction="none", scaling=0.5, **values, **OPTIONS[options]
            )
            assert losses.dtype == torch.float32
        else:
            values = {n: t.requires_grad_(n in trained) for n, t in values.items()}
            w = values["weight"]
            if "lora_a" in values:
                w = w + 0.5 * values["lora_b"] @ values["lora_a"]
            losses, _ = defined(values["hidden"], w, labels, values["bias"], **OPTIONS[options])
        return list(torch.autograd.grad(losses, [values[n] for n in trained], dy.to(losses.dtype)))

    with pk.use_backend("reference"):
        plain = gradients(None)
    got, truth = gradients(None), gradients(torch.float64)
    assert all(g.dtype == leaves[name].dtype for name, g in zip(trained, got, strict=True))
    return dict(zip(trained, zip(got, plain, truth, strict=True), strict=True))


@each_dtype
@pytest.mark.parametrize("rows", [5, 80])
def test_near_certainty(backend: str, dtype: torch.dtype, rows: int) -> None:
    """p - 1 of the label is small there, and the gradient still exact."""
    w = testing.tensor(700, 64, dtype=dtype, seed=1)
    labels = torch.arange(rows) * 7
    own = w[labels].float()
    x = (20 * own / own.square().sum(1, keepdim=True)).to(dtype)  # logits of 20, and of N(0, 2.5)
    args = (w, None, None, None, 0, 700, None, labels, IGNORED, 1.0, 0.0, 0.0, 0.0, True, True, False, True)
    got, plain = (
        op(x, *args)
        for op in (torch.ops.peft_kernels.linear_cross_entropy, testing.reference_op("linear_cross_entropy"))
    )
    truth = testing.reference_op("linear_cross_entropy")(*map(testing.widen, (x, *args)))
    assert truth[0].median() < 1e-3
    names = ("loss", "entropy", "lse", "top", "mean", "squares", "dx")
    for name, g, p, t in zip(names, got, plain, truth, strict=True):
        if name != "top":
            testing.assert_close(g, p, t, name)
    assert got[3].all()
    if backend == "reference":
        return  # in plain torch p - 1 is a difference of rounded numbers
    if backend in SLOW and dtype == torch.float16:
        return  # gradients of logits are rounded to fp16, where those below 6e-5 have fewer bits
    # Logits may be rounded to dtype, by half an eps of themselves: exp(z) is off by as much, relatively.
    of_logits = (x.double() @ w.double().t()).abs().topk(2).values.sum(1) / 2
    allowed = (of_logits + 2) * torch.finfo(dtype).eps * truth[6].norm(dim=1)
    assert ((got[6].double() - truth[6]).norm(dim=1) <= allowed + 1e-6).all()


def test_great_logits_come_last(backend: str) -> None:
    """The greatest logit comes last, far above the others. Logits are exact in any order of the sum."""
    w = torch.linspace(-1, 1, 1500).mul(1024).round()[:, None] / 1024 * torch.ones(1, 32)
    x = torch.ones(3, 32) * torch.tensor([[8.0], [-8.0], [0.0]])
    for label in (0, 700, 1499):
        labels = torch.full((3,), label)
        got = pk.linear_cross_entropy(x, w, labels, reduction="none")
        want = F.cross_entropy(F.linear(x.double(), w.double()), labels, reduction="none")
        torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [70, 300])
def test_rows_do_not_mix(backend: str, rows: int) -> None:
    """NaN in one row stays there; in an ignored row it has no effect. Rows are left out if there are many."""
    x, w, labels = testing.tensor(rows, 64), testing.tensor(600, 64, seed=1), labels_of(rows, 600)
    args = (w, None, None, None, 0, 600, None, labels, IGNORED, 1.0, 0.0, 0.0, 0.0, True, False, False, False)
    clean = torch.ops.peft_kernels.linear_cross_entropy(x, *args)
    x[3], x[9] = float("nan"), float("inf")  # the latter is ignored
    loss, *_, dx = torch.ops.peft_kernels.linear_cross_entropy(x, *args)
    assert loss[3].isnan() and dx[3].isnan().all()
    others = [i for i in range(rows) if i != 3]
    torch.testing.assert_close(loss[others], clean[0][others])
    torch.testing.assert_close(dx[others], clean[6][others])
    if backend == "reference" or rows < 300:
        return  # a row that is not left out meets its gradient of zero
    backward = torch.ops.peft_kernels.linear_cross_entropy_backward
    factors = [testing.tensor(rows, seed=seed) for seed in (6, 7, 8)]
    x[3], needs = 0.0, (True, True, False, False, False)
    rest = *args[:7], None, None, *args[7:-5], *needs
    want = backward(*factors, clean[2], x.nan_to_num(posinf=0.0), *rest)
    got = backward(*factors, clean[2], x, *rest)
    assert all(map(torch.equal, got, want))


@each_dtype
@pytest.mark.parametrize("cap", [0.0, 5.0])
def test_extreme_logits(backend: str, dtype: torch.dtype, cap: float) -> None:
    """Masked columns (a bias of -inf) have no probability, and no difference of logits overflows."""
    vocabulary, labels = 267, torch.tensor([3, 0, 266])
    x, w = testing.tensor(3, 24, dtype=dtype), torch.zeros(267, 24, dtype=dtype)
    bias = torch.zeros(vocabulary, dtype=dtype)
    bias[5:100] = float("-inf") if cap == 0.0 else -6e4
    bias[0], bias[266] = 6e4, -6e4
    options = labels, IGNORED, 1.0, cap, 0.0, 0.0, True, True, True, True
    head = w, None, None, None, 0, vocabulary, bias
    loss, _, lse, top, *_, dx = torch.ops.peft_kernels.linear_cross_entropy(x, *head, *options)
    z = bias.double()
    z = cap * torch.tanh(z / cap) if cap else z
    want = F.cross_entropy(z.expand(3, -1), labels, reduction="none")
    torch.testing.assert_close(loss.double(), want, rtol=ONE_LAYER, atol=ONE_LAYER)
    assert lse.isfinite().all() and top.tolist() == [False, True, False] and not dx.any()


@pytest.mark.parametrize("rows", [6, 300])
@pytest.mark.parametrize("kind", ["frozen", "nested", "trained", "adapter"])
def test_ignored_rows_have_a_gradient_of_zero(backend: str, kind: str, rows: int) -> None:
    """Whatever comes in: inf from a mean over no token, or NaN. It changes no other gradient either."""
    if backend == "triton" and rows > 100:
        pytest.skip("triton: each row is a program of its own, as where they are fewer")
    x, bias = testing.tensor(rows, 32).requires_grad_(), testing.tensor(60, seed=3)
    weight = weight_of("nested" if kind == "nested" else "dense", 60, 32, x.dtype)
    leaves = {"hidden": x, "bias": bias} if kind in ("trained", "adapter") else {"hidden": x}
    if kind == "trained":
        leaves["weight"] = weight
    if kind == "adapter":
        leaves["lora_a"], leaves["lora_b"] = testing.tensor(4, 32, seed=4), testing.tensor(60, 4, seed=5)
    leaves = {name: t.requires_grad_() for name, t in leaves.items()}

    def gradients(labels: Tensor, *dy: Tensor, **options: str) -> tuple[Tensor, ...]:
        given: dict[str, Any] = {"weight": weight, "bias": bias, **leaves, **options}
        losses = pk.linear_cross_entropy(labels=labels, **given)
        return torch.autograd.grad(losses, tuple(leaves.values()), dy or None)

    assert not any(g.any() for g in gradients(torch.full((rows,), IGNORED)))
    labels, dy = labels_of(rows, 60), testing.tensor(rows, seed=9)
    dy[4::5] = 0.0
    want = gradients(labels, dy, reduction="none")
    for value in (float("nan"), float("inf")):
        dy[4::5] = value
        got = gradients(labels, dy, reduction="none")
        assert not got[0][4::5].any() and all(map(torch.equal, got, want))


@pytest.mark.parametrize(
    "base,dtype",
    [
        ("nested", torch.bfloat16),
        ("nested", torch.float32),
        ("dense", torch.bfloat16),
        ("fp32", torch.bfloat16),
    ],
)
@pytest.mark.parametrize("rows", [6, 100, 600])
def test_with_any_threads(backend: str, base: str, dtype: torch.dtype, rows: int) -> None:
    if not backend.startswith("cpu"):
        pytest.skip(f"{backend}: products are torch's, or on one thread")
    if base != "nested" and not backend.endswith(("bf16", "amx_emulated")):
        pytest.skip(f"{backend}: the product is torch's, which may split its sums by threads")
    x = testing.tensor(rows, 64, dtype=dtype).requires_grad_()
    rounds = base == "fp32"
    w = testing.tensor(1100, 64, seed=1) if rounds else weight_of(base, 1100, 64, dtype)
    labels = labels_of(rows, 1100)

    def run() -> list[Tensor]:
        with torch.autocast("cpu", dtype, enabled=rounds):
            losses = pk.linear_cross_entropy(x, w, labels, reduction="none")
        return [losses, *torch.autograd.grad(losses.sum(), x)]

    same_with_any_threads(run)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
@pytest.mark.parametrize("rows,features", [(5, 33), (100, 64), (600, 64), (4700, 32)])
def test_an_fp32_head_is_rounded(backend: str, dtype: torch.dtype, rows: int, features: int) -> None:
    """To x's type: each result, and each gradient of one that is trained, has the bits of the rounded one's,
    whether it is rounded by pieces, or at once, for many rows or where its own lie apart."""
    if rows > 100 and not backend.startswith("cpu"):
        pytest.skip(f"{backend}: more rows are read as few are")
    vocabulary = 1100
    x = testing.tensor(rows, features, dtype=dtype)
    w, b = testing.tensor(vocabulary, features, seed=1), testing.tensor(vocabulary, seed=2)
    numbers = labels_of(rows, vocabulary), IGNORED, 2.0, 0.0, 0.1, 1e-2
    ops = torch.ops.peft_kernels

    def results(weight: Tensor) -> list[Tensor]:
        head = weight, None, None, None, 0, vocabulary, b
        found = ops.linear_cross_entropy(x, *head, *numbers, True, True, True, True)
        factors = [testing.tensor(rows, seed=seed) for seed in (3, 4, 5)]
        trained, needs = (x, *head, None, None, *numbers[:-1]), (True, True, True, False, False)
        back = ops.linear_cross_entropy_backward(*factors, found[2], *trained, *needs)
        assert back[1].dtype == weight.dtype
        return [*found, back[0], back[1].to(dtype), back[2]]

    apart = torch.empty(features, vocabulary).t().copy_(w)
    want = results(w.to(dtype))
    for weight in (w, apart) if backend.startswith("cpu") else (w,):  # torch's sums go by where rows lie
        for i, (got, one) in enumerate(zip(results(weight), want, strict=True)):
            assert torch.equal(got, one), i


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(trained: bool, options: str) -> None:
    x = testing.tensor(4, 6, dtype=torch.float64).requires_grad_()
    w = testing.tensor(9, 6, dtype=torch.float64, seed=1).requires_grad_(trained)
    b = testing.tensor(9, dtype=torch.float64, seed=2).requires_grad_(trained)
    lora = [testing.tensor(*s, dtype=torch.float64, seed=3).requires_grad_() for s in ((2, 6), (9, 2))]
    labels = torch.tensor([0, IGNORED, 8, 3])

    def call(x: Tensor, w: Tensor, b: Tensor, *adapter: Tensor) -> Tensor:
        named = dict(zip(("lora_a", "lora_b"), adapter, strict=False))
        return pk.linear_cross_entropy(x, w, labels, b, reduction="none", **named, **OPTIONS[options])

    with pk.use_backend("reference"):
        assert gradcheck(call, (x, w, b))
        assert not trained or gradcheck(call, (x, w, b, *lora))


def test_kernels_check_labels_themselves(compiled_ops: Any) -> None:
    """Nothing outside of the logits is read or written: memory is guarded."""
    x, w, labels = torch.ones(5, 32), torch.ones(12, 32), torch.tensor([1, 12, 3, -1, 1 << 40])
    args = (w, None, None, None, 0, 12, None, labels, IGNORED, 1.0, 0.0, 0.0, 0.0, True, False, False, False)
    if compiled_ops is not torch.ops.peft_kernels_cpu:  # as on a GPU, where to look at them would be to wait
        loss, *_, dx = compiled_ops.linear_cross_entropy(x, *args)
        outside = [False, True, False, True, True]
        assert loss.isnan().tolist() == dx.isnan().all(1).tolist() == outside
        return
    with pytest.raises((RuntimeError, IndexError), match="12"):
        compiled_ops.linear_cross_entropy(x, *args)

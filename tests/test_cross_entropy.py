"""linear_cross_entropy and token_log_probs on every back end, against their definition in fp64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numbers_policy import DTYPES, case_id, same_with_any_threads, short
from torch import Tensor
from torch.autograd import gradcheck

import peft_kernels as pk
import testing
from peft_kernels.backends import triton

IGNORED = -100
OPTIONS: dict[str, dict[str, float]] = {
    "plain": {},
    "scaled": {"logit_scale": 0.25},
    "capped": {"softcap": 5.0, "logit_scale": 2.0},
    "smoothed": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-2},
    "all": {"logit_scale": 2.0, "softcap": 5.0, "label_smoothing": 0.2, "z_loss": 1e-2},
}
SIZES = ((64, 5, 33), (64, 1, 32), (7, 700, 7), (1, 513, 96), (70, 1500, 64), (300, 1030, 64), (0, 40, 32))
"""Rows, vocabulary, hidden size: about the borders of pieces, of parts and of tasks."""

pytestmark = pytest.mark.usefixtures("nan_outputs")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=short)


def labels_of(rows: int, vocabulary: int, seed: int = 0) -> Tensor:
    """Every fifth is ignored; the first and the last token are among the others."""
    labels = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(seed))
    labels[:2] = torch.tensor([0, vocabulary - 1])[:rows]
    labels[4::5] = IGNORED
    return labels


def weight_of(base: str, vocabulary: int, features: int, dtype: torch.dtype) -> Any:
    if base == "dense":
        return testing.tensor(vocabulary, features, dtype=dtype, seed=1, scale=2 * features**-0.5)
    return testing.nf4_weight(vocabulary, features, 32, base == "nested")


def defined(
    x: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, logit_scale: float = 1.0,
    softcap: float | None = None, label_smoothing: float = 0.0, z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Losses and entropies by torch's own functions."""
    z = F.linear(x, weight, bias) * logit_scale
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    losses = F.cross_entropy(z, labels, label_smoothing=label_smoothing, reduction="none")
    valid = labels != IGNORED
    entropy = torch.distributions.Categorical(logits=z).entropy() if len(z) else z.new_empty(0)
    return losses + z_loss * z.logsumexp(-1) ** 2 * valid, entropy * valid


def wide(weight: Any) -> Tensor:
    return (
        (weight.dequantize(torch.float32) if isinstance(weight, pk.NF4Weight) else weight).detach().double()
    )


CASES = testing.pairwise(
    size=SIZES,
    dtype=DTYPES,
    base=("dense", "nested", "plain"),
    bias=("none", "same", "fp32"),
    options=(*OPTIONS,),
)


def results_of(case: dict[str, Any], seed: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Of the op, of plain torch and in fp64, by name."""
    rows, vocabulary, features = case["size"]
    dtype, options = case["dtype"], OPTIONS[case["options"]]
    with_slope = case["options"] != "all"  # with both a cap and smoothing there is none
    x = testing.tensor(rows, features, dtype=dtype, seed=seed)
    weight = weight_of(case["base"], vocabulary, features, dtype)
    bias = {"none": None, "same": dtype, "fp32": torch.float32}[case["bias"]]
    b = None if bias is None else testing.tensor(vocabulary, dtype=bias, seed=3)
    labels = labels_of(rows, vocabulary, seed)
    head = weight._state.op_args if case["base"] != "dense" else (weight, None, None, None, 0)
    o = [options.get(k, v) for k, v in (("logit_scale", 1.0), ("softcap", 0.0), ("label_smoothing", 0.0))]
    args = (*head, vocabulary, b, labels, IGNORED, *o, options.get("z_loss", 0.0), with_slope, True)
    got = torch.ops.peft_kernels.linear_cross_entropy(x, *args)
    plain = testing.reference_op("linear_cross_entropy")(x, *args)
    assert all(g.is_contiguous() and g.dtype == p.dtype for g, p in zip(got, plain, strict=True))
    assert not any(t[4::5].any() for t in got)
    value, *rest = torch.ops.peft_kernels.linear_cross_entropy(x, *args[:-2], False, False)
    near = 8 * torch.finfo(dtype).eps  # the way to a slope may be another
    torch.testing.assert_close(value, got[0], rtol=near, atol=near)
    assert [t.numel() for t in rest] == [rows, 0, 0]
    x64 = x.double().requires_grad_()
    truth, entropy = defined(x64, wide(weight), labels, None if b is None else b.double(), **options)
    lse = testing.reference_op("linear_cross_entropy")(*map(testing.widen, (x, *args)))[1]
    (slope,) = torch.autograd.grad(truth.sum(), x64)
    truths = (truth.detach(), lse, entropy, slope if with_slope else slope[:0])
    names = ("loss", "lse", "entropy", "slope")
    return {n: parts for n, *parts in zip(names, got, plain, truths, strict=True)}  # type: ignore[misc]


@pytest.mark.parametrize("case", CASES, ids=map(case_id, CASES))
def test_loss_and_slope_of_a_frozen_head(backend: str, case: dict[str, Any]) -> None:
    rows, vocabulary, _ = case["size"]
    if backend == "triton" and rows > 100:
        pytest.skip("triton: each row is a program of its own, as where they are fewer")
    if backend == "ptx" and case["base"] != "dense" and rows * vocabulary > 10_000:
        pytest.skip("ptx: made of products that have their tests")
    samples = [results_of(case, seed) for seed in range(1 if rows == 0 else -(-100 // rows))]
    for name in samples[0]:
        got, plain, truth = (torch.cat([s[name][i] for s in samples]) for i in range(3))
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
    for name, got, near, truth in zip(trained, gradients(None), plain, gradients(torch.float64), strict=True):
        assert got.dtype == leaves[name].dtype, name
        testing.assert_close(got, near, truth, name)


def torchs(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).flatten(0, -2), labels.flatten(), **options)


def test_reductions_are_torchs(backend: str) -> None:
    x, w = testing.tensor(2, 9, 32).requires_grad_(), testing.tensor(50, 32, seed=1)
    labels = labels_of(18, 50).view(2, 9)
    for reduction in ("mean", "sum", "none"):
        got, want = (
            pk.linear_cross_entropy(x, w, labels, reduction=reduction),
            torchs(x, w, labels, reduction=reduction),
        )
        torch.testing.assert_close(got, want.view(got.shape))
        for a, b in zip(torch.autograd.grad(got.sum(), x), torch.autograd.grad(want.sum(), x), strict=True):
            torch.testing.assert_close(a, b)
    for items in (40, torch.tensor(40)):
        got = pk.linear_cross_entropy(x, w, labels, num_items_in_batch=items)
        torch.testing.assert_close(got, torchs(x, w, labels, reduction="sum") / 40)
    assert pk.linear_cross_entropy(x, w, torch.full_like(labels, IGNORED)).isnan()
    other = labels.where(labels != IGNORED, 7)
    got = pk.linear_cross_entropy(x, w, other, ignore_index=7)
    torch.testing.assert_close(got, torchs(x, w, other, ignore_index=7))


def test_shift_is_that_of_causal_models(backend: str) -> None:
    x, w = testing.tensor(2, 9, 32).requires_grad_(), testing.tensor(50, 32, seed=1)
    labels = labels_of(18, 50).view(2, 9)
    got = pk.linear_cross_entropy(x, w, labels, shift=True)
    want = torchs(x[:, :-1], w, labels[:, 1:])
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(t, x)[0] for t in (got, want)))
    each = pk.linear_cross_entropy(x, w, labels, shift=True, reduction="none")
    assert each.shape == labels.shape and not each[:, -1].any()


@each_dtype
def test_log_probs_and_entropy(backend: str, dtype: torch.dtype) -> None:
    x = testing.tensor(3, 8, 64, dtype=dtype).requires_grad_()
    w, tokens = weight_of("dense", 700, 64, dtype), labels_of(24, 700).view(3, 8)
    got, entropy = pk.token_log_probs(x, w, tokens, entropy=True, logit_scale=1 / 0.7)
    assert got.shape == entropy.shape == tokens.shape and not entropy.requires_grad
    x64 = x.detach().double().requires_grad_()
    truth = torch.log_softmax(F.linear(x64, w.double()) / 0.7, -1)
    valid = tokens != IGNORED
    chosen = truth.gather(-1, tokens.clamp(min=0)[..., None])[..., 0] * valid
    with pk.use_backend("reference"):
        plain, plain_entropy = pk.token_log_probs(x, w, tokens, entropy=True, logit_scale=1 / 0.7)
        (near,) = torch.autograd.grad(plain.square().sum(), x)
    testing.assert_close(got, plain, chosen, "log_probs")
    testing.assert_close(entropy, plain_entropy, -(truth.exp() * truth).sum(-1) * valid, "entropy")
    (g,), (t,) = torch.autograd.grad(got.square().sum(), x), torch.autograd.grad(chosen.square().sum(), x64)
    testing.assert_close(g, near, t, "gradient")
    assert torch.equal(pk.token_log_probs(x, w, tokens, logit_scale=1 / 0.7), got)


@each_dtype
@pytest.mark.parametrize("rows", [5, 80])
def test_near_certainty(backend: str, dtype: torch.dtype, rows: int) -> None:
    """p - 1 of the label is small there, and the gradient exact all the same."""
    w = testing.tensor(700, 64, dtype=dtype, seed=1)
    labels = torch.arange(rows) * 7
    x = (w[labels] * 0.3).to(dtype)
    args = (w, None, None, None, 0, 700, None, labels, IGNORED, 1.0, 0.0, 0.0, 0.0, True, True)
    got, plain = (
        op(x, *args)
        for op in (torch.ops.peft_kernels.linear_cross_entropy, testing.reference_op("linear_cross_entropy"))
    )
    truth = testing.reference_op("linear_cross_entropy")(*map(testing.widen, (x, *args)))
    assert truth[0].median() < 1e-3
    for name, g, p, t in zip(("loss", "lse", "entropy", "slope"), got, plain, truth, strict=True):
        testing.assert_close(g, p, t, name)
    if not backend.startswith(("cpu", "triton")):
        return  # in plain torch p - 1 is a difference of rounded numbers
    scale = truth[3].norm(dim=1)
    assert ((got[3].double() - truth[3]).norm(dim=1) <= 8 * torch.finfo(dtype).eps * scale + 1e-6).all()


def test_great_logits_and_late_ones(backend: str) -> None:
    """The greatest logit comes last, and others are far from it."""
    w = torch.linspace(-1, 1, 1500)[:, None] * torch.ones(1, 32)
    x = torch.ones(3, 32) * torch.tensor([[8.0], [-8.0], [0.0]])
    for label in (0, 700, 1499):
        labels = torch.full((3,), label)
        got = pk.linear_cross_entropy(x, w, labels, reduction="none")
        want = F.cross_entropy(F.linear(x.double(), w.double()), labels, reduction="none")
        torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-5)


def test_rows_do_not_mix(backend: str) -> None:
    """NaN in one row stays there, and in an ignored row nothing is seen of it."""
    x, w, labels = testing.tensor(70, 64), testing.tensor(600, 64, seed=1), labels_of(70, 600)
    args = (w, None, None, None, 0, 600, None, labels, IGNORED, 1.0, 0.0, 0.0, 0.0, True, False)
    clean = torch.ops.peft_kernels.linear_cross_entropy(x, *args)
    x[3], x[9] = float("nan"), float("inf")  # the latter is ignored
    loss, _, _, slope = torch.ops.peft_kernels.linear_cross_entropy(x, *args)
    assert loss[3].isnan() and slope[3].isnan().all()
    others = [i for i in range(70) if i != 3]
    torch.testing.assert_close(loss[others], clean[0][others])
    torch.testing.assert_close(slope[others], clean[3][others])


@pytest.mark.parametrize(
    "base,dtype", [("nested", torch.bfloat16), ("nested", torch.float32), ("dense", torch.bfloat16)]
)
@pytest.mark.parametrize("rows", [6, 100, 600])
def test_with_any_threads(backend: str, base: str, dtype: torch.dtype, rows: int) -> None:
    if not backend.startswith("cpu"):
        pytest.skip(f"{backend}: products are torch's, or on one thread")
    if base == "dense" and not backend.endswith(("bf16", "amx_emulated")):
        pytest.skip(f"{backend}: the product is torch's, which may split its sums by threads")
    x = testing.tensor(rows, 64, dtype=dtype).requires_grad_()
    w, labels = weight_of(base, 1100, 64, dtype), labels_of(rows, 1100)

    def run() -> list[Tensor]:
        losses = pk.linear_cross_entropy(x, w, labels, reduction="none")
        return [losses, *torch.autograd.grad(losses.sum(), x)]

    same_with_any_threads(run)


def test_what_is_saved(backend: str) -> None:
    """Of a frozen head a slope like hidden; of a trained one a number for each token."""
    x, w = testing.tensor(40, 64).requires_grad_(), testing.tensor(900, 64, seed=1)
    labels = labels_of(40, 900)
    per_row = 2 * 4 * 40
    exclude = [w, labels]
    frozen = testing.saved_bytes(lambda: pk.linear_cross_entropy(x, w, labels, reduction="sum"), exclude)
    assert x.numel() * 4 <= frozen <= x.numel() * 4 + per_row
    w.requires_grad_()
    trained = testing.saved_bytes(
        lambda: pk.linear_cross_entropy(x, w, labels, reduction="sum"), [*exclude, x]
    )
    assert 0 < trained <= 2 * per_row


def allocated(call: Callable[[], Any], folder: Path) -> int:
    """Most bytes of torch's that a call has at a time."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    profile.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    totals = [(e["ts"], e["args"]) for e in events if e.get("name") == "[memory]"]
    totals.sort(key=lambda event: event[0])
    first = totals[0][1]["Total Allocated"] - totals[0][1]["Bytes"]
    return max(args["Total Allocated"] for _, args in totals) - first


@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_memory_is_a_small_part_of_the_logits(backend: str, head: str, tmp_path: Path) -> None:
    if backend != "reference" and not backend.startswith("cpu"):
        pytest.skip(f"{backend}: runs on another machine's terms")
    rows, vocabulary, features = 1024, 49152, 64
    x = testing.tensor(rows, features, dtype=torch.bfloat16).requires_grad_()
    w = weight_of("dense", vocabulary, features, torch.bfloat16).requires_grad_(head == "trained")
    labels = labels_of(rows, vocabulary)

    def step() -> None:
        pk.linear_cross_entropy(x, w, labels).backward()

    step()
    x.grad = w.grad = None
    needed = x.nbytes + (w.nbytes if head == "trained" else 0)
    share = (allocated(step, tmp_path) - needed) / (rows * vocabulary * 4)
    assert share < (0.6 if backend == "reference" else 0.02), share


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


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_double_backward_is_refused(backend: str, trained: bool) -> None:
    x, w = testing.tensor(4, 32).requires_grad_(), testing.tensor(50, 32, seed=1).requires_grad_(trained)
    loss = pk.linear_cross_entropy(x, w, labels_of(4, 50))
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(
        RuntimeError, match="a gradient of its gradients was asked for, expected first order only"
    ):
        dx.square().sum().backward()


def test_under_autocast(backend: str) -> None:
    """As F.linear: hidden and a dense head are rounded, whatever is trained; losses stay in fp32."""
    x, w = testing.tensor(20, 64).requires_grad_(), weight_of("dense", 300, 64, torch.float32)
    labels = labels_of(20, 300)
    want = pk.linear_cross_entropy(x.bfloat16(), w.bfloat16(), labels)
    for trained in (False, True):
        w.requires_grad_(trained)
        with torch.autocast("cpu", torch.bfloat16):
            got = pk.linear_cross_entropy(x, w, labels)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        leaves = [x, w] if trained else [x]
        assert all(g.dtype == torch.float32 for g in torch.autograd.grad(got, leaves))


def test_kernels_check_labels_themselves(compiled_ops: Any) -> None:
    x, w, labels = torch.ones(3, 32), torch.ones(12, 32), torch.tensor([1, 12, 3])
    args = (w, None, None, None, 0, 12, None, labels, IGNORED, 1.0, 0.0, 0.0, 0.0, True, False)
    if triton.BACKEND.interpreted:  # as on a GPU, where to look at them would be to wait
        assert compiled_ops.linear_cross_entropy(x, *args)[0].isnan().tolist() == [False, True, False]
        return
    with pytest.raises((RuntimeError, IndexError), match="12"):
        compiled_ops.linear_cross_entropy(x, *args)

"""The typed calls linear_cross_entropy and token_log_probs, and what they save."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loss_cases import IGNORED, labels_of, weight_of, wide
from numbers_policy import each_dtype
from torch import Tensor

import peft_kernels as pk
import testing

pytestmark = pytest.mark.usefixtures("nan_outputs")


def torchs(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).flatten(0, -2), labels.flatten(), **options)


def test_reductions_equal_torch(backend: str) -> None:
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


def test_shift_equals_causal_models(backend: str) -> None:
    x, w = testing.tensor(2, 9, 32).requires_grad_(), testing.tensor(50, 32, seed=1)
    labels = labels_of(18, 50).view(2, 9)
    got = pk.linear_cross_entropy(x, w, labels, shift=True)
    want = torchs(x[:, :-1], w, labels[:, 1:])
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(t, x)[0] for t in (got, want)))
    each = pk.linear_cross_entropy(x, w, labels, shift=True, reduction="none")
    assert each.shape == labels.shape and not each[:, -1].any()


HEADS = {
    "frozen": ("dense", ("hidden",)),
    "nf4": ("nested", ("hidden",)),
    "trained": ("dense", ("hidden", "weight", "bias")),
    "adapter": ("nested", ("hidden", "lora_a", "lora_b")),
}
"""Weight of a head, and what has a gradient."""


def head_of(kind: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Operands of token_log_probs."""
    base, trained = HEADS[kind]
    found: dict[str, Any] = {
        "hidden": testing.tensor(3, 8, 64, dtype=dtype),
        "weight": weight_of(base, 700, 64, dtype),
        "bias": testing.tensor(700, dtype=dtype, seed=3),
    }
    if kind == "adapter":
        found["lora_a"] = testing.tensor(4, 64, seed=4, scale=64**-0.5)
        found["lora_b"] = testing.tensor(700, 4, seed=5, scale=0.3)
    return {n: t.requires_grad_() if n in trained else t for n, t in found.items()}


def scores(
    operands: dict[str, Tensor], tokens: Tensor, scale: float, cap: float | None
) -> tuple[Tensor, ...]:
    """Log-probabilities, entropies and logarithms of squares, in torch functions."""
    weight = operands["weight"]
    if "lora_a" in operands:
        weight = weight + operands["lora_b"] @ operands["lora_a"]
    z = F.linear(operands["hidden"], weight, operands["bias"]) * scale
    logs = torch.log_softmax(z if cap is None else cap * torch.tanh(z / cap), -1)
    valid = tokens != IGNORED
    chosen = logs.gather(-1, tokens.clamp(min=0)[..., None])[..., 0]
    entropy, squares = -(logs.exp() * logs).sum(-1), (2 * logs).exp().sum(-1).log()
    return chosen * valid, entropy * valid, squares * valid


@each_dtype
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("cap", [None, 4.0])
@pytest.mark.parametrize("of", ["log_probs", "entropy", "both"])
def test_log_probs_and_entropy(
    backend: str, dtype: torch.dtype, kind: str, cap: float | None, of: str
) -> None:
    """Values, and gradients of a loss of the log-probabilities, of the entropy, and of both."""
    tokens, scale = labels_of(24, 700).view(3, 8), 1 / 0.7
    operands, trained = head_of(kind, dtype), HEADS[kind][1]
    factors = [float(of != "entropy"), float(of != "log_probs")]
    options: dict[str, Any] = {
        "entropy": True,
        "log_sum_sq_probs": True,
        "softcap": cap,
        "logit_scale": scale,
    }

    def results() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        found = pk.token_log_probs(tokens=tokens, **operands, **options)
        assert all(t.shape == tokens.shape and t.dtype == torch.float32 for t in found)
        assert found[1].requires_grad and not found[2].requires_grad
        loss = [f * t.square().sum() for f, t in zip(factors, found, strict=False) if f]
        return found, torch.autograd.grad(sum(loss), [operands[n] for n in trained])

    got, gradients = results()
    with pk.use_backend("reference"):
        plain, near = results()
    wide64 = {n: wide(t).requires_grad_(n in trained) for n, t in operands.items()}
    truth = scores(wide64, tokens, scale, cap)
    loss = factors[0] * truth[0].square().sum() + factors[1] * truth[1].square().sum()
    true = torch.autograd.grad(loss, [wide64[n] for n in trained])
    for name, *values in zip(("log_probs", "entropy", "squares"), got, plain, truth, strict=True):
        testing.assert_close(*values, name)
    for name, *values in zip(trained, gradients, near, true, strict=True):
        testing.assert_close(*values, name, product=dtype)
    without = {n: t.detach() for n, t in operands.items()}
    alone = pk.token_log_probs(tokens=tokens, **without, softcap=cap, logit_scale=scale)
    torch.testing.assert_close(alone, got[0])


def test_what_depends_on_no_result_has_no_gradient(backend: str) -> None:
    operands, tokens = head_of("frozen", torch.float32), labels_of(24, 700).view(3, 8)
    *_, top = pk.token_log_probs(tokens=tokens, **operands, entropy=True, is_top1=True)
    assert not top.requires_grad
    _, entropy = pk.token_log_probs(tokens=tokens, **operands, entropy=True)
    empty = pk.token_log_probs(operands["hidden"][:0], operands["weight"], tokens[:0], entropy=True)
    assert not torch.autograd.grad(empty[1].sum(), operands["hidden"])[0].any()
    assert torch.autograd.grad(entropy.sum() * 0, operands["hidden"])[0].eq(0).all()


def test_masked_logits_have_no_gradient(backend: str) -> None:
    """Columns whose bias is -inf, with a loss of the log-probabilities alone."""
    x, w = testing.tensor(6, 32).requires_grad_(), testing.tensor(50, 32, seed=1).requires_grad_()
    bias = torch.zeros(50)
    bias[30:] = float("-inf")
    tokens = torch.arange(6)
    got = pk.token_log_probs(x, w, tokens, bias)
    want = F.linear(x, w, bias)[:, :30].log_softmax(-1)[tokens, tokens]
    torch.testing.assert_close(got, want)
    for g, t in zip(*(torch.autograd.grad(y.square().sum(), (x, w)) for y in (got, want)), strict=True):
        torch.testing.assert_close(g, t)


@each_dtype
@pytest.mark.parametrize("rows", [6, 300])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_top1_and_mean(backend: str, dtype: torch.dtype, rows: int, trained: bool) -> None:
    """The label's logit is the largest in every other row, and ties with another in every sixth."""
    if backend == "triton" and rows > 100:
        pytest.skip("triton: each row is a program of its own, as where they are fewer")
    w, labels = weight_of("dense", 700, 64, dtype), torch.arange(rows) % 600
    x = w[labels].clone()
    x[1::2] *= -1
    w[650], labels[4] = w[labels[0]], IGNORED
    w.requires_grad_(trained)
    log_probs, top, mean = pk.token_log_probs(x, w, labels, is_top1=True, mean_logits=True, logit_scale=2.0)
    valid = labels != IGNORED
    assert torch.equal(top, (torch.arange(rows) % 2 == 0) & valid)
    truth = 2 * F.linear(x.double(), w.detach().double()).mean(-1) * valid
    scale = F.linear(x, w).abs().amax().item()
    torch.testing.assert_close(mean.double(), truth, atol=4 * scale * torch.finfo(dtype).eps, rtol=0)
    assert log_probs.requires_grad == trained and not mean.requires_grad


def test_saved_tensors(backend: str) -> None:
    """For a frozen head a tensor like hidden; for a trained one a value per token."""
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
    w.requires_grad_(False)
    both = testing.saved_bytes(lambda: pk.token_log_probs(x, w, labels, entropy=True)[0].sum(), [*exclude, x])
    assert x.numel() * 4 <= both <= x.numel() * 4 + 2 * per_row


def allocated(call: Callable[[], Any], folder: Path) -> int:
    """Peak bytes that torch allocates in a call."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    profile.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    totals = [(e["ts"], e["args"]) for e in events if e.get("name") == "[memory]"]
    totals.sort(key=lambda event: event[0])
    first = totals[0][1]["Total Allocated"] - totals[0][1]["Bytes"]
    return max(args["Total Allocated"] for _, args in totals) - first


@pytest.mark.parametrize("head", ["frozen", "trained", "fp32"])
def test_memory_is_a_small_part_of_the_logits(backend: str, head: str, tmp_path: Path) -> None:
    if backend != "reference" and not backend.startswith("cpu"):
        pytest.skip(f"{backend}: runs on another machine's terms")
    rows, vocabulary, features = 1024, 49152, 64
    x = testing.tensor(rows, features, dtype=torch.bfloat16).requires_grad_()
    dtype = torch.float32 if head == "fp32" else torch.bfloat16
    w = weight_of("dense", vocabulary, features, dtype).requires_grad_(head == "trained")
    labels = labels_of(rows, vocabulary)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=head == "fp32"):
            loss = pk.linear_cross_entropy(x, w, labels)
        loss.backward()

    step()
    x.grad = w.grad = None
    needed = x.nbytes + (w.nbytes if head == "trained" else 0)
    share = (allocated(step, tmp_path) - needed) / (rows * vocabulary * 4)
    assert share < (0.6 if backend == "reference" else 0.02), share


def test_under_autocast(backend: str) -> None:
    """Hidden states and a dense head are rounded as by F.linear, trained or not; losses stay fp32."""
    x, w = testing.tensor(20, 64).requires_grad_(), weight_of("dense", 300, 64, torch.float32)
    labels = labels_of(20, 300)
    for trained in (False, True):
        w.requires_grad_(trained)
        leaves = [x, w] if trained else [x]
        want = pk.linear_cross_entropy(x.bfloat16(), w.bfloat16(), labels)
        with torch.autocast("cpu", torch.bfloat16):
            got = pk.linear_cross_entropy(x, w, labels)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        for g, t in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
            assert g.dtype == torch.float32
            torch.testing.assert_close(g, t)

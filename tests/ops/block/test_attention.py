"""Attention on every back end, against its definition in fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rounding import ONE_LAYER, assert_within_rounding
from torch import Tensor

import peft_kernels as pk
import testing
from peft_kernels.ops.lora.dropout import dropout_mask, dropout_scale, new_seed

FP32 = torch.finfo(torch.float32)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# batch, rows, keys, query heads, key heads, features
SIZES = [
    (2, 130, 130, 6, 2, 64),
    (1, 7, 33, 3, 1, 80),
    (1, 70, 600, 2, 2, 128),
    (3, 65, 65, 4, 4, 6),
    (1, 5, 12, 2, 1, 7),
    (1, 1, 9, 1, 1, 16),
    (1, 3, 1100, 2, 1, 32),
]
MASKS = ["none", "causal", "spans", "both", "two", "two causal"]


def sides(size: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    batch, rows, keys, heads, key_heads, features = size
    shapes = (rows, heads), (keys, key_heads), (keys, key_heads), (rows, heads)
    return [testing.tensor(batch, r, h, features, dtype=dtype, seed=i) for i, (r, h) in enumerate(shapes)]


def spans_for(size: tuple[int, ...], seed: int = 0) -> Tensor:
    """Spans of all kinds: empty, beyond the last key, before the first."""
    batch, rows, keys = size[:3]
    generator = torch.Generator().manual_seed(rows + seed + testing.SEED)
    first = torch.randint(-2, keys, (batch, rows), generator=generator)
    end = first + torch.randint(0, keys + 3, (batch, rows), generator=generator)
    return torch.stack([first, end], -1).int()


def spans_of_mask(mask: str, size: tuple[int, ...]) -> Tensor | None:
    if mask.startswith(
        "two"
    ):  # in either order, some that overlap or touch, some without the one or the other
        return torch.stack([spans_for(size), spans_for(size, 5)], 2)
    return spans_for(size) if mask in ("spans", "both") else None


def weights_of(q: Tensor, k: Tensor, spans: Tensor | None, causal: bool, scale: float) -> Tensor:
    """The softmax over keys, (batch, heads, rows, keys)."""
    rows, keys, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    key = torch.arange(keys)
    attends = torch.ones(q.shape[0], rows, keys, dtype=torch.bool)
    if spans is not None:
        parts = spans if spans.dim() == 4 else spans[:, :, None]
        attends &= ((key >= parts[..., :1]) & (key < parts[..., 1:])).any(2)
    if causal:
        attends &= key <= torch.arange(rows)[:, None] + keys - rows
    scores = torch.einsum("brhf,bshf->bhrs", q, k.repeat_interleave(group, 2)) * scale
    # A row without keys gives 0, and so do its gradients.
    some = attends.any(-1)[:, None, :, None]
    return torch.where(attends[:, None] | ~some, scores, -math.inf).softmax(-1) * some


def definition(
    q: Tensor, k: Tensor, v: Tensor, spans: Tensor | None, causal: bool, scale: float, kept: Any = 1.0
) -> Tensor:
    weights = weights_of(q, k, spans, causal, scale) * kept
    return torch.einsum("bhrs,bshf->brhf", weights, v.repeat_interleave(q.shape[2] // k.shape[2], 2))


def kept_weights(size: tuple[int, ...], p: float, seed: int) -> Tensor:
    """What weights (batch, heads, rows, keys) are multiplied by after `torch.manual_seed(seed)`."""
    batch, rows, keys, heads = size[:4]
    torch.manual_seed(seed)
    b, h, r, k = torch.meshgrid(*(torch.arange(n) for n in (batch, heads, rows, keys)), indexing="ij")
    strips = (rows + 63) // 64
    element = (((b * heads + h) * strips + r // 64) * keys + k) * 64 + r % 64
    numel = batch * heads * strips * keys * 64
    return dropout_mask(torch.Size([numel]), p, new_seed(b), 0)[element] * dropout_scale(p)


def magnitudes(weights: Tensor, *sides: Tensor, scale: float, kept: Any = 1.0) -> dict[str, Tensor]:
    """What errors of single elements are relative to: sums over absolute values, in which a weight's error is
    that of its score and of all scores of its row, through their sum, or the smallest normal number."""
    (q, k, v, dy), heads = (t.double().abs() for t in sides), sides[1].shape[2]
    group = q.shape[2] // heads
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = scale * torch.einsum("brhf,bshf->bhrs", q, k)
    spread = weights * (1 + scores + (weights * scores).sum(-1, keepdim=True)) + FP32.tiny / FP32.eps
    d_weights = torch.einsum("brhf,bshf->bhrs", dy, v) * kept
    d_scores = spread * (d_weights + (weights * d_weights).sum(-1, keepdim=True))
    d_scores = scale * (d_scores + weights * (spread * d_weights).sum(-1, keepdim=True))
    y, dq = (torch.einsum("bhrs,bshf->brhf", *pair) for pair in ((spread * kept, v), (d_scores, k)))
    dk, dv = (
        torch.einsum("bhrs,brhf->bshf", *pair).unflatten(2, (heads, group)).sum(3)
        for pair in ((d_scores, q), (spread * kept, dy))
    )
    return {"y": y, "dq": dq, "dk": dk, "dv": dv}


def results(forward: Any, q: Tensor, k: Tensor, v: Tensor, dy: Tensor) -> dict[str, Tensor]:
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    y = forward(*leaves)
    return dict(zip(("y", "dq", "dk", "dv"), (y, *torch.autograd.grad(y, leaves, dy)), strict=True))


def in_plain_torch(forward: Any, *sides: Tensor) -> dict[str, Tensor]:
    """The same formulas in plain torch, with gradients from the row sums of y * dy."""
    with pk.use_backend("reference"):
        return results(forward, *sides)


def check(
    *sides: Tensor, spans: Tensor | None, causal: bool, scale: float, dropout_p: float = 0.0
) -> dict[str, Tensor]:
    """Results of the op, checked by the numbers policy."""
    seed, (batch, rows, heads, _), keys = testing.SEED + 7, sides[0].shape, sides[1].shape[1]
    kept = kept_weights((batch, rows, keys, heads), dropout_p, seed) if dropout_p else 1.0

    def ours(*given: Tensor) -> Tensor:
        torch.manual_seed(seed)
        return pk.attention(*given, spans, causal, scale, dropout_p)

    got, plain = results(ours, *sides), in_plain_torch(ours, *sides)
    truth = results(lambda *t: definition(*t, spans, causal, scale, kept), *(t.double() for t in sides))
    weights = weights_of(*(t.double() for t in sides[:2]), spans, causal, scale)
    magnitude, depth = magnitudes(weights, *sides, scale=scale, kept=kept), sum(sides[1].shape)
    for name, value in got.items():
        assert value.dtype == sides[0].dtype and value.shape == truth[name].shape
        testing.assert_close(value, plain[name], truth[name], name, by_element=False)
        assert_within_rounding(value, truth[name], magnitude[name], depth, name)
    return got


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_attention(backend: str, size: tuple[int, ...], dtype: torch.dtype, mask: str) -> None:
    spans = spans_of_mask(mask, size)
    causal = mask in ("causal", "both", "two causal")
    assert check(*sides(size, dtype), spans=spans, causal=causal, scale=0.3)["y"].is_contiguous()


@pytest.mark.parametrize("mask", ["none", "causal", "two"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_dropout(backend: str, size: tuple[int, ...], dtype: torch.dtype, mask: str) -> None:
    """The same mask in forward and backward, also with few rows and in blocks of which a part is masked."""
    spans, causal = spans_of_mask(mask, size), mask == "causal"
    check(*sides(size, dtype), spans=spans, causal=causal, scale=0.3, dropout_p=0.3)


def test_dropout_drops_and_scales(backend: str) -> None:
    """With equal scores and values of 1, a row's result is the share of its weights that are kept, scaled:
    mean and variance over independent weights are within six standard deviations of what is expected."""
    p, (batch, rows, keys, heads) = 0.1, (2, 100, 90, 3)
    q, k, v = (torch.ones(batch, n, heads, 8) for n in (rows, keys, keys))
    torch.manual_seed(testing.SEED)
    first, second = (pk.attention(q, k, v, dropout_p=p)[..., 0] for _ in range(2))
    variance, count = p / (1 - p) / keys, batch * heads * rows
    assert abs(first.mean() - 1) < 6 * math.sqrt(variance / count)
    assert abs(first.var() / variance - 1) < 6 * math.sqrt(2 / count)
    assert not torch.equal(first, second) and len(first.unique()) > 5
    assert not pk.attention(q, k, v, dropout_p=1.0).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [129, 200])
def test_windows(backend: str, keys: int, dtype: torch.dtype) -> None:
    """Neighbouring rows whose keys begin in different blocks, so that some still have no key when others do,
    and a scale that would overflow the score of an empty row."""
    size = (2, 150, keys, 2, 1, 64)
    row = torch.arange(150) - 3
    spans = torch.stack([row, row + torch.arange(150) % 23], -1).int().expand(2, 150, 2).contiguous()
    check(*sides(size, dtype), spans=spans, causal=False, scale=3.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prompt,completions", [(70, (5, 130, 3, 64)), (3, (9,) * 20), (200, (30, 40))])
def test_completions_share_a_prompt(
    backend: str, prompt: int, completions: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Each completion sees the prompt and itself: between them lie key blocks that no query of a strip sees,
    and a strip may have rows of several completions. Keys that a completion does not see change none of its
    bits."""
    ends = torch.tensor(completions).cumsum(0) + prompt
    rows = int(ends[-1])
    row = torch.arange(rows)
    borders = torch.tensor([prompt, *ends.tolist()])
    own = torch.cat([borders.new_zeros(1), borders])[torch.bucketize(row, borders, right=True)]
    of_prompt = torch.stack([0 * row, (row + 1).clamp(max=prompt)], -1)
    spans = torch.stack([of_prompt, torch.stack([own, row + 1], -1)], 1).int()[None]
    spans[:, :prompt, 1] = 0
    q, k, v, dy = sides((1, rows, rows, 4, 2, 32), dtype)
    got = check(q, k, v, dy, spans=spans, causal=False, scale=32**-0.5)
    start, end = prompt + completions[0], int(ends[1])  # of the second completion; the others become huge
    others = torch.ones(rows, dtype=torch.bool)
    others[:prompt] = others[start:end] = False
    k[:, others], v[:, others] = 1e4, -1e4
    again = results(lambda *t: pk.attention(*t, spans), q, k, v, dy)
    assert torch.equal(again["y"][:, ~others], got["y"][:, ~others])
    assert torch.equal(again["dq"][:, ~others], got["dq"][:, ~others])


def test_two_spans_that_join(backend: str) -> None:
    """Bit-equal to the joined span."""
    q, k, v, dy = sides((2, 70, 150, 2, 1, 32), torch.bfloat16)
    one = spans_for((2, 70, 150)).clamp(min=0)
    middle = (one.sum(-1, keepdim=True) // 2).int()
    first, end = one.split(1, -1)
    two = torch.stack([torch.cat([middle, end], -1), torch.cat([first, middle], -1)], 2)
    want = results(lambda *t: pk.attention(*t, one), q, k, v, dy)
    got = results(lambda *t: pk.attention(*t, two), q, k, v, dy)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_any_layout(backend: str) -> None:
    """Transposed views, non-contiguous features, and gradients of such layouts."""
    q, k, v, dy = sides((2, 40, 40, 4, 2, 16), torch.bfloat16)
    want = results(lambda *t: pk.attention(*t, is_causal=True), q, k, v, dy)
    views = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v, dy)]
    strided = [torch.stack([t, t], -1)[..., 0] for t in (q, k, v, dy)]
    for given in (views, strided):
        got = results(lambda *t: pk.attention(*t, is_causal=True), *given)
        assert all(torch.equal(got[name], want[name]) for name in want)


def test_bits_do_not_depend_on_threads_or_batch(backend: str) -> None:
    size = (3, 150, 150, 6, 3, 32)
    q, k, v, dy = sides(size, torch.bfloat16)
    want = results(lambda *t: pk.attention(*t, is_causal=True), q, k, v, dy)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            got = results(lambda *t: pk.attention(*t, is_causal=True), q, k, v, dy)
            assert all(torch.equal(got[name], want[name]) for name in want)
    finally:
        torch.set_num_threads(threads)
    alone = results(lambda *t: pk.attention(*t, is_causal=True), *(t[1:2] for t in (q, k, v, dy)))
    testing.assert_close(alone["y"], want["y"][1:2], want["y"][1:2].double(), "y")


def test_masked_values_have_no_effect(backend: str) -> None:
    """They may be large, and have gradient 0."""
    q, k, v, dy = sides((1, 20, 90, 2, 1, 16), torch.float32)
    spans = torch.tensor([3, 70]).int().expand(1, 20, 2)
    want = results(lambda *t: pk.attention(*t, spans), q, k, v, dy)
    k[:, 70:], v[:, 70:], k[:, :3], v[:, :3] = 1e4, -1e4, 1e4, 1e4
    got = results(lambda *t: pk.attention(*t, spans), q, k, v, dy)
    assert all(torch.equal(got[name], want[name]) for name in want)
    for name in ("dk", "dv"):
        assert not got[name][:, :3].any() and not got[name][:, 70:].any() and got[name][:, 3:70].any()


def test_large_scores(backend: str) -> None:
    """Exponentials alone would overflow, and each chunk of keys has a larger score. Nearly all weight is on
    one key, so gradients are small differences."""
    q, k, v, dy = sides((1, 4, 1200, 1, 1, 8), torch.float32)
    k = k * torch.linspace(1, 100, 1200)[None, :, None, None]
    check(q, k, v, dy, spans=None, causal=False, scale=8**-0.5)


def test_large_scores_of_many_rows(backend: str) -> None:
    """As above, with more rows than the kernels for few rows accept."""
    q, k, v, dy = sides((1, 40, 1200, 1, 1, 8), torch.float32)
    k = k * torch.linspace(1, 100, 1200)[None, :, None, None]
    check(q, k, v, dy, spans=None, causal=False, scale=8**-0.5)


@pytest.mark.parametrize("batch,rows,keys", [(0, 3, 3), (2, 0, 3), (2, 3, 0)])
def test_empty(backend: str, batch: int, rows: int, keys: int) -> None:
    q, k, v, dy = sides((batch, rows, keys, 2, 1, 8), torch.float32)
    got = results(lambda *t: pk.attention(*t), q, k, v, dy)
    assert all(not value.any() for value in got.values())
    assert got["y"].shape == q.shape and got["dk"].shape == k.shape


def test_saved() -> None:
    """Saves q, k, v, the result and two values per row and head, no scores."""
    q, k, v, _ = (t.requires_grad_() for t in sides((2, 200, 200, 4, 2, 32), torch.bfloat16))
    saved = testing.saved_bytes(lambda: pk.attention(q, k, v, is_causal=True), [q, k, v])
    assert saved == q.nbytes + 2 * 2 * 4 * 200 * 4


def test_equals_scaled_dot_product_attention(backend: str) -> None:
    """In the default scale and in which query heads share a key head."""
    dtype = torch.float64 if backend == "reference" else torch.float32
    q, k, v, dy = (t.to(dtype) for t in sides((2, 50, 50, 6, 2, 32), torch.float32))

    def sdpa(*sides: Tensor) -> Tensor:
        heads = (t.transpose(1, 2) for t in sides)
        return F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2)

    got, want = (results(f, q, k, v, dy) for f in (lambda *t: pk.attention(*t, is_causal=True), sdpa))
    bound = 1e-13 if dtype == torch.float64 else ONE_LAYER
    assert all(testing.relative_error(got[name], want[name]) < bound for name in want)


@pytest.mark.parametrize(
    "name,change,sentence",
    [
        ("q", lambda t: t[0], "q: expected a floating dtype of shape (batch, rows, heads, features), got"),
        ("k", lambda t: t[:, :, :, :-1], "k: expected shape (2, keys, key_heads, 8), got (2, 5, 2, 7)"),
        ("v", lambda t: t[:, 1:], "v: expected shape (2, 5, 2, 8) like k, got (2, 4, 2, 8)"),
        ("v", lambda t: t.double(), "v: expected torch.float32 on cpu like q, got torch.float64 on cpu"),
        ("q", lambda t: t[:, :, :3], "k: expected a divisor of q's 3 heads, got 2"),
        (
            "spans",
            lambda t: t.long(),
            "spans: expected torch.int32 of shape (2, 6, 2) or (2, 6, 2, 2) on cpu, got torch.int64",
        ),
        (
            "spans",
            lambda t: t[:, 1:],
            "spans: expected torch.int32 of shape (2, 6, 2) or (2, 6, 2, 2) on cpu, got torch.int32",
        ),
        ("scale", lambda _: -1.0, "scale: expected a finite number above 0, got -1.0"),
        ("dropout_p", lambda _: 1.5, "dropout_p: expected 0 to 1, got 1.5"),
    ],
)
def test_refused(name: str, change: Any, sentence: str) -> None:
    q, k, v, _ = sides((2, 6, 5, 4, 2, 8), torch.float32)
    given: dict[str, Any] = {"q": q, "k": k, "v": v, "spans": spans_for((2, 6, 5)), "scale": 1.0}
    given["dropout_p"] = 0.0
    given[name] = change(given[name])
    with pytest.raises(ValueError) as error:
        pk.attention(**given)
    assert str(error.value).startswith(sentence)

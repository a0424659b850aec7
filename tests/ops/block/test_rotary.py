"""Rotary embedding on every back end, bit-equal to transformers' functions and their gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from block_samples import angles
from numbers_policy import DTYPES, each_dtype, same_with_any_threads, short
from skips import require
from test_gradient_needs import saved_by
from torch import Tensor

import peft_kernels as pk
import testing
from peft_kernels.core.backends import BACKENDS

SIZES = {"one": (1, 1, 1, 1, 2), "odd": (2, 5, 3, 1, 6), "lanes": (3, 7, 9, 3, 64), "wide": (1, 33, 2, 2, 80)}
"""Batch, rows, heads, heads of keys, features."""

pytestmark = pytest.mark.usefixtures("nan_outputs")


def rotate_half(x: Tensor) -> Tensor:
    a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-b, a), dim=-1)


def stock(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`apply_rotary_pos_emb` with (rows, heads) instead of (heads, rows)."""
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def sides(size: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    batch, rows, heads, key_heads, features = size
    return (
        testing.tensor(batch, rows, heads, features, dtype=dtype, seed=1),
        testing.tensor(batch, rows, key_heads, features, dtype=dtype, seed=2),
    )


def results(forward: Any, q: Tensor, k: Tensor, *rest: Any) -> dict[str, Tensor]:
    leaves = [t.detach().requires_grad_() for t in (q, k)]
    found = forward(*leaves, *rest)
    dy = [testing.tensor(*t.shape, dtype=t.dtype, seed=i) for i, t in enumerate(found)]
    dq, dk = torch.autograd.grad(found, leaves, dy)
    return {"q": found[0].detach(), "k": found[1].detach(), "dq": dq, "dk": dk}


@each_dtype
@pytest.mark.parametrize("batch", ["each", "all"])
@pytest.mark.parametrize("size", SIZES)
def test_bit_equal_to_stock(backend: str, size: str, batch: str, dtype: torch.dtype) -> None:
    q, k = sides(SIZES[size], dtype)
    of_rows = angles(q.shape[0] if batch == "each" else 1, q.shape[1], q.shape[3], dtype)
    want, got = results(stock, q, k, *of_rows), results(pk.rotary, q, k, *of_rows)
    for name, value in want.items():
        assert torch.equal(got[name], value) and got[name].dtype == value.dtype, name
        assert got[name].is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
@pytest.mark.parametrize("of_angles", DTYPES, ids=lambda dtype: f"by_{short(dtype)}")
def test_mixed_types(backend: str, dtype: torch.dtype, of_angles: torch.dtype) -> None:
    """The forward has stock's bits, in torch's promoted dtype. Gradients are rounded once, to q's dtype,
    where stock rounds each term."""
    q, k = sides(SIZES["lanes"], dtype)
    of_rows = angles(1, q.shape[1], q.shape[3], of_angles)
    want, got = results(stock, q, k, *of_rows), results(pk.rotary, q, k, *of_rows)
    truth = results(stock, *(t.double() for t in (q, k, *of_rows)))
    for name in ("q", "k"):
        assert torch.equal(got[name], want[name]) and got[name].dtype == want[name].dtype
    for name in ("dq", "dk"):
        assert got[name].dtype == dtype
        if got["q"].dtype == dtype:
            assert torch.equal(got[name], want[name])
        else:
            testing.assert_close(got[name], want[name], truth[name], name)


def test_results_in_another_type(backend: str) -> None:
    """Bit-equal to stock's results rounded once more; incoming gradients have that dtype, outgoing ones
    q's."""
    q, k = sides(SIZES["lanes"], torch.float32)
    of_rows = angles(1, q.shape[1], q.shape[3])

    def rounded(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.bfloat16() for t in stock(q, k, cos, sin))

    want, got = results(rounded, q, k, *of_rows), results(pk.rotary, q, k, *of_rows, torch.bfloat16)
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert got["q"].dtype == torch.bfloat16 and got["dq"].dtype == torch.float32


def test_16_bit_sums_are_rounded_before_they_are_widened(backend: str) -> None:
    q, k = sides(SIZES["lanes"], torch.bfloat16)
    of_rows = angles(1, q.shape[1], q.shape[3], torch.bfloat16)
    for got, want in zip(pk.rotary(q, k, *of_rows, torch.float32), stock(q, k, *of_rows), strict=True):
        assert got.dtype == torch.float32 and torch.equal(got, want.float())


def test_any_layout(backend: str) -> None:
    """Transposed views, non-contiguous features, and gradients of such layouts."""
    q, k = sides(SIZES["lanes"], torch.bfloat16)
    of_rows = angles(q.shape[0], q.shape[1], q.shape[3], torch.bfloat16)
    want = results(pk.rotary, q, k, *of_rows)
    views = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k)]
    strided = [torch.stack([t, t], -1)[..., 0] for t in (q, k)]
    for given in (views, strided, (q.transpose(0, 1).contiguous().transpose(0, 1), k)):
        got = results(pk.rotary, *given, *of_rows)
        assert all(torch.equal(got[name], want[name]) for name in want)
    cos, sin = (torch.stack([t, t], -1)[..., 0] for t in of_rows)
    got = results(lambda q, k: [t.transpose(1, 2) for t in pk.rotary(q, k, cos, sin)], q, k)
    assert torch.equal(got["q"].transpose(1, 2), want["q"])


def test_strides_beyond_32_bits(backend: str) -> None:
    """Pages of a fresh calloc cost nothing until written."""
    stride = 1 << 30
    far = torch.from_numpy(np.zeros(3 * stride + 6, np.float16))
    q = torch.as_strided(far, (4, 1, 1, 6), (stride, 6, 6, 1))
    q.copy_(testing.tensor(*q.shape, seed=1))
    near, of_rows = q.contiguous(), angles(4, 1, 6, torch.float16)
    assert torch.equal(pk.rotary(q, near, *of_rows)[0], stock(near, near, *of_rows)[0])


def test_gradient_of_q_or_k_alone(backend: str) -> None:
    q, k = sides(SIZES["odd"], torch.float32)
    of_rows = angles(1, q.shape[1], q.shape[3])
    want = results(pk.rotary, q, k, *of_rows)
    trained = q.clone().requires_grad_()
    turned = pk.rotary(trained, k, *of_rows)
    (dq,) = torch.autograd.grad(turned[0], trained, testing.tensor(*q.shape, seed=0))
    assert torch.equal(dq, want["dq"])
    trained = k.clone().requires_grad_()
    turned = pk.rotary(q, trained, *of_rows)
    (dk,) = torch.autograd.grad(turned[1], trained, testing.tensor(*k.shape, seed=1))
    assert torch.equal(dk, want["dk"])


def test_q_and_k_are_not_saved(backend: str) -> None:
    q, k = (t.requires_grad_() for t in sides(SIZES["odd"], torch.float32))
    _, saved = saved_by(lambda: pk.rotary(q, k, *angles(1, 5, 6)))
    assert [t.shape for t in saved] == [(1, 5, 6)] * 2


def test_second_derivatives(backend: str) -> None:
    """The gradient is linear in dy, and its gradient is the forward op."""
    q, k = sides(SIZES["odd"], torch.float32)
    of_rows = angles(1, 5, 6)
    q.requires_grad_()
    dy = testing.tensor(*q.shape, seed=5).requires_grad_()
    (dq,) = torch.autograd.grad(pk.rotary(q, k, *of_rows)[0], q, dy, create_graph=True)
    other = testing.tensor(*q.shape, seed=6)
    (got,) = torch.autograd.grad(dq, dy, other)
    assert torch.equal(got, pk.rotary(other, k, *of_rows)[0])


def test_rotary_with_any_threads(backend: str) -> None:
    q, k = sides((2, 600, 6, 2, 64), torch.bfloat16)
    of_rows = angles(2, 600, 64, torch.bfloat16)
    same_with_any_threads(lambda: results(pk.rotary, q, k, *of_rows).values())


ONES = torch.ones(2, 5, 3, 6)
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "q": (r"q: expected .*\(batch, rows, heads, features\).*got torch.float32 of shape \(5, 3, 6\)",
          {"q": ONES[0]}),
    "odd": ("q: expected .* features even, got", {"q": ONES[..., :5]}),
    "k": (r"k: expected shape \(2, 5, key_heads, 6\), got \(2, 4, 3, 6\)", {"k": ONES[:, :4]}),
    "k-dtype": ("k: expected torch.float32 on cpu like q, got torch.float16 on cpu", {"k": ONES.half()}),
    "cos": (r"cos: expected shape \(2 or 1, 5, 6\), got \(1, 5, 4\)", {"cos": torch.ones(1, 5, 4)}),
    "batch": (r"cos: expected shape \(2 or 1, 5, 6\), got \(3, 5, 6\)", {"cos": torch.ones(3, 5, 6)}),
    "sin": ("sin: expected torch.float32 of shape .* like cos", {"sin": torch.ones(1, 5, 6).bfloat16()}),
    "gradient": ("sin: expected requires_grad=False", {"sin": torch.ones(1, 5, 6).requires_grad_()}),
    "device": ("cos: expected a floating dtype on cpu", {"cos": torch.ones(1, 5, 6, device="meta")}),
    "dtype": ("dtype: expected a floating dtype, got torch.int32", {"dtype": torch.int32}),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_rotary_refuses(case: str) -> None:
    message, wrong = REFUSED[case]
    of_rows = torch.ones(1, 5, 6)
    given: dict[str, Any] = {"q": ONES, "k": ONES, "cos": of_rows, "sin": of_rows}
    with pytest.raises(ValueError, match=message):
        pk.rotary(**given | wrong)


@pytest.mark.parametrize("name", ["cpu", "ptx"])
def test_compiled_op_refuses(name: str) -> None:
    """The op itself checks for memory safety, not only the typed call."""
    require(name)
    raw: Any = getattr(torch.ops, BACKENDS[name].namespace)
    cos = torch.ones(1, 5, 6)
    for message, x, of_rows in (
        ("x: expected shape", [ONES[:, :4]], (cos, cos)),
        ("x: expected shape", [ONES], (torch.ones(3, 5, 6), torch.ones(3, 5, 6))),
        ("x: expected Float", [ONES, ONES.half()], (cos, cos)),
        ("x: expected 2 sequences, got 1", [ONES, ONES[:1]], (cos, cos)),
        ("sin: expected shape", [ONES], (cos, cos[:, :4])),
        ("cos: expected an even number of features", [ONES], (torch.ones(1, 5, 5), cos)),
    ):
        with pytest.raises(RuntimeError, match=message):
            raw.rotary(x, *of_rows, False, torch.float32)

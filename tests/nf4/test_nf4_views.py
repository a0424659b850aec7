"""Reads of a PackedWeight, and its views, which are read-only."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from nf4_weights import make
from torch import Tensor, nn

import testing


def test_reads_see_the_dequantized_values() -> None:
    weight, x = make(), testing.tensor(5, 12)
    dense = weight.dequantize()
    assert torch.equal(weight + 1, dense + 1) and torch.equal(1 - weight, 1 - dense)
    assert torch.equal(weight.abs().sum(), dense.abs().sum())
    assert torch.equal(x @ weight, x @ dense) and torch.equal(torch.mm(x, weight), x @ dense)
    assert torch.equal(weight.norm(), dense.norm()) and weight.isfinite().all()
    assert torch.equal(torch.cat((weight, weight)), torch.cat((dense, dense)))
    assert torch.equal(torch.zeros_like(weight), torch.zeros(12, 64))
    assert weight.new_zeros(3).shape == (3,) and weight.max() == dense.max()
    assert torch.allclose(weight, dense) and torch.equal(weight.float(), dense)
    buffer = torch.empty(12, 64)
    assert torch.equal(buffer.copy_(weight), dense)
    assert not weight.is_dense


VIEWS: dict[str, Callable[[Tensor], object]] = {
    "index": lambda w: w[0],
    "slice": lambda w: w[:, 2:5],
    "t": lambda w: w.t(),
    "T": lambda w: w.T,
    "transpose": lambda w: w.transpose(0, 1),
    "view": lambda w: w.view(-1),
    "unsqueeze": lambda w: w.unsqueeze(0),
    "chunk": lambda w: w.chunk(2),
    "split": lambda w: w.split(3),
    "narrow": lambda w: w.narrow(0, 0, 2),
    "diagonal": lambda w: w.diagonal(),
    "expand": lambda w: w.expand(2, 12, 64),
    "as_strided": lambda w: w.as_strided((2, 2), (1, 1)),
    "einsum": lambda w: torch.einsum("oi->io", w),
    "unbind": lambda w: w.unbind(0),
}


def first(value: object) -> Tensor:
    return value[0] if isinstance(value, (tuple, list)) else value  # type: ignore[return-value]


READ_ONLY = "an NF4 weight has no writable views of its values"


def test_assigning_to_an_index_raises() -> None:
    weight = make()
    before = weight.dequantize()
    with pytest.raises(NotImplementedError, match=READ_ONLY):
        weight[0] = 0.0
    assert not weight.is_dense and torch.equal(weight.dequantize(), before)


@pytest.mark.parametrize("merged", [False, True], ids=["packed", "merged"])
@pytest.mark.parametrize("how", VIEWS)
def test_views_are_read_only(how: str, merged: bool) -> None:
    """A write to a view of a temporary would be lost silently, and so would one beneath a merge."""
    weight = make()
    if merged:
        weight.add_(1.0)
    before = weight.dequantize()
    view, want = first(VIEWS[how](weight)), first(VIEWS[how](before.clone()))
    rows = how in ("chunk", "split") and not merged  # still packed: FSDP2 uses them (NF4Shard)
    assert torch.equal(view, want) and torch.equal(view + 1, want + 1) and view.tolist() == want.tolist()
    assert type(view + 1) is Tensor and (view.numpy() == want.numpy()).all()
    assert (type(view.clone()) is Tensor) != rows
    writes: list[Callable[[], object]] = [
        lambda: view.fill_(5.0),
        lambda: view.add_(1.0),
        lambda: view.data.mul_(2.0),
        lambda: view.detach().zero_(),
        lambda: view.view_as(view).copy_(want),
        lambda: view.unsqueeze(0)[0].fill_(1.0),
        lambda: view.__setitem__(0, 1.0),
        lambda: torch.add(want, 1.0, out=view),
        lambda: torch._foreach_add_([view], 1.0),
        lambda: nn.Parameter(view, requires_grad=False).data.add_(1.0),
    ]
    for write in writes:
        with pytest.raises(NotImplementedError, match=f"expected writes|{READ_ONLY}" if rows else READ_ONLY):
            write()
    assert weight.is_merged == merged and torch.equal(weight.dequantize(), before)


def test_decompositions_and_autograd_on_views() -> None:
    weight, x = make(), testing.tensor(5, 12).requires_grad_()
    dense = weight.dequantize()
    torch.manual_seed(0)
    got = torch.svd_lowrank(weight, q=4, niter=2)
    torch.manual_seed(0)
    for part, want in zip(got, torch.svd_lowrank(dense, q=4, niter=2), strict=True):
        assert type(part) is Tensor and torch.equal(part, want)
    assert torch.equal(torch.linalg.qr(weight.T).Q, torch.linalg.qr(dense.T).Q)
    (x @ weight.T.T).sum().backward()
    torch.testing.assert_close(x.grad, dense.sum(1).expand(5, 12))
    assert copy.deepcopy(weight.T).equal(dense.T) and pickle.loads(pickle.dumps(weight[0])).equal(dense[0])


@pytest.mark.parametrize("how", VIEWS)
def test_view_of_a_dense_weight_is_a_view(how: str) -> None:
    weight = make()
    weight.mul_(2.0)
    first(VIEWS[how](weight)).fill_(5.0)
    assert (weight.dense == 5.0).any()
    weight[1] = 7.0
    assert (weight.dense[1] == 7.0).all()

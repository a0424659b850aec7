"""Dense experts by torch's grouped GEMM, on CPU tensors, where torch has the same op."""

from __future__ import annotations

from typing import Any

import moe_models as moe
import pytest
import torch
import torch.nn.functional as F
from experts_cases import SPLITS, ends_of, runs
from moe_models import sample
from test_cuda_graphs import nothing_read
from test_gradient_needs import Unused
from torch import Tensor

import testing
from peft_kernels.nf4 import grouped_linear as module
from peft_kernels.nf4.experts_forward import experts_forward
from peft_kernels.nf4.grouped_linear import grouped_linear, has_kernel, has_vectors

BF16 = torch.bfloat16
pytestmark = pytest.mark.usefixtures("nan_outputs")


@pytest.fixture
def on_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors count as on a card with a kernel."""
    monkeypatch.setattr(module, "_on_card", lambda x: True)


def loop(x: Tensor, ends: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x[:, :1] * weight.new_zeros(weight.shape[1])
    for e, rows in runs(ends):
        y[rows] = F.linear(x[rows], weight[e], None if bias is None else bias[e])
    return y


def results(call: Any, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    leaf = x.clone().requires_grad_()
    y = call(leaf)
    return {"y": y.detach(), "dx": torch.autograd.grad(y, leaf, dy)[0]}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("split", [name for name in SPLITS if name != "no-rows"])
def test_equals_a_loop(split: str, with_bias: bool, transposed: bool) -> None:
    m, experts, n, k = sum(SPLITS[split]), len(SPLITS[split]) - 1, 24, 40
    ends = ends_of(SPLITS[split])
    x, dy = testing.tensor(m, k, dtype=BF16, seed=1), testing.tensor(m, n, dtype=BF16, seed=2)
    weight = testing.tensor(experts, n, k, dtype=BF16, seed=3)
    if transposed:
        weight = weight.mT.contiguous().mT
    bias = testing.tensor(experts, n, dtype=BF16, seed=4) if with_bias else None
    assert has_vectors(weight)
    truth = results(
        lambda x: loop(x, ends, weight.double(), None if bias is None else bias.double()),
        x.double(),
        dy.double(),
    )
    plain = results(lambda x: loop(x, ends, weight, bias), x, dy)
    with nothing_read():
        got = results(lambda x: grouped_linear(x, ends, weight, bias), x, dy)
    for what, value in got.items():
        testing.assert_close(value, plain[what], truth[what], what)
        assert not value[int(ends[-1]) :].any()


def test_rows_that_lie_apart() -> None:
    wide, ends = testing.tensor(20, 48, dtype=BF16), ends_of(SPLITS["even"])
    weight = testing.tensor(4, 16, 40, dtype=BF16)
    for x in (wide[:, 8:], wide[:, 3:43], wide.flatten()[1:801].view(20, 40)):
        assert torch.equal(grouped_linear(x, ends, weight), grouped_linear(x.clone(), ends, weight))


@pytest.mark.usefixtures("on_card")
def test_what_has_a_kernel() -> None:
    x, weight = torch.ones(5, 16, dtype=BF16), torch.ones(3, 24, 16, dtype=BF16)
    assert has_kernel(x, weight) and has_kernel(x, weight.mT.contiguous().mT)
    assert has_kernel(x, torch.ones(3, 24, 32, dtype=BF16)[..., 16:])
    for rows, other in (
        (x[:0], weight),
        (x.float(), weight.float()),
        (x.half(), weight.half()),
        (x, weight.float()),
        (x, torch.ones(3, 20, 16, dtype=BF16)),
        (x, torch.ones(3, 24, 12, dtype=BF16)),
        (x, torch.ones(3, 24, 36, dtype=BF16)[..., :16]),
        (x, torch.ones(3, 24, 24, dtype=BF16)[..., 4:20]),
        (x, torch.ones(3, 24, 32, dtype=BF16)[..., ::2]),
        (x, weight[:0]),
        (x, weight[:1].expand(1024, 24, 16)),
    ):
        assert not has_kernel(rows, other), (rows.dtype, other.shape, other.stride())


@pytest.mark.parametrize(
    "capability,expected",
    [((8, 0), False), ((9, 0), True), ((10, 0), True), ((10, 3), False), ((12, 0), False)],
)
def test_cards(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: bool) -> None:
    class OnCard(Tensor):
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(module, "CARDS", ((9, 0), (10, 0)))
    x, weight = torch.ones(5, 16, dtype=BF16), torch.ones(3, 24, 16, dtype=BF16)
    assert not has_kernel(x, weight)
    assert has_kernel(x.as_subclass(OnCard), weight) is expected


@pytest.mark.usefixtures("on_card")
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_experts_of_transformers(kind: str) -> None:
    """Gated, transposed with biases, and without a gate: nothing is read from the device."""
    experts = moe.experts(kind, BF16)
    hidden, index, weights = sample(dtype=BF16)
    wide = moe.experts(kind, torch.float64)
    wide.load_state_dict(experts.state_dict())
    truth = wide(hidden.double(), index, weights.double())
    plain = experts(hidden, index, weights.to(BF16))
    with nothing_read():
        got = experts_forward(experts, hidden, index, weights)
    testing.assert_close(got, plain, truth)


@pytest.mark.usefixtures("on_card")
def test_no_gradient_where_no_loss_depends_on_it() -> None:
    x = torch.ones(4, 16, dtype=BF16, requires_grad=True)
    y = grouped_linear(x, torch.tensor([1, 4], dtype=torch.int32), torch.ones(2, 24, 16, dtype=BF16))
    Unused.apply(y).sum().backward()
    assert x.grad is None


@pytest.mark.usefixtures("on_card")
def test_a_trained_weight_gets_its_gradient() -> None:
    """By the loop, as torch's grouped GEMM is used with frozen weights alone."""
    experts = moe.experts("qwen3_moe", BF16)
    experts.down_proj.requires_grad_()
    experts_forward(experts, *sample(dtype=BF16)).sum().backward()
    assert experts.down_proj.grad.isfinite().all() and experts.down_proj.grad.any()

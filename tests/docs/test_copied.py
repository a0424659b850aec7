"""The back end that copies tensors to another device, tested with the CPU as the other device."""

from __future__ import annotations

import pytest
import torch
from copied import CopiedBackend, copied
from skips import require

import peft_kernels as pk
import testing
from peft_kernels.core.backends import BACKENDS

DETOUR = CopiedBackend(BACKENDS["reference"], "cpu")


@pytest.fixture
def copying_backend(monkeypatch: pytest.MonkeyPatch) -> str:
    """Copies to a back end that runs here."""
    DETOUR.load()
    monkeypatch.setitem(BACKENDS, DETOUR.name, DETOUR)
    return DETOUR.name


def test_views_stay_views() -> None:
    base = testing.tensor(6, 8, dtype=torch.bfloat16)
    views = (base, base.t(), base[1:, 3::2], base[:1].expand(4, 8), base.view(-1)[5:], base[:0], base[2, 3])
    for view in views:
        copy = copied(view, "cpu")
        assert torch.equal(copy, view) and copy.dtype == view.dtype
        assert (copy.stride(), copy.storage_offset()) == (view.stride(), view.storage_offset())
        assert copy.untyped_storage().data_ptr() != view.untyped_storage().data_ptr() or not view.numel()


def test_ops_and_gradients_are_those_of_the_target(copying_backend: str) -> None:
    weight = testing.nf4_weight(24, 128)
    bases = testing.tensor(5, 128, seed=2), testing.tensor(4, 128, seed=3), testing.tensor(24, 4, seed=4)

    def results() -> list[torch.Tensor]:
        inputs = [base.clone().requires_grad_() for base in bases]
        y = pk.lora_linear(inputs[0], weight, *inputs[1:], 0.5)
        return [y, *torch.autograd.grad(y.square().sum(), inputs)]

    with pk.use_backend("reference"):
        expected = results()
    with pk.use_backend(copying_backend):
        got = results()
    assert len(got) == 4 and all(map(torch.equal, got, expected))


def test_composite_ops_are_copied_part_by_part(copying_backend: str) -> None:
    gate, up, down = (testing.nf4_weight(*shape) for shape in ((96, 64), (96, 64), (64, 96)))
    x = testing.tensor(3, 64)
    layers = [pk.AdaptedLinear(weight) for weight in (gate, up, down)]
    with pk.use_backend("reference"):
        expected = pk.gated_mlp(x, *layers)
    with pk.use_backend(copying_backend):
        assert torch.equal(pk.gated_mlp(x, *layers), expected)


def test_composite_ops_with_kernels_are_copied_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    require("cpu")
    over = CopiedBackend(BACKENDS["cpu"], "cpu")
    assert over.has_kernel("rms_norm") and not over.has_kernel("linear_cross_entropy_trained")
    assert not over.has_kernel("adamw")  # it changes its arguments
    over.load()
    monkeypatch.setitem(BACKENDS, over.name, over)
    x, weight = testing.tensor(5, 300, dtype=torch.bfloat16), testing.tensor(300)
    with pk.use_backend("cpu"):
        expected = pk.rms_norm(x, weight)
    with pk.use_backend(over.name):
        assert torch.equal(pk.rms_norm(x, weight), expected)


def test_errors_of_the_target_are_raised(copying_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKENDS["reference"], "supports", lambda op, args: f"{op}: not today", raising=False)
    with pk.use_backend(copying_backend), pytest.raises(RuntimeError, match="quantize_nf4: not today"):
        pk.NF4Weight.quantize(testing.tensor(8, 64))

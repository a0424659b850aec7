"""PEFT's `DoraCaching` with patched layers: norms are computed once and dropped by PEFT's rules."""

from __future__ import annotations

import copy
from typing import Any

import models
import pytest
import torch
from peft_models import lora, peft
from test_fused import moved_magnitudes

import peft_kernels as pk
import testing
from peft_kernels.core import dispatch

caching = pytest.importorskip("peft.helpers", reason="PEFT is not installed")


@pytest.fixture
def norms(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtypes of x for which a norm was computed."""
    found: list[torch.dtype] = []
    call = dispatch.call

    def counting(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "dora_norm":
            found.append(kwargs["like"].dtype)
        return call(name, *args, **kwargs)

    monkeypatch.setattr(dispatch, "call", counting)
    return found


def patched_dora(base: str, dtype: torch.dtype = torch.float32) -> Any:
    model = lora(models.base_model(base, dtype), use_dora=True).eval()
    moved_magnitudes(model)
    pk.patch(model)
    return model


def change(model: Any) -> None:
    """Changes the directions, and so the norms."""
    for layer in (model.base_model.model.q, model.base_model.model.o):
        layer.lora_B["default"].weight.data += 0.5


@pytest.mark.parametrize("base", models.BASES)
def test_norms_are_computed_once(base: str, norms: list[torch.dtype]) -> None:
    model, x = patched_dora(base), models.inputs()
    want = model(x)
    assert len(norms) == 2
    with caching.DoraCaching(), torch.no_grad():
        results = [model(x) for _ in range(3)]
    assert len(norms) == 4
    assert all(torch.equal(one, want) for one in results)


def test_train_and_the_end_of_caching_drop_them(norms: list[torch.dtype]) -> None:
    model, x = patched_dora("nf4"), models.inputs()

    def assert_right(count: int, right: bool = True) -> None:
        """Checks that the output uses current norms, and the number of norms computed."""
        norms.clear()
        got, made = model(x), len(norms)
        stock = copy.deepcopy(model)
        pk.unpatch(stock)
        want = stock(x)
        assert made == count and torch.allclose(got, want, rtol=1e-4, atol=1e-4) == right

    with caching.DoraCaching():
        assert_right(2)
        change(model)
        assert_right(0, right=False)  # as in PEFT: the user states that nothing changes
        model.train().eval()
        assert_right(2)
    change(model)
    assert_right(2)
    with caching.DoraCaching():  # norms cached in the earlier context are not reused
        assert_right(2)


def test_training_caches_none(norms: list[torch.dtype]) -> None:
    model, x = patched_dora("nf4").train(), models.inputs()
    with caching.DoraCaching():
        model(x), model(x)
    assert len(norms) == 4


def test_norms_are_cached_by_adapter_and_dtype(norms: list[torch.dtype]) -> None:
    model, x = patched_dora("dense"), models.inputs()
    model.add_adapter("other", peft.LoraConfig(r=8, target_modules=["q", "o"], use_dora=True))
    model.eval()
    for layer in (model.base_model.model.q, model.base_model.model.o):
        torch.nn.init.normal_(layer.lora_B["other"].weight)
    want = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        want[name] = model(x)
    with caching.DoraCaching():
        for name in ("default", "other", "default", "other"):
            model.set_adapter(name)
            assert torch.equal(model(x), want[name]), name
        kept = len(norms)
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
        assert kept == 8 and norms[8:] == [torch.bfloat16] * 2


def test_gradients_with_cached_norms() -> None:
    model, x = patched_dora("nf4"), models.inputs()
    model(x).sum().backward()
    want = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    with caching.DoraCaching():
        for _ in range(2):
            model.zero_grad()
            model(x).sum().backward()
            for name, grad in want.items():
                assert torch.equal(dict(model.named_parameters())[name].grad, grad), name


def test_mismatched_norm_is_refused() -> None:
    x, w, a, b = (testing.tensor(*shape) for shape in ((3, 64), (32, 64), (4, 64), (32, 4)))
    for norm in (torch.ones(31), torch.ones(32, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match=r"norm: expected float32 \(32,\), got torch.* \(3"):
            pk.dora_linear(x, w, a, b, torch.ones(32), 0.5, norm=norm)
    norm = torch.full((32,), 2.0)
    want = pk.dora_linear(x, w, a, b, torch.ones(32), 0.5) * 0
    got = pk.dora_linear(x, w, a, b, torch.ones(32), 0.5, norm=norm)
    torch.testing.assert_close(got, want + (x @ w.T + 0.5 * x @ a.T @ b.T) / 2, rtol=1e-5, atol=1e-5)

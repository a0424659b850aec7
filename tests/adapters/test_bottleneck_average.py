"""pk.adapters.average: means of adapters' parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bottleneck_models import FAMILIES, output, stir

import peft_kernels as pk
from peft_kernels.adapters import AdapterConfig

adapters = pk.adapters


def parameters(model: Any, name: str) -> dict[str, torch.Tensor]:
    return {n: p for n, p in model.named_parameters() if f"_adapters.adapters.{name}." in n}


def test_average() -> None:
    model, config = FAMILIES["bert"].make(), AdapterConfig.houlsby(norm=True)
    for seed, name in enumerate("abc"):
        adapters.add(model, name, config)
        stir(model, name, 100 * seed)
    adapters.train(model, "a")
    adapters.average(model, "mean", ["a", "b", "c"])
    adapters.average(model, "weighted", ["a", "b"], weights=[1, 3])
    adapters.average(model, "task", ["a", "b"], weights=[1, -1], normalize_weights=False)
    adapters.average(model, "copy", ["b"])
    a, b, c = (parameters(model, name) for name in "abc")
    assert len(a) == 2 * 2 * 6
    for name, factors in {"mean": (1 / 3,) * 3, "weighted": (1 / 4, 3 / 4, 0), "task": (1, -1, 0)}.items():
        columns = zip(*(p.values() for p in (parameters(model, name), a, b, c)), strict=True)
        for got, *values in columns:
            want = sum(factor * value.double() for factor, value in zip(factors, values, strict=True))
            assert torch.equal(got, want.to(got.dtype))
    assert adapters.active(model) == ["a"]
    assert not any(p.requires_grad for p in parameters(model, "mean").values())
    outputs = []
    for name in ("b", "copy"):
        adapters.set_active(model, name)
        outputs.append(output(model, FAMILIES["bert"].inputs()))
    assert torch.equal(*outputs)
    for site in adapters.manage.sites(model):
        site.adapters["a"].bfloat16()
        site.adapters["b"].bfloat16()
    adapters.average(model, "narrow", ["a", "b"])
    adapters.average(model, "wide", ["a", "c"])
    adapters.average(model, "wide_too", ["c", "a"])
    assert {p.dtype for p in parameters(model, "narrow").values()} == {torch.bfloat16}
    for name in ("wide", "wide_too"):
        assert {p.dtype for p in parameters(model, name).values()} == {torch.float32}


def test_refused() -> None:
    model = FAMILIES["bert"].make()
    configs = dict.fromkeys("abc", AdapterConfig.houlsby())
    configs |= {"other": AdapterConfig.houlsby(reduction=8), "scaled": AdapterConfig.houlsby(scaling=2.0)}
    for name, config in configs.items():
        adapters.add(model, name, config)
    before = [name for name, _ in model.named_modules()]
    for names, options, message in (
        (["a", "d"], {}, "name: expected one of a, b, c, other, scaled, got 'd'"),
        (["a", "a"], {}, "name: expected different adapters, got a, a"),
        ("a", {}, "names: expected a sequence of adapters, got 'a'"),
        ([], {}, r"names: expected a sequence of adapters, got \[\]"),
        (["a", "other"], {}, "one config, got reduction=16 of 'a' and 8 of 'other'"),
        (["a", "b", "scaled"], {}, r"one config, got scaling=1.0 of 'a' and 2.0 of 'scaled'"),
        (["a", "b"], {"weights": [1.0]}, r"weights: expected 2 finite numbers, .* got \[1.0\]"),
        (["a", "b"], {"weights": [1, 2, 3]}, r"weights: expected 2 finite numbers, .* got \[1.0, 2.0, 3.0\]"),
        (["a", "b"], {"weights": [1, float("nan")]}, r"weights: expected 2 finite .* got \[1.0, nan\]"),
        (["a", "b"], {"weights": [1, float("inf")]}, r"weights: expected 2 finite .* got \[1.0, inf\]"),
        (["a", "b"], {"weights": [1, -1]}, "weights: expected finite shares .* got sum 0.0"),
        (["a", "b"], {"weights": [1e308, 1e308]}, "weights: expected finite shares .* got sum inf"),
        (
            ["a", "b", "c"],
            {"weights": [1e308, -1e308, 0.5]},
            r"weights: expected finite shares .* got sum 0.5",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            adapters.average(model, "new", names, **options)
    with pytest.raises(ValueError, match="name: there is an adapter 'b' already"):
        adapters.average(model, "b", ["a", "b"])
    assert [name for name, _ in model.named_modules()] == before

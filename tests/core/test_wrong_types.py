"""TypeErrors of the public calls name the argument, the expected and the given type."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peft_kernels as pk
import testing

ROWS, IN, OUT, R = 3, 64, 32, 4
X, A, B = torch.ones(ROWS, IN), torch.ones(R, IN), torch.ones(OUT, R)
HEADS = torch.ones(1, 2, 5, 32)


def nf4(*shape: int) -> pk.NF4Weight:
    return pk.NF4Weight.quantize(testing.tensor(*shape))


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(IN, OUT))


def layer(out: int = OUT, features: int = IN) -> pk.AdaptedLinear:
    return pk.AdaptedLinear(
        nf4(out, features), None, [pk.Adapter(torch.ones(R, features), torch.ones(out, R), 1.0)]
    )


def optimizer_args() -> dict[str, Any]:
    return {"params": [nn.Parameter(torch.ones(8))]}


def in_backend(name: str) -> None:
    with pk.use_backend(name):
        pass


CALLS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "add_rms_norm": (pk.add_rms_norm, lambda: {"x": X, "residual": X, "weight": torch.ones(IN)}),
    "attention": (pk.attention, lambda: {"q": HEADS, "k": HEADS, "v": HEADS}),
    "bottleneck": (pk.bottleneck, lambda: {"x": X, "down": A, "up": torch.ones(IN, R)}),
    "dora_linear": (
        pk.dora_linear,
        lambda: {
            "x": X,
            "weight": nf4(OUT, IN),
            "lora_a": A,
            "lora_b": B,
            "magnitude": torch.ones(OUT),
            "scaling": 1.0,
        },
    ),
    "experts_linear": (
        pk.experts_linear,
        lambda: {"x": X, "ends": torch.tensor([1, 3], dtype=torch.int32), "weight": nf4(2, OUT, IN)},
    ),
    "experts_lora_linear": (
        pk.experts_lora_linear,
        lambda: {
            "x": X,
            "ends": torch.tensor([1, 3], dtype=torch.int32),
            "weight": nf4(2, OUT, IN),
            "lora_a": A.repeat(2, 1, 1),
            "lora_b": B.repeat(2, 1, 1),
            "scaling": 1.0,
        },
    ),
    "gated_activation": (pk.gated_activation, lambda: {"gate": X, "up": X}),
    "gated_mlp": (pk.gated_mlp, lambda: {"x": X, "gate": layer(), "up": layer(), "down": layer(IN, OUT)}),
    "linear_cross_entropy": (
        pk.linear_cross_entropy,
        lambda: {"hidden": X, "weight": nf4(OUT, IN), "labels": torch.arange(ROWS), "lora_a": A, "lora_b": B},
    ),
    "linear_kl": (
        pk.linear_kl,
        lambda: {"student": pk.Head(X, nf4(OUT, IN)), "teacher": torch.ones(ROWS, OUT)},
    ),
    "load_checkpoint": (pk.load_checkpoint, lambda: {"model": model(), "path": Path("nowhere")}),
    "lora_linear": (
        pk.lora_linear,
        lambda: {"x": X, "weight": nf4(OUT, IN), "lora_a": A, "lora_b": B, "scaling": 1.0},
    ),
    "multi_bottleneck": (
        pk.multi_bottleneck,
        lambda: {
            "x": X,
            "adapters": [pk.BottleneckParameters(A, torch.ones(IN, R))],
            "row_group": torch.zeros(ROWS, dtype=torch.int32),
        },
    ),
    "multi_lora_linear": (pk.multi_lora_linear, lambda: {"x": X, "layers": [layer()]}),
    "nf4_linear": (pk.nf4_linear, lambda: {"x": X, "weight": nf4(OUT, IN)}),
    "patch": (pk.patch, lambda: {"model": model()}),
    "quantize_model": (pk.quantize_model, lambda: {"model": model()}),
    "rms_norm": (pk.rms_norm, lambda: {"x": X, "weight": torch.ones(IN)}),
    "rotary": (
        pk.rotary,
        lambda: {"q": HEADS, "k": HEADS, "cos": torch.ones(1, 2, 32), "sin": torch.ones(1, 2, 32)},
    ),
    "token_log_probs": (
        pk.token_log_probs,
        lambda: {"hidden": X, "weight": nf4(OUT, IN), "tokens": torch.arange(ROWS), "lora_a": A, "lora_b": B},
    ),
    "unpatch": (pk.unpatch, lambda: {"model": model()}),
    "use_backend": (in_backend, lambda: {"name": "reference"}),
    "NF4Weight.quantize": (pk.NF4Weight.quantize, lambda: {"weight": torch.ones(OUT, IN)}),
    "NF4Linear": (pk.nn.NF4Linear, lambda: {"weight": nf4(OUT, IN)}),
    "NF4Linear.from_linear": (pk.nn.NF4Linear.from_linear, lambda: {"linear": nn.Linear(IN, OUT)}),
    "LoRALinear": (pk.nn.LoRALinear, lambda: {"base_layer": nn.Linear(IN, OUT)}),
    "NF4LoRALinear": (pk.nn.NF4LoRALinear, lambda: {"base_layer": nn.Linear(IN, OUT)}),
    **{n: (getattr(pk.optim, n), optimizer_args) for n in pk.optim.__all__ if n[0].isupper()},
}


ELSEWHERE = {
    ("quantize_model", "modules_to_not_convert"): "another name for skip",
    ("NF4Weight.quantize", "name"): "said in errors alone",
}


def wrong_values(kind: Any) -> list[Any]:
    """None and a string, unless the annotation allows them. Any value is accepted as a bool, and the function
    itself checks a string that names an option."""
    parts = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if bool in parts or Any in parts:
        return []
    return [v for v in (None, "a word") if type(v) not in parts]


def wrong_arguments() -> list[tuple[str, str, Any]]:
    found = []
    for name, (call, _) in CALLS.items():
        target = call.__init__ if inspect.isclass(call) else call
        for argument, kind in typing.get_type_hints(target).items():
            if argument != "return" and (name, argument) not in ELSEWHERE:
                found += [(name, argument, value) for value in wrong_values(kind)]
    return found


@pytest.mark.parametrize("name,argument,value", wrong_arguments())
def test_wrong_arguments_are_named(name: str, argument: str, value: Any) -> None:
    call, arguments = CALLS[name]
    with pytest.raises((TypeError, ValueError), match=rf"^{argument}\b.*: .*expected .*, got "):
        call(**{**arguments(), argument: value})


@pytest.mark.parametrize("name", CALLS)
def test_right_arguments_pass(name: str) -> None:
    call, arguments = CALLS[name]
    if name == "load_checkpoint":
        pytest.skip("its own errors of files are in test_bad_checkpoints.py")
    call(**arguments())


def test_list_items_are_named() -> None:
    bad = pk.AdaptedLinear(nf4(OUT, IN), adapters=[pk.Adapter(torch.ones(R, IN), None, 1.0)])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^layers\[1\]\.adapters\[0\]\.lora_b: expected a Tensor, got None$"):
        pk.multi_lora_linear(X, [layer(), bad])


def test_other_errors_are_unchanged() -> None:
    """Errors with right types, and Python's own error about missing arguments, are unchanged."""
    with pytest.raises(ValueError, match=r"^x: expected shape"):
        pk.rms_norm(X, torch.ones(IN + 1))
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'weight'"):
        pk.rms_norm(X)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"^x: expected a Tensor, got ndarray$") as caught:
        pk.rms_norm(X.numpy(), torch.ones(IN))  # type: ignore[arg-type]
    assert caught.value.__cause__ is not None
    torch.testing.assert_close(pk.rms_norm(X, torch.ones(IN), torch.tensor(1e-6)), X)  # type: ignore[arg-type]


def test_every_public_call_is_covered() -> None:
    others = {"explain", "keep_freed_memory", "patched"}
    records = {"AdaptedLinear", "Adapter", "BottleneckParameters", "Head"}
    classes = {"NF4Weight", "PackedWeight"}
    assert {n for n in pk.__all__ if callable(getattr(pk, n))} - others - records - classes <= set(CALLS)

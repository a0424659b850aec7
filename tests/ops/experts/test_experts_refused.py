"""Bad arguments of the experts' ops: the typed calls raise ValueError; the compiled ops, without Python's
checks, raise too and never read out of bounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from skips import require
from torch import Tensor

import peft_kernels as pk
import testing
from peft_kernels.core.backends import BACKENDS

E, N, K, R, ROWS = 3, 33, 64, 4, 7


def weight() -> pk.NF4Weight:
    return pk.NF4Weight.quantize(testing.tensor(E, N, K), 32)


def good() -> dict[str, Any]:
    return {
        "x": testing.tensor(ROWS, K), "ends": torch.tensor([2, 2, 6], dtype=torch.int32), "weight": weight(),
        "lora_a": testing.tensor(E, R, K), "lora_b": testing.tensor(E, N, R), "scaling": 0.5,
        "bias": testing.tensor(E, N),
    }  # fmt: skip


ones = torch.ones
INT = torch.int32
EITHER: dict[str, tuple[str, dict[str, Any]]] = {
    "x-vector": (r"^x: expected shape \(rows, 64\), got \(64,\)$", {"x": ones(K)}),
    "x-3-d": (r"^x: expected shape \(rows, 64\), got \(1, 7, 64\)$", {"x": ones(1, ROWS, K)}),
    "x-features": (r"^x: expected shape \(rows, 64\), got \(7, 63\)$", {"x": ones(ROWS, K - 1)}),
    "x-int": (r"^x: expected a floating dtype, got torch.int32$", {"x": ones(ROWS, K, dtype=INT)}),
    "ends-count": (
        r"^ends: expected shape \(3,\) of torch.int32, got \(2,\) of torch.int32$",
        {"ends": ones(2, dtype=INT)},
    ),
    "ends-dtype": (r"^ends: .*got \(3,\) of torch.int64$", {"ends": ones(E, dtype=torch.int64)}),
    "ends-device": (
        r"^ends: expected device cpu like x, got meta$",
        {"ends": ones(E, dtype=INT, device="meta")},
    ),
    "weight-2-d": (
        r"^weight: expected shape \(experts, out_features, in_features\), got \(33, 64\)$",
        {"weight": testing.nf4_weight(N, K, 32)},
    ),
    "bias-shape": (r"^bias: expected shape \(3, 33\), got \(33,\)$", {"bias": ones(N)}),
    "bias-dtype": (
        r"^bias: expected torch.float32 like x or float32, got torch.float16$",
        {"bias": ones(E, N).half()},
    ),
    "bias-grad": (
        r"^bias: expected requires_grad=False, as experts are frozen here, got True$",
        {"bias": ones(E, N).requires_grad_()},
    ),
}
WITH_ADAPTER: dict[str, tuple[str, dict[str, Any]]] = {
    "weight-dtype": (
        r"^weight: expected torch.float32 like x, got torch.bfloat16$",
        {"weight": ones(E, N, K).bfloat16()},
    ),
    "weight-grad": (
        r"^weight: expected requires_grad=False, as experts are frozen here, got True$",
        {"weight": ones(E, N, K).requires_grad_()},
    ),
    "lora_a-2-d": (r"^lora_a: expected shape \(3, r, 64\), got \(4, 64\)$", {"lora_a": ones(R, K)}),
    "lora_a-experts": (r"^lora_a: expected shape \(3, r, 64\)", {"lora_a": ones(E + 1, R, K)}),
    "lora_b-rank": (
        r"^lora_b: expected shape \(3, 33, 4\), got \(3, 33, 5\)$",
        {"lora_b": ones(E, N, R + 1)},
    ),
    "lora_b-dtype": (
        r"^lora_b: expected torch.float32 like x or float32, got torch.bfloat16$",
        {"lora_b": ones(E, N, R).bfloat16()},
    ),
    "lora_a-device": (
        r"^lora_a: expected device cpu like x, got meta$",
        {"lora_a": ones(E, R, K, device="meta")},
    ),
}


@pytest.mark.parametrize("case", EITHER)
def test_experts_linear_refuses(case: str) -> None:
    message, changes = EITHER[case]
    args = {name: value for name, value in (good() | changes).items() if name not in ("lora_a", "lora_b")}
    del args["scaling"]
    with pytest.raises(ValueError, match=message):
        pk.experts_linear(**args)


@pytest.mark.parametrize("case", [*EITHER, *WITH_ADAPTER])
def test_experts_lora_linear_refuses(case: str) -> None:
    message, changes = (EITHER | WITH_ADAPTER)[case]
    with pytest.raises(ValueError, match=message):
        pk.experts_lora_linear(**(good() | changes))


@pytest.mark.filterwarnings("ignore:.* bytes for each value of an NF4 weight")
def test_experts_linear_needs_packed_values() -> None:
    x, ends = good()["x"], good()["ends"]
    with pytest.raises(ValueError, match=r"^weight: expected a PackedWeight, got Tensor$"):
        pk.experts_linear(x, ends, ones(E, N, K))  # type: ignore[arg-type]
    dense = weight()
    dense.mul_(2.0)
    with pytest.raises(ValueError, match=r"^weight: expected packed values, got .* that a write made dense$"):
        pk.experts_linear(x, ends, dense)


BAD_ENDS = {"falls": [5, 3, 6], "beyond": [2, 6, 8], "negative": [-1, 2, 6], "huge": [2, 2, 2**31 - 1]}
NEED = True, True, True


def each_op(ops: Any, ends: Tensor, of: pk.NF4Weight) -> dict[str, Any]:
    x, dy, h = testing.tensor(ROWS, K), testing.tensor(ROWS, N), testing.tensor(ROWS, R)
    a, b, group = testing.tensor(E, R, K), testing.tensor(E, N, R), of._state.op_args
    return {
        "linear": lambda: ops.experts_linear(x, ends, *group, N, None),
        "linear_dx": lambda: ops.experts_linear_dx(dy, ends, *group, K),
        "lora_linear": lambda: ops.experts_lora_linear(x, ends, *group, None, a, b, 0.5),
        "lora_linear_backward": lambda: ops.experts_lora_linear_backward(
            dy, x, h, ends, *group, a, b, 0.5, *NEED
        ),
    }


@pytest.fixture
def cpu_ops() -> Any:
    """The ops, called without the checks of Python."""
    require("cpu")
    return getattr(torch.ops, BACKENDS["cpu"].namespace)


@pytest.mark.parametrize("bad", BAD_ENDS)
@pytest.mark.parametrize("op", ["linear", "linear_dx", "lora_linear", "lora_linear_backward"])
def test_bad_ends_are_refused(cpu_ops: Any, op: str, bad: str) -> None:
    ends = torch.tensor(BAD_ENDS[bad], dtype=INT)
    sentence = (
        r"^ends: expected values that rise from 0 to 7, the rows there are, got -?\d+ after \d for expert"
    )
    with pytest.raises(RuntimeError, match=sentence):
        each_op(cpu_ops, ends, weight())[op]()


@pytest.mark.parametrize("bad", BAD_ENDS)
@pytest.mark.parametrize("op", ["linear", "linear_dx", "lora_linear", "lora_linear_backward"])
def test_bad_ends_are_safe(backend: str, op: str, bad: str) -> None:
    """Every back end raises, or returns results of the right shapes from existing rows."""
    ends = torch.tensor(BAD_ENDS[bad], dtype=INT)
    call = each_op(torch.ops.peft_kernels, ends, weight())[op]
    try:
        found = call()
    except (RuntimeError, IndexError) as error:
        assert backend.startswith("cpu") and str(error).startswith("ends: "), error
        return
    assert not backend.startswith("cpu")
    for got in [found] if isinstance(found, Tensor) else found:
        assert got.isfinite().all()


SENTENCES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "x": ("linear", "x: expected 2 dimensions, got 1", {"x": ones(K)}),
    "packed": ("linear", "packed: expected 3168 bytes, got 3167", {"packed": ones(3167, dtype=torch.uint8)}),
    "absmax": ("linear", "absmax: expected 198 elements, got 66", {"absmax": ones(66, dtype=torch.uint8)}),
    "absmax2": ("linear", "absmax2: expected 3 elements, got 1", {"absmax2": ones(1)}),
    "offset": ("linear", "offset: expected 3 elements, got 1", {"offset": ones(())}),
    "ends-dtype": ("linear", "ends: expected Int, got Long", {"ends": ones(E, dtype=torch.int64)}),
    "ends-2-d": ("linear", "ends: expected 1 dimension, got 2", {"ends": ones(E, 1, dtype=INT)}),
    "bias": ("linear", r"bias: expected shape \[3, 33\], got \[33\]", {"bias": ones(N)}),
    "bias-dtype": ("linear", "bias: expected Float or Float, got Half", {"bias": ones(E, N).half()}),
    "out_features": ("linear", "out_features: expected 0 or more, got -1", {"out_features": -1}),
    "in_features": ("linear_dx", "in_features: expected 0 or more, got -1", {"in_features": -1}),
    "lora_a": ("lora", r"lora_a: expected shape \[3, 4, 64\], got", {"lora_a": ones(E, R, K + 1)}),
    "lora_a-2-d": ("lora", "lora_a: expected 3 dimensions, got 2", {"lora_a": ones(R, K)}),
    "lora_b": ("lora", r"lora_b: expected shape \[3, 33, 4\], got", {"lora_b": ones(E, N, R + 1)}),
    "lora_b-experts": ("lora", r"lora_b: expected shape \[3, 33, 4\], got", {"lora_b": ones(E - 1, N, R)}),
    "lora_b-dtype": ("lora", "lora_b: expected Float or Float, got Half", {"lora_b": ones(E, N, R).half()}),
    "dy": ("backward", r"dy: expected shape \[7, 33\], got \[6, 33\]", {"dy": ones(ROWS - 1, N)}),
    "dy-dtype": ("backward", "dy: expected Float, got Half", {"dy": ones(ROWS, N).half()}),
    "h": ("backward", r"h: expected shape \[7, 4\], got \[7, 5\]", {"h": ones(ROWS, R + 1)}),
    "h-dtype": ("backward", "h: expected Float, got BFloat16", {"h": ones(ROWS, R).bfloat16()}),
}


@pytest.mark.parametrize("case", SENTENCES)
def test_the_compiled_ops_refuse(cpu_ops: Any, case: str) -> None:
    op, sentence, changes = SENTENCES[case]
    args = good() | {"dy": ones(ROWS, N), "h": ones(ROWS, R), "out_features": N, "in_features": K}
    args |= weight()._state.op_args._asdict() | {"packed": weight().packed} | changes
    group = tuple(args[name] for name in ("packed", "absmax", "absmax2", "offset", "layout"))
    adapter = args["lora_a"], args["lora_b"], args["scaling"]
    x, ends, bias = args["x"], args["ends"], args["bias"]
    calls = {
        "linear": lambda: cpu_ops.experts_linear(x, ends, *group, args["out_features"], bias),
        "linear_dx": lambda: cpu_ops.experts_linear_dx(args["dy"], ends, *group, args["in_features"]),
        "lora": lambda: cpu_ops.experts_lora_linear(x, ends, *group, bias, *adapter),
        "backward": lambda: cpu_ops.experts_lora_linear_backward(
            args["dy"], x, args["h"], ends, *group, *adapter, *NEED
        ),
    }
    with pytest.raises(RuntimeError, match=f"^{sentence}"):
        calls[op]()


def test_a_dense_weight_must_fit(cpu_ops: Any) -> None:
    args = good()
    for dense, sentence in (
        (ones(E, N, K + 1), r"^weight: expected shape \[3, 33, 64\]"),
        (ones(E - 1, N, K), r"^weight: expected shape \[3, 33, 64\]"),
        (ones(E, N, K).half(), "^weight: expected Float, got Half"),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            cpu_ops.experts_lora_linear(
                args["x"], args["ends"], dense, None, None, None, 0, None, args["lora_a"], args["lora_b"], 0.5
            )

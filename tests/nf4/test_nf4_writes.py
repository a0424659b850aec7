"""Writes to a PackedWeight keep full precision and reach every alias."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import models
import pytest
import torch
import torch.nn.functional as F
from nf4_weights import assert_equal_weights, each_shape, make, parts
from torch import Tensor, nn

import peft_kernels as pk
import testing
from peft_kernels.core import packed_state


def add_to_data(weight: Tensor, delta: Tensor) -> None:
    weight.data += delta


def assign_data(weight: Tensor, delta: Tensor) -> None:
    weight.data = weight.data + delta


def add_to_detached(weight: Tensor, delta: Tensor) -> None:
    weight.detach().add_(delta)


def copy_dense(weight: Tensor, delta: Tensor) -> None:
    weight.copy_(weight.dequantize() + delta)  # type: ignore[attr-defined]


WRITES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "data-iadd": add_to_data,
    "add_": lambda w, d: w.add_(d),
    "data-assign": assign_data,
    "data-add_": lambda w, d: w.data.add_(d),
    "detach-add_": add_to_detached,
    "copy_": copy_dense,
    "out": lambda w, d: torch.add(w.dequantize(), d, out=w),
    "foreach": lambda w, d: torch._foreach_add_([w], [d]),
}


@each_shape
@pytest.mark.parametrize("wrap", ["tensor", "parameter"])
@pytest.mark.parametrize("how", WRITES)
def test_write_keeps_full_precision(how: str, wrap: str, shape: tuple[int, int]) -> None:
    weight: Tensor = make(shape)
    if wrap == "parameter":
        weight = nn.Parameter(weight, requires_grad=False)
    delta = testing.tensor(*shape, seed=9, scale=1e-3)  # far below the step of the 4-bit grid
    want = weight.dequantize() + delta
    with torch.no_grad():
        WRITES[how](weight, delta)
    assert weight.is_dense and torch.equal(weight.dequantize(), want) and torch.equal(weight + 0, want)
    x = testing.tensor(3, shape[1])
    torch.testing.assert_close(F.linear(x, weight), x @ want.t())
    torch.testing.assert_close(pk.nf4_linear(x, weight), x @ want.t())


@pytest.mark.parametrize("how", ["data-iadd", "add_", "data-add_", "detach-add_", "copy_", "out", "foreach"])
def test_write_reaches_every_alias(how: str) -> None:
    weight = make()
    parameter = nn.Parameter(weight, requires_grad=False)
    aliases = [weight, weight.detach(), weight.data, parameter, parameter.detach()]
    delta = testing.tensor(12, 64, seed=9)
    want = weight.dequantize() + delta
    with torch.no_grad():
        WRITES[how](parameter, delta)
    for alias in aliases:
        assert alias.is_dense and torch.equal(alias.dequantize(), want)
    if how in ("copy_", "out"):  # not a merge, so it cannot be undone
        assert parts(weight).keys() == {"dense"}, "the packed bytes must be freed"
    else:
        assert weight.is_merged


def test_write_to_a_wrapped_dtype_rounds_to_that_dtype() -> None:
    weight = make(dtype=torch.bfloat16)
    want = weight.dequantize() + 1
    weight.add_(1)
    assert weight.dense.dtype == torch.bfloat16 and torch.equal(weight.dense, want)


def test_memory_growth_warns_once_per_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_state, "_warned", set())
    weight = pk.NF4Weight.quantize(testing.tensor(12, 64), name="model.q.weight")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weight.add_(1)  # merge_and_unload leaves a dense layer
    with pytest.warns(
        UserWarning, match=r"^model\.q\.weight: 4\.5\d bytes for each value .* until it is unmerged"
    ):
        pk.nf4_linear(testing.tensor(2, 64), weight)
    with pytest.warns(UserWarning, match=r"^model\.q\.weight: 4 bytes for each value .* from now on"):
        weight.mul_(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make().add_(1).mul_(2)


def test_a_merge_into_dense_layers_does_not_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the recipe does it; what stays merged and packed warns when it is called."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    monkeypatch.setattr(packed_state, "_warned", set())
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(pk.quantize_model(models.tiny_llama(num_hidden_layers=1)), config)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="until it is unmerged"):
        model(input_ids=torch.ones(1, 3, dtype=torch.int64))
    model.unmerge_adapter()
    packed_state._warned.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*bytes for each value")
        model.merge_and_unload()(input_ids=torch.ones(1, 3, dtype=torch.int64))


def test_writing_the_same_values_stays_packed() -> None:
    weight = make(dtype=torch.bfloat16)
    packed = weight.packed
    weight.copy_(weight.dequantize())
    assert not weight.is_dense and weight.packed is packed
    weight.mul_(1.0)
    weight.add_(1.0)
    weight.copy_(weight._state.dequantize(torch.bfloat16))
    assert not weight.is_dense and weight.packed is packed


def test_failed_write_changes_nothing() -> None:
    weight = make()
    for write in (lambda: weight.add_(torch.ones(5)), lambda: weight.copy_(torch.ones(5))):
        with pytest.raises(RuntimeError):
            write()
    assert not weight.is_dense


def test_assigning_a_dense_tensor() -> None:
    weight = nn.Parameter(make(), requires_grad=False)
    dense = testing.tensor(12, 64, dtype=torch.bfloat16, seed=5)
    weight.data = dense
    assert weight.is_dense and weight.dtype == torch.bfloat16 and torch.equal(weight.dequantize(), dense)
    assert weight.dense.data_ptr() == dense.data_ptr()
    with pytest.raises(ValueError, match=r"data: expected shape \(12, 64\), got \(64, 12\)"):
        weight.data = torch.zeros(64, 12)
    assert torch.equal(weight.dequantize(), dense)


def test_assigning_another_nf4_weight() -> None:
    weight, other = nn.Parameter(make(), requires_grad=False), make((7, 33), dtype=torch.float16, seed=3)
    weight.data = other
    assert_equal_weights(weight, other)
    assert isinstance(weight, nn.Parameter)


@pytest.mark.parametrize("read", ["data", "detach", "float", "contiguous", "to", "cpu"])
def test_dense_weight_reads_as_the_plain_tensor(read: str) -> None:
    """A subclass on the right of `dense.data = ...` crashes torch, and a dense weight can be plain."""
    weight = nn.Parameter(make(), requires_grad=False)
    weight.data.abs_()
    value = getattr(weight, read)
    value = value if read == "data" else value(torch.float32) if read == "to" else value()
    assert type(value) is Tensor and value.data_ptr() == weight.dense.data_ptr()
    ordinary = nn.Parameter(torch.zeros(12, 64))
    ordinary.data = value
    assert torch.equal(ordinary, weight.dequantize())
    value.fill_(3.0)
    assert (weight.dequantize() == 3).all(), "the write was lost"

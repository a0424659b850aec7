"""Repeated merge_adapter and unmerge_adapter of PEFT over NF4: the same bits, the same memory."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import models
import pytest
import torch
from installed import before
from merge_models import PATCHED, SAFE
from peft_models import DTYPES, lora
from rounding import ONE_MODEL
from torch import Tensor, nn

import peft_kernels as pk
import testing
from peft_kernels.core import fingerprint as fingerprints
from peft_kernels.core import packed_state
from peft_kernels.core.fingerprint import fingerprint
from peft_kernels.nn import NF4Linear

peft = pytest.importorskip("peft", reason="PEFT is not installed")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*may get different generations due to rounding errors"),
    pytest.mark.filterwarnings("ignore:.*bytes for each value of an NF4 weight"),
]
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def adapted(
    dtype: torch.dtype = torch.bfloat16, adapters: int = 1, patched: bool = False, **options: Any
) -> Any:
    model = lora(models.base_model("nf4", dtype), **options)
    for i in range(1, adapters):
        config = peft.LoraConfig(r=2 + i, target_modules=["q", "o"], init_lora_weights=False)
        model.add_adapter(str(i), config)
    model.base_model.set_adapter(["default", *map(str, range(1, adapters))])
    if patched:
        pk.patch(model)
    return model


def bases(model: Any) -> dict[str, NF4Linear]:
    net = model.base_model.model
    return {"q": net.q.base_layer, "o": net.o.base_layer}


def bits(model: Any) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def storage_bytes(model: nn.Module) -> int:
    """Bytes of all storages that the model's parameters keep alive."""
    return sum(p._state.nbytes if isinstance(p, pk.NF4Weight) else p.nbytes for p in model.parameters())


def assert_same_bits(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert got[key].dtype == value.dtype and torch.equal(got[key], value), key


@PATCHED
@SAFE
@DTYPE
@pytest.mark.parametrize("adapters", [1, 3])
def test_cycles_restore_bits_and_memory(adapters: int, dtype: torch.dtype, safe: bool, patched: bool) -> None:
    model, x = adapted(dtype, adapters, patched), testing.tensor(9, 64, dtype=dtype)
    before, size, packed = bits(model), storage_bytes(model), bases(model)["q"].weight.packed.data_ptr()
    y = model(x)
    for _ in range(3):
        model.merge_adapter(safe_merge=safe)
        for base in bases(model).values():
            assert type(base) is NF4Linear and base.weight.is_merged and base.weight.packed is None
        eps = torch.finfo(dtype).eps
        assert testing.relative_error(model(x), y) < max(8 * eps, ONE_MODEL)
        assert storage_bytes(model) > size
        model.unmerge_adapter()
        assert_same_bits(bits(model), before)
        assert storage_bytes(model) == size and not any(b.weight.is_dense for b in bases(model).values())
        assert torch.equal(model(x), y)
    assert safe or bases(model)["q"].weight.packed.data_ptr() == packed, "packed bytes were copied"


def test_unmerging_in_any_order() -> None:
    weight = pk.NF4Weight.quantize(testing.tensor(48, 64, dtype=torch.bfloat16))
    packed, deltas = weight.packed, [testing.tensor(48, 64, seed=i) for i in range(4)]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        for delta in deltas:
            weight.data += delta  # fp32, as PEFT merges
        for i in order:
            assert weight.is_merged
            weight.data -= deltas[i].to(torch.bfloat16)  # in the weight's dtype, as PEFT unmerges
        assert weight.packed is packed and weight.dense is None


def test_one_adapter_stays_merged_while_others_change() -> None:
    weight = pk.NF4Weight.quantize(testing.tensor(48, 64))
    a, b = testing.tensor(48, 64, seed=1), testing.tensor(48, 64, seed=2)
    weight.data += a
    weight.data += b
    weight.data -= a
    assert weight.is_merged
    torch.testing.assert_close(weight.dense, weight._state.dequantize(torch.float32) + b)
    weight.data -= b
    assert not weight.is_dense


BETWEEN: dict[str, Callable[[pk.NF4Weight, Tensor], object]] = {
    "another delta": lambda w, d: w.data.sub_(d * (1 + 1e-6)),
    "half of it": lambda w, d: w.data.sub_(d, alpha=0.5),
    "scaled": lambda w, d: w.data.mul_(1.5),
    "one element": lambda w, d: w.copy_(w.dequantize().index_fill_(0, torch.tensor([3]), 0.25)),
    "assigned": lambda w, d: setattr(w, "data", w.dequantize() * 2),
}


@pytest.mark.parametrize("how", BETWEEN)
def test_writes_to_a_merged_weight_are_kept(how: str) -> None:
    weight, delta = pk.NF4Weight.quantize(testing.tensor(48, 64)), testing.tensor(48, 64, seed=1)
    weight.data += delta
    plain = weight.dequantize()
    twin = pk.NF4Weight(packed_state.PackedState((48, 64), 64, dense=plain), torch.float32)
    for w in (weight, twin):
        BETWEEN[how](w, delta)
        w.data -= delta
    assert torch.equal(weight.dequantize(), twin.dequantize())
    assert weight.is_dense and not weight.is_merged, "the packed bytes are of no more use"
    assert not torch.equal(weight.dequantize(), weight.dequantize().zero_())


def test_subtracting_a_delta_of_another_dtype_does_not_unmerge() -> None:
    weight, delta = pk.NF4Weight.quantize(testing.tensor(48, 64)), testing.tensor(48, 64, seed=1)
    weight.data += delta
    weight.data -= delta.bfloat16()
    assert weight.is_dense and not weight.is_merged


def test_fingerprints_differ_between_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    value = testing.tensor(33, 65, dtype=torch.bfloat16)
    first = fingerprint(value)
    assert fingerprint(value.clone()) == fingerprint(value.t().contiguous().t()) == first
    others = [value.view(65, 33), value.t(), value.half(), value.view(torch.int16), value[1:], value.flip(0)]
    for i in (0, 1000, value.numel() - 1):
        nudged = value.clone()
        nudged.view(torch.int16).view(-1)[i] ^= 1
        others.append(nudged)
    swapped = value.clone()
    swapped[[0, 1]] = value[[1, 0]]
    prints = [fingerprint(v) for v in (*others, swapped)]
    assert len({first, *prints}) == len(prints) + 1
    big = torch.zeros(3, fingerprints._CHUNK["cpu"])
    moved = big.clone()
    big[0, 5], moved[1, 5] = 1, 1
    assert fingerprint(big) != fingerprint(moved)
    on_any_device = fingerprint(big)
    monkeypatch.setitem(fingerprints._CHUNK, "cpu", 1000)
    assert fingerprint(big) == on_any_device and fingerprint(value) == first


@PATCHED
@DTYPE
def test_dora_cycles_need_the_merging_context(dtype: torch.dtype, patched: bool) -> None:
    """DoRA's merge assigns and its unmerge divides, so the weight alone cannot recognise its earlier
    value. Patched layers enter the context themselves."""
    model, x = adapted(dtype, patched=patched, use_dora=True), testing.tensor(9, 64, dtype=dtype)
    before, size, y = bits(model), storage_bytes(model), model(x)
    for _ in range(2):
        for name, base in bases(model).items():
            with nullcontext() if patched else base.weight.merging():
                getattr(model.base_model.model, name).merge()
            assert base.weight.is_merged
        assert testing.relative_error(model(x), y) < max(16 * torch.finfo(dtype).eps, ONE_MODEL)
        for name, base in bases(model).items():
            with nullcontext() if patched else base.weight.unmerging():
                getattr(model.base_model.model, name).unmerge()
        assert_same_bits(bits(model), before)
        assert storage_bytes(model) == size and torch.equal(model(x), y)
    model.merge_adapter()
    model.unmerge_adapter()
    for base in bases(model).values():
        assert base.weight.is_dense is not patched and not base.weight.is_merged


def test_unmerging_keeps_later_writes() -> None:
    weight = pk.NF4Weight.quantize(testing.tensor(48, 64))
    with weight.merging():
        weight.data = weight.dequantize() * 2
    assert weight.is_merged
    weight.data.mul_(3)
    with weight.unmerging():
        weight.data = weight.dequantize() / 2
    assert weight.is_dense and not weight.is_merged
    torch.testing.assert_close(
        weight.dequantize(), pk.NF4Weight.quantize(testing.tensor(48, 64)).dequantize() * 3
    )


def test_failed_or_empty_merge_leaves_the_weight_packed() -> None:
    weight = pk.NF4Weight.quantize(testing.tensor(48, 64))
    with pytest.raises(RuntimeError, match="broken"), weight.merging():
        raise RuntimeError("broken")
    assert not weight.is_dense
    with weight.merging():
        pass
    assert not weight.is_dense


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_a_merged_model_unmerges_too(how: str) -> None:
    model = adapted()
    before = bits(model)
    model.merge_adapter()
    twin = COPIES[how](model)
    twin.unmerge_adapter()
    assert_same_bits(bits(twin), before)
    assert bases(model)["q"].weight.is_merged
    model.unmerge_adapter()
    assert_same_bits(bits(model), before)


def test_merged_model_moves_and_unmerges() -> None:
    model, x = adapted(torch.float32), testing.tensor(9, 64)
    before, y = bits(model), model(x)
    model.merge_adapter()
    model.to("cpu").eval().requires_grad_(False)
    saved = model.state_dict()
    assert saved["base_model.model.q.base_layer.weight"].dtype == torch.float32
    assert testing.relative_error(model(x), y) < ONE_MODEL
    model.unmerge_adapter()
    assert_same_bits(bits(model), before)


@SAFE
@PATCHED
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("cycled", [False, True], ids=["at once", "after a cycle"])
def test_merge_and_unload_leaves_no_trace(
    cycled: bool, options: dict[str, bool], patched: bool, safe: bool
) -> None:
    model, x = adapted(torch.float32, patched=patched, **options), testing.tensor(9, 64)
    y = model(x)
    if cycled:
        model.merge_adapter()
        model.unmerge_adapter()
    merged = model.merge_and_unload(safe_merge=safe)
    assert testing.relative_error(merged(x), y) < ONE_MODEL
    for layer in (merged.q, merged.o):
        assert type(layer) is nn.Linear and type(layer.weight) is nn.Parameter
        assert vars(layer).keys() == vars(nn.Linear(1, 1)).keys()
    left = {"peft_config"} if before("peft", "0.19") else set()
    assert vars(merged).keys() == vars(models.Net()).keys() | left
    assert b"peft_kernels" not in pickle.dumps(merged)
    file = io.BytesIO()
    torch.save(merged.state_dict(), file)
    assert b"peft_kernels" not in file.getvalue()
    traced = torch.jit.trace(merged, x)
    assert testing.relative_error(traced(x), y) < ONE_MODEL


def test_a_model_merged_and_unloaded_in_two_steps() -> None:
    model = adapted(torch.float32)
    model.merge_adapter()
    assert bases(model)["q"].weight.is_merged and list(bases(model)["q"].named_modules())
    assert isinstance(bases(model)["q"], NF4Linear), "PEFT's wrapper is still around it"
    assert type(model.unload().q) is nn.Linear


def test_unload_without_a_merge_stays_nf4() -> None:
    base = adapted().unload()
    assert isinstance(base.q, NF4Linear) and not base.q.weight.is_dense

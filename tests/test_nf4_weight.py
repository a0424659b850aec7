"""NF4Weight in other people's hands: what a library does to an ordinary frozen weight works, or raises."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peft_kernels as pk
import testing
from peft_kernels import nf4_state

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = {"even": (12, 64), "odd": (7, 33)}

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
each_nesting = pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def make(
    shape: tuple[int, int] = (12, 64), nested: bool = True, dtype: torch.dtype = torch.float32, seed: int = 1
) -> pk.NF4Weight:
    return pk.NF4Weight.quantize(testing.tensor(*shape, dtype=dtype, seed=seed), 32, nested)


def parts(weight: pk.NF4Weight) -> dict[str, Tensor]:
    return weight._state.tensors()


def assert_equal_weights(got: Tensor, want: pk.NF4Weight) -> None:
    assert isinstance(got, pk.NF4Weight)
    assert (got.shape, got.dtype, got.blocksize, got.double_quant) == (
        want.shape, want.dtype, want.blocksize, want.double_quant,
    )  # fmt: skip
    assert parts(got).keys() == parts(want).keys()
    for name, tensor in parts(want).items():
        assert torch.equal(parts(got)[name], tensor), name


def assert_shares_nothing(a: pk.NF4Weight, b: pk.NF4Weight) -> None:
    assert a._state is not b._state
    for name in parts(a):
        assert parts(a)[name].data_ptr() != parts(b)[name].data_ptr(), name


# What it says of itself


@each_nesting
@each_shape
@each_dtype
def test_looks_like_the_tensor_it_was(dtype: torch.dtype, shape: tuple[int, int], nested: bool) -> None:
    weight = make(shape, nested, dtype)
    assert isinstance(weight, Tensor) and weight.shape == shape and weight.dtype == dtype
    assert weight.numel() == shape[0] * shape[1] and weight.device.type == "cpu" and not weight.requires_grad
    assert (weight.absmax2 is not None) == (weight.offset is not None) == nested == weight.double_quant
    assert weight.packed.shape == (
        (shape[0], shape[1] // 2) if shape[1] % 2 == 0 else ((shape[0] * shape[1] + 1) // 2,)
    )
    assert weight.nbytes == sum(t.numel() * t.element_size() for t in parts(weight).values())
    assert repr(weight) == (
        f"NF4Weight({shape[0]}, {shape[1]}, dtype={dtype}, device=cpu, blocksize=32, double_quant={nested})"
    )
    assert not weight.is_dense and weight.dense is None


@each_dtype
def test_dequantize_takes_a_dtype(dtype: torch.dtype) -> None:
    weight = make(dtype=torch.bfloat16)
    assert weight.dequantize().dtype == torch.bfloat16
    assert torch.equal(weight.dequantize(dtype), weight.dequantize(torch.float32).to(dtype))


def test_quantize_an_nf4_weight_again() -> None:
    weight = make()
    again = pk.NF4Weight.quantize(weight, 64, double_quant=False)
    assert again.blocksize == 64 and not again.double_quant
    assert torch.equal(again.dequantize(), pk.NF4Weight.quantize(weight.dequantize(), 64, False).dequantize())


@pytest.mark.parametrize(
    "message,call",
    [
        (r"^weight: expected shape \(out_features, in_features\), got \(4,\)$",
         lambda: pk.NF4Weight.quantize(torch.ones(4))),
        (r"^weight: expected float32, bfloat16 or float16, got torch.float64$",
         lambda: pk.NF4Weight.quantize(torch.ones(4, 4, dtype=torch.float64))),
        (r"^weight: expected float32, .* got torch.int32$",
         lambda: pk.NF4Weight.quantize(torch.ones(4, 4, dtype=torch.int32))),
        (r"^blocksize: expected one of \(32, .*4096\), got 48$",
         lambda: pk.NF4Weight.quantize(torch.ones(4, 4), 48)),
        (r"^q_proj: expected shape", lambda: pk.NF4Weight.quantize(torch.ones(4), name="q_proj")),
    ],
    ids=["1-d", "fp64", "int32", "blocksize", "name"],
)  # fmt: skip
def test_quantize_refuses(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_quantize_leaves_its_input() -> None:
    dense = testing.tensor(5, 64).requires_grad_()
    before = dense.detach().clone()
    weight = pk.NF4Weight.quantize(dense)
    assert torch.equal(dense, before) and not weight.requires_grad


# Copies


COPIES: dict[str, Callable[[pk.NF4Weight], Tensor]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda w: pickle.loads(pickle.dumps(w)),
    "torch.save": lambda w: save_and_load(w),
    "clone": lambda w: w.clone(),
    "detach-clone": lambda w: w.detach().clone(),
    "to-copy": lambda w: w.to("cpu", copy=True),
    "state_dict": lambda w: pk.NF4Weight.from_state_dict(copy.deepcopy(w.state_dict())),
    "parameter-deepcopy": lambda w: copy.deepcopy(nn.Parameter(w, requires_grad=False)),
}


def save_and_load(value: object) -> object:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@each_nesting
@each_shape
@pytest.mark.parametrize("how", COPIES)
def test_copy(how: str, shape: tuple[int, int], nested: bool) -> None:
    weight = make(shape, nested, torch.bfloat16)
    got = COPIES[how](weight)
    assert_equal_weights(got, weight)
    assert_shares_nothing(got, weight)
    got.add_(1.0)
    assert got.is_dense and not weight.is_dense


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "clone"])
def test_copy_of_a_dense_weight(how: str) -> None:
    weight = make()
    weight.mul_(2.0)
    got = COPIES[how](weight)
    assert got.is_dense and torch.equal(got.dense, weight.dense)
    assert got.dense.data_ptr() != weight.dense.data_ptr()


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copy_of_a_layer(how: str) -> None:
    layer = pk.nn.NF4Linear.from_linear(nn.Linear(64, 12))
    got = COPIES[how](layer)
    assert isinstance(got, pk.nn.NF4Linear) and isinstance(got.weight, nn.Parameter)
    assert_equal_weights(got.weight, layer.weight)
    assert_shares_nothing(got.weight, layer.weight)
    x = testing.tensor(3, 64)
    assert torch.equal(got(x), layer(x))


def test_tied_weights_stay_tied_in_a_deepcopy() -> None:
    layer = pk.nn.NF4Linear.from_linear(nn.Linear(64, 12))
    both = nn.ModuleList([layer, layer])
    got = copy.deepcopy(both)
    assert got[0].weight is got[1].weight


@each_nesting
@each_dtype
def test_to_dtype_is_nominal(dtype: torch.dtype, nested: bool) -> None:
    weight = make(nested=nested, dtype=torch.float32)
    moved = weight.to(dtype)
    assert moved.dtype == dtype and isinstance(moved, pk.NF4Weight) and not moved.is_dense
    assert all(torch.equal(parts(moved)[name], t) for name, t in parts(weight).items()), (
        "scales must not be rounded"
    )
    assert weight.half().dtype == torch.float16 and weight.bfloat16().dtype == torch.bfloat16
    assert weight.to("cpu") is weight


def test_to_meta() -> None:
    moved = make().to("meta")
    assert isinstance(moved, pk.NF4Weight) and moved.device.type == "meta" and moved.shape == (12, 64)
    assert all(t.device.type == "meta" for t in parts(moved).values())


def test_to_an_integer_dtype_is_a_read() -> None:
    weight = make()
    assert torch.equal(weight.to(torch.int32), weight.dequantize().to(torch.int32))


@each_dtype
def test_module_to(dtype: torch.dtype) -> None:
    """nn.Module._apply, with and without swapping tensors."""
    x = testing.tensor(3, 64, dtype=dtype)
    for swap in (False, True):
        torch.__future__.set_swap_module_params_on_conversion(swap)
        try:
            layer = pk.nn.NF4Linear.from_linear(nn.Linear(64, 12))
            packed = layer.weight.packed.clone()
            layer.to(dtype)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        assert isinstance(layer.weight, pk.NF4Weight) and isinstance(layer.weight, nn.Parameter)
        assert layer.weight.dtype == dtype == layer.bias.dtype and torch.equal(layer.weight.packed, packed)
        assert layer(x).dtype == dtype
        layer.to("meta")
        assert layer.weight.device.type == "meta" and isinstance(layer.weight, pk.NF4Weight)


def test_copy_between_nf4_weights() -> None:
    """copy_ of one NF4 weight into another copies the bytes, whatever form either was in."""
    target, source = make(seed=1), make(seed=2)
    alias = target.detach()
    assert target.copy_(source) is target
    assert_equal_weights(target, source)
    assert_equal_weights(alias, source)
    assert_shares_nothing(target, source)
    target.add_(1.0)
    target.copy_(source)
    assert_equal_weights(target, source)
    source.mul_(3.0)
    target.copy_(source)
    assert target.is_dense and torch.equal(target.dense, source.dense)


# Reads


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


def first_of(value: object) -> Tensor:
    return value[0] if isinstance(value, (tuple, list)) else value  # type: ignore[return-value]


READ_ONLY = "an NF4 weight has no view of its numbers that could be written to"


def test_assigning_to_an_index_raises() -> None:
    weight = make()
    before = weight.dequantize()
    with pytest.raises(NotImplementedError, match=READ_ONLY):
        weight[0] = 0.0
    assert not weight.is_dense and torch.equal(weight.dequantize(), before)


@pytest.mark.parametrize("merged", [False, True], ids=["packed", "merged"])
@pytest.mark.parametrize("how", VIEWS)
def test_a_view_can_be_read_and_not_written_to(how: str, merged: bool) -> None:
    """A write to a view of a temporary would be lost without a word, and so would one beneath a merge."""
    weight = make()
    if merged:
        weight.add_(1.0)
    before = weight.dequantize()
    view, want = first_of(VIEWS[how](weight)), first_of(VIEWS[how](before.clone()))
    assert torch.equal(view, want) and torch.equal(view + 1, want + 1) and view.tolist() == want.tolist()
    assert type(view + 1) is Tensor and type(view.clone()) is Tensor and (view.numpy() == want.numpy()).all()
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
        with pytest.raises(NotImplementedError, match=READ_ONLY):
            write()
    assert weight.is_merged == merged and torch.equal(weight.dequantize(), before)


def test_decompositions_and_gradients_run_on_views() -> None:
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
def test_a_view_of_a_dense_weight_is_a_view(how: str) -> None:
    weight = make()
    weight.mul_(2.0)
    first_of(VIEWS[how](weight)).fill_(5.0)
    assert (weight.dense == 5.0).any()
    weight[1] = 7.0
    assert (weight.dense[1] == 7.0).all()


# Writes


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
def test_a_write_is_kept_in_full(how: str, wrap: str, shape: tuple[int, int]) -> None:
    weight: Tensor = make(shape)
    if wrap == "parameter":
        weight = nn.Parameter(weight, requires_grad=False)
    delta = testing.tensor(*shape, seed=9, scale=1e-3)  # far below the 4-bit grid
    want = weight.dequantize() + delta
    with torch.no_grad():
        WRITES[how](weight, delta)
    assert weight.is_dense and torch.equal(weight.dequantize(), want) and torch.equal(weight + 0, want)
    x = testing.tensor(3, shape[1])
    torch.testing.assert_close(F.linear(x, weight), x @ want.t())
    torch.testing.assert_close(pk.nf4_linear(x, weight), x @ want.t())


@pytest.mark.parametrize("how", ["data-iadd", "add_", "data-add_", "detach-add_", "copy_", "out", "foreach"])
def test_a_write_reaches_every_alias(how: str) -> None:
    weight = make()
    parameter = nn.Parameter(weight, requires_grad=False)
    aliases = [weight, weight.detach(), weight.data, parameter, parameter.detach()]
    delta = testing.tensor(12, 64, seed=9)
    want = weight.dequantize() + delta
    with torch.no_grad():
        WRITES[how](parameter, delta)
    for alias in aliases:
        assert alias.is_dense and torch.equal(alias.dequantize(), want)
    if how in ("copy_", "out", "foreach"):  # no merge that could be taken back
        assert parts(weight).keys() == {"dense"}, "the packed bytes must be freed"
    else:
        assert weight.is_merged


def test_a_write_to_a_wrapped_dtype_rounds_to_that_dtype() -> None:
    weight = make(dtype=torch.bfloat16)
    want = weight.dequantize() + 1
    weight.add_(1)
    assert weight.dense.dtype == torch.bfloat16 and torch.equal(weight.dense, want)


def test_growth_is_told_once_of_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4_state, "_warned", set())
    weight = pk.NF4Weight.quantize(testing.tensor(12, 64), name="model.q.weight")
    with pytest.warns(
        UserWarning, match=r"^model\.q\.weight: 4\.5\d bytes for each value .* until it is unmerged"
    ):
        weight.add_(1)
    with pytest.warns(UserWarning, match=r"^model\.q\.weight: 4 bytes for each value .* from now on"):
        weight.mul_(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make().add_(1).mul_(2)


def test_writing_what_a_weight_holds_changes_nothing() -> None:
    weight = make(dtype=torch.bfloat16)
    packed = weight.packed
    weight.copy_(weight.dequantize())
    assert not weight.is_dense and weight.packed is packed
    weight.mul_(1.0)
    weight.add_(1.0)
    weight.copy_(weight._state.dequantize(torch.bfloat16))
    assert not weight.is_dense and weight.packed is packed


def test_a_failed_write_changes_nothing() -> None:
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
def test_a_dense_weight_reads_as_the_plain_tensor(read: str) -> None:
    """A subclass on the right of `ordinary.data = ...` crashes torch, and a dense weight can be plain."""
    weight = nn.Parameter(make(), requires_grad=False)
    weight.data *= 2
    value = getattr(weight, read)
    value = value if read == "data" else value(torch.float32) if read == "to" else value()
    assert type(value) is Tensor and value.data_ptr() == weight.dense.data_ptr()
    ordinary = nn.Parameter(torch.zeros(12, 64))
    ordinary.data = value
    assert torch.equal(ordinary, weight.dequantize())
    value.fill_(3.0)
    assert (weight.dequantize() == 3).all(), "the write was lost"


@each_nesting
def test_requantize(nested: bool) -> None:
    weight = nn.Parameter(make(nested=nested, dtype=torch.bfloat16), requires_grad=False)
    alias = weight.detach()
    weight.data += 0.25
    dense = weight.dequantize()
    assert weight.requantize_() is weight
    assert not weight.is_dense and not alias.is_dense and weight.dtype == torch.bfloat16
    assert_equal_weights(weight, pk.NF4Weight.quantize(dense, 32, nested))
    before = weight.packed.clone()
    weight.requantize_()
    assert torch.equal(weight.packed, before)


# In products


@each_nesting
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_f_linear_runs_the_kernel(nested: bool, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_kernels import dispatch

    calls = []
    original = dispatch.call
    monkeypatch.setattr(dispatch, "call", lambda op, *args: calls.append(op) or original(op, *args))
    weight, x = make(nested=nested), testing.tensor(3, 64)
    b = testing.tensor(12) if bias else None
    layer = nn.Linear(64, 12, bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    want = pk.nf4_linear(x, weight, b)
    assert torch.equal(F.linear(x, weight, b), want)
    assert torch.equal(F.linear(x, weight=weight, bias=b), want)
    assert torch.equal(F.linear(input=x, weight=weight, bias=b), want)
    assert torch.equal(layer(x), pk.nf4_linear(x, weight))
    assert calls == ["nf4_linear"] * 6


def test_an_nf4_activation_is_only_a_tensor() -> None:
    weight, dense = make((12, 64)), testing.tensor(5, 64)
    assert torch.equal(F.linear(weight, dense), weight.dequantize() @ dense.t())
    assert torch.equal(F.linear(weight, weight), weight.dequantize() @ weight.dequantize().t())


def test_an_nf4_weight_cannot_be_trained() -> None:
    layer = pk.nn.NF4Linear.from_linear(nn.Linear(64, 12), name="mlp.up_proj.weight")
    message = (
        r"^mlp\.up_proj: NF4 weights are frozen; for full fine-tuning load the model without quantize_model$"
    )
    writes: list[Callable[[], object]] = [
        lambda: layer.requires_grad_(True),
        lambda: layer.weight.requires_grad_(),
        lambda: setattr(layer.weight, "requires_grad", True),
        lambda: nn.Parameter(layer.weight),
    ]
    for call in writes:
        with pytest.raises(ValueError, match=message):
            call()
    layer.weight.requires_grad_(False)
    layer.weight.requires_grad = False
    assert not layer.weight.requires_grad


def test_autograd_through_f_linear() -> None:
    weight = nn.Parameter(make(), requires_grad=False)
    x = testing.tensor(3, 64).requires_grad_()
    F.linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.dequantize().sum(0).expand(3, 64), rtol=1e-5, atol=1e-5)
    assert weight.grad is None


# Layers


def test_a_dense_layer_settles_when_its_weight_is_assigned() -> None:
    layer = pk.nn.NF4Linear.from_linear(nn.Linear(64, 12))
    want = layer.weight.dequantize() + 0.125
    layer.weight.data += 0.125
    assert type(layer) is pk.nn.NF4Linear and torch.equal(layer.weight, want)
    assert layer.state_dict().keys() == {"weight", "bias"} and torch.equal(layer.state_dict()["weight"], want)
    x = testing.tensor(3, 64)
    y = layer(x)
    layer.weight = layer.weight
    assert type(layer) is nn.Linear and type(layer.weight) is nn.Parameter and torch.equal(layer.weight, want)
    assert vars(layer).keys() == vars(nn.Linear(1, 1)).keys() and repr(layer) == repr(nn.Linear(64, 12))
    assert torch.equal(layer(x), y) and torch.equal(y, F.linear(x, want, layer.bias))


def test_parameters_of_a_model_are_frozen_nf4() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64))
    dense_bytes = sum(p.nbytes for p in model.parameters())
    pk.quantize_model(model)
    named = dict(model.named_parameters())
    assert isinstance(named["0.weight"], pk.NF4Weight) and not named["0.weight"].requires_grad
    assert sum(p.nbytes for p in model.parameters()) < 0.3 * dense_bytes
    assert [p for p in model.parameters() if p.requires_grad] == [model[0].bias, model[2].bias]


def test_memory_is_freed_with_the_weight() -> None:
    import weakref

    weight = make()
    packed = weakref.ref(weight.packed)
    x = testing.tensor(3, 64).requires_grad_()
    y = pk.nf4_linear(x, weight)
    del weight
    y.sum().backward()
    del y
    gc.collect()
    assert packed() is None

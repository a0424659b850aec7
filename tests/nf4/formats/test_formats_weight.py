"""Weights in every format: as tensors, in state dicts, merged and averaged."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from nf4_weights import COPIES, assert_equal_weights, assert_shares_nothing, dtype_id, each_dtype, parts
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

import peft_kernels as pk
import testing
from peft_kernels.core.formats import FORMATS

SHAPES = {"layer": (12, 96), "experts": (3, 4, 96)}
ODD = {"odd": (7, 33), "odd-experts": (4, 7, 33), "one-expert": (1, 5, 32)}
"""With blocks that cross rows, and an odd number of codes."""
FORMS: dict[str, tuple[str, int, bool]] = {
    "nf4": ("nf4", 32, True),
    "nf4-plain": ("nf4", 32, False),
    "fp4": ("fp4", 64, True),
    "fp4-plain": ("fp4", 64, False),
    "mxfp4": ("mxfp4", 32, False),
    "nvfp4": ("nvfp4", 16, False),
    "int4": ("int4", 32, True),
    "int4-plain": ("int4", 32, False),
    "fp8": ("fp8", 128, False),
    "fp8-rows": ("fp8", 0, False),
    "int8": ("int8", 64, False),
    "int8-rows": ("int8", 0, False),
}
"""Format, blocksize, and whether scales are double-quantised or blocks have zero points."""
each_form = pytest.mark.parametrize("form", FORMS)
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
CASES = {f"{form}-{name}": (form, shape) for form in FORMS for name, shape in SHAPES.items()}
CASES |= {f"{form}-{name}": (form, shape) for form in ("nf4", "nf4-plain") for name, shape in ODD.items()}
each_case = pytest.mark.parametrize("form,shape", CASES.values(), ids=CASES)
PLAIN = {"nf4": "nf4-plain", "fp4": "fp4-plain"}
BY_CODE = pytest.mark.parametrize("form", ["mxfp4", "nvfp4"])


def make(
    form: str, shape: tuple[int, ...] = SHAPES["layer"], dtype: torch.dtype = torch.float32
) -> pk.NF4Weight:
    dense = testing.uneven(testing.tensor(*shape, dtype=dtype, seed=1))
    return quantize(dense, form)


def quantize(dense: Tensor, form: str) -> pk.NF4Weight:
    format, blocksize, double_quant = FORMS[form]
    return pk.NF4Weight.quantize(dense, blocksize, double_quant, format=format)


# Quantising


@each_form
@each_shape
def test_attributes(form: str, shape: tuple[int, ...]) -> None:
    weight = make(form, shape, torch.bfloat16)
    assert weight.shape == shape and weight.dtype == torch.bfloat16
    format, blocksize, double_quant = FORMS[form]
    assert weight._state.format == format and weight.blocksize == blocksize
    assert weight.double_quant == (weight.offset is not None) == double_quant
    scales = {"int4": torch.bfloat16, "fp8": torch.float32, "int8": torch.float32}
    expected = torch.float32 if form in PLAIN.values() else scales.get(format, torch.uint8)
    assert weight.absmax.dtype == expected
    assert weight.packed.shape == (*shape[:-1], 96 if FORMATS[format].bits == 8 else 48)


@BY_CODE
def test_values_lie_within_half_a_step(form: str) -> None:
    """And no value of a block is beyond its largest code: E8M0 scales are rounded up."""
    dense = testing.uneven(testing.tensor(12, 96, seed=1))
    weight = make(form)
    scale = weight.absmax2[weight.absmax.long()].view(-1, 1)
    blocks, got = (t.view(len(scale), -1) for t in (dense, weight.dequantize()))
    step = torch.where(blocks.abs() < 2 * scale, 0.5, torch.where(blocks.abs() < 4 * scale, 1.0, 2.0)) * scale
    over = (blocks.abs() - 6 * scale).clamp(min=0)  # E4M3 scales are rounded to the nearest
    assert ((got - blocks).abs() <= step / 2 * (1 + 1e-6) + over).all()
    assert form == "nvfp4" or not over.any()
    assert ((blocks.abs() / scale).amax(1) > (2.9 if form == "mxfp4" else 5.6)).all(), "scales too large"


@each_form
def test_packed_values_are_quantised_to_themselves(form: str) -> None:
    weight = make(form)
    again = quantize(weight.dequantize(), form)
    if form in ("nf4", "fp4", "int4", "int4-plain"):  # scales are rounded again, or no code is the largest
        return
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(again.dequantize(), weight.dequantize(), rtol=2 * eps, atol=0)


@pytest.mark.parametrize("form", ["int8", "int8-rows"])
def test_int8_rounds_to_the_nearest_code(form: str) -> None:
    dense = testing.uneven(testing.tensor(12, 160, seed=1))
    weight = make(form, (12, 160))
    width = weight.blocksize or 160
    scale = weight.absmax.view(12, -1).repeat_interleave(width, 1)[:, :160]
    assert ((weight.dequantize() - dense).abs() <= scale * (0.5 + 1e-5)).all()
    largest = torch.stack([part.abs().amax(1) for part in dense.split(width, 1)], 1)
    torch.testing.assert_close(weight.absmax.view(12, -1), largest / 127)


@each_form
def test_zero_blocks(form: str) -> None:
    dense = testing.tensor(4, 192)
    dense[1], dense[2, 64:] = 0, 0
    back = quantize(dense, PLAIN.get(form, form)).dequantize()
    assert back.isfinite().all() and not back[1].any() and not back[2, 64:].any() and back[2, :64].any()
    assert not quantize(dense * 0, form).dequantize().any()


@pytest.mark.parametrize("magnitude", [1e-38, 1e-42, 1e38], ids="{:g}".format)
@each_form
def test_extreme_magnitudes(form: str, magnitude: float) -> None:
    dense = (testing.tensor(4, 64).clamp(-1, 1).double() * magnitude).float()
    back = quantize(dense, PLAIN.get(form, form)).dequantize()
    assert back.isfinite().all() and (back.abs() <= 1.34 * dense.abs().max() + 2e-38).all()


REFUSED: dict[str, tuple[str, Callable[[], object]]] = {
    "format": (
        r"^format: expected one of nf4, fp4, mxfp4, nvfp4, int4, fp8, int8, got 'int3'$",
        lambda: pk.NF4Weight.quantize(torch.ones(4, 64), format="int3"),
    ),
    "blocksize": (
        r"^blocksize: expected one of \(16,\), got 64$",
        lambda: pk.NF4Weight.quantize(torch.ones(4, 64), 64, format="nvfp4"),
    ),
    "rows": (
        r"^q_proj: expected a multiple of 32 input features for mxfp4, got 48$",
        lambda: pk.NF4Weight.quantize(torch.ones(4, 48), name="q_proj", format="mxfp4"),
    ),
    "rows-of-experts": (
        r"^weight: expected a multiple of 16 input features for nvfp4, got 40$",
        lambda: pk.NF4Weight.quantize(torch.ones(2, 4, 40), format="nvfp4"),
    ),
    **{
        f"nan-{form}": (
            r"^up: expected finite values, got 1 NaN or Inf among 256$",
            lambda form=form: pk.NF4Weight.quantize(  # type: ignore[misc]
                torch.ones(4, 64).index_put_((torch.tensor(2), torch.tensor(5)), torch.tensor(float("nan"))),
                name="up",
                format=form,
            ),
        )
        for form in ("fp4", "mxfp4", "nvfp4", "int4", "fp8", "int8")
    },
    "inf-in-an-expert": (
        r"^weight\[1\]: expected finite values, got 128 NaN or Inf among 128$",
        lambda: pk.NF4Weight.quantize(
            torch.tensor([1.0, float("inf")]).view(2, 1, 1).expand(2, 2, 64), format="mxfp4"
        ),
    ),
    "to-bitsandbytes": (
        r"^weight: expected the format nf4 or fp4, got mxfp4$",
        lambda: make("mxfp4").to_bnb(),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    message, call = REFUSED[case]
    if case == "to-bitsandbytes":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    with pytest.raises(ValueError, match=message):
        call()


# Copies, moves and writes


@each_case
@pytest.mark.parametrize("how", COPIES)
def test_copy(how: str, form: str, shape: tuple[int, ...]) -> None:
    weight = make(form, shape, torch.bfloat16)
    copied = COPIES[how](weight)
    assert_equal_weights(copied, weight)
    assert_shares_nothing(copied, weight)
    copied.add_(1.0)
    assert copied.is_dense and not weight.is_dense


@each_form
@each_dtype
def test_to_dtype_is_nominal(dtype: torch.dtype, form: str) -> None:
    weight = make(form)
    moved = weight.to(dtype)
    assert moved.dtype == dtype and moved._state.format == weight._state.format and not moved.is_dense
    assert torch.equal(moved.dequantize(), weight.dequantize().to(dtype))
    for name, tensor in parts(weight).items():
        torch.testing.assert_close(parts(moved)[name], tensor, rtol=0, atol=0, equal_nan=True)
    assert weight.half().dtype == torch.float16 and weight.to("cpu") is weight


@each_case
def test_merge_and_unmerge_restore_the_bytes(form: str, shape: tuple[int, ...]) -> None:
    weight = make(form, shape)
    packed = weight.packed
    before, delta = weight.clone(), testing.tensor(*shape, seed=2)
    weight.data += delta
    assert weight.is_dense
    assert torch.equal(weight.dequantize(), before.dequantize() + delta)
    weight.data -= delta
    assert not weight.is_dense and weight.packed is packed
    assert_equal_weights(weight, before)


@each_case
def test_requantize(form: str, shape: tuple[int, ...]) -> None:
    weight = nn.Parameter(make(form, shape, torch.bfloat16), requires_grad=False)
    alias, delta = weight.detach(), testing.tensor(*shape, seed=2)
    weight.data += delta
    dense = weight.dequantize()
    assert weight.requantize_() is weight and not weight.is_dense and not alias.is_dense
    assert_equal_weights(weight, quantize(dense, form))
    weight.requantize_()
    assert_equal_weights(weight, quantize(dense, form))


@each_form
@pytest.mark.parametrize("how", ["swa", "ema"])
def test_an_average_with_itself_stays_packed(how: str, form: str) -> None:
    model = nn.Sequential(pk.nn.NF4Linear(make(form)))
    averaged = AveragedModel(model, **({"avg_fn": get_ema_avg_fn(0.999)} if how == "ema" else {}))
    for _ in range(3):
        averaged.update_parameters(model)
    assert not averaged.module[0].weight.is_dense
    assert_equal_weights(averaged.module[0].weight, model[0].weight)


@each_form
def test_f_linear_runs_the_kernel(form: str, op_counts: Counter[str]) -> None:
    weight, x = make(form), testing.tensor(3, 96)
    want = x.double() @ weight.dequantize(torch.float32).double().t()
    op_counts.clear()
    got = F.linear(x, weight)
    assert op_counts == {"nf4_linear": 1}
    testing.assert_close(got, x @ weight.dequantize().t(), want)


@each_form
def test_compiled(form: str) -> None:
    torch.compiler.reset()
    layer = pk.nn.NF4Linear(make(form))
    x = testing.tensor(3, 96).requires_grad_()
    y = layer(x)
    y.sum().backward()
    want, x.grad = x.grad, None
    got = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    got.sum().backward()
    torch.testing.assert_close(got, y)
    torch.testing.assert_close(x.grad, want)


@each_form
def test_an_expert_shares_memory(form: str) -> None:
    weight = make(form, SHAPES["experts"])
    for e in range(3):
        one = weight[e]
        assert one._state.format == weight._state.format
        assert torch.equal(one.dequantize(), weight.dequantize()[e])
        assert one.packed.data_ptr() == weight.packed[e].data_ptr()


# State dicts


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_state_dict(dtype: torch.dtype, form: str, shape: tuple[int, ...]) -> None:
    weight = make(form, shape, dtype)
    items = weight.state_dict("up.")
    again = pk.NF4Weight.from_state_dict(items, "up.")
    assert_equal_weights(again, weight)
    if len(shape) == 2:
        layer = pk.nn.NF4Linear(pk.NF4Weight.quantize(testing.tensor(*shape)), None)
        layer.load_state_dict(weight.state_dict())
        assert_equal_weights(layer.weight, weight)


def test_items_of_a_layer_in_mxfp4() -> None:
    items = make("mxfp4").state_dict()
    state = json.loads(bytes(items.pop("weight.quant_state.peft_kernels__packed").tolist()))
    assert state == {"quant_type": "mxfp4", "blocksize": 32, "dtype": "float32", "shape": [12, 96]}
    assert {name: (t.dtype, tuple(t.shape)) for name, t in items.items()} == {
        "weight": (torch.uint8, (576,)),
        "weight.absmax": (torch.uint8, (36,)),
        "weight.scale_values": (torch.float32, (256,)),
    }


@BY_CODE
def test_items_of_experts_are_not_those_of_a_layer(form: str) -> None:
    """The name of the item tells a reader of names which it is."""
    layer, experts = (make(form, shape).state_dict() for shape in SHAPES.values())
    state = "weight.quant_state.peft_kernels__packed"
    layer[f"{state}_experts"], experts[state] = layer.pop(state), experts.pop(f"{state}_experts")
    for items in (layer, experts):
        with pytest.raises(ValueError, match=r"^weight: expected a shape \("):
            pk.NF4Weight.from_state_dict(items)


def test_parts_have_no_memory_of_others() -> None:
    """Tables of scale values are a weight's own when it is saved: writers of files refuse shared memory."""
    items = [make("mxfp4").state_dict(f"{i}.") for i in range(2)]
    tables = [one[f"{i}.weight.scale_values"].data_ptr() for i, one in enumerate(items)]
    assert tables[0] != tables[1]
    assert parts(make("mxfp4")).keys() == {"packed", "absmax", "absmax2"}

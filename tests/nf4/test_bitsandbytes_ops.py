"""bitsandbytes' functions on our kernels, on every back end: bits, matmuls, calls left to bitsandbytes."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bnb_layers import bnb, bnb_functional, quantized, their_layer
from nf4_oracle import assert_same, oracle_dequantize, oracle_quantize
from nf4_weights import dtype_id, each_dtype, each_nesting
from torch import Tensor

import peft_kernels as pk
import testing
from peft_kernels.integrations.bitsandbytes import disable, enable

ops = torch.ops.bitsandbytes


@pytest.fixture
def enabled() -> Iterator[None]:
    with enable():
        yield


def stock(call: Any) -> Any:
    """Result of a call with bitsandbytes' own kernels."""
    disable()
    with torch.no_grad():
        result = call()
    enable()
    return result


SHAPES = [(64, 64), (33, 96), (7, 33), (5, 7, 32), (100,), (1, 1), (0, 64)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


# Quantising and dequantising


@each_dtype
@each_shape
def test_quantised_bits(backend: str, enabled: None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    dense = testing.tensor(*shape, dtype=dtype)
    for blocksize in (32, 64, 4096):
        packed, state = bnb_functional.quantize_4bit(dense, blocksize=blocksize, quant_type="nf4")
        want_packed, want_absmax = oracle_quantize(dense, blocksize)
        assert_same(packed, want_packed[:, None], f"packed, blocksize {blocksize}")
        assert_same(state.absmax, want_absmax, f"absmax, blocksize {blocksize}")
        assert state.shape == dense.shape and state.dtype == dtype


@each_dtype
@each_shape
def test_dequantised_bits(backend: str, enabled: None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    numel = testing.tensor(*shape).numel()
    for blocksize in (32, 64, 4096):
        packed, absmax = oracle_quantize(testing.tensor(*shape), blocksize)
        state = bnb_functional.QuantState(
            absmax, torch.Size(shape), None, blocksize, quant_type="nf4", dtype=dtype
        )
        got = bnb_functional.dequantize_4bit(packed[:, None], state)
        want = oracle_dequantize(packed, absmax, blocksize, numel, dtype).view(shape)
        assert_same(got, want, f"blocksize {blocksize}")
        out = torch.full_like(want, float("nan"))
        bnb_functional.dequantize_4bit(packed[:, None], state, out=out)
        assert_same(out, want, f"out, blocksize {blocksize}")


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32], ids=dtype_id)
def test_bytes_stored_as_another_dtype(enabled: None, storage: torch.dtype) -> None:
    """FSDP asks for such storage; older callers also pass the weight transposed."""
    dense = testing.tensor(24, 96)
    plain, _ = bnb_functional.quantize_4bit(dense, quant_type="nf4")
    packed, state = bnb_functional.quantize_4bit(dense, quant_type="nf4", quant_storage=storage)
    assert packed.dtype == storage and packed.shape == (24 * 96 // 2 // storage.itemsize, 1)
    assert torch.equal(packed.view(torch.uint8).view(-1), plain.view(-1))
    want = oracle_dequantize(plain, state.absmax, 64, dense.numel(), torch.float32).view(24, 96)
    assert_same(bnb_functional.dequantize_4bit(packed, state), want, "dequantised")
    assert_same(bnb_functional.dequantize_4bit(packed.t(), state), want.t(), "dequantised transposed")
    x = testing.tensor(3, 96)
    first = bnb.matmul_4bit(x, packed, quant_state=state)
    assert torch.equal(bnb.matmul_4bit(x, packed.t(), quant_state=state), first)
    testing.assert_close(first, F.linear(x, want), F.linear(x.double(), want.double()))


def test_non_contiguous_input(enabled: None) -> None:
    dense = testing.tensor(96, 64).t()
    packed, state = bnb_functional.quantize_4bit(dense, quant_type="nf4")
    want, absmax = oracle_quantize(dense.contiguous(), 64)
    assert torch.equal(packed.view(-1), want) and torch.equal(state.absmax, absmax)


def test_buffers_of_other_sizes(enabled: None) -> None:
    """bitsandbytes' kernels accept larger buffers, and read past the end of smaller ones."""
    dense = testing.tensor(4, 96)
    packed, absmax = ops.quantize_4bit(dense, 64, "nf4", torch.uint8)
    want = ops.dequantize_4bit(packed, absmax, 64, "nf4", dense.shape, dense.dtype)
    wider = torch.cat((absmax, absmax)), F.pad(packed, (0, 0, 0, 5))
    assert torch.equal(ops.dequantize_4bit(wider[1], wider[0], 64, "nf4", dense.shape, dense.dtype), want)
    with pytest.raises(RuntimeError, match=r"absmax: expected 6 elements, got 5"):
        ops.dequantize_4bit(packed, absmax[:-1], 64, "nf4", dense.shape, dense.dtype)
    with pytest.raises(RuntimeError, match=r"packed: expected 192 bytes, got 191"):
        ops.dequantize_4bit(packed[:-1], absmax, 64, "nf4", dense.shape, dense.dtype)
    with pytest.raises(
        ValueError, match=r"out: expected torch.float32 \(4, 96\), got torch.float32 \(2, 96\)"
    ):
        ops.dequantize_4bit.out(packed, absmax, 64, "nf4", dense.shape, dense.dtype, torch.empty(2, 96))


# Matmuls


def exact(layer: Any) -> Tensor:
    return pk.NF4Weight.from_bnb(layer.weight).dequantize(torch.float32).double()


@each_dtype
@each_nesting
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_linear4bit(
    backend: str, enabled: None, training: bool, bias: bool, nested: bool, dtype: torch.dtype
) -> None:
    check_linear4bit(training, bias, nested, dtype)


@each_dtype
@each_nesting
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_fp4_linear4bit(enabled: None, training: bool, nested: bool, dtype: torch.dtype) -> None:
    check_linear4bit(training, True, nested, dtype, "fp4")


def check_linear4bit(training: bool, bias: bool, nested: bool, dtype: torch.dtype, kind: str = "nf4") -> None:
    """Errors against fp64 within the numerics policy, forward and backward, with blocks that cross rows."""
    for shape in ((40, 64), (33, 96), (64, 128)):
        layer = their_layer(
            testing.tensor(*shape, dtype=dtype, scale=0.1), bias=bias, nested=nested, kind=kind
        )
        layer.to(dtype).train(training)
        before = copy.deepcopy(layer.state_dict())
        weight = exact(layer)
        x, dy = testing.tensor(9, shape[1], dtype=dtype), testing.tensor(9, shape[0], dtype=dtype, seed=9)
        b = layer.bias.detach() if bias else None
        truth = F.linear(x.double(), weight, None if b is None else b.double())
        plain = F.linear(x, weight.to(dtype), b)
        with torch.no_grad():
            testing.assert_close(layer(x), plain, truth, f"{shape} without grad")
        y = layer(x.requires_grad_())
        testing.assert_close(y, plain, truth, f"{shape}")
        y.backward(dy)
        testing.assert_close(x.grad, dy @ weight.to(dtype), dy.double() @ weight, f"{shape} x.grad")
        if bias:
            want = dy.double().sum(0)
            testing.assert_close(layer.bias.grad, dy.float().sum(0).to(dtype), want, f"{shape} bias.grad")
        for key, value in layer.state_dict().items():
            assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("rows", [(64,), (0, 64), (2, 3, 64)], ids=str)
def test_leading_dimensions(enabled: None, rows: tuple[int, ...]) -> None:
    params = quantized(testing.tensor(40, 64))
    state, x = params.quant_state, testing.tensor(*rows)
    arguments = x, params.data, [40, 64], state.state2.absmax, 64, "nf4"
    y = ops.gemm_4bit(*arguments, None, state.absmax, state.state2.code, state.offset)
    want = F.linear(x, bnb_functional.dequantize_4bit(params.data, state))
    assert y.shape == want.shape
    torch.testing.assert_close(y, want)


@each_nesting
def test_gemv(enabled: None, nested: bool) -> None:
    params = quantized(testing.tensor(64, 96), nested=nested)
    x, out = testing.tensor(1, 96), torch.empty(1, 64)
    weight = bnb_functional.dequantize_4bit(params.data, params.quant_state)
    got = bnb_functional.gemv_4bit(x, params.data.t(), state=params.quant_state)
    testing.assert_close(got, F.linear(x, weight), F.linear(x.double(), weight.double()))
    assert bnb_functional.gemv_4bit(x, params.data, out=out, state=params.quant_state) is out
    assert torch.equal(out, got)


def test_inference_mode(enabled: None) -> None:
    with torch.inference_mode():
        layer = their_layer(testing.tensor(40, 64)).eval()
        x = testing.tensor(3, 64)
        got = layer(x)
    want = F.linear(x, exact(layer).float(), layer.bias)
    torch.testing.assert_close(got, want)


def test_autocast_does_not_change_the_dtype(enabled: None) -> None:
    """The result has the dtype that bitsandbytes' fake kernel reports to torch.compile."""
    layer, x = their_layer(testing.tensor(40, 64)), testing.tensor(3, 64)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        got = layer(x)
    assert got.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(got, layer(x))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_patched_layer_gives_the_same_bits(enabled: None, kind: str) -> None:
    layer = their_layer(testing.tensor(40, 64, dtype=torch.bfloat16), kind=kind).bfloat16().eval()
    x = testing.tensor(3, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        want = layer(x)
        with pk.patched(layer) as report:
            assert torch.equal(layer(x), want)
    assert report.fused


@each_nesting
def test_fp4_functions(enabled: None, nested: bool) -> None:
    """Values to the bit, and products of one row; the layer is not repacked in evaluation."""
    dense, x = testing.tensor(64, 128, dtype=torch.bfloat16), testing.tensor(1, 128, dtype=torch.bfloat16)
    params = quantized(dense, nested=nested, kind="fp4")
    state, weight = params.quant_state, pk.NF4Weight.from_bnb(params)
    values = bnb_functional.dequantize_4bit(params.data, state)
    assert_same(values, weight.dequantize(torch.bfloat16), "values")
    assert_same(values, stock(lambda: bnb_functional.dequantize_4bit(params.data, state)), "theirs")
    want = pk.nf4_linear(x, weight)
    assert_same(bnb.matmul_4bit(x, params.data, quant_state=state), want, "matmul")
    if not nested:  # its gemv dequantises the scales in its own way
        assert_same(bnb_functional.gemv_4bit(x, params.data, state=state), want, "gemv")
        out = torch.empty_like(values)
        bnb_functional.dequantize_4bit(params.data, state, out=out)
        assert_same(out, values, "out")
    layer = their_layer(dense, bias=False, nested=nested, kind="fp4").eval()
    with torch.no_grad():
        assert_same(layer(x), want, "layer")
    assert torch.equal(layer.weight.data, params.data)


# opcheck and torch.compile


@each_nesting
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=dtype_id)
def test_opcheck(enabled: None, storage: torch.dtype, nested: bool) -> None:
    params = quantized(testing.tensor(40, 64), nested=nested, storage=storage)
    state, x, bias = params.quant_state, testing.tensor(3, 64), testing.tensor(40)
    absmax = state.state2.absmax if nested else state.absmax
    second = (state.absmax, state.state2.code, state.offset) if nested else (None, None, None)
    torch.library.opcheck(ops.gemm_4bit.default, (x, params.data, [40, 64], absmax, 64, "nf4", bias, *second))
    if not nested:
        arguments = params.data, absmax, 64, "nf4", [40, 64], torch.bfloat16
        torch.library.opcheck(ops.dequantize_4bit.default, arguments)
        gemv = x, params.data, [40, 64], absmax, state.code, 64
        torch.library.opcheck(ops.gemv_4bit.default, gemv)
        if storage == torch.uint8:  # bitsandbytes' fake kernel computes a wrong size for other dtypes
            torch.library.opcheck(ops.quantize_4bit.default, (testing.tensor(40, 64), 64, "nf4", storage))


@pytest.mark.parametrize("kind,training", [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)])
def test_compiled_in_one_graph(enabled: None, kind: str, training: bool) -> None:
    torch.compiler.reset()
    net = torch.nn.Sequential(*(their_layer(testing.tensor(64, 64, scale=0.1), kind=kind) for _ in range(2)))
    net.train(training)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = testing.tensor(9, 64)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), net(x))
    gradients = []
    for module in (net, compiled):
        leaf = x.clone().requires_grad_()
        module(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], gradients[0])
    assert not any(getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in net)


# Calls left to bitsandbytes


@each_nesting
def test_quantising_to_fp4_is_left_to_bitsandbytes(enabled: None, nested: bool) -> None:
    dense = testing.tensor(33, 96, dtype=torch.bfloat16)

    def results() -> list[Tensor]:
        params = quantized(dense, nested=nested, kind="fp4")
        return [params.data, params.quant_state.absmax]

    for got, want in zip(results(), stock(results), strict=True):
        assert_same(got, want, "bits")


def test_other_scale_table_is_left_to_bitsandbytes(enabled: None) -> None:
    """A table is checked again after a write to it."""
    params = quantized(testing.tensor(40, 64))
    state, x = params.quant_state, testing.tensor(3, 64)
    standard = bnb.matmul_4bit(x, params.data, quant_state=state)
    state.state2.code.data.mul_(0.5)
    halved = bnb.matmul_4bit(x, params.data, quant_state=state)
    assert_same(halved, stock(lambda: bnb.matmul_4bit(x, params.data, quant_state=state)), "halved")
    assert testing.relative_error(halved, standard.double()) > 0.01
    state.state2.code.data.mul_(2)
    assert torch.equal(bnb.matmul_4bit(x, params.data, quant_state=state), standard)


def test_unsupported_dtype_is_left_to_bitsandbytes(enabled: None) -> None:
    arguments = testing.tensor(40, 64).double(), 64, "nf4", torch.uint8
    theirs = stock(lambda: ops.quantize_4bit(*arguments))
    for got, want in zip(ops.quantize_4bit(*arguments), theirs, strict=True):
        assert_same(got, want, "fp64")
    values = *theirs, 64, "nf4", [40, 64], torch.float64, torch.empty(40, 64).double()
    with pytest.raises(NotImplementedError, match=r"dequantize_4bit.out: bitsandbytes has no kernel for CPU"):
        ops.dequantize_4bit.out(*values)


def test_saving_does_not_depend_on_enable() -> None:
    """The flag for repacking is kept per layer, whatever is enabled while it is made, copied and saved."""
    name = "support_avx512bf16_for_cpu"
    want = their_layer(testing.tensor(40, 64)).__dict__[name]
    with enable():
        layer = their_layer(testing.tensor(40, 64))
        assert layer.support_avx512bf16_for_cpu is False
        file = io.BytesIO()
        torch.save(layer, file)
        copies = [layer, copy.deepcopy(layer), torch.load(io.BytesIO(file.getvalue()), weights_only=False)]
    for one in copies:
        assert one.__dict__[name] == want == one.support_avx512bf16_for_cpu

"""torch.library.opcheck of every op, and torch.compile without graph breaks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import pytest
import torch
from op_samples import CASES, NAMESPACES, K, N, R, leaf, mlp_args, multi_args, samples
from rounding import ONE_MODEL, relative_error
from torch import Tensor

import peft_kernels as pk
import testing
from peft_kernels.core import registry
from peft_kernels.core.backends import BACKENDS

ops = torch.ops.peft_kernels


@pytest.mark.filterwarnings("error:.*an autograd kernel was not registered")
@pytest.mark.parametrize("op,sample", CASES, ids=[f"{op}-{sample}" for op, sample in CASES])
@pytest.mark.parametrize("namespace", NAMESPACES)
def test_opcheck(namespace: str, op: str, sample: str) -> None:
    if namespace in BACKENDS and (reason := testing.unavailable(namespace)) is not None:
        pytest.skip(f"{namespace}: {reason}")
    function = getattr(getattr(torch.ops, NAMESPACES[namespace]), op).default
    # Traced once, since all namespaces share the fake kernel and the backward formula; only results differ.
    traced = ("test_aot_dispatch_dynamic",) if namespace == "public" else ()
    utils = ("test_schema", "test_autograd_registration", "test_faketensor", *traced)
    torch.library.opcheck(function, samples(op)[sample], test_utils=utils)


@pytest.mark.parametrize("op", registry.OPS)
def test_every_op_is_sampled(op: str) -> None:
    assert samples(op)


Case = tuple[Callable[..., Tensor], list[Tensor]]


def with_adapters(op: Any, args: tuple[Any, ...]) -> Case:
    """A function of x and all adapters: the sum of y, or of a list of them."""
    count = len(args[8])

    def function(x: Tensor, *adapters: Tensor) -> Tensor:
        y = op(x, *args[1:8], list(adapters[:count]), list(adapters[count:]), *args[10:])[0]
        return sum((t.sin() for t in y), 0) if isinstance(y, list) else y.sin()

    return function, [leaf(3, K), *args[8], *args[9]]


COMPILED = (
    *("nf4_linear", "lora_linear", "lora_linear-dense", "NF4Linear", "nn.Linear", "NF4LoRALinear"),
    *("lora_linear-dropout", "multi_lora_linear", "gated_mlp", "elementwise", "dora"),
)


def case(name: str) -> Case:
    """A function or a module, and what it is called with."""
    weight, seed = testing.nf4_weight(N, K), torch.tensor(3)
    op_args, x, adapter = weight._state.op_args, leaf(3, K), [leaf(R, K), leaf(N, R)]
    layer: Any
    if name == "nf4_linear":
        return (lambda x, bias: pk.nf4_linear(x, weight, bias).sin()), [x, leaf(N)]
    if name == "lora_linear":
        return (lambda x, a, b: pk.lora_linear(x, weight, a, b, 0.5).sin()), [x, *adapter]
    if name == "lora_linear-dense":
        dense = leaf(N, K, seed=1)
        return (lambda x, w, a, b: pk.lora_linear(x, w, a, b, 0.5).sin()), [x, dense, *adapter]
    if name == "lora_linear-dropout":
        rest = (0.5, 0.3, seed, None)
        return (lambda x, a, b: ops.lora_linear(x, *op_args, None, a, b, *rest)[0].sin()), [x, *adapter]
    if name == "NF4Linear":
        return pk.nn.NF4Linear(weight, testing.tensor(N)), [x]
    if name == "nn.Linear":  # F.linear on the weight as a parameter
        layer = torch.nn.Linear(K, N)
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        return layer, [x]
    if name == "NF4LoRALinear":
        layer = pk.nn.NF4LoRALinear(torch.nn.Linear(K, N), r=R)
        torch.nn.init.normal_(layer.lora_B)
        return layer, [x]
    if name == "multi_lora_linear":
        return with_adapters(ops.multi_lora_linear, multi_args("nf4", [0, 1, 0]))
    if name == "gated_mlp":
        return with_adapters(ops.gated_mlp, mlp_args("nf4", [2, 0, 1], "silu"))

    def elementwise(x: Tensor, up: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        product = ops.gated_activation(x, up + x, "gelu")
        return ops.dora_scale(ops.dropout(product, 0.3, seed), scale, bias)

    def dora(x: Tensor, a: Tensor, b: Tensor, magnitude: Tensor) -> Tensor:
        """As in a layer: the norm is part of the scale and has no gradient."""
        norm = ops.dora_norm(*op_args, a.detach(), b.detach(), 0.5)
        z, _ = ops.lora_linear(x, *op_args, None, a, b, 0.5, 0.0, None, None)
        return ops.dora_scale(z, magnitude / norm, None)

    if name == "elementwise":
        return elementwise, [x, leaf(K, seed=1), leaf(K, seed=2), leaf(K, seed=3)]
    assert name == "dora", name
    return dora, [x, *adapter, leaf(N, seed=1)]


@pytest.mark.parametrize("double_quant", [False, True])
def test_inner_tensors_are_read_without_python(double_quant: bool) -> None:
    """Torch 2.9 compiles a getter in Python, and compiled code that reads the tensor then calls itself."""
    weight = pk.NF4Weight.quantize(torch.ones(N, K), double_quant=double_quant)
    names, context = weight.__tensor_flatten__()
    for name in names:
        getter = inspect.getattr_static(pk.NF4Weight, name).fget
        assert not isinstance(getter, FunctionType)
    inner = {name: getattr(weight, name) for name in names}
    again = pk.NF4Weight.__tensor_unflatten__(inner, context, weight.shape, weight.stride())
    assert again._state.tensors().keys() == weight._state.tensors().keys()
    assert torch.equal(again.dequantize(), weight.dequantize())


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def assert_compiled_matches(
    function: Callable[..., Tensor], inputs: list[Tensor], compiled: Callable[..., Tensor]
) -> None:
    parameters = list(function.parameters()) if isinstance(function, torch.nn.Module) else []
    leaves = [t for t in (*inputs, *parameters) if t.requires_grad]

    def run(call: Callable[..., Tensor]) -> list[Tensor]:
        y = call(*inputs)
        return [y.detach(), *torch.autograd.grad(y.pow(2).sum(), leaves)]

    want, got = run(function), run(compiled)
    for g, w in zip(got, want, strict=True):
        assert relative_error(g, w) <= ONE_MODEL


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("name", COMPILED)
def test_compile_fullgraph(name: str) -> None:
    function, inputs = case(name)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_compiled_matches(function, inputs, compiled)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("name", ["nf4_linear", "lora_linear"])
def test_compile_fullgraph_on_every_back_end(backend: str, name: str) -> None:
    test_compile_fullgraph(name)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("name", COMPILED)
def test_compile_dynamic_shapes(name: str) -> None:
    """One graph for all batches: a second shape must not recompile."""
    from torch._dynamo.testing import CompileCounterWithBackend

    function, inputs = case(name)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for rows in (3, 5, 17):
        assert_compiled_matches(function, [leaf(rows, K, seed=rows), *inputs[1:]], compiled)
        graphs.append(counter.frame_count)
    assert graphs[0] > 0 and graphs == graphs[:1] * 3


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
def test_compile_with_inductor() -> None:
    """Once with the default compiler, which generates code around the ops."""
    function, inputs = case("NF4LoRALinear")
    assert_compiled_matches(function, inputs, torch.compile(function, fullgraph=True))


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_graph_holds_the_public_op() -> None:
    """The back end is chosen when the graph runs, not when it is traced."""
    seen: list[str] = []

    def look(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    function, inputs = case("nf4_linear")
    torch.compile(function, fullgraph=True, backend=look)(*inputs)
    assert "peft_kernels.nf4_linear" in seen

"""What torch.library asks of every op, and torch.compile without a graph break."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import peft_kernels as pk
from peft_kernels import spec, testing

N, K, R = 20, 34, 4
NAMESPACES = {"public": "peft_kernels", "cpu": "peft_kernels_cpu", "reference": "peft_kernels_reference"}


def group(nested: bool) -> tuple[Any, ...]:
    return testing.nf4_weight(N, K, 32, nested)._state.op_args


def leaf(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return testing.tensor(*shape, dtype=dtype, seed=seed).requires_grad_()


def samples(op: str) -> dict[str, tuple[Any, ...]]:
    """Arguments of each op by name, with and without its optional ones."""
    a, b, dense = leaf(R, K, seed=3), leaf(N, R, seed=4), leaf(N, K, seed=1)
    half_a, half_b = leaf(R, K, dtype=torch.bfloat16), leaf(N, R, dtype=torch.bfloat16)
    x, dy, h = leaf(2, 3, K), testing.tensor(2, 3, N), testing.tensor(2, 3, R)
    plain, nested, unpacked = group(False), group(True), (dense, None, None, None, 0)
    bf16_x = leaf(5, K, dtype=torch.bfloat16)
    rest = (0.5, 0.0, None)
    detached = tuple(t.detach() for t in (dense, a, b))
    return {
        "quantize_nf4": {
            "fp32": (testing.tensor(N, K), 64),
            "bf16-odd": (testing.tensor(5, 7, dtype=torch.bfloat16), 32),
        },
        "quantize_absmax": {"fp32": (testing.tensor(300).abs(),)},
        "unpack_absmax": {"fp32": tuple(nested[1:4])},
        "dequantize_nf4": {
            "plain-fp32": (*plain, [N, K], torch.float32),
            "nested-bf16": (*nested, [N, K], torch.bfloat16),
        },
        "nf4_linear": {
            "plain-fp32": (x, *plain, N, None),
            "nested-fp32-bias": (x, *nested, N, leaf(N)),
            "nested-bf16-bias": (bf16_x, *nested, N, leaf(N)),
        },
        "nf4_linear_dx": {
            "plain-fp32": (leaf(2, 3, N), *plain, K),
            "nested-bf16": (leaf(5, N, dtype=torch.bfloat16), *nested, K),
        },
        "lora_linear": {
            "plain-fp32": (x, *plain, None, a, b, *rest),
            "nested-bf16-bias": (bf16_x, *nested, leaf(N), half_a, b, *rest),
            "dense-bias": (x, *unpacked, leaf(N), a, b, *rest),
            "frozen-dense": (x, detached[0], *unpacked[1:], None, a, b, *rest),
        },
        "lora_linear_backward": {
            "plain-all": (dy, x.detach(), h, *plain, *detached[1:], *rest, True, True, True),
            "nested-bf16-adapter": (
                dy.bfloat16(), x.detach().bfloat16(), h, *nested, half_a.detach(), half_b.detach(), *rest,
                False, True, True,
            ),
            "dense-dx": (
                dy, x.detach(), h, *detached[:1], *unpacked[1:], *detached[1:], *rest, True, False, False,
            ),
        },
    }[op]  # fmt: skip


CASES = [(op, sample) for op in spec.OPS for sample in samples(op)]


@pytest.mark.parametrize("op,sample", CASES, ids=[f"{op}-{sample}" for op, sample in CASES])
@pytest.mark.parametrize("namespace", NAMESPACES)
def test_opcheck(namespace: str, op: str, sample: str) -> None:
    if namespace == "cpu" and (reason := testing.unavailable("cpu")) is not None:
        pytest.skip(f"cpu: {reason}")
    function = getattr(getattr(torch.ops, NAMESPACES[namespace]), op).default
    torch.library.opcheck(function, samples(op)[sample])


@pytest.mark.parametrize("op", spec.OPS)
def test_every_op_is_sampled(op: str) -> None:
    assert samples(op)


def nf4_linear_case() -> tuple[Callable[..., Tensor], list[Tensor]]:
    weight = testing.nf4_weight(N, K)
    return (lambda x, bias: pk.nf4_linear(x, weight, bias).sin()), [leaf(3, K), leaf(N)]


def lora_linear_case() -> tuple[Callable[..., Tensor], list[Tensor]]:
    weight = testing.nf4_weight(N, K)
    return (lambda x, a, b: pk.lora_linear(x, weight, a, b, 0.5).sin()), [leaf(3, K), leaf(R, K), leaf(N, R)]


def dense_lora_case() -> tuple[Callable[..., Tensor], list[Tensor]]:
    inputs = [leaf(3, K), leaf(N, K, seed=1), leaf(R, K), leaf(N, R)]
    return (lambda x, w, a, b: pk.lora_linear(x, w, a, b, 0.5).sin()), inputs


def nf4_module_case() -> tuple[Callable[..., Tensor], list[Tensor]]:
    layer = pk.nn.NF4Linear(testing.nf4_weight(N, K), testing.tensor(N))
    return layer, [leaf(3, K)]


def f_linear_case() -> tuple[Callable[..., Tensor], list[Tensor]]:
    """F.linear on the weight as a parameter of somebody else's nn.Linear."""
    layer = torch.nn.Linear(K, N)
    layer.weight = torch.nn.Parameter(testing.nf4_weight(N, K), requires_grad=False)
    return layer, [leaf(3, K)]


def nf4_lora_module_case() -> tuple[Callable[..., Tensor], list[Tensor]]:
    layer = pk.nn.NF4LoRALinear(torch.nn.Linear(K, N), r=R)
    torch.nn.init.normal_(layer.lora_B)
    return layer, [leaf(3, K)]


COMPILED = {
    "nf4_linear": nf4_linear_case,
    "lora_linear": lora_linear_case,
    "lora_linear-dense": dense_lora_case,
    "NF4Linear": nf4_module_case,
    "nn.Linear": f_linear_case,
    "NF4LoRALinear": nf4_lora_module_case,
}


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def forward_and_gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    parameters = list(function.parameters()) if isinstance(function, torch.nn.Module) else []
    leaves = [t for t in (*inputs, *parameters) if t.requires_grad]
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y.pow(2).sum(), leaves)]


def assert_compiled_matches(
    function: Callable[..., Tensor], inputs: list[Tensor], compiled: Callable[..., Tensor]
) -> None:
    parameters = list(function.parameters()) if isinstance(function, torch.nn.Module) else []
    leaves = [t for t in (*inputs, *parameters) if t.requires_grad]
    want = forward_and_gradients(function, inputs)
    y = compiled(*inputs)
    got = [y.detach(), *torch.autograd.grad(y.pow(2).sum(), leaves)]
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("name", COMPILED)
def test_compile_fullgraph(name: str) -> None:
    function, inputs = COMPILED[name]()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_compiled_matches(function, inputs, compiled)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("name", COMPILED)
def test_compile_dynamic_shapes(name: str) -> None:
    """One graph for every batch: a second shape must not compile again."""
    from torch._dynamo.testing import CompileCounterWithBackend

    function, inputs = COMPILED[name]()
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
    """The default compiler, once: the ops as they sit in generated code."""
    function, inputs = COMPILED["NF4LoRALinear"]()
    assert_compiled_matches(function, inputs, torch.compile(function, fullgraph=True))


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_graph_holds_the_public_op() -> None:
    """The choice of a back end stays open until the graph runs."""
    seen: list[str] = []

    def look(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    function, inputs = COMPILED["nf4_linear"]()
    torch.compile(function, fullgraph=True, backend=look)(*inputs)
    assert "peft_kernels.nf4_linear" in seen

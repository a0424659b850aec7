"""What torch.library asks of every op, and torch.compile without a graph break."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import peft_kernels as pk
from peft_kernels import spec, testing
from peft_kernels.backends import BACKENDS, triton

ops = torch.ops.peft_kernels
N, K, R = 20, 34, 4
NAMESPACES = {
    "public": "peft_kernels",
    "reference": "peft_kernels_reference",
    "cpu": "peft_kernels_cpu",
    "simt": "peft_kernels_simt",
}
if triton.BACKEND.interpreted:
    NAMESPACES = {"triton": "peft_kernels_triton"}


def group(nested: bool) -> tuple[Any, ...]:
    return testing.nf4_weight(N, K, 32, nested)._state.op_args


def leaf(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return testing.tensor(*shape, dtype=dtype, seed=seed).requires_grad_()


def layers(base: str, adapters: list[int], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Three layers for the ops that take lists, in the order of their arguments; the third without a bias."""
    shapes = [(N, K), (N, K), (K, N)]
    bases: list[tuple[Any, ...]] = []
    for j, (n, k) in enumerate(shapes):
        if base == "dense" or (base == "mixed" and j == 1):
            bases.append((leaf(n, k, dtype=dtype, seed=j), None, None, None, 0))
        else:
            bases.append(testing.nf4_weight(n, k, 32, j == 0, seed=j)._state.op_args)
    a = [leaf(R + i, shapes[j][1], seed=10 + i) for i, j in enumerate(adapters)]
    b = [leaf(shapes[j][0], R + i, seed=20 + i) for i, j in enumerate(adapters)]
    names = ("weight", "absmax", "absmax2", "offset", "blocksize")
    return {name: [group[i] for group in bases] for i, name in enumerate(names)} | {
        "out_features": [n for n, _ in shapes],
        "bias": [leaf(N, seed=1), leaf(N, dtype=dtype, seed=2), torch.empty(0)],
        "lora_a": a,
        "lora_b": b,
        "layer": adapters,
        "scaling": [0.5 + i for i in range(len(adapters))],
        "dropout_p": [0.3 * (i % 2) for i in range(len(adapters))],
    }


def cut(values: dict[str, Any], count: int) -> dict[str, Any]:
    """The first `count` layers, which share their input."""
    chosen = ("weight", "absmax", "absmax2", "offset", "blocksize", "out_features", "bias")
    return {name: value[:count] if name in chosen else value for name, value in values.items()}


def multi_args(
    base: str, adapters: list[int], dtype: torch.dtype = torch.float32, groups: bool = False
) -> Any:
    values = cut(layers(base, adapters, dtype), 2)
    row_group = torch.tensor([0, 0, 1, -1, 1, 5]) if groups else None
    seed = torch.tensor(3) if len(adapters) > 1 else None
    x = leaf(2, 3, K, dtype=dtype)
    return (x, *values.values(), seed, [i % 2 for i in range(len(adapters))], row_group)


def multi_backward_args(
    base: str, adapters: list[int], needs: tuple[bool, list[bool], list[bool]], groups: bool = False
) -> tuple[Any, ...]:
    x, *rest = multi_args(base, adapters, groups=groups)
    weight, absmax, absmax2, offset, blocksize, _, _, a, b, *serving = rest
    dy, h = (
        [testing.tensor(2, 3, N, seed=j) for j in range(2)],
        testing.tensor(2, 3, sum(t.shape[0] for t in a)),
    )
    a, b, weight = ([t.detach() for t in tensors] for tensors in (a, b, weight))
    return (dy, x.detach(), h, weight, absmax, absmax2, offset, blocksize, a, b, *serving, *needs)


def mlp_args(base: str, adapters: list[int], activation: str, dtype: torch.dtype = torch.float32) -> Any:
    seed = torch.tensor(3) if len(adapters) > 1 else None
    return (leaf(2, 3, K, dtype=dtype), *layers(base, adapters, dtype).values(), seed, activation)


def transposed_x(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """x, in place 1, with another layout: gradients stay contiguous."""
    return (args[0], testing.tensor(K, 3, 2).permute(2, 1, 0), *args[2:])


def samples(op: str) -> dict[str, tuple[Any, ...]]:
    """Arguments of each op by name, with and without its optional ones."""
    a, b, dense = leaf(R, K, seed=3), leaf(N, R, seed=4), leaf(N, K, seed=1)
    half_a, half_b = leaf(R, K, dtype=torch.bfloat16), leaf(N, R, dtype=torch.bfloat16)
    x, dy, h = leaf(2, 3, K), testing.tensor(2, 3, N), testing.tensor(2, 3, R)
    plain, nested, unpacked = group(False), group(True), (dense, None, None, None, 0)
    bf16_x = leaf(5, K, dtype=torch.bfloat16)
    rest, dropping = (0.5, 0.0, None), (0.5, 0.3, torch.tensor(3))
    gate, up, scale = leaf(5, 7), leaf(5, 7, seed=1), leaf(7)
    half_gate = leaf(5, 7, dtype=torch.bfloat16)
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
            "nested-dropout": (x, *nested, leaf(N), a, b, *dropping),
            "dense-dropout": (x, *unpacked, None, a, b, *dropping),
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
            "plain-dropout": (dy, x.detach(), h, *plain, *detached[1:], *dropping, True, True, False),
        },
        "multi_lora_linear": {
            "dense": multi_args("dense", [0, 1, 0]),
            "nf4-groups": multi_args("nf4", [1, 0, 0], groups=True),
            "mixed-bf16": multi_args("mixed", [1], torch.bfloat16),
            "nf4-no-adapters": multi_args("nf4", []),
        },
        "multi_lora_linear_backward": {
            "dense-all": multi_backward_args("dense", [0, 1], (True, [True, True], [True, True])),
            "nf4-groups": multi_backward_args("nf4", [1, 0], (False, [True, False], [False, True]), True),
            "transposed-x": transposed_x(multi_backward_args("mixed", [1], (True, [True], [False]))),
        },
        "gated_mlp": {
            "dense": mlp_args("dense", [0, 1, 2], "silu"),
            "nf4-twice": mlp_args("nf4", [2, 0, 2], "gelu"),
            "mixed-bf16": mlp_args("mixed", [2], "gelu_tanh", torch.bfloat16),
            "nf4-no-adapters": mlp_args("nf4", [], "relu"),
        },
        "gated_activation": {
            "silu": (gate, up, "silu"),
            "gelu-transposed": (leaf(7, 5).t(), up, "gelu"),
            "relu-bf16": (half_gate, half_gate, "relu"),
        },
        "gated_activation_backward": {
            "gelu_tanh": (gate.detach(), up.detach(), up.detach(), "gelu_tanh"),
        },
        "dropout": {
            "p0.5": (gate, 0.5, torch.tensor(3)),
            "p0": (gate, 0.0, torch.tensor(3)),
            "bf16": (half_gate, 1.0, torch.tensor([3])),
        },
        "dora_norm": {
            "nested": (*nested, a.detach(), b.detach(), 0.5),
            "dense-bf16": (
                dense.detach().bfloat16(), *unpacked[1:], half_a.detach(), half_b.detach(), 0.5
            ),
        },
        "dora_scale": {
            "plain": (gate, scale, None),
            "bias": (leaf(2, 3, 7), scale, leaf(7)),
            "bf16": (half_gate, scale, leaf(7, dtype=torch.bfloat16)),
        },
        "dora_scale_backward": {
            "fp32": (gate.detach(), up.detach(), scale.detach(), None),
            "bf16": (half_gate.detach(), half_gate.detach(), scale.detach(), scale.detach()),
        },
    }[op]  # fmt: skip


CASES = [(op, sample) for op in spec.OPS for sample in samples(op)]


@pytest.mark.parametrize("op,sample", CASES, ids=[f"{op}-{sample}" for op, sample in CASES])
@pytest.mark.parametrize("namespace", NAMESPACES)
def test_opcheck(namespace: str, op: str, sample: str) -> None:
    if namespace in BACKENDS and (reason := testing.unavailable(namespace)) is not None:
        pytest.skip(f"{namespace}: {reason}")
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


def lora_dropout_case() -> tuple[Callable[..., Tensor], list[Tensor]]:
    op_args, seed = testing.nf4_weight(N, K)._state.op_args, torch.tensor(3)

    def function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return ops.lora_linear(x, *op_args, None, a, b, 0.5, 0.3, seed)[0].sin()

    return function, [leaf(3, K), leaf(R, K), leaf(N, R)]


def with_adapters(op: Any, args: tuple[Any, ...], a_at: int) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """As a function of x and all adapters; the sum of y, or of the list of them."""
    count = len(args[a_at])

    def function(x: Tensor, *adapters: Tensor) -> Tensor:
        lists = [list(adapters[:count]), list(adapters[count:])]
        y = op(x, *args[1:a_at], *lists, *args[a_at + 2 :])[0]
        return sum((t.sin() for t in y), 0) if isinstance(y, list) else y.sin()

    return function, [leaf(3, K), *args[a_at], *args[a_at + 1]]


def multi_case() -> tuple[Callable[..., Tensor], list[Tensor]]:
    return with_adapters(ops.multi_lora_linear, multi_args("nf4", [0, 1, 0]), 8)


def mlp_case() -> tuple[Callable[..., Tensor], list[Tensor]]:
    return with_adapters(ops.gated_mlp, mlp_args("nf4", [2, 0, 1], "silu"), 8)


def elementwise_case() -> tuple[Callable[..., Tensor], list[Tensor]]:
    seed = torch.tensor(3)

    def function(x: Tensor, up: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        product = ops.gated_activation(x, up + x, "gelu")
        return ops.dora_scale(ops.dropout(product, 0.3, seed), scale, bias)

    return function, [leaf(3, K), leaf(K, seed=1), leaf(K, seed=2), leaf(K, seed=3)]


def dora_case() -> tuple[Callable[..., Tensor], list[Tensor]]:
    """As a layer would use it: the norm takes part in the scale, and gets no gradient."""
    op_args = testing.nf4_weight(N, K)._state.op_args

    def function(x: Tensor, a: Tensor, b: Tensor, magnitude: Tensor) -> Tensor:
        norm = ops.dora_norm(*op_args, a.detach(), b.detach(), 0.5)
        z, _ = ops.lora_linear(x, *op_args, None, a, b, 0.5, 0.0, None)
        return ops.dora_scale(z, magnitude / norm, None)

    return function, [leaf(3, K), leaf(R, K), leaf(N, R), leaf(N, seed=1)]


COMPILED = {
    "nf4_linear": nf4_linear_case,
    "lora_linear": lora_linear_case,
    "lora_linear-dense": dense_lora_case,
    "NF4Linear": nf4_module_case,
    "nn.Linear": f_linear_case,
    "NF4LoRALinear": nf4_lora_module_case,
    "lora_linear-dropout": lora_dropout_case,
    "multi_lora_linear": multi_case,
    "gated_mlp": mlp_case,
    "elementwise": elementwise_case,
    "dora": dora_case,
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
@pytest.mark.parametrize("name", ["nf4_linear", "lora_linear"])
def test_compile_fullgraph_on_every_back_end(backend: str, name: str) -> None:
    test_compile_fullgraph(name)


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

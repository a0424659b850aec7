"""Gradients: through torch's autograd on every back end, against fp64; gradcheck on the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import philox
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import peft_kernels as pk
import testing

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
N, K, R, SCALING = 48, 96, 8, 0.8

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)


def leaf(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    return testing.tensor(*shape, dtype=dtype, seed=seed, scale=scale).requires_grad_()


def inputs(dtype: torch.dtype, base: str, adapter: torch.dtype, bias: torch.dtype | None) -> dict[str, Any]:
    """Leaves of a lora_linear call; `weight` is an NF4Weight or a trainable dense leaf."""
    weight: Tensor
    if base == "dense":
        weight = leaf(N, K, dtype=dtype, seed=1, scale=K**-0.5)
    else:
        weight = testing.nf4_weight(N, K, double_quant=base == "nested")
    return {
        "x": leaf(5, 3, K, dtype=dtype, seed=2),
        "weight": weight,
        "lora_a": leaf(R, K, dtype=adapter, seed=3, scale=K**-0.5),
        "lora_b": leaf(N, R, dtype=adapter, seed=4, scale=R**-0.5),
        "bias": None if bias is None else leaf(N, dtype=bias, seed=5),
    }


def fp64_gradients(leaves: dict[str, Any], dy: Tensor) -> dict[str, Tensor]:
    """Autograd in fp64 over the definition of the layer."""
    wide: dict[str, Any] = {}
    for name, value in leaves.items():
        if isinstance(value, pk.NF4Weight):
            wide[name] = value.dequantize(torch.float32).double()
        elif value is not None:
            wide[name] = value.detach().double().requires_grad_()
    y = wide["x"] @ wide["weight"].t()
    if "bias" in wide:
        y = y + wide["bias"]
    if "lora_a" in wide:
        y = y + SCALING * (wide["x"] @ wide["lora_a"].t()) @ wide["lora_b"].t()
    y.backward(dy.double())
    return {name: value.grad for name, value in wide.items() if value.grad is not None}


def clear(leaves: dict[str, Any]) -> None:
    for value in leaves.values():
        if value is not None:
            value.grad = None


def call(leaves: dict[str, Any]) -> Tensor:
    if "lora_a" not in leaves:
        return pk.nf4_linear(leaves["x"], leaves["weight"], leaves["bias"])
    return pk.lora_linear(
        leaves["x"], leaves["weight"], leaves["lora_a"], leaves["lora_b"], SCALING, leaves["bias"]
    )


def gradients(leaves: dict[str, Any], dy: Tensor) -> dict[str, Tensor]:
    clear(leaves)
    call(leaves).backward(dy)
    return {
        name: value.grad for name, value in leaves.items() if value is not None and value.grad is not None
    }


def check_gradients(leaves: dict[str, Any], dtype: torch.dtype) -> None:
    dy = testing.tensor(5, 3, N, dtype=dtype, seed=6)
    truth = fp64_gradients(leaves, dy)
    got = gradients(leaves, dy)
    with pk.use_backend("reference"):
        plain = gradients(leaves, dy)
    assert got.keys() == truth.keys()
    for name, value in got.items():
        assert value.dtype == leaves[name].dtype and value.shape == leaves[name].shape, name
        testing.assert_close(value, plain[name], truth[name], f"gradient of {name}")
        # The reference is judged against itself above and needs a bound of its own: an fp32 parameter gets a
        # gradient that was never rounded to the activations' dtype.
        assert testing.relative_error(value, truth[name]) <= 4 * torch.finfo(value.dtype).eps, name


@each_dtype
@pytest.mark.parametrize("bias", ["none", "same", "fp32"])
@pytest.mark.parametrize("base", ["plain", "nested"])
def test_nf4_linear_gradients(backend: str, base: str, bias: str, dtype: torch.dtype) -> None:
    bias_dtype = {"none": None, "same": dtype, "fp32": torch.float32}[bias]
    leaves = inputs(dtype, base, torch.float32, bias_dtype)
    del leaves["lora_a"], leaves["lora_b"]
    check_gradients(leaves, dtype)


@each_dtype
@pytest.mark.parametrize("bias", ["none", "same", "fp32"])
@pytest.mark.parametrize("adapter", ["fp32", "same"])
@pytest.mark.parametrize("base", ["dense", "plain", "nested"])
def test_lora_linear_gradients(backend: str, base: str, adapter: str, bias: str, dtype: torch.dtype) -> None:
    bias_dtype = {"none": None, "same": dtype, "fp32": torch.float32}[bias]
    adapter_dtype = torch.float32 if adapter == "fp32" else dtype
    check_gradients(inputs(dtype, base, adapter_dtype, bias_dtype), dtype)


@pytest.mark.parametrize("trained", ["x", "lora_a", "lora_b", "bias", "weight", "lora_a lora_b", "x bias"])
def test_only_what_is_trained_gets_a_gradient(backend: str, trained: str) -> None:
    leaves = inputs(torch.float32, "dense", torch.float32, torch.float32)
    dy = testing.tensor(5, 3, N, seed=6)
    everything = gradients(leaves, dy)
    for name, value in leaves.items():
        value.requires_grad_(name in trained.split())
    got = gradients(leaves, dy)
    assert got.keys() == set(trained.split())
    for name, value in got.items():
        assert torch.equal(value, everything[name]), name


@each_dtype
@pytest.mark.parametrize("base", ["dense", "nested"])
def test_backward_twice(backend: str, base: str, dtype: torch.dtype) -> None:
    """With retain_graph the second backward gives the same bits, and neither changes what it reads."""
    leaves = inputs(dtype, base, torch.float32, dtype)
    dy = testing.tensor(5, 3, N, dtype=dtype, seed=6)
    y = call(leaves)
    before = {name: value.detach().clone() for name, value in leaves.items()} | {
        "dy": dy.clone(),
        "y": y.clone(),
    }
    state = leaves["weight"].state_dict() if base == "nested" else {}
    saved = {name: tensor.clone() for name, tensor in state.items()}
    results = []
    for retain in (True, False):
        clear(leaves)
        y.backward(dy, retain_graph=retain)
        results.append({name: v.grad.clone() for name, v in leaves.items() if v.grad is not None})
    assert results[0].keys() == results[1].keys() and len(results[0]) == 4 + (base == "dense")
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name
    now = leaves | {"dy": dy, "y": y}
    for name, value in before.items():
        if not isinstance(value, pk.NF4Weight):
            assert torch.equal(now[name], value), f"{name} was changed"
    for name, tensor in saved.items():
        assert torch.equal(state[name], tensor), f"{name} was changed"


@pytest.mark.parametrize("base", ["dense", "nested"])
@pytest.mark.parametrize("shape", ["expanded", "non-contiguous", "one row", "no rows", "vector"])
def test_upstream_gradient_of_any_layout(backend: str, shape: str, base: str) -> None:
    """`y.sum().backward()` sends an expanded gradient with stride 0."""
    weight = inputs(torch.float32, base, torch.float32, None)["weight"]
    rows = {"one row": 1, "no rows": 0}.get(shape, 6)
    x = leaf(*([] if shape == "vector" else [rows]), K, dtype=torch.float32, seed=2)
    bias = leaf(N, dtype=torch.float32, seed=5)
    a, b = leaf(R, K, dtype=torch.float32, seed=3), leaf(N, R, dtype=torch.float32, seed=4)
    if shape == "expanded":
        dy = torch.ones(()).expand(rows, N)
    elif shape == "non-contiguous":
        dy = testing.tensor(N, rows, seed=6).t()
    else:
        dy = testing.tensor(*x.shape[:-1], N, seed=6)
    leaves = {"x": x, "weight": weight, "lora_a": a, "lora_b": b, "bias": bias}
    truth = fp64_gradients(leaves, dy)
    got = gradients(leaves, dy)
    assert got.keys() == truth.keys()
    for name, value in got.items():
        assert testing.relative_error(value, truth[name]) <= 1e-6, name


# fp64, on the reference


@pytest.fixture
def _reference() -> Any:
    with pk.use_backend("reference"):
        yield


def fp64_leaf(*shape: int, seed: int) -> Tensor:
    return leaf(*shape, dtype=torch.float64, seed=seed)


@pytest.mark.usefixtures("_reference")
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_gradcheck_nf4_linear(nested: bool) -> None:
    weight = testing.nf4_weight(5, 7, 32, nested)
    x, bias = fp64_leaf(2, 3, 7, seed=1), fp64_leaf(5, seed=2)
    assert gradcheck(lambda x, bias: pk.nf4_linear(x, weight, bias), (x, bias))
    assert gradgradcheck(lambda x, bias: pk.nf4_linear(x, weight, bias), (x, bias))


@pytest.mark.usefixtures("_reference")
@pytest.mark.parametrize("base", ["dense", "nested"])
def test_gradcheck_lora_linear(base: str) -> None:
    x, a, b, bias = (fp64_leaf(*s, seed=i) for i, s in enumerate([(2, 3, 7), (4, 7), (5, 4), (5,)]))
    if base == "dense":
        weight = fp64_leaf(5, 7, seed=9)
        assert gradcheck(
            lambda x, w, a, b, bias: pk.lora_linear(x, w, a, b, 0.7, bias), (x, weight, a, b, bias)
        )
    else:
        nf4 = testing.nf4_weight(5, 7, 32)
        assert gradcheck(lambda x, a, b, bias: pk.lora_linear(x, nf4, a, b, 0.7, bias), (x, a, b, bias))


def test_double_backward_of_nf4_linear(backend: str) -> None:
    """d/d(dy) of |dx|^2 / 2 = W W^T dy: the backward's own gradient is the forward product."""
    weight = testing.nf4_weight(N, K)
    x = leaf(4, K, dtype=torch.float32, seed=1)
    dy = leaf(4, N, dtype=torch.float32, seed=2)
    (dx,) = torch.autograd.grad(pk.nf4_linear(x, weight), x, dy, create_graph=True)
    (got,) = torch.autograd.grad(dx.pow(2).sum() / 2, dy)
    w = weight.dequantize().double()
    assert testing.relative_error(got, dy.detach().double() @ w @ w.t()) <= 1e-6


def test_double_backward_of_lora_linear_is_refused(backend: str) -> None:
    """There is no formula for it: an error, never a gradient with a part left out."""
    leaves = inputs(torch.float32, "nested", torch.float32, None)
    (dx,) = torch.autograd.grad(call(leaves).pow(2).sum(), leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(dx.pow(2).sum(), leaves["lora_a"])


def test_no_gradient_leaks_into_h_or_the_weight(backend: str) -> None:
    leaves = inputs(torch.float32, "nested", torch.float32, None)
    state = leaves["weight"]._state
    y, h = torch.ops.peft_kernels.lora_linear(
        leaves["x"], *state.op_args, None, leaves["lora_a"], leaves["lora_b"], SCALING, 0.0, None, None
    )
    assert y.requires_grad and not h.requires_grad
    with torch.no_grad():
        assert not call(leaves).requires_grad


# The ops with dropout, several layers and several adapters

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
ACTIVATIONS = tuple(FUNCTIONS)
ops = torch.ops.peft_kernels


class Spy(TorchDispatchMode):
    """Records the arguments of every op of the package that is called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        if namespace == "peft_kernels":
            self.calls.append((name.partition(".")[0], args))
        return func(*args, **(kwargs or {}))


def flat(*values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        found.extend(t for t in (value if isinstance(value, list) else [value]) if t is not None)
    return found


class Layers:
    """Arguments of multi_lora_linear or gated_mlp, all trainable, with the same in fp64 as a definition."""

    def __init__(
        self, features: list[tuple[int, int]], base: str, layer: list[int], dtype: torch.dtype,
        p: float = 0.4, adapter: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.features, self.layer, self.dtype = features, layer, dtype
        self.x = leaf(2, 3, features[0][1], dtype=dtype, seed=1)
        weights = [self._weight(base, j, n, k) for j, (n, k) in enumerate(features)]
        self.weight, *quantised = ([w[i] for w in weights] for i in range(5))
        self.quantised, self.w64 = quantised, [w[5] for w in weights]
        self.n = [n for n, _ in features]
        self.bias = [leaf(n, dtype=dtype, seed=20 + j) for j, n in enumerate(self.n)]
        self.bias[0] = torch.empty(0)  # the first layer has none
        adapter = adapter or dtype
        ranks = [2 + i for i in range(len(layer))]
        self.a = [
            leaf(r, features[j][1], dtype=adapter, seed=30 + i, scale=features[j][1] ** -0.5)
            for i, (r, j) in enumerate(zip(ranks, layer, strict=True))
        ]
        self.b = [
            leaf(self.n[j], r, dtype=adapter, seed=40 + i)
            for i, (r, j) in enumerate(zip(ranks, layer, strict=True))
        ]
        self.scaling = [0.5 + i for i in range(len(layer))]
        self.p = [p if i != 1 else 0.0 for i in range(len(layer))]
        self.seed_value, self.seed = 77, torch.tensor(77)

    def _weight(self, base: str, j: int, n: int, k: int) -> tuple[Any, ...]:
        if base == "dense":
            dense = leaf(n, k, dtype=self.dtype, seed=10 + j, scale=k**-0.5)
            return dense, None, None, None, 0, dense
        nf4 = testing.nf4_weight(n, k, 32, base == "nested", seed=10 + j)
        return *nf4._state.op_args, nf4.dequantize(torch.float32).double()

    def leaves(self) -> dict[str, Tensor]:
        named = {"x": self.x}
        for kind, tensors in (("w", self.weight), ("bias", self.bias), ("a", self.a), ("b", self.b)):
            trained = (t.dtype.is_floating_point and t.numel() for t in tensors)
            named |= {f"{kind}{i}": t for i, (t, use) in enumerate(zip(tensors, trained, strict=True)) if use}
        return named

    def common(self) -> tuple[Any, ...]:
        rest = (self.n, self.bias, self.a, self.b, self.layer, self.scaling, self.p, self.seed)
        return (self.x, self.weight, *self.quantised, *rest)

    def wide(self) -> dict[str, Tensor]:
        return {name: t.detach().double().requires_grad_() for name, t in self.leaves().items()}

    def define_layer(
        self, wide: dict[str, Tensor], j: int, x: Tensor, adapters: list[int], key: int, served: Any = None
    ) -> Tensor:
        """Layer j in fp64; `adapters` are those of its call, whose place there is their stream."""
        y = x @ wide.get(f"w{j}", self.w64[j]).t()
        if f"bias{j}" in wide:
            y = y + wide[f"bias{j}"]
        for stream, i in enumerate(adapters):
            if self.layer[i] == j:
                dropped = x * philox.factors(tuple(x.shape), self.p[i], key, stream)
                delta = self.scaling[i] * (dropped @ wide[f"a{i}"].t()) @ wide[f"b{i}"].t()
                y = y + (delta if served is None else delta * served[i])
        return y


class Many(Layers):
    """multi_lora_linear: three layers, the last without adapters, and rows of three groups and of none."""

    def __init__(
        self, base: str, dtype: torch.dtype, groups: bool, adapter: torch.dtype | None = None
    ) -> None:
        super().__init__([(5, 7), (4, 7), (6, 7)], base, [1, 0, 0], dtype, adapter=adapter)
        self.row_group = torch.tensor([0, 0, 1, -1, 1, 2]) if groups else None
        self.group = [0, 1, 0]
        self.served = None
        if groups:
            masks = [(self.row_group == g).double().view(2, 3, 1) for g in self.group]
            self.served = dict(enumerate(masks))

    def args(self) -> tuple[Any, ...]:
        return (*self.common(), self.group, self.row_group, None)

    def call(self) -> list[Tensor]:
        return list(ops.multi_lora_linear(*self.args())[0])

    def define(self, wide: dict[str, Tensor]) -> list[Tensor]:
        every = list(range(len(self.layer)))
        return [
            self.define_layer(wide, j, wide["x"], every, self.seed_value, self.served)
            for j in range(len(self.n))
        ]


ADAPTERS = {"all": [0, 1, 2], "twice": [2, 0, 2, 1], "gate": [0], "down": [2], "none": [], "no-up": [2, 0]}


class Mlp(Layers):
    """gated_mlp; `adapters` says which of its layers have how many."""

    def __init__(
        self, base: str, dtype: torch.dtype, adapters: str = "all", activation: str = "silu", p: float = 0.4,
        adapter: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__([(9, 6), (9, 6), (6, 9)], base, ADAPTERS[adapters], dtype, p, adapter)
        self.activation = activation

    def args(self) -> tuple[Any, ...]:
        return (*self.common(), self.activation)

    def call(self) -> list[Tensor]:
        return [ops.gated_mlp(*self.args())[0]]

    def define(self, wide: dict[str, Tensor]) -> list[Tensor]:
        first = [i for i, j in enumerate(self.layer) if j < 2]
        last = [i for i, j in enumerate(self.layer) if j == 2]
        gate, up = (self.define_layer(wide, j, wide["x"], first, self.seed_value) for j in (0, 1))
        middle = FUNCTIONS[self.activation](gate) * up
        return [self.define_layer(wide, 2, middle, last, self.seed_value + 1)]


def gradients_of(c: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    leaves = c.leaves()
    y = c.call()
    dy = [testing.tensor(*t.shape, dtype=t.dtype, seed=60 + j) for j, t in enumerate(y)]
    found = torch.autograd.grad(y, list(leaves.values()), dy, allow_unused=True)
    return y, {name: g for name, g in zip(leaves, found, strict=True) if g is not None}


def assert_near(got: Tensor, truth: Tensor, what: str) -> None:
    """A few roundings: the numbers policy is for the ops' own tests, and needs more elements."""
    eps = torch.finfo(got.dtype).eps
    for measure, allowed in ((testing.relative_error, 4 * eps), (testing.max_error, 16 * eps)):
        assert measure(got, truth) <= allowed, f"{what}: {measure.__name__}"


def check_against_fp64(make: Callable[[], Any]) -> None:
    """Values and all gradients, against the definition in fp64."""
    c = make()
    y, got = gradients_of(c)
    wide = c.wide()
    truth_y = c.define(wide)
    dy = [testing.tensor(*t.shape, dtype=t.dtype, seed=60 + j).double() for j, t in enumerate(y)]
    truth = torch.autograd.grad(truth_y, list(wide.values()), dy)
    assert got.keys() == wide.keys()
    for j, value in enumerate(y):
        assert_near(value, truth_y[j].detach(), f"y{j}")
    for (name, value), want in zip(got.items(), truth, strict=True):
        like = c.leaves()[name]
        assert value.dtype == like.dtype and value.shape == like.shape, name
        assert_near(value, want, f"gradient of {name}")


@each_dtype
@pytest.mark.parametrize("groups", [False, True], ids=["all-rows", "groups"])
@pytest.mark.parametrize("base", ["dense", "nested"])
def test_multi_lora_linear_gradients(backend: str, base: str, groups: bool, dtype: torch.dtype) -> None:
    for adapter in {torch.float32, dtype}:
        check_against_fp64(lambda adapter=adapter: Many(base, dtype, groups, adapter))


@each_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_mlp_gradients(backend: str, activation: str, dtype: torch.dtype) -> None:
    for base, adapters in (("nested", "twice"), ("dense", "all")):
        check_against_fp64(lambda base=base, adapters=adapters: Mlp(base, dtype, adapters, activation))


@pytest.mark.parametrize("base", ["dense", "plain"])
@pytest.mark.parametrize("adapters", ADAPTERS)
def test_gated_mlp_without_some_adapters(backend: str, adapters: str, base: str) -> None:
    check_against_fp64(lambda: Mlp(base, torch.float32, adapters))


def test_gated_mlp_is_made_of_the_other_ops(backend: str) -> None:
    """Outputs to the bit, and its second product draws its masks from seed + 1."""
    c = Mlp("nested", torch.float32)
    y, gate, up, h, h_down = ops.gated_mlp(*c.args())
    x, weight, absmax, absmax2, offset, blocksize, n, bias, a, b, _, scaling, p, seed, activation = c.args()
    lists = [weight, absmax, absmax2, offset, blocksize, n, bias]
    first, last = [v[:2] for v in lists], [v[2:] for v in lists]
    (want_gate, want_up), want_h = ops.multi_lora_linear(
        x, *first, a[:2], b[:2], [0, 1], scaling[:2], p[:2], seed, [0, 0], None, None
    )
    product = ops.gated_activation(want_gate, want_up, activation)
    (want,), want_h_down = ops.multi_lora_linear(
        product, *last, a[2:], b[2:], [0], scaling[2:], p[2:], seed + 1, [0], None, None
    )
    pairs = zip((y, gate, up, h, h_down), (want, want_gate, want_up, want_h, want_h_down), strict=True)
    assert all(torch.equal(got, value) for got, value in pairs)


@pytest.mark.parametrize("base", ["dense", "nested"])
def test_autograd_of_multi_lora_linear_is_its_backward_op(backend: str, base: str) -> None:
    c = Many(base, torch.bfloat16, groups=True)
    y, got = gradients_of(c)
    with torch.no_grad():
        _, h = ops.multi_lora_linear(*c.args())
        dy = [testing.tensor(*t.shape, dtype=t.dtype, seed=60 + j) for j, t in enumerate(y)]
        dx, da, db = ops.multi_lora_linear_backward(
            dy, c.x, h, c.weight, *c.quantised, c.a, c.b, c.layer, c.scaling, c.p, c.seed, c.group,
            c.row_group, None, True, [True] * 3, [True] * 3,
        )  # fmt: skip
    want = {"x": dx} | {f"a{i}": t for i, t in enumerate(da)} | {f"b{i}": t for i, t in enumerate(db)}
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def test_autograd_of_lora_linear_with_dropout_is_its_backward_op(backend: str) -> None:
    leaves = inputs(torch.bfloat16, "nested", torch.float32, torch.float32)
    group, seed = leaves["weight"]._state.op_args, torch.tensor(5)
    x, a, b, bias = (leaves[name] for name in ("x", "lora_a", "lora_b", "bias"))
    y, h = ops.lora_linear(x, *group, bias, a, b, SCALING, 0.3, seed, None)
    dy = testing.tensor(*y.shape, dtype=y.dtype, seed=6)
    got = torch.autograd.grad(y, (x, a, b), dy)
    with torch.no_grad():
        want = ops.lora_linear_backward(dy, x, h, *group, a, b, SCALING, 0.3, seed, None, True, True, True)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    w = leaves["weight"].dequantize(torch.float32).double()
    wide = [t.detach().double().requires_grad_() for t in (x, a, b)]
    dropped = wide[0] * philox.factors(tuple(x.shape), 0.3, 5)
    truth = torch.autograd.grad(
        wide[0] @ w.t() + SCALING * dropped @ wide[1].t() @ wide[2].t(), wide, dy.double()
    )
    for name, g, t in zip(("x", "lora_a", "lora_b"), got, truth, strict=True):
        assert testing.relative_error(g, t) <= 4 * torch.finfo(g.dtype).eps, name


def test_autograd_of_elementwise_ops_is_their_backward_op(backend: str) -> None:
    gate, up, dy = (leaf(3, 5, dtype=torch.float32, seed=i) for i in (1, 2, 3))
    dy = dy.detach()
    for activation in ACTIVATIONS:
        got = torch.autograd.grad(ops.gated_activation(gate, up, activation), (gate, up), dy)
        want = ops.gated_activation_backward(dy, gate.detach(), up.detach(), activation)
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True)), activation
    scale, bias = leaf(5, dtype=torch.float32, seed=4), leaf(5, dtype=torch.float32, seed=5)
    got = torch.autograd.grad(ops.dora_scale(gate, scale, bias), (gate, scale, bias), dy)
    want = ops.dora_scale_backward(dy, gate.detach(), scale.detach(), bias.detach())
    assert all(torch.equal(g, w) for g, w in zip(got, (*want, (1 - scale) * dy.sum(0)), strict=True))
    seed = torch.tensor(3)
    (got_dx,) = torch.autograd.grad(ops.dropout(gate, 0.4, seed), gate, dy)
    assert torch.equal(got_dx, ops.dropout(dy, 0.4, seed))


# What is computed, and what is kept


@pytest.mark.parametrize("trained", ["x", "a0", "b1", "a1 b1", "w1", "bias2", "x a2", "a0 a1 a2 b0 b1 b2"])
@pytest.mark.parametrize("kind", ["multi_lora_linear", "gated_mlp"])
def test_only_the_needed_gradients_of_lists_are_computed(backend: str, kind: str, trained: str) -> None:
    def make() -> Any:
        return (
            Many("dense", torch.float32, True) if kind == "multi_lora_linear" else Mlp("dense", torch.float32)
        )

    _, everything = gradients_of(make())
    c, names = make(), set(trained.split())
    for name, value in c.leaves().items():
        value.requires_grad_(name in names)
    y = c.call()
    dy = [testing.tensor(*t.shape, dtype=t.dtype, seed=60 + j) for j, t in enumerate(y)]
    with Spy() as spy:
        # A layer that nothing trained reaches has no gradient to start from.
        sources = [(t, d) for t, d in zip(y, dy, strict=True) if t.requires_grad]
        torch.autograd.backward([t for t, _ in sources], [d for _, d in sources])
    got = {name: value.grad for name, value in c.leaves().items() if value.grad is not None}
    assert got.keys() == names
    for name, value in got.items():
        assert torch.equal(value, everything[name]), name
    calls = [args for name, args in spy.calls if name == "multi_lora_linear_backward"]
    computed_a = sum(sum(args[-2]) for args in calls)
    computed_b = sum(sum(args[-1]) for args in calls)
    assert computed_a == sum(name[0] == "a" for name in names)
    assert computed_b == sum(name[0] == "b" and name[:2] != "bi" for name in names)
    assert calls[-1][-3] is ("x" in names)


def saved_by(call: Callable[[], Any]) -> tuple[Any, list[Tensor]]:
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        return call(), saved


def assert_saved(saved: list[Tensor], allowed: dict[str, Tensor]) -> None:
    assert saved
    known = {(t.data_ptr(), t.numel()) for t in allowed.values()}
    for t in saved:
        assert t.numel() == 0 or (t.data_ptr(), t.numel()) in known, f"saved: {tuple(t.shape)} {t.dtype}"


@pytest.mark.parametrize("base", ["dense", "nested"])
def test_lora_linear_with_dropout_saves_no_mask(backend: str, base: str) -> None:
    leaves = inputs(torch.bfloat16, base, torch.float32, torch.float32)
    weight = leaves["weight"]
    group = (weight, None, None, None, 0) if base == "dense" else weight._state.op_args
    x, a, b, bias = (leaves[name] for name in ("x", "lora_a", "lora_b", "bias"))
    seed = torch.tensor(5)
    (y, h), saved = saved_by(lambda: ops.lora_linear(x, *group, bias, a, b, SCALING, 0.3, seed, None))
    parameters = {f"weight{i}": t for i, t in enumerate(group) if isinstance(t, Tensor)}
    assert_saved(saved, {"x": x, "h": h, "seed": seed, "a": a, "b": b} | parameters)
    assert y.requires_grad


@pytest.mark.parametrize("base", ["dense", "nested"])
@pytest.mark.parametrize("kind", ["multi_lora_linear", "gated_mlp"])
def test_lists_of_layers_save_no_mask_and_no_product(backend: str, kind: str, base: str) -> None:
    c: Any = Many(base, torch.bfloat16, True) if kind == "multi_lora_linear" else Mlp(base, torch.bfloat16)
    outputs, saved = saved_by(lambda: getattr(ops, kind)(*c.args()))
    allowed = {"x": c.x, "seed": c.seed}
    if kind == "gated_mlp":
        allowed |= dict(zip(("gate", "up", "h", "h_down"), outputs[1:], strict=True))
    else:
        allowed |= {"h": outputs[1], "row_group": c.row_group}
    parameters = flat(c.weight, *c.quantised[:3], c.a, c.b)
    assert_saved(saved, allowed | {f"parameter{i}": t for i, t in enumerate(parameters)})
    assert not any(t.requires_grad for t in outputs[1:])


def test_elementwise_ops_save_no_mask(backend: str) -> None:
    x, up, scale = (leaf(*s, dtype=torch.float32, seed=1) for s in ((6, 5), (6, 5), (5,)))
    seed, bias = torch.tensor(4), leaf(5, dtype=torch.float32, seed=3)
    assert_saved(saved_by(lambda: ops.dropout(x, 0.5, seed))[1], {"seed": seed})
    assert_saved(saved_by(lambda: ops.gated_activation(x, up, "gelu"))[1], {"gate": x, "up": up})
    assert_saved(saved_by(lambda: ops.dora_scale(x, scale, bias))[1], {"z": x, "scale": scale, "bias": bias})


# fp64, on the reference, of the ops with lists


def gradcheck_layers(c: Any) -> None:
    leaves = c.leaves()

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(leaves, values, strict=True))
        lists = (("w", "weight"), ("bias", "bias"), ("a", "a"), ("b", "b"))
        before = {attribute: getattr(c, attribute) for _, attribute in lists} | {"x": c.x}
        c.x = named["x"]
        for kind, attribute in lists:
            setattr(c, attribute, [named.get(f"{kind}{i}", t) for i, t in enumerate(before[attribute])])
        try:
            return tuple(c.call())
        finally:
            for attribute, value in before.items():
                setattr(c, attribute, value)

    assert gradcheck(call, tuple(leaves.values()), fast_mode=True)


@pytest.mark.usefixtures("_reference")
@pytest.mark.parametrize("groups", [False, True], ids=["all-rows", "groups"])
@pytest.mark.parametrize("base", ["dense", "nested"])
def test_gradcheck_multi_lora_linear(base: str, groups: bool) -> None:
    gradcheck_layers(Many(base, torch.float64, groups))


@pytest.mark.usefixtures("_reference")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("base,adapters", [("dense", "all"), ("nested", "twice"), ("plain", "no-up")])
def test_gradcheck_gated_mlp(base: str, adapters: str, activation: str) -> None:
    gradcheck_layers(Mlp(base, torch.float64, adapters, activation))


@pytest.mark.usefixtures("_reference")
@pytest.mark.parametrize("p", [0.3, 1.0])
def test_gradcheck_lora_linear_with_dropout(p: float) -> None:
    x, a, b, bias = (fp64_leaf(*s, seed=i) for i, s in enumerate([(2, 3, 7), (4, 7), (5, 4), (5,)]))
    w, rest = fp64_leaf(5, 7, seed=9), (0.7, p, torch.tensor(8), None)
    assert gradcheck(
        lambda x, w, a, b, bias: ops.lora_linear(x, w, None, None, None, 0, bias, a, b, *rest)[0],
        (x, w, a, b, bias),
    )


@pytest.mark.usefixtures("_reference")
def test_gradcheck_elementwise_ops() -> None:
    gate, up = fp64_leaf(3, 5, seed=1), fp64_leaf(3, 5, seed=2)
    for activation in ACTIVATIONS:
        assert gradcheck(lambda g, u, name=activation: ops.gated_activation(g, u, name), (gate, up))
    scale, bias = fp64_leaf(5, seed=3), fp64_leaf(5, seed=4)
    assert gradcheck(ops.dora_scale, (gate, scale, bias))
    assert gradcheck(lambda z, scale: ops.dora_scale(z, scale, None), (gate, scale))
    seed = torch.tensor(8)
    for p in (0.0, 0.4, 1.0):
        assert gradcheck(lambda x, p=p: ops.dropout(x, p, seed), (gate,))
        assert gradgradcheck(lambda x, p=p: ops.dropout(x, p, seed), (gate,))


# Second derivatives


def second_order_cases() -> dict[str, tuple[Callable[[], Any], list[Tensor]]]:
    many, mlp = Many("dense", torch.float32, True), Mlp("dense", torch.float32)
    z, scale, up = (leaf(*s, dtype=torch.float32, seed=2) for s in ((3, 5), (5,), (3, 5)))
    leaves = inputs(torch.float32, "dense", torch.float32, None)
    x, w, a, b = (leaves[name] for name in ("x", "weight", "lora_a", "lora_b"))
    seed = torch.tensor(3)
    return {
        "lora_linear": (
            lambda: ops.lora_linear(x, w, None, None, None, 0, None, a, b, SCALING, 0.3, seed, None)[0],
            [x, a],
        ),
        "multi_lora_linear": (lambda: many.call()[0], [many.x, many.a[1]]),
        "gated_mlp": (lambda: mlp.call()[0], [mlp.x, mlp.a[0]]),
        "gated_activation": (lambda: ops.gated_activation(z, up, "silu"), [z, up]),
        "dora_scale": (lambda: ops.dora_scale(z, scale, None), [z, scale]),
    }  # fmt: skip


@pytest.mark.parametrize("upstream", ["differentiable", "constant"])
@pytest.mark.parametrize("op", second_order_cases())
def test_double_backward_is_refused(backend: str, op: str, upstream: str) -> None:
    """There is no formula for it: an error that says so, never a gradient with a part left out."""
    call, (first, second) = second_order_cases()[op]
    y = call()
    loss = y.pow(2).sum() if upstream == "differentiable" else (y * torch.ones_like(y)).sum()
    (gradient,) = torch.autograd.grad(loss, first, create_graph=True)
    sentence = f"{op}: a gradient of its gradients was asked for, expected first order only"
    with pytest.raises(RuntimeError, match=sentence):
        torch.autograd.grad(gradient.pow(2).sum(), second, retain_graph=True)
    with pytest.raises(RuntimeError, match=sentence):
        gradient.sum().backward()


def test_create_graph_alone_changes_no_gradient(backend: str) -> None:
    for op, (call, wanted) in second_order_cases().items():
        got = torch.autograd.grad(call().sum(), wanted, create_graph=True)
        want = torch.autograd.grad(call().sum(), wanted)
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True)), op

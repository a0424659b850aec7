"""Calls of the ops with trainable arguments, and their fp64 gradients from the definitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import philox
import torch
import torch.nn.functional as F
from lora_cases import BEYOND_FP16
from numbers_policy import in_range
from rounding import ONE_MODEL
from torch import Tensor

import peft_kernels as pk
import testing

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
N, K, R, SCALING = 48, 96, 8, 0.8


def leaf(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    return testing.tensor(*shape, dtype=dtype, seed=seed, scale=scale).requires_grad_()


def inputs(dtype: torch.dtype, base: str, adapter: torch.dtype, bias: torch.dtype | None) -> dict[str, Any]:
    """Leaves of a lora_linear call; `weight` is a PackedWeight or a trainable dense leaf."""
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


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
ACTIVATIONS = tuple(FUNCTIONS)
ops = torch.ops.peft_kernels


class Layers:
    """Trainable arguments of multi_lora_linear or gated_mlp, and the definition in fp64."""

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

    def scale(self, large: str) -> Layers:
        of_a, of_b, of_scaling = BEYOND_FP16[large]["large"]
        for factor, leaves in ((of_a, self.a), (of_b, self.b)):
            for one in leaves:
                one.detach().mul_(factor)
        self.scaling = [s * of_scaling for s in self.scaling]
        return self

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
        """Layer j in fp64; the index in `adapters` is an adapter's dropout stream."""
        y = x @ wide.get(f"w{j}", self.w64[j]).t()
        if f"bias{j}" in wide:
            y = y + wide[f"bias{j}"]
        for stream, i in enumerate(adapters):
            if self.layer[i] == j:
                dropped = x * philox.factors(tuple(x.shape), self.p[i], key, stream)
                delta = self.scaling[i] * (dropped @ wide[f"a{i}"].t()) @ wide[f"b{i}"].t()
                y = y + (delta if served is None else delta * served[i])
        return y


class MultiLora(Layers):
    """multi_lora_linear: three layers, the last without adapters; rows of three groups and of none."""

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
    """gated_mlp; `adapters`: how many each layer has."""

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


def assert_near(
    got: Tensor, plain: Tensor, truth: Tensor, what: str, inside: torch.dtype | None = None
) -> None:
    """By the numbers policy, which is trivial for the reference. So it is bounded here: an fp32 parameter's
    gradient must never be rounded to the activations' dtype. `inside`: what activations between layers are
    rounded to."""
    testing.assert_close(got, plain, truth, what)
    eps = torch.finfo(inside or got.dtype).eps
    assert testing.relative_error(got, truth) <= max(4 * eps, ONE_MODEL), what


def check_against_fp64(make: Callable[[], Any]) -> None:
    c = make()
    y, got = gradients_of(c)
    with pk.use_backend("reference"):
        plain_y, plain = gradients_of(c)
    wide = c.wide()
    truth_y = c.define(wide)
    dy = [testing.tensor(*t.shape, dtype=t.dtype, seed=60 + j).double() for j, t in enumerate(y)]
    truth = torch.autograd.grad(truth_y, list(wide.values()), dy)
    assert got.keys() == wide.keys()
    for j, value in enumerate(y):
        assert_near(value, plain_y[j], truth_y[j].detach(), f"y{j}")
    for (name, value), want in zip(got.items(), truth, strict=True):
        if name[0] in "ab" and not in_range(want, value.dtype):
            continue  # large ranks in 16 bits
        like = c.leaves()[name]
        assert value.dtype == like.dtype and value.shape == like.shape, name
        inside = c.dtype if isinstance(c, Mlp) else None
        assert_near(value, plain[name], want, f"gradient of {name}", inside)

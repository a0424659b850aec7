"""Arguments of every op, with and without optional ones, and the namespaces that tests use."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import torch
from attention_samples import attention_samples
from block_samples import block_samples
from loss_samples import loss_samples
from small_tensors import K, N, R, group, leaf
from torch import Tensor

import testing
from peft_kernels import NF4Weight
from peft_kernels.core import registry
from peft_kernels.triton_kernels import backend as triton

NAMESPACES = {
    "public": "peft_kernels",
    "reference": "peft_kernels_reference",
    "cpu": "peft_kernels_cpu",
    "ptx": "peft_kernels_ptx",
}
if triton.BACKEND.interpreted:
    NAMESPACES = {"triton": "peft_kernels_triton"}


def experts_group(nested: bool, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """The weight of three experts."""
    weight = testing.tensor(3, N, K, dtype=dtype, seed=9)
    return NF4Weight.quantize(weight, 32, nested)._state.op_args


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
    base: str,
    adapters: list[int],
    dtype: torch.dtype = torch.float32,
    groups: bool = False,
    compute: torch.dtype | None = None,
) -> Any:
    values = cut(layers(base, adapters, compute or dtype), 2)
    row_group = torch.tensor([0, 0, 1, -1, 1, 5]) if groups else None
    seed = torch.tensor(3) if len(adapters) > 1 else None
    x = leaf(2, 3, K, dtype=dtype)
    return (x, *values.values(), seed, [i % 2 for i in range(len(adapters))], row_group, compute)


def multi_backward_args(
    base: str, adapters: list[int], needs: tuple[bool, list[bool], list[bool]], groups: bool = False,
    compute: torch.dtype | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    x, *rest = multi_args(base, adapters, groups=groups, compute=compute)
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
    """The arguments with x (index 1) in another layout; gradients stay contiguous."""
    return (args[0], testing.tensor(K, 3, 2).permute(2, 1, 0), *args[2:])


def adamw_args(
    kind: str, shapes: list[tuple[int, ...]], dtypes: list[torch.dtype], bits: list[int],
    option: str = "", seed: int = 0,
) -> tuple[Any, ...]:  # fmt: skip
    """Parameters and moments during training, in two groups."""
    params = [
        testing.tensor(*s, dtype=d, seed=seed + i)
        for i, (s, d) in enumerate(zip(shapes, dtypes, strict=True))
    ]
    grads = [testing.tensor(*p.shape, dtype=p.dtype, seed=seed + 50 + i) for i, p in enumerate(params)]
    moments: list[list[Tensor]] = [[], []]
    absmax: list[list[Tensor]] = [[], []]
    for i, (p, b) in enumerate(zip(params, bits, strict=True)):
        for which in range(1 if kind == "lion" else 2):
            value = testing.tensor(*p.shape, seed=seed + 100 + 2 * i + which)
            codes = testing.tensor(*p.shape, seed=seed + 200 + 2 * i + which).abs().mul(60).clamp(max=255)
            scale = testing.tensor(-(-p.numel() // 256), seed=seed + 300 + 2 * i + which).abs()
            moments[which].append(codes.to(torch.uint8) if b == 8 else value.abs() if which else value)
            absmax[which].append(scale if b == 8 else torch.empty(0))
    compensation = []
    if option == "compensation":
        scaled = [p * 2**-9 if p.dtype == torch.bfloat16 else p.new_empty(0) for p in params]
        compensation = [t.flip(0) for t in scaled]
    return (
        params, grads, *moments, *absmax, compensation, torch.arange(1, len(params) + 1),
        [i % 2 for i in range(len(params))], torch.tensor([1e-2, 3e-3]), [0.9, 0.8], [0.999, 0.95],
        [1e-8, 1e-6], [0.01, 0.0], kind, torch.tensor(8.0) if option == "scaled" else None,
        torch.tensor([float(option == "found_inf")]) if option in ("scaled", "found_inf") else None,
        0.5 if option == "clipped" else 0.0, torch.tensor(7) if option == "stochastic" else None,
        torch.tensor(0.3) if option == "factor" else None,
    )  # fmt: skip


def bottleneck_args(
    activation: str, norm: bool = False, biases: bool = True, beside: bool = False, p: float = 0.0,
    dtype: torch.dtype = torch.float32, parameters: torch.dtype = torch.float32,
) -> tuple[Any, ...]:  # fmt: skip
    """Six rows; `beside`: a residual other than x, of another width."""
    n = N if beside else K
    vectors = [leaf(m, dtype=parameters, seed=i) for i, m in enumerate((K, K, R, n))]
    return (
        leaf(2, 3, K, dtype=dtype), leaf(2, 3, n, dtype=dtype, seed=1) if beside else None,
        *(vectors[:2] if norm else (None, None)), 1e-5, leaf(R, K, dtype=parameters, seed=3),
        vectors[2] if biases else None, leaf(n, R, dtype=parameters, seed=4), vectors[3] if biases else None,
        activation, 0.5, p, torch.tensor(3) if p else None,
    )  # fmt: skip


def bottleneck_backward_args(
    *needs: bool, beside: bool = False, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Any, ...]:
    args = bottleneck_args("gelu", beside=beside, dtype=dtype, **options)
    x, _, *norm, eps, down, _, up, _, activation, scaling, p, seed = args
    dy, z = testing.tensor(2, 3, up.shape[0], dtype=dtype, seed=5), testing.tensor(2, 3, R, seed=6)
    tensors = [t if t is None else t.detach() for t in (x, z, *norm)]
    rest = (eps, down.detach(), up.detach(), activation, scaling, p, seed)
    return (dy, *tensors, *rest, not beside, *needs)


def multi_bottleneck_args(beside: bool = False, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Three adapters of all kinds, the second without rows, for six rows of which two have none."""
    options: list[dict[str, Any]] = [
        {"activation": "silu", "norm": True},
        {"activation": "relu", "parameters": dtype},
        {"activation": "gelu", "biases": False, "p": 0.3},
    ]
    made = [bottleneck_args(beside=beside, dtype=dtype, **one) for one in options]
    x, residual, *columns = (list(column) for column in zip(*made, strict=True))
    return (x[0], residual[0], torch.tensor([2, 0, -1, 2, 0, 3]), *columns)


def multi_bottleneck_backward_args(
    beside: bool = False, dtype: torch.dtype = torch.float32, need_dx: bool = True
) -> tuple[Any, ...]:
    def detached(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [detached(one) for one in value]
        return value.detach() if isinstance(value, Tensor) else value

    args = detached(multi_bottleneck_args(beside, dtype))
    x, _, row_group, *norm, down, _, up, _, activation, scaling, p, seed = args
    dy, z = testing.tensor(2, 3, up[0].shape[0], dtype=dtype, seed=5), testing.tensor(2, 3, R, seed=6)
    rest = (row_group, *norm, down, up, activation, scaling, p, seed, not beside)
    return (dy, x, z, *rest, need_dx, [True, False, False], *([True, False, True] for _ in range(4)))


def samples(op: str) -> dict[str, tuple[Any, ...]]:
    """Arguments of an op by name, with and without its optional ones: new tensors with each call."""
    return copy.deepcopy(_samples(testing.SEED)[op])


@lru_cache(maxsize=1)
def _samples(_seed: int) -> dict[str, dict[str, tuple[Any, ...]]]:
    """Those of all ops."""
    a, b, dense = leaf(R, K, seed=3), leaf(N, R, seed=4), leaf(N, K, seed=1)
    half_a, half_b = leaf(R, K, dtype=torch.bfloat16), leaf(N, R, dtype=torch.bfloat16)
    x, dy, h = leaf(2, 3, K), testing.tensor(2, 3, N), testing.tensor(2, 3, R)
    plain, nested, unpacked = group(False), group(True), (dense, None, None, None, 0)
    bf16_x = leaf(5, K, dtype=torch.bfloat16)
    rest, dropping = (0.5, 0.0, None, None), (0.5, 0.3, torch.tensor(3), None)
    bf16, half_dense = (0.5, 0.3, torch.tensor(3), torch.bfloat16), leaf(N, K, dtype=torch.bfloat16, seed=1)
    gate, up, scale = leaf(5, 7), leaf(5, 7, seed=1), leaf(7)
    half_gate = leaf(5, 7, dtype=torch.bfloat16)
    detached = tuple(t.detach() for t in (dense, a, b))
    x2, dy2, h2 = leaf(7, K), leaf(7, N), testing.tensor(7, R)
    ends, whole = torch.tensor([2, 2, 6], dtype=torch.int32), torch.tensor([0, 7, 7], dtype=torch.int32)
    packs, nested_packs = experts_group(False), experts_group(True)
    bias3, a3, b3 = testing.tensor(3, N), leaf(3, R, K, seed=3), leaf(3, N, R, seed=4)
    dense3 = (testing.tensor(3, N, K), None, None, None, 0)
    adapters3 = a3.detach(), b3.detach()
    fp32, half_types = [torch.float32] * 3, [torch.bfloat16, torch.float16, torch.bfloat16]
    sizes: list[tuple[int, ...]] = [(3, 100), (513,), (1,)]
    return {
        "adamw": {
            "adamw-8bit": adamw_args("adamw", sizes, fp32, [8, 8, 8]),
            "adamw-mixed-bits": adamw_args("adamw", sizes, half_types, [8, 32, 32]),
            "adam-scaled": adamw_args("adam", sizes, half_types, [32, 8, 8], "scaled"),
            "adamw-found-inf": adamw_args("adamw", sizes, fp32, [32, 8, 8], "found_inf"),
            "adamw-clipped": adamw_args("adamw", sizes, fp32, [32, 8, 8], "clipped"),
            "adamw-stochastic": adamw_args("adamw", sizes, half_types, [8, 8, 32], "stochastic"),
            "adamw-compensation": adamw_args("adamw", sizes, half_types, [8, 8, 32], "compensation"),
            "adamw-factor": adamw_args("adamw", sizes, fp32, [32, 8, 8], "factor"),
            "lion": adamw_args("lion", sizes, half_types, [8, 32, 8]),
        },
        "clip_factor": {
            "plain": (adamw_args("adamw", sizes, half_types, [8, 8, 8])[1], None, 0.5),
            "scaled": (adamw_args("adamw", sizes, fp32, [8, 8, 8])[1], torch.tensor(8.0), 1e9),
        },
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
            "nested-compute-bf16": (x, *nested, leaf(N), a, b, *bf16),
            "dense-compute-bf16": (x, half_dense, *unpacked[1:], leaf(N, dtype=torch.bfloat16), a, b, *bf16),
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
            "nested-compute-bf16": (dy, x.detach(), h, *nested, *detached[1:], *bf16, True, True, True),
        },
        "experts_linear": {
            "plain-fp32": (x2, ends, *packs, N, None),
            "nested-fp32-bias": (x2, whole, *nested_packs, N, bias3),
            "nested-bf16-bias": (leaf(7, K, dtype=torch.bfloat16), ends, *nested_packs, N, bias3),
        },
        "experts_linear_dx": {
            "plain-fp32": (dy2, ends, *packs, K),
            "nested-bf16": (leaf(7, N, dtype=torch.bfloat16), whole, *nested_packs, K),
        },
        "experts_lora_linear": {
            "plain-fp32": (x2, ends, *packs, None, a3, b3, 0.5),
            "nested-bf16-bias": (
                leaf(7, K, dtype=torch.bfloat16), whole, *nested_packs, bias3,
                leaf(3, R, K, dtype=torch.bfloat16), b3, 0.5,
            ),
            "dense-bias": (x2, ends, *dense3, bias3, a3, b3, 0.5),
        },
        "experts_lora_linear_backward": {
            "plain-all": (
                dy2.detach(), x2.detach(), h2, ends, *packs, *adapters3, 0.5, True, True, True
            ),
            "nested-adapter": (
                dy2.detach(), x2.detach(), h2, whole, *nested_packs, *adapters3, 0.5, False, True, True
            ),
            "dense-dx": (
                dy2.detach(), x2.detach(), h2, ends, *dense3, *adapters3, 0.5, True, False, False
            ),
        },
        **loss_samples(),
        **attention_samples(),
        **block_samples(),
        "multi_lora_linear": {
            "dense": multi_args("dense", [0, 1, 0]),
            "nf4-groups": multi_args("nf4", [1, 0, 0], groups=True),
            "mixed-bf16": multi_args("mixed", [1], torch.bfloat16),
            "nf4-no-adapters": multi_args("nf4", []),
            "mixed-compute-bf16": multi_args("mixed", [0, 1], compute=torch.bfloat16),
        },
        "multi_lora_linear_backward": {
            "dense-all": multi_backward_args("dense", [0, 1], (True, [True, True], [True, True])),
            "nf4-groups": multi_backward_args("nf4", [1, 0], (False, [True, False], [False, True]), True),
            "mixed-compute-bf16": multi_backward_args(
                "mixed", [0, 1], (True, [True, True], [True, True]), compute=torch.bfloat16
            ),
            "transposed-x": transposed_x(multi_backward_args("mixed", [1], (True, [True], [False]))),
        },
        "gated_mlp": {
            "dense": mlp_args("dense", [0, 1, 2], "silu"),
            "nf4-twice": mlp_args("nf4", [2, 0, 2], "gelu"),
            "mixed-bf16": mlp_args("mixed", [2], "gelu_tanh", torch.bfloat16),
            "nf4-no-adapters": mlp_args("nf4", [], "relu"),
        },
        "bottleneck": {
            "relu": bottleneck_args("relu"),
            "gelu-norm-beside": bottleneck_args("gelu", norm=True, beside=True),
            "gelu_tanh-dropout": bottleneck_args("gelu_tanh", p=0.3),
            "silu-bf16-no-biases": bottleneck_args(
                "silu", True, False, True, 0.3, torch.bfloat16, torch.bfloat16
            ),
            "relu-bf16": bottleneck_args("relu", norm=True, dtype=torch.bfloat16),
        },
        "bottleneck_backward": {
            "norm-all": bottleneck_backward_args(*[True] * 6, norm=True, p=0.3),
            "dx-beside": bottleneck_backward_args(True, *[False] * 5, beside=True),
            "parameters": bottleneck_backward_args(False, *[True] * 5),
            "bf16": bottleneck_backward_args(*[True] * 6, norm=True, beside=True, dtype=torch.bfloat16),
        },
        "multi_bottleneck": {
            "fp32": multi_bottleneck_args(),
            "bf16-beside": multi_bottleneck_args(True, torch.bfloat16),
        },
        "multi_bottleneck_backward": {
            "fp32": multi_bottleneck_backward_args(),
            "bf16-beside": multi_bottleneck_backward_args(True, torch.bfloat16),
            "parameters": multi_bottleneck_backward_args(need_dx=False),
        },
        "column_sums": {
            "fp32": (x,),
            "bf16": (bf16_x,),
            "transposed": (leaf(7, 5, transposed=True),),
            "one-row": (leaf(7),),
        },
        "gated_activation": {
            "silu": (gate, up, "silu"),
            "gelu-transposed": (leaf(7, 5, transposed=True), up, "gelu"),
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
    }  # fmt: skip


CASES = [(op, sample) for op in registry.OPS for sample in _samples(testing.SEED)[op]]

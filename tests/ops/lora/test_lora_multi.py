"""multi_lora_linear, forward and backward, on every back end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from lora_cases import BEYOND_FP16
from lora_multi_cases import (
    MultiCase,
    assert_same,
    check_backward,
    check_forward,
    multi_case,
    named_gradients,
    named_outputs,
)
from numbers_policy import (
    DTYPES,
    FEATURES,
    assert_in_range,
    case_id,
    each_dtype,
    same_with_any_threads,
    short,
)
from torch import Tensor

import testing

ops = torch.ops.peft_kernels
ROWS = (0, 1, 2, 5, 17, 130)
RANKS = (1, 3, 8, 16, 33, 70)

pytestmark = pytest.mark.usefixtures("nan_outputs")


CASES = testing.pairwise(
    m=ROWS,
    k=FEATURES,
    n=FEATURES,
    r=RANKS,
    layers=(1, 2, 3),
    adapters=("0", "120", "00", "", "2", "02011"),
    base=("dense", "nf4", "nested", "various"),
    bs=(32, 64, 4096),
    dtype=DTYPES,
    adapter=("fp32", "same", "mixed"),
    bias=("none", "same", "fp32", "various"),
    layout=testing.LAYOUTS,
    p=(0.0, 0.1, 0.5, 1.0, "various"),
    groups=("none", "one", "runs", "alternating", "nobody", "absent"),
    needs=("xab", "x", "ab", "b", "some"),
)
each_case = pytest.mark.parametrize("case", CASES, ids=case_id)


@each_case
def test_multi_lora_linear(backend: str, case: dict[str, Any]) -> None:
    check_forward(case)


@each_case
def test_multi_lora_linear_backward(backend: str, case: dict[str, Any]) -> None:
    check_backward(case)


@pytest.mark.parametrize("adapter", ["fp32", "same"])
@pytest.mark.parametrize("groups", ["none", "runs", "alternating"])
@each_dtype
def test_many_rows(backend: str, dtype: torch.dtype, groups: str, adapter: str) -> None:
    """More rows than a kernel takes at once, split within a group."""
    p = 0.5 if adapter == "fp32" else 0.0  # without dropout, adapters share sums
    case = multi_case(m=530, k=33, n=40, layers=1, adapters="000", bs=32, dtype=dtype, groups=groups)
    case |= {"adapter": adapter, "p": p}
    check_forward(case)
    check_backward(case)


@pytest.mark.parametrize("large", BEYOND_FP16)
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("groups", ["none", "runs"])
def test_ranks_beyond_fp16(backend: str, groups: str, p: float, large: str) -> None:
    """With dropout, the sums of x / (1 - p) too."""
    case = multi_case(m=41, n=128, k=192, dtype=torch.float16, groups=groups, p=p)
    c = MultiCase(case | BEYOND_FP16[large])
    assert_in_range(everything(c), c, c.depth)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("adapter", ["fp32", "same"])
@pytest.mark.parametrize("base", ["dense", "nested"])
@pytest.mark.parametrize("groups", ["runs", "alternating", "nobody", "absent"])
@each_dtype
def test_other_groups_rows_are_untouched(
    backend: str, dtype: torch.dtype, groups: str, base: str, adapter: str, p: float
) -> None:
    """y and dx are bit-equal to the base alone and h is 0, for any values of the adapter."""
    case = multi_case(m=41, base=base, dtype=dtype, adapter=adapter, p=p)
    c = MultiCase(case | {"groups": groups})
    alone = MultiCase(case | {"groups": "none", "adapters": ""})
    assert c.row_group is not None
    for a, b in zip(c.a, c.b, strict=True):
        a[0], b[1] = float("nan"), float("inf")
    y, h = ops.multi_lora_linear(*c.forward_args)
    plain_y, plain_h = ops.multi_lora_linear(*alone.forward_args)
    dx, _, _ = ops.multi_lora_linear_backward(*c.backward_args(h))
    plain_dx, _, _ = ops.multi_lora_linear_backward(*alone.backward_args(plain_h))
    untouched_everywhere = torch.ones(41, dtype=torch.bool)
    begin = 0
    for i, a in enumerate(c.a):
        elsewhere = c.row_group != c.group[i]
        assert (h[elsewhere, begin : begin + a.shape[0]] == 0).all()
        begin += a.shape[0]
        untouched_everywhere &= elsewhere
    for j in range(2):
        untouched = torch.ones(41, dtype=torch.bool)
        for i, layer in enumerate(c.layer):
            untouched &= (c.row_group != c.group[i]) | (layer != j)
        assert torch.equal(y[j][untouched], plain_y[j][untouched]), j
        assert groups == "absent" or not y[j][~untouched].isfinite().all(), j
    assert torch.equal(dx[untouched_everywhere], plain_dx[untouched_everywhere])


@each_dtype
def test_other_groups_rows_are_not_summed(backend: str, dtype: torch.dtype) -> None:
    """Rows without an adapter reach no adapter's gradient."""
    if backend == "reference":
        pytest.skip("reference: multiplies by 0")
    c = MultiCase(multi_case(m=41, dtype=dtype, groups="nobody", needs="ab"))
    assert c.row_group is not None
    _, h = ops.multi_lora_linear(*c.forward_args)
    clean = named_gradients(c, "ab", *ops.multi_lora_linear_backward(*c.backward_args(h, "ab")))
    for t in (c.x, *c.dy):
        t[c.row_group == -1] = float("nan")
    got = named_gradients(c, "ab", *ops.multi_lora_linear_backward(*c.backward_args(h, "ab")))
    assert_same(got, clean)


def test_adapters_of_other_layers_have_no_effect(backend: str) -> None:
    c = MultiCase(multi_case(layers=3, adapters="02", groups="none"))
    alone = MultiCase(multi_case(layers=3, adapters="", groups="none"))
    y, _ = ops.multi_lora_linear(*c.forward_args)
    plain, _ = ops.multi_lora_linear(*alone.forward_args)
    assert torch.equal(y[1], plain[1])
    assert not torch.equal(y[0], plain[0]) and not torch.equal(y[2], plain[2])


def everything(c: MultiCase) -> dict[str, Tensor]:
    y, h = ops.multi_lora_linear(*c.forward_args)
    gradients = ops.multi_lora_linear_backward(*c.backward_args(h))
    return named_outputs(y, h) | named_gradients(c, "xab", *gradients)


BIG = {"m": 70, "k": 576, "n": 200, "layers": 3, "adapters": "0120", "p": 0.3, "base": "various"}
TILES = BIG | {"k": 320, "n": 136}  # several tiles in each direction, the last ones partial


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_same_inputs_same_bits(backend: str, dtype: torch.dtype) -> None:
    """Also after the scratch memory held NaN; inputs are unchanged."""
    c = MultiCase(multi_case(**TILES, dtype=dtype))
    inputs = [c.x, *c.dy, *c.a, *c.b, *c.bias, c.seed, c.row_group, *c.weights[0]]
    before = [t.clone() for t in inputs]
    first = everything(c)
    poisoned = MultiCase(multi_case(**TILES, dtype=dtype, groups="none"))
    for t in (poisoned.x, *poisoned.a, *poisoned.b):
        t.fill_(float("nan"))
    everything(poisoned)
    again = everything(c)
    assert_same(again, first)
    assert all(value.isfinite().all() for value in again.values())
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True)), "an input was changed"


@each_dtype
@pytest.mark.parametrize("k", [35, 96])
def test_many_layers(backend: str, k: int, dtype: torch.dtype) -> None:
    case = multi_case(m=17, k=k, n=32, layers=6, adapters="0123", dtype=dtype, p=0.0)
    check_forward(case)
    check_backward(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_threads_do_not_change_a_bit(backend: str, dtype: torch.dtype) -> None:
    if backend in ("reference", "ptx", "triton"):
        pytest.skip(f"{backend}: torch's own matmul may split sums by threads")
    # The base of a dense layer is torch's GEMM.
    c = MultiCase(multi_case(**(BIG | {"base": "nested"}), dtype=dtype))
    same_with_any_threads(lambda: everything(c).values())


def test_flags_do_not_change_a_bit(backend: str) -> None:
    c = MultiCase(multi_case(dtype=torch.bfloat16, base="various"))
    _, h = ops.multi_lora_linear(*c.forward_args)
    every_gradient = named_gradients(c, "xab", *ops.multi_lora_linear_backward(*c.backward_args(h)))
    for needs in ("", "x", "a", "b", "some", "ab"):
        got = named_gradients(c, needs, *ops.multi_lora_linear_backward(*c.backward_args(h, needs)))
        assert_same(got, {name: every_gradient[name] for name in got})


@pytest.mark.parametrize("shape", [(96,), (0, 96), (2, 0, 96), (2, 3, 96), (2, 1, 3, 96)], ids=str)
def test_leading_dimensions_are_kept(backend: str, shape: tuple[int, ...]) -> None:
    rows = int(np.prod(shape[:-1]))
    c = MultiCase(multi_case(m=rows, groups="nobody"))
    flat = everything(c)
    c.forward_args = (c.x.view(shape), *c.forward_args[1:])
    c.x, c.dy = c.x.view(shape), [d.view(*shape[:-1], d.shape[1]) for d in c.dy]
    for name, value in everything(c).items():
        if name[0] in "yh":
            assert value.shape[:-1] == shape[:-1], name
        testing.assert_close(value.view(flat[name].shape), flat[name], flat[name].double(), name)


def test_no_layers(backend: str) -> None:
    x, empty = testing.tensor(3, 8), [[]] * 5
    y, h = ops.multi_lora_linear(x, *empty, [], [], [], [], [], [], [], None, [], None, None)
    assert list(y) == [] and h.shape == (3, 0)
    rest = ([], [], [], [], [], None, [], None, None)
    for need in (False, True):
        dx, da, db = ops.multi_lora_linear_backward([], x, h, *empty, *rest, need, [], [])
        assert torch.equal(dx, torch.zeros(3, 8) if need else torch.empty(0))
        assert list(da) == [] and list(db) == []

"""The numbers policy with the cards' rounding of sums, which Triton's interpreter lacks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import test_dora
import test_gated
import test_linear
import test_lora
import test_lora_multi
import torch
from lora_cases import check_lora_linear, check_lora_linear_backward, check_nf4_linear_dx
from lora_multi_cases import check_forward
from numbers_policy import case_id

from peft_kernels.triton_kernels import backend as triton

if not triton.BACKEND.interpreted:
    pytest.skip("for Triton's interpreter (make triton)", allow_module_level=True)

import triton_sums

import testing

pytestmark = pytest.mark.usefixtures("nan_outputs")


@pytest.fixture(autouse=True)
def _as_on_cards(one_thread: None) -> Iterator[None]:
    """Runs plain torch on one thread, where it is most accurate."""
    with triton_sums.as_on_cards():
        yield


LONG_SUMS = {
    "n": 100,
    "k": 1152,
    "r": 16,
    "base": "nested",
    "bs": 64,
    "a_dtype": torch.float32,
    "b_dtype": torch.float32,
    "layout": "contiguous",
}


def chosen(cases: Sequence[dict[str, Any]], *ids: str) -> pytest.MarkDecorator:
    """Cases that failed when sums were a single chain of `tl.dot`."""
    found = {case_id(case): case for case in cases}
    return pytest.mark.parametrize("case", [found[name] for name in ids], ids=ids)


# fp32: a chain of fused multiply-adds per element.


@chosen(test_linear.LINEAR_CASES, "m5-n576-k33-bs32-not_nested-fp32-bias_none-3-d")
def test_nf4_linear_dx(backend: str, case: dict[str, Any]) -> None:
    check_nf4_linear_dx(case)


@chosen(
    test_lora.LORA_CASES,
    "m5-n100-k576-r33-dense-bs128-fp32-adapter_mixed-bias_fp32-slice-needs_a",
    # 16 bits, on tensor cores.
    "m1-n96-k576-r3-nf4-bs128-fp16-adapter_same-bias_none-contiguous-needs_ab",
    "m2-n33-k576-r16-nf4-bs32-bf16-adapter_same-bias_same-column-step-needs_xab",
    "m5-n7-k576-r8-nf4-bs4096-fp16-adapter_same-bias_none-transposed-needs_xb",
    "m5-n100-k576-r33-nested-bs4096-fp16-adapter_mixed-bias_fp32-expanded-needs_xab",
)
def test_lora_linear(backend: str, case: dict[str, Any]) -> None:
    check_lora_linear(case)


@chosen(
    test_lora.LORA_CASES,
    "m5-n96-k33-r1-dense-bs32-fp32-adapter_fp32-bias_same-column-step-needs_x",
    "m64-n33-k96-r1-dense-bs4096-fp32-adapter_fp32-bias_none-expanded-needs_b",
    "m5-n576-k1-r3-nf4-bs128-fp16-adapter_mixed-bias_fp32-transposed-needs_xa",
    "m17-n576-k33-r8-nested-bs4096-fp16-adapter_mixed-bias_fp32-contiguous-needs_xab",
)
def test_lora_linear_backward(backend: str, case: dict[str, Any]) -> None:
    check_lora_linear_backward(case)


@chosen(
    test_lora_multi.CASES,
    "m5-k7-n1-r70-layers1-adapters_0-dense-bs64-fp32-adapter_fp32-bias_fp32-expanded-p_various-groups_nobody-needs_x",
    "m5-k576-n576-r16-layers3-adapters_2-nf4-bs4096-fp32-adapter_fp32-bias_same-contiguous-p_0.5-groups_runs-needs_xab",
)
def test_multi_lora_linear(backend: str, case: dict[str, Any]) -> None:
    check_forward(case)


@pytest.mark.parametrize("shape", ["lanes", "3-d"])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_activation(backend: str, shape: str, activation: str) -> None:
    test_gated.test_gated_activation(backend, shape, torch.float32, activation)


# fp32 accuracy on tensor cores, with each value split into two float16 values.


@pytest.mark.parametrize("case", test_dora.NORM_CASES, ids=case_id)
def test_dora_norm(backend: str, case: dict[str, Any]) -> None:
    test_dora.check_norm_case(case)


@pytest.mark.parametrize("size", [1e-15, 1e-6, 3e4, 1e15], ids="{:g}".format)
def test_dora_norm_of_any_size(backend: str, size: float) -> None:
    """A in float16 would be 0 or Inf; B compensates."""
    test_dora.check_norm_case({**LONG_SUMS, "a_size": size})


def test_dora_norm_of_one_large_element(backend: str) -> None:
    """The other elements of its rank are small, and so is their share of the sum."""
    group, w = test_dora.norm_base(LONG_SUMS)
    a, b = testing.tensor(4, 1152, seed=3), testing.tensor(100, 4, seed=4)
    a[:, 700] = 3e6
    test_dora.check_norm(group, w, a, b, 1.0)


def test_tensor_cores_truncate() -> None:
    ones, tiny = np.ones((1, 8)), np.full((8, 1), 2.0**-25)
    acc = np.ones((1, 1))
    assert triton_sums.truncated(ones, tiny, acc) == 1  # each is below the largest term's bits
    assert triton_sums.truncated(ones, 2 * tiny, acc) == 1 + 2.0**-21
    assert triton_sums.truncated(ones[:, :3], 2 * tiny[:3], acc) == 1 + 2.0**-23  # 1.5 units
    assert triton_sums.truncated(-ones[:, :3], 2 * tiny[:3], -acc) == -1 - 2.0**-23
    assert triton_sums.chained(ones[:, :1], np.full((1, 1), 1.5 * 2.0**-23), acc) == 1 + 2.0**-22


def test_3xtf32() -> None:
    generator = np.random.default_rng(0)
    a, b = (
        generator.standard_normal(shape).astype(np.float32).astype(np.float64) for shape in ((4, 8), (8, 4))
    )
    got = triton_sums.multiply_add(a, b, np.zeros((4, 4)), "tf32x3")
    assert 0 < np.abs(got - a @ b).max() < 3e-6

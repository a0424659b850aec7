"""The Triton kernels as compiled for cards that are not here: every kernel, with every config."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))

triton = pytest.importorskip("triton", reason="Triton is not installed")
if triton.knobs.runtime.interpret:
    pytest.skip("Triton interprets its kernels in this process", allow_module_level=True)

import triton.language as tl
from triton.backends.compiler import GPUTarget

from bench import report, run, triton_cases, triton_code
from bench.triton_cases import TARGETS
from bench.triton_code import Code, Launched
from peft_kernels import triton_kernels
from peft_kernels.triton_kernels import launch

PRODUCTS = {"linear_kernel", "linear_dx_kernel", "to_ranks_kernel", "from_ranks_kernel", "over_rows_kernel"}

each_target = pytest.mark.parametrize("target", TARGETS)
refusal = lru_cache(triton_code.unsupported)


def require(target: str) -> None:
    if reason := refusal(target):
        pytest.skip(reason)


@lru_cache(maxsize=1)
def all_code() -> list[Code]:
    return triton_code.compile_all([target for target in TARGETS if refusal(target) is None])


def code_for(target: str) -> list[Code]:
    require(target)
    return [code for code in all_code() if code.target == target]


@pytest.mark.slow
@each_target
def test_kernels_stay_within_their_limits(target: str) -> None:
    found = code_for(target)
    assert found
    faults = [
        f"{code.variant.kernel}, {code.variant.config}, {code.variant.types}: {fault}"
        for code in found
        for fault in code.faults
    ]
    assert not faults, "\n".join(faults)


@each_target
def test_products_reach_tensor_cores(target: str) -> None:
    assert {code.variant.kernel for code in code_for(target) if code.matrix} >= PRODUCTS


# That nothing is forgotten.


def modules() -> Iterator[Any]:
    for module in pkgutil.iter_modules(triton_kernels.__path__, f"{triton_kernels.__name__}."):
        yield importlib.import_module(module.name)


def configs_in(value: Any) -> Iterator[Any]:
    if isinstance(value, triton.Config):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from configs_in(item)


@lru_cache(maxsize=1)
def launched() -> list[Launched]:
    return [item for target in TARGETS for item in triton_code.launches(target)]


def test_every_kernel_is_compiled() -> None:
    """A function under @triton.jit is launched, or called by one that is."""
    found = {value.__name__: value for m in modules() for value in vars(m).values() if is_jit(value)}
    called = {
        node.id
        for function in found.values()
        for node in ast.walk(function.parse())
        if isinstance(node, ast.Name) and node.id != function.__name__
    }
    assert found.keys() - called == {item.kernel.__name__ for item in launched()}


def is_jit(value: Any) -> bool:
    return isinstance(value, triton.runtime.JITFunction)


def test_every_config_is_compiled() -> None:
    compiled = {id(item.config) for item in launched()}
    missing = [
        f"{module.__name__}.{name}: {config}"
        for module in modules()
        for name, value in vars(module).items()
        for config in configs_in(value)
        if id(config) not in compiled
    ]
    assert not missing


@each_target
def test_nothing_is_read_on_the_host(target: str) -> None:
    """Tensors without memory, as the calls have, cannot tell what they hold."""
    assert triton_code.launches(target)
    with pytest.raises(RuntimeError, match="meta"):
        torch.empty((), device="meta").item()


# Kernels that break the rules.


@triton.jit
def spilling_kernel(x, BLOCK: tl.constexpr):
    at = x + tl.arange(0, BLOCK)
    values = tl.load(at)
    tl.store(at, values * tl.sum(values))


@triton.jit
def product_kernel(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr):
    row, col, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros((M, N), tl.float32)
    for _ in range(16):
        left = tl.load(a + row[:, None] * K + inner[None, :])
        right = tl.load(b + inner[:, None] * N + col[None, :])
        if WIDE:
            total = tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="ieee")
        else:
            total = tl.dot(left, right, total)
        a += M * K
        b += K * N
    tl.store(c + row[:, None] * N + col[None, :], total)


@triton.jit
def refused_kernel(x):
    for i in tl.static_range(2):
        STEP: tl.constexpr = i
        tl.store(x + STEP, STEP)


def judged(target: str, kernel: Any, *args: Any, stages: int = 3, **constants: int) -> Code:
    require(target)
    item = Launched(kernel, args, constants, triton.Config({}, num_warps=4, num_stages=stages))
    (variant,) = triton_code.variants(target, [item])
    return triton_code.compiled(target, variant)


def product(target: str, m: int, n: int, k: int, wide: bool = False, stages: int = 3) -> Code:
    half = torch.empty(1, dtype=torch.bfloat16, device="meta")
    out = torch.empty(1, device="meta")
    return judged(target, product_kernel, half, half, out, M=m, N=n, K=k, WIDE=wide, stages=stages)


@pytest.mark.parametrize("target", ("sm80", "sm90", "sm120"))
def test_a_kernel_that_spills_is_found(target: str) -> None:
    x = torch.empty(1, device="meta")
    code = judged(target, spilling_kernel, x, BLOCK=1 << 16)
    assert code.faults == (f"{code.spills} bytes of local memory",) and code.spills >= 256
    assert judged(target, spilling_kernel, x, BLOCK=1 << 10).faults == ()


@pytest.mark.parametrize("target", ("sm80", "sm90", "sm100", "gfx942", "gfx1100"))
def test_a_product_in_fp32_is_found(target: str) -> None:
    good = product(target, 64, 32, 32)
    assert good.matrix and good.faults == ()
    assert product(target, 64, 32, 32, wide=True).faults == ("multiplies in fp32",)


def test_a_product_without_tensor_cores_is_found() -> None:
    assert product("gfx1100", 64, 8, 64).faults == ("no instructions for tensor cores",)
    assert product("gfx1100", 64, 16, 64).faults == ()


@pytest.mark.parametrize("target", ("sm80", "sm120", "gfx942"))
def test_too_much_shared_memory_is_found(target: str) -> None:
    code = product(target, 128, 128, 128, stages=6)
    assert any(fault.startswith("does not fit") for fault in code.faults)


def test_a_kernel_that_does_not_compile_is_found() -> None:
    (fault,) = judged("sm90", refused_kernel, torch.empty(1, dtype=torch.int32, device="meta")).faults
    assert re.match(r"does not compile: .*refused_kernel", fault, re.DOTALL)


def test_a_target_that_triton_lacks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_code, "gpu_target", lambda name: GPUTarget("metal", name, 32))
    assert "cannot compile for sm90: 0 compatible backends" in str(triton_code.unsupported("sm90"))
    result = triton_cases.Case("sm90").run()
    assert "cannot compile for sm90" in result.line()


# What decides between configs.


def test_nothing_is_timed_where_results_must_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(launch.ENVIRONMENT_VARIABLE, raising=False)
    before = torch.are_deterministic_algorithms_enabled()
    try:
        for deterministic in (True, False):
            torch._C._set_deterministic_algorithms(deterministic)  # the public one imports Inductor
            assert launch._may_time() is not deterministic
    finally:
        torch._C._set_deterministic_algorithms(before)
    monkeypatch.setenv(launch.ENVIRONMENT_VARIABLE, "0")
    assert not launch._may_time()


# What is printed.


def test_the_table_has_a_line_for_each_config() -> None:
    code = product("sm90", 64, 32, 32)
    result = triton_cases.Compiled(triton_cases.Case("sm90"), codes=[code, code])
    text = report.render([result])
    assert "Triton kernels as compiled for sm90" in text
    assert re.search(
        r"^product_kernel +4 warps, 3 stages +2 +\d+ +[\d,]+ +\d+ +0 +\d+ *$", text, re.MULTILINE
    )
    (kernel,) = result.data()["kernels"][:1]
    assert kernel["matrix"] == code.matrix and kernel["registers"] == code.registers
    assert result.line() == "2 kernels, 0 beyond their limits"


def test_run_selects_targets(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--list", "--only", "^triton"]) == 0
    assert capsys.readouterr().out.split() == [f"triton-{target}" for target in TARGETS]

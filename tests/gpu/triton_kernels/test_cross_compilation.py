"""Compiles every Triton kernel, with every config, for cards that are absent."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch
from skips import needs

triton = pytest.importorskip("triton", reason="Triton is not installed")
if triton.knobs.runtime.interpret:
    pytest.skip("Triton interprets its kernels in this process", allow_module_level=True)

import triton.language as tl
from triton.backends.compiler import GPUTarget

import ptx_backend as ptx
from bench import run
from bench.gpu import triton_code
from bench.gpu.compiled import TRITON_TARGETS, Compiled, standard, triton_rows
from bench.gpu.triton_calls import BF16, Call, empty, nf4
from bench.gpu.triton_code import Code, Launched
from bench.lib import report
from peft_kernels import triton_kernels
from peft_kernels.triton_kernels.core import launch

GEMMS = {
    "linear_kernel",
    "shrink_kernel",
    "expand_kernel",
    "over_rows_kernel",
    "bottleneck_kernel",
    "bottleneck_backward_kernel",
}

SM90 = next(case for case in standard("bf16") if case.name == "triton-sm90")
each_target = pytest.mark.parametrize("target", TRITON_TARGETS)
refusal = lru_cache(triton_code.unsupported)


def require(target: str) -> None:
    if reason := refusal(target):
        pytest.skip(reason)


@lru_cache(maxsize=1)
def all_code() -> list[Code]:
    return triton_code.compile_all([target for target in TRITON_TARGETS if refusal(target) is None])


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
def test_gemms_use_tensor_cores(target: str) -> None:
    """Some fp32 kernels may not; kernels compiled for targets of the same kind count too."""
    require(target)
    kind = triton_code.kind_of(target)
    assert {code.variant.kernel for code in all_code() if code.target in kind and code.matrix} >= GEMMS


def modules() -> Iterator[Any]:
    for module in pkgutil.walk_packages(triton_kernels.__path__, f"{triton_kernels.__name__}."):
        yield importlib.import_module(module.name)


def configs_in(value: Any) -> Iterator[Any]:
    if isinstance(value, dict) and "num_warps" in value:
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from configs_in(item)


@lru_cache(maxsize=1)
def launched() -> list[Launched]:
    return [item for target in TRITON_TARGETS for item in triton_code.standard(target)]


def test_every_kernel_is_compiled() -> None:
    """Every @triton.jit function is launched, or called by one that is."""
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
    """The calls use meta tensors, whose values cannot be read."""
    assert triton_code.standard(target)
    with pytest.raises(RuntimeError, match="meta"):
        torch.empty((), device="meta").item()


@needs("ptx")
def test_the_ptx_machine_knows_every_instruction() -> None:
    """`make triton-ptx` reaches only the instructions of its tests; this covers all for its card."""
    require("sm80")
    with triton_code.compiling_for("sm80"):
        for item in triton_code.different("sm80"):
            made = triton_code.warm_up(item)
            ptx.BACKEND.extension.load(made.asm["ptx"]).read_all()


@triton.jit
def spilling_kernel(x, BLOCK: tl.constexpr):
    at = x + tl.arange(0, BLOCK)
    values = tl.load(at)
    tl.store(at, values * tl.sum(values))


@triton.jit
def gemm_kernel(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr):
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


def compiled_for(target: str, kernel: Any, *args: Any, stages: int = 3, **constants: int) -> Code:
    require(target)
    config = launch.config(4, stages)
    return triton_code.compiled(target, Launched(kernel, args, constants, config, config))


def gemm(target: str, m: int, n: int, k: int, wide: bool = False, stages: int = 3) -> Code:
    half = torch.empty(1, dtype=torch.bfloat16, device="meta")
    out = torch.empty(1, device="meta")
    return compiled_for(target, gemm_kernel, half, half, out, M=m, N=n, K=k, WIDE=wide, stages=stages)


@pytest.mark.parametrize("target", ("sm80", "sm90", "sm120"))
def test_a_kernel_that_spills_is_found(target: str) -> None:
    x = torch.empty(1, device="meta")
    code = compiled_for(target, spilling_kernel, x, BLOCK=1 << 16)
    assert code.faults == (f"{code.spills} bytes of local memory",) and code.spills >= 256
    assert compiled_for(target, spilling_kernel, x, BLOCK=1 << 10).faults == ()


@pytest.mark.parametrize("target", ("sm80", "sm90", "sm100", "gfx942", "gfx1100"))
def test_a_gemm_in_fp32_is_found(target: str) -> None:
    good = gemm(target, 64, 32, 32)
    assert good.matrix and good.faults == ()
    assert gemm(target, 64, 32, 32, wide=True).faults == ("multiplies in fp32",)


def test_a_gemm_without_tensor_cores_is_found() -> None:
    assert gemm("gfx1100", 64, 8, 64).faults == ("no instructions for tensor cores",)
    assert gemm("gfx1100", 64, 16, 64).faults == ()


@pytest.mark.parametrize("target", ("sm80", "sm120", "gfx942"))
def test_too_much_shared_memory_is_found(target: str) -> None:
    code = gemm(target, 128, 128, 128, stages=6)
    assert any(fault.startswith("does not fit") for fault in code.faults)


def test_a_kernel_that_does_not_compile_is_found() -> None:
    (fault,) = compiled_for("sm90", refused_kernel, torch.empty(1, dtype=torch.int32, device="meta")).faults
    assert re.match(r"does not compile: .*refused_kernel", fault, re.DOTALL)


def test_an_unsupported_target_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_code, "gpu_target", lambda name: GPUTarget("metal", name, 32))
    assert "cannot compile for sm90: 0 compatible backends" in str(triton_code.unsupported("sm90"))
    result = SM90.run()
    assert "cannot compile for sm90" in result.line()


def test_stages_are_two_at_most_on_amd() -> None:
    with triton_code.compiling_for("gfx942"):
        assert launch.for_target(launch.config(4, 3)) == launch.config(4, 2)
    with triton_code.compiling_for("sm90"):
        assert launch.for_target(launch.config(4, 3)) == launch.config(4, 3)


def lora_calls(m: int, adapters: int) -> list[Call]:
    """A training step of a layer with adapters for groups of rows, followed by a bottleneck."""
    x, seed, count = empty(m, 512, dtype=BF16), empty(dtype=torch.int64), range(adapters)
    base, h, row_group = nf4(512, 512), empty(m, 16 * adapters), empty(m, dtype=torch.int64)
    a, b = [empty(16, 512) for _ in count], [empty(512, 16) for _ in count]
    rest = a, b, [0 for _ in count], [0.5 for _ in count], [0.3 for _ in count], seed, list(count), row_group
    lists, needs = [[part] for part in base], (True, [True for _ in count], [True for _ in count])
    middle, all_but_norm = ("gelu", 0.5, 0.3, seed), (True, True, False, True, True, True, True)
    ranks = empty(m, 16)
    return [
        Call("bottleneck", (x, None, None, None, 0.0, a[0], None, b[0], None, *middle)),
        Call("bottleneck_backward", (x, x, ranks, None, None, 0.0, a[0], b[0], *middle, *all_but_norm)),
        Call("nf4_linear", (x, *base, 512, None)),
        Call("nf4_linear_dx", (x, *base, 512)),
        Call("multi_lora_linear", (x, *lists, [512], [empty(0)], *rest, None)),
        Call("multi_lora_linear_backward", ([x], x, h, *lists, *rest, None, *needs)),
    ]


@each_target
def test_batches_and_adapters_share_compiled_kernels(target: str) -> None:
    """Other numbers of rows within a table entry, and more pairs of adapters, compile nothing new."""
    require(target)

    def codes(m: int, adapters: int) -> set[Any]:
        return set(triton_code.by_code(target, triton_code.launches(target, lora_calls(m, adapters))))

    # Adapters are launched in pairs; the last launch may have one or two, and later pairs add to a sum.
    assert codes(17, 5) == codes(24, 5) == codes(32, 5) == codes(31, 7)
    assert codes(17, 6) == codes(31, 8)
    assert {kernel for kernel, _ in codes(17, 5)} >= GEMMS


def test_the_table_has_a_line_for_each_config() -> None:
    code = gemm("sm90", 64, 32, 32)
    result = Compiled(SM90, rows=triton_rows([code, code]))
    text = report.render([result])
    assert "kernels as compiled for sm90" in text
    assert re.search(r"^gemm_kernel +4 warps, 3 stages +2 +\d+ +[\d,]+ +\d+ +0 +\d+ *$", text, re.MULTILINE)
    (kernel,) = result.data()["kernels"]
    assert kernel["matrix"] == str(code.matrix) and kernel["registers"] == str(code.registers)
    assert result.line() == "1 kernels, 0 beyond their limits"


def test_run_selects_targets(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--list", "--only", "^triton"]) == 0
    assert capsys.readouterr().out.split() == [f"triton-{target}" for target in TRITON_TARGETS]

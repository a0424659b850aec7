"""What an optimizer step launches on CUDA, and that its device tables are rewritten when tensors change."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from numbers_policy import at_odd_address, short
from op_samples import adamw_args
from skips import needs
from stub_device import H100, Launches, stub_device
from test_adamw import ABSMAX1, GRADS, PARAMS, STATE1, compare, moment_args

from bench.gpu import adamw_loops, limits, sass
from bench.gpu.adamw_loops import BLOCKS_PER_SM, WARPS
from bench.gpu.sass import Kernel
from peft_kernels.core.op import OPS

TOOLS = sass.tools()
GRAD_SCALE = OPS["adamw"].arguments.index("grad_scale")
needs_tools = pytest.mark.skipif(isinstance(TOOLS, str), reason=str(TOOLS))
needs_stub = needs("ptx")


def step(args: tuple[Any, ...]) -> None:
    torch.ops.peft_kernels_ptx.adamw(*args)


def many(count: int, option: str = "", kind: str = "adamw") -> tuple[Any, ...]:
    """Arguments of all dtypes and both kinds of moments."""
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    shapes = [(8, 64 + i % 5) for i in range(count)]
    bits = [8 + 24 * (i % 2) for i in range(count)]
    return adamw_args(kind, shapes, [dtypes[i % 3] for i in range(count)], bits, option)


def launched(args: tuple[Any, ...], launches: Launches) -> Counter[str]:
    launches()
    step(args)
    return Counter(launch.kernel.split("::")[-1].split("<")[0] for launch in launches())


@needs_stub
@pytest.mark.parametrize("option,more", [("", {}), ("scaled", {}), ("clipped", {"ClipFactor": 1})])
def test_one_launch_for_all_parameters(option: str, more: dict[str, int]) -> None:
    args = many(448, option)
    with stub_device(H100) as launches:
        first = launched(args, launches)
        again = launched(args, launches)
        args[GRADS][3] = args[GRADS][3].clone()
        other = launched(args, launches)
    assert first["StoreTable"] > 2
    assert again == {"AdamWStep": 1, **more}
    assert other == {"AdamWStep": 1, "StoreTable": 1, **more}


@needs_stub
def test_a_step_reads_nothing_from_the_device() -> None:
    from test_cuda_graphs import nothing_read

    args = many(20, "clipped")
    with stub_device(H100), nothing_read():
        step(args)


@needs_stub
def test_the_grid_fills_a_card_once() -> None:
    most = 132 * BLOCKS_PER_SM
    for numel, blocks in ((256, 1), (256 * WARPS, 1), (256 * WARPS + 1, 2), (100_000_000, most)):
        tensors = [torch.empty(numel, dtype=torch.bfloat16, device="cpu") for _ in range(2)]
        states = [torch.empty(numel, dtype=torch.uint8) for _ in range(2)]
        scales = [torch.empty(-(-numel // 256)) for _ in range(2)]
        lists = [[t] for t in (*tensors, *states, *scales)]
        numbers = (torch.tensor([1]), [0], torch.ones(1), [0.9], [0.99], [1e-8], [0.0], "adamw")
        args = (*lists, [], *numbers, None, None, 0.0, None, None)
        with stub_device(H100) as launches:
            step(args)
            (found,) = [launch for launch in launches() if "AdamWStep" in launch.kernel]
        assert found.blocks == blocks


@needs_stub
@pytest.mark.parametrize("kind", ["adamw", "lion"])
def test_new_tensors_are_used(kind: str) -> None:
    """Not those of the previous step, although sizes and dtypes are the same."""
    kept = []
    for seed in range(3):
        got = adamw_args(kind, [(3, 100), (700,)], [torch.float32] * 2, [8, 32], seed=10 * seed)
        kept.append(got)  # so that no memory is reused
        compare(got, step)
        got[GRADS][:] = [g.clone() * 2 for g in got[GRADS]]
        compare(got, step)


@needs_stub
def test_unaligned_memory_uses_no_vectors() -> None:
    got = adamw_args("adamw", [(700,)] * 4, [torch.float32] * 4, [8, 8, 32, 8])
    for i, which in enumerate((PARAMS, GRADS, STATE1, ABSMAX1)):
        got[which][i] = at_odd_address(got[which][i])
    compare(got, step)


@needs_stub
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=short)
def test_norm_of_scaled_gradients(dtype: torch.dtype, aligned: bool) -> None:
    got = adamw_args("adamw", [(700,), (3, 100), (1500,)], [dtype] * 3, [8, 32, 8], "clipped")
    got = (*got[:GRAD_SCALE], torch.tensor(0.25), *got[GRAD_SCALE + 1 :])
    if not aligned:
        got[GRADS][:] = map(at_odd_address, got[GRADS])
    compare(got, step)


@needs_stub
@pytest.mark.parametrize("most", [2.0**-127, 1e-38, 1e-30, 1.0, 1e15, 2.0**100, 2.0**127])
def test_absmax_of_any_magnitude_is_inverted_exactly(most: float) -> None:
    got = moment_args(torch.linspace(-1, 1, 256) * most, "lion")
    compare(got, step)
    assert got[STATE1][0].unique().numel() > 100


@needs_stub
def test_empty_parameters_are_skipped() -> None:
    shapes: list[tuple[int, ...]] = [(0,), (5,), (0, 3), (300,)]
    got = adamw_args("adamw", shapes, [torch.bfloat16] * 4, [8] * 4, "stochastic")
    compare(got, step)


@lru_cache(maxsize=1)
def compiled(architecture: int) -> tuple[Path, dict[str, Kernel]]:
    assert isinstance(TOOLS, sass.Tools)
    (made,) = sass.compile_all(TOOLS, [sass.SOURCES / "optim" / "adamw.cu"], [architecture], cache=sass.CACHE)
    return made.path, {kernel.name: kernel for kernel in sass.read(TOOLS, [made], cache=sass.CACHE)}


@needs_tools
@pytest.mark.parametrize("architecture", sass.ARCHITECTURES, ids=lambda a: f"sm{a}")
def test_loops_have_few_instructions_and_vector_loads(architecture: int) -> None:
    for name in ("AdamWStep<false>", "AdamWStep<true>"):
        kernel = compiled(architecture)[1][name]
        assert adamw_loops.faults(kernel) == [], name
        assert kernel.threads == 32 * WARPS
        assert limits.resident_warps(kernel) == WARPS * BLOCKS_PER_SM


@needs_tools
def test_a_bad_loop_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = compiled(90)[1]["AdamWStep<false>"]

    def faults(**opcodes: str) -> set[str]:
        code = [
            replace(i, opcode=opcodes.get(i.opcode.replace(".", "_"), i.opcode)) for i in kernel.instructions
        ]
        return {fault.partition(": ")[2] for fault in adamw_loops.faults(replace(kernel, instructions=code))}

    assert faults() == set()
    assert "6 instructions of single elements" in faults(STG_E="STG.E.U16")
    assert "0 loads of 32 bits, expected 4" in faults(LDG_E="LDG.E.U8")
    assert any(fault.endswith("of fp64") for fault in faults(FADD="DADD"))
    kind = adamw_loops.Kind(False, "fp32", 8)
    monkeypatch.setitem(adamw_loops.LIMITS, kind, (20.0, 20.0))
    (fault,) = adamw_loops.faults(kernel)
    assert re.fullmatch(rf"{kind.name}: 5\d\.\d\d instructions an element, at most 20 allowed", fault)
    monkeypatch.setitem(adamw_loops.LIMITS, kind._replace(dtype="fp8"), (20.0, 20.0))
    assert "no loop for AdamW, fp8, moments in 8 bits" in adamw_loops.faults(kernel)


@needs_tools
@pytest.mark.parametrize("architecture", sass.ARCHITECTURES, ids=lambda a: f"sm{a}")
def test_a_step_calls_no_slow_division(architecture: int) -> None:
    assert isinstance(TOOLS, sass.Tools)
    command = [TOOLS.nvdisasm, "-c", str(compiled(architecture)[0])]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    steps = [code for code in listing.split("\t.section\t.text.")[1:] if "AdamWStep" in code.split(",")[0]]
    assert len(steps) == 2
    # Shuffles may call: on sm_80 they have a path for diverged lanes.
    slow = r"CALL.*(div|rcp|sqrt|rsq)"
    assert re.search(slow, listing), "ClipFactor divides once, at its end"
    assert not [line for code in steps for line in code.splitlines() if re.search(slow, line)]

"""Measures whether our dense GEMMs are as fast as torch's with this machine's best ISA, and records it.

    PEFT_KERNELS_AMX_DENSE=1 python bench/ops/dense_choice.py --record csrc/cpu/isa/fast_dense.h

A LoRA layer on a dense bf16 base computes the base GEMM itself with the best ISA (`has_fast_dense` in
csrc/cpu/isa/dispatch.cpp), and with torch, which our limit does not affect, with the ISA below. Forward and
backward of both are interleaved. Ours count as fast if the geometric mean of torch's time / ours over the
shapes of the tables in docs/benchmarks.md is at least 1. bench/amx_check.sh runs this.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent.parent))

import peft_kernels as pk
from bench.lib import cases, harness, layers, machine
from bench.lib.report import Spread, Timing
from peft_kernels.core.backends import cpu

OURS, TORCHS = "ours", "torch's"
RECORD = """// Whether our dense GEMMs with AMX are as fast as torch's, so that ops use them.
// Written by bench/amx_check.sh: torch's time / ours, forward and backward of a LoRA layer,
// {cpu}, {cores} cores, torch {torch}:
{lines}// Their geometric mean is {mean:.2f}.
#pragma once

namespace peft_kernels::cpu {{

inline constexpr bool kAmxHasFastDense = {fast};

}}  // namespace peft_kernels::cpu
"""

Call = Callable[[], Any]


def call(level: str, weights: layers.Weights, base: torch.Tensor, x: torch.Tensor, dy: torch.Tensor) -> Call:
    """Forward and backward of a layer, limited to an ISA."""
    trained = [t.detach().clone().requires_grad_() for t in (x, weights.lora_a, weights.lora_b)]

    def run() -> None:
        with cpu.BACKEND.use_isa(level), pk.use_backend("cpu"):
            y = pk.lora_linear(trained[0], base, trained[1], trained[2], 1.0)
            torch.autograd.grad(y, trained, dy)

    return run


def ratio(shape: cases.Shape, m: int, levels: dict[str, str], timing: Timing) -> float:
    """Torch's time / ours."""
    weights = layers.Weights(*shape, torch.bfloat16)
    count = harness.copies(2 * shape[0] * shape[1], len(levels))
    contenders = []
    for name, level in levels.items():
        bases = [weights.rounded.clone() for _ in range(count)]
        calls = [call(level, weights, base, weights.x(m), weights.dy(m)) for base in bases]
        contenders.append(harness.Contender(name, calls, verify=lambda result: 0.0))
    seconds = harness.interleave(contenders, timing)
    return Spread.of_ratios(seconds[TORCHS], seconds[OURS]).median


def decide(ratios: dict[str, float]) -> tuple[float, bool]:
    mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
    return mean, mean >= 1.0


def record(ratios: dict[str, float], facts: dict[str, Any]) -> str:
    mean, fast = decide(ratios)
    lines = "".join(f"//   {name}: {value:.2f}\n" for name, value in ratios.items())
    torch_version = facts["versions"]["torch"]
    return RECORD.format_map(
        facts | {"torch": torch_version, "lines": lines, "mean": mean, "fast": str(fast).lower()}
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--record", type=Path, help="the file to write")
    parser.add_argument("--level", default="amx", help="ISA of ours; torch is not limited")
    parser.add_argument("--quick", action="store_true", help="one small shape, as a smoke test")
    options = parser.parse_args(arguments)
    reason = cpu.BACKEND.probe()
    if reason is not None:
        print(f"dense_choice: back end cpu: {reason}")
        return 3
    built = cpu.BACKEND.extension.isa_levels()
    if options.level not in built[1:] or options.level != built[-1]:
        print(
            f"dense_choice: expected --level to be the best of this machine, {built[-1]}, got {options.level}"
        )
        return 3
    levels = {OURS: options.level, TORCHS: built[-2]}
    facts = machine.describe()
    print(machine.header(facts))
    shapes = {(192, 64): (16,)} if options.quick else cases.TRAINING_M
    ratios = {}
    for shape, rows in shapes.items():
        for m in rows:
            name = f"{shape[0]}x{shape[1]} M={m}"
            ratios[name] = ratio(shape, m, levels, Timing(0.0, 1) if options.quick else Timing())
            print(f"{name}: torch's time / ours {ratios[name]:.2f}", flush=True)
    mean, fast = decide(ratios)
    print(f"geometric mean {mean:.2f}: dense GEMMs are {'ours' if fast else 'left to torch'}")
    if options.record:
        options.record.write_text(record(ratios, facts))
        print(f"written to {options.record}: build again")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Checks the kernels, then times them with torch, bitsandbytes and PEFT in one interleaved run.

    python bench/run.py                    # the main cases, in at most five minutes
    python bench/run.py --quick            # under a minute
    python bench/run.py --full             # all timed cases, the 14336x4096 layer too
    python bench/run.py --list             # names of all cases
    python bench/run.py --only forward-4096x4096 --isa avx2
    python bench/run.py --only '^(sass|triton)'

Every case is checked against the fp64 reference first; a wrong result is reported and not timed. A ratio is
the peer's time / our time: above 1 we win. A cost is our time / that of a cheaper job of ours. Writes
results.jsonl and table.txt to the output folder. Exits with 1 if a result was wrong.

Except memory-... these run only by name:

memory-...             bytes that a forward saves for its backward
sass-..., triton-...   the compiled CUDA and Triton kernels, without a GPU: registers and spills; of the CUDA
                       kernels instructions per weight, compared with their limits
estimate-...           a whole step of an 8B model on a GPU, and for how many rows to fuse GEMMs, from bytes
                       and FLOPs
loading-...            memory and time of loading a checkpoint in 4 bits
bitsandbytes-ops-...   bitsandbytes' Linear4bit as it is and on our kernels
attention-...          attention of a layer, compared with torch's
busy-...               a training step while other processes use the cores, compared with a quiet machine
loss-...               a language model's head with its loss, compared with torch's over all logits
experts-...            layers of experts
bottleneck-...         bottleneck adapters compared with plain modules
adamw-...              a step of optimizers
optimizer-curves-...   held-out loss of training with each optimizer (most of an hour)
peak-...               peak memory of a process in a training step of 8x512 tokens
dpo-..., grpo-..., sft-...   steps of TRL's trainers on SmolLM2-135M
prefix-...             prefix tuning compared with PEFT's, which copies the prefix for each sample
methods-...            fine-tuning methods side by side: parameters, memory, time and loss
formats-...            packed formats: linear layers, and a model trained on each
serving-...            requests with 8 adapters in one batch, compared with 8 passes and one adapter
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import re
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# At the end: an installed peft_kernels, with its compiled library, takes precedence over the source tree.
sys.path.append(str(Path(__file__).resolve().parent.parent))

import bench  # noqa: F401  (for the path of `testing`)
from bench.lib import levels

TIMED = ("bench.lib.cases", "bench.models.model", "bench.models.memory")
BY_NAME = (
    *(f"bench.ops.{name}" for name in ("attention", "bnb_ops", "bottlenecks", "formats")),
    "bench.models.noisy_neighbour",
    "bench.ops.experts",
    *(f"bench.gpu.{name}" for name in ("step_estimate", "compiled")),
    "bench.models.loading",
    "bench.ops.losses",
    "bench.models.serving",
    "bench.ops.optimizers",
    *(f"bench.models.{name}" for name in ("peak", "prefix", "optimizer_curves", "rlhf", "methods")),
)
DEFAULT = (
    r"^forward-4096x4096-m(1|16|128|512)-",
    r"^forward-1536x576-m(1|64|512|2048)-",
    r"^qlora-(4096x4096-m(16|128|512)|1536x576-m(256|1024|4096))-",
    r"^lora-(4096x4096-m(16|128|512)|1536x576-m(256|1024|4096))-",
    r"^(quantize|dequantize|step|decode|overhead|memory)-",
    r"^block-.*-(4x256|8x128)-",
)
"""Where most of the time goes, and all cells that are known to lose."""
QUICK = (
    r"^forward-(4096x4096-m(1|128)|1536x576-m(1|64))-",
    r"^q?lora-1536x576-m256-",
    r"^(quantize|dequantize|overhead|memory-layer)-",
    r"^block-.*-(1x256|8x32)-",
)
"""Under a minute."""


def main(arguments: Sequence[str] | None = None) -> int:
    options, started = _parse(arguments), time.perf_counter()
    # torch and bitsandbytes read these when they are imported.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.threads:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
    if options.machine:
        levels.limit(options.machine)
    import torch

    warnings.filterwarnings("ignore", category=FutureWarning)  # of the peers
    if options.threads:
        torch.set_num_threads(options.threads)
    import peft_kernels as pk
    import testing
    from bench.lib import machine, report, session

    timed, by_name = (
        [case for name in modules for case in importlib.import_module(name).standard(options.dtype)]
        for modules in (TIMED, BY_NAME)
    )
    every: list[Any] = [*timed, *by_name]
    if options.list and not (options.only or options.quick or options.full):
        chosen = every
    elif options.full:
        chosen = timed
    else:
        pattern = options.only or "|".join(QUICK if options.quick else DEFAULT)
        chosen = [case for case in every if re.search(pattern, case.name)]
    if options.list:
        print("\n".join(case.name for case in chosen))
        return 0
    if not chosen:
        print(f"--only: no case matches {options.only!r}; see --list", file=sys.stderr)
        return 2
    if options.isa and (reason := testing.unavailable(f"cpu-{options.isa}")):
        print(f"--isa: {reason}", file=sys.stderr)
        return 2
    by_budget = not (options.full or options.only)
    limit = options.seconds or (290.0 if by_budget else float("inf"))
    timing = report.Timing(options.min_time or (1.0 if by_budget else 3.0), options.repeats)
    options.output.mkdir(parents=True, exist_ok=True)
    with testing.running_on(f"cpu-{options.isa}") if options.isa else contextlib.nullcontext():
        facts = machine.describe() | {"memory_kept": options.keep_memory and pk.keep_freed_memory()}
        header = machine.header(facts)
        print(f"{header}\n{session.estimate(chosen, timing, limit)}", flush=True)
        done = session.run(
            chosen,
            lambda case, progress: case.run(timing, progress),
            options.output / "results.jsonl",
            facts,
            limit,
        )
    body = done.render()
    print("\n" + body)
    (options.output / "table.txt").write_text(f"{header}\n\n{body}", encoding="utf-8")
    print(f"{options.output}: results.jsonl, table.txt ({time.perf_counter() - started:.0f} s)")
    return done.status


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="a few small cases")
    which.add_argument("--full", action="store_true", help="all timed cases, without a time limit")
    which.add_argument("--only", default="", metavar="REGEX", help="cases whose name matches")
    add("--list", action="store_true", help="print the names of the cases and stop")
    add("--dtype", default="bf16", choices=("bf16", "fp32", "fp16"), help="of activations and dense weights")
    add("--isa", default="", metavar="LEVEL", help="limit our kernels to scalar, avx2, avx512, ...")
    add("--machine", default="", metavar="LEVEL", help="limit torch, oneDNN, MKL and bitsandbytes, too")
    add("--threads", type=int, default=0, metavar="N", help="for all contenders (torch's choice)")
    add("--keep-memory", action="store_true", help="pk.keep_freed_memory() first, for all contenders")
    add("--min-time", type=float, metavar="S", help="to time a case (1; with --full or --only 3)")
    add("--repeats", type=int, default=5, metavar="N", help="least number of rounds (5)")
    add(
        "--seconds",
        type=float,
        metavar="S",
        help="leave out cases that would end later (290; --full, --only: none)",
    )
    add("--output", type=Path, default=Path("bench-output"), metavar="DIR", help="default: bench-output")
    options = parser.parse_args(arguments)
    if options.repeats < 1 or options.threads < 0:
        parser.error("--repeats and --threads take positive numbers")
    if options.machine:
        if options.machine not in levels.LEVELS:
            parser.error(f"--machine: expected one of {', '.join(levels.LEVELS)}, got {options.machine}")
        options.isa = options.machine
    return options


if __name__ == "__main__":
    sys.exit(main())

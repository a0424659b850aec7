"""Checks the kernels on a GPU, then times them with cuBLAS, bitsandbytes and PEFT.

    python bench/gpu/run.py --output gpu-output
    python bench/gpu/run.py --only '^forward-4096x4096'
    python bench/gpu/run.py --only '^step-'      # the parts of a training step
    python bench/gpu/run.py --only ^wgmma        # LinearWgmma and the kernels for mma.sync, on an H100
    python bench/gpu/run.py --eager --only m1-   # with the cost of Python and launches
    python bench/gpu/run.py --check              # small shapes, checked and not timed: for sanitizers
    python bench/gpu/run.py --backend cpu        # small shapes on the CPU, to test the suite (or ptx)

Every case is checked against the reference in fp64 first, a decoder layer and a loss in fp32; a wrong result
is not timed. Weights rotate through copies larger than the cache. The roofline is the time that the measured
bandwidth and matrix peak of this card allow. Writes results.jsonl and table.txt. Exits with 1 if a result was
wrong or a case failed, with 2 if the back end cannot be used here.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent.parent))

import torch

import bench  # noqa: F401  (for the path of `testing`)
import peft_kernels as pk
import testing
from bench.gpu import device_cases, events
from bench.gpu.device_cases import Suite
from bench.gpu.roofline import Gpu
from bench.lib import harness, machine, report, session
from bench.lib.harness import Case, Result
from bench.lib.report import OURS, Progress, Timing
from peft_kernels.core.backends import BACKENDS

DEVICES = {"cuda": "cuda", "triton": "cuda", "cpu": "cpu", "ptx": "cpu", "reference": "cpu"}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    device = DEVICES[options.backend]
    if reason := refusal(options.backend):
        print(f"bench/gpu/run.py: back end {options.backend} cannot be used here: {reason}", file=sys.stderr)
        return 2
    tiny = options.check or device == "cpu"
    gpu = measured_card(device, with_peaks=not (options.check or options.list))
    suite = Suite(device, tiny, gpu.l2)
    cases = suite.cases() + suite.wgmma_cases(BACKENDS[options.backend])
    cases = [case for case in cases if re.search(options.only, case.name)]
    if options.list:
        print("\n".join(case.name for case in cases))
        return 0
    facts = describe(options.backend, gpu)
    header = "\n".join(f"{name}: {value}" for name, value in facts.items())
    print(header, flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    with pk.use_backend(options.backend):
        done = run(cases, options, facts)
    body = render(done, gpu, timed=not options.check)
    if gpu.architecture:
        body += f"\nat the end: {clocks()}\n"
    print("\n" + body)
    (options.output / "table.txt").write_text(f"{header}\n\n{body}", encoding="utf-8")
    return done.status


def refusal(backend: str) -> str | None:
    testing.register_ptx()
    if DEVICES[backend] == "cuda" and not torch.cuda.is_available():
        return "torch sees no GPU"
    if backend not in BACKENDS:
        return "this version of peft_kernels has no such back end"
    return BACKENDS[backend].probe()


def run(cases: Sequence[Case], options: argparse.Namespace, facts: dict[str, Any]) -> session.Done:
    on_gpu = DEVICES[options.backend] == "cuda"
    turns = partial(events.take_turns, graphs=not options.eager) if on_gpu else None
    timing = Timing(options.min_time, options.repeats)

    def measure(case: Case, progress: Progress) -> Result:
        return case.check() if options.check else case.run(timing, progress, take_turns=turns)

    lines = options.output / "results.jsonl"
    return session.run(cases, measure, lines, facts, options.seconds, gpu_is_lost)


def gpu_is_lost() -> bool:
    """Whether an error such as an illegal access has destroyed the CUDA context."""
    if not torch.cuda.is_available():
        return False
    with contextlib.suppress(RuntimeError):
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        return False
    return True


def measured_card(device: str, with_peaks: bool) -> Gpu:
    """This machine's card, with its bandwidth and matrix peak measured for rooflines, or 0."""
    if device == "cpu":
        return Gpu("CPU", 0, 1, 1e10, 1e11, harness.last_level_cache())
    card = torch.cuda.get_device_properties(0)
    architecture = card.major * 10 + card.minor
    bandwidth = flops = 0.0
    if with_peaks:
        bandwidth, flops = events.copy_bandwidth(), events.matrix_peak()
        torch.cuda.empty_cache()
    return Gpu(card.name, architecture, card.multi_processor_count, bandwidth, flops, card.L2_cache_size)


def describe(backend: str, gpu: Gpu) -> dict[str, Any]:
    """Facts for every JSON line."""
    facts: dict[str, Any] = {"device": gpu.name, "backend": BACKENDS[backend].describe()}
    if gpu.architecture:
        facts |= {
            "compute_capability": gpu.architecture,
            "sms": gpu.sms,
            "l2_mib": gpu.l2 // harness.MIB,
            "copy_bandwidth_gb_s": round(gpu.bandwidth / 1e9),
            "matrix_peak_tflop_s": round(gpu.flops / 1e12, 1),
            "nvidia_smi": clocks(),
            "cuda": torch.version.cuda,
        }
    packages = ("peft_kernels", "torch", "triton", "bitsandbytes", "peft", "transformers")
    return facts | {"versions": {package: machine.version(package) for package in packages}}


def clocks() -> str | None:
    """Driver version, clocks, power and temperature by name: a card that is too hot gives useless times."""
    query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"
    output = _output_of(["nvidia-smi", "--id=0", f"--query-gpu={query}", "--format=csv,noheader"])
    return output and ", ".join(map(" ".join, zip(query.split(","), output.split(", "), strict=True)))


def _output_of(command: Sequence[str]) -> str | None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    return None


def render(done: session.Done, gpu: Gpu, timed: bool = True) -> str:
    if not timed:
        wrong = [f"{r.case.name}: {r.wrong[OURS]}" for r in done.outcomes if r.wrong]
        right = len(done.outcomes) - len(wrong)
        checked = "\n".join([f"{right} cases right, {len(wrong)} wrong", *wrong])
        return session.Done(failed=done.failed, left_out=done.left_out).render(checked)
    tables = []
    for group in report.unique(result.case.group for result in done.outcomes):
        members = [result for result in done.outcomes if result.case.group == group]
        if gpu.architecture and (cells := roofline_shares(members, gpu)):
            tables.append(f"{group}: roofline / time of {OURS}\n{report.grid(cells)}")
    return done.render(*tables, unit="us")


def roofline_shares(results: Sequence[Result], gpu: Gpu) -> dict[tuple[str, tuple[int, str]], str]:
    """Time that bandwidth and matrix peak allow / our time, by shape and column."""
    return {
        (result.case.shape, result.column): f"{allowed / spent.median:.0%}"
        for result in results
        if (allowed := device_cases.roofline(result.case, gpu)) and (spent := result.time(OURS))
    }


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--backend", default="cuda", choices=tuple(DEVICES), help="back end of our kernels (cuda)")
    add("--only", default="", metavar="REGEX", help="cases whose name matches; see --list")
    add("--list", action="store_true", help="print the names of the cases and stop")
    add("--check", action="store_true", help="small shapes, only checked")
    add("--eager", action="store_true", help="time calls from Python, without CUDA graphs")
    add(
        "--seconds", type=float, default=240.0, metavar="S", help="leave out cases that would end later (240)"
    )
    add("--min-time", type=float, default=0.3, metavar="S", help="to time a case (0.3)")
    add("--repeats", type=int, default=7, metavar="N", help="least number of rounds (7)")
    add("--output", type=Path, default=Path("gpu-output"), metavar="DIR", help="default: gpu-output")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())

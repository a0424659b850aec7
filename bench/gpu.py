"""Check the kernels on a GPU, then time them beside cuBLAS, bitsandbytes and PEFT.

    python bench/gpu.py --output gpu-output
    python bench/gpu.py --only '^forward-4096x4096'
    python bench/gpu.py --eager --only m1-   # what Python and launches cost
    python bench/gpu.py --check              # small shapes, checked and not timed: for sanitizers
    python bench/gpu.py --backend cpu        # small shapes on the CPU: that the suite itself works (or simt)

Every case is checked against the reference in fp64 first; what is wrong is never timed. Weights rotate
through copies larger than the cache. A floor is the time that the measured bandwidth and matrix peak of this
card would allow. Writes results.jsonl and table.txt. Exits with 1 when a result was wrong or a case failed,
with 2 when the back end cannot be used here.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))  # results are checked by testing.py

import torch

import peft_kernels as pk
import testing
from bench import device_cases, events, harness, machine, report
from bench.device_cases import Suite
from bench.floors import Gpu
from bench.harness import OURS, Case, Result
from peft_kernels.backends import BACKENDS

DEVICES = {"cuda": "cuda", "triton": "cuda", "cpu": "cpu", "simt": "cpu", "reference": "cpu"}


@dataclass
class Run:
    """What came of all cases."""

    results: list[Result] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    device = DEVICES[options.backend]
    if reason := refusal(options.backend):
        print(f"gpu.py: back end {options.backend} cannot be used here: {reason}", file=sys.stderr)
        return 2
    tiny = options.check or device == "cpu"
    gpu = ceilings(device, measured=not (options.check or options.list))
    suite = Suite(device, tiny, gpu.l2)
    cases = [case for case in suite.cases() if re.search(options.only, case.name)]
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
    print("\n" + body)
    (options.output / "table.txt").write_text(f"{header}\n\n{body}", encoding="utf-8")
    return 1 if done.failed or any(result.wrong for result in done.results) else 0


def refusal(backend: str) -> str | None:
    testing.register_simt()
    if DEVICES[backend] == "cuda" and not torch.cuda.is_available():
        return "torch sees no GPU"
    if backend not in BACKENDS:
        return "this version of peft_kernels has none of that name"
    return BACKENDS[backend].probe()


def run(cases: Sequence[Case], options: argparse.Namespace, facts: dict[str, Any]) -> Run:
    """One case after the other until the time is up. What one raises, the others do not feel, unless the GPU
    itself is lost."""
    done = Run()
    end = time.perf_counter() + options.seconds
    on_gpu = DEVICES[options.backend] == "cuda"
    turns = partial(events.take_turns, graphs=not options.eager) if on_gpu else None
    with open(options.output / "results.jsonl", "w", encoding="utf-8") as lines:
        for number, case in enumerate(cases, 1):
            if time.perf_counter() > end:
                done.left_out = [case.name for case in cases[number - 1 :]]
                break
            head = f"[{number:>{len(str(len(cases)))}}/{len(cases)}] {case.name}: "
            try:
                if options.check:
                    result = check(case)
                else:
                    result = harness.measure(case, options.min_time, options.repeats, take_turns=turns)
            except Exception as error:
                traceback.print_exc()
                done.failed[case.name] = f"{type(error).__name__}: {harness.first_line(error)}"
                print(head + done.failed[case.name], flush=True)
                if gpu_is_lost():
                    done.left_out = [case.name for case in cases[number:]]
                    break
                continue
            done.results.append(result)
            lines.write(report.json_line(result, facts) + "\n")
            lines.flush()
            line = "; ".join(f"{name} {error:.2g}" for name, error in result.errors.items())
            print(head + (f"errors: {line}" if options.check else report.progress_line(result)), flush=True)
    return done


def check(case: Case) -> Result:
    """Ours against the reference, nothing timed."""
    result = Result(case)
    for contender in case.build():
        if contender.name == OURS:
            result.contenders.append(OURS)
            if isinstance(contender, harness.Absent):
                result.wrong[OURS] = contender.reason
            else:
                harness.admit(contender, result)
    return result


def gpu_is_lost() -> bool:
    """Whether an error, an illegal access say, has taken the CUDA context with it."""
    if not torch.cuda.is_available():
        return False
    with contextlib.suppress(RuntimeError):
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        return False
    return True


def ceilings(device: str, measured: bool) -> Gpu:
    """What this machine reaches, as far as floors need it; nothing, if that is not to be measured."""
    if device == "cpu":
        return Gpu("CPU", 0, 1, 1e9, 1e10, 1e11, harness.last_level_cache())
    card = torch.cuda.get_device_properties(0)
    architecture = card.major * 10 + card.minor
    bandwidth = flops = 0.0
    if measured:
        bandwidth, flops = events.copy_bandwidth(), events.matrix_peak()
        torch.cuda.empty_cache()
    # The clock is in no floor.
    return Gpu(card.name, architecture, card.multi_processor_count, 1e9, bandwidth, flops, card.L2_cache_size)


def describe(backend: str, gpu: Gpu) -> dict[str, Any]:
    """The facts that go into every JSON line."""
    facts: dict[str, Any] = {"device": gpu.name, "backend": BACKENDS[backend].describe()}
    if gpu.architecture:
        query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
        facts |= {
            "compute_capability": gpu.architecture,
            "sms": gpu.sms,
            "l2_mib": gpu.l2 // harness.MIB,
            "copy_bandwidth_gb_s": round(gpu.bandwidth / 1e9),
            "matrix_peak_tflop_s": round(gpu.flops / 1e12, 1),
            "nvidia_smi": _said(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]),
            "cuda": torch.version.cuda,
        }
    packages = ("peft_kernels", "torch", "triton", "bitsandbytes", "peft", "transformers")
    return facts | {"versions": {package: machine.version(package) for package in packages}}


def _said(command: Sequence[str]) -> str | None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    return None


def render(done: Run, gpu: Gpu, timed: bool = True) -> str:
    blocks = []
    if timed and done.results:
        blocks.append(report.render(done.results, unit="us").rstrip())
        for group in report.unique(result.case.group for result in done.results):
            members = [result for result in done.results if result.case.group == group]
            if gpu.architecture and (table := floors_table(members, gpu)):
                blocks.append(f"{group}: floor / time of {OURS}\n{table}")
    elif done.results:
        wrong = [f"{r.case.name}: {r.wrong[OURS]}" for r in done.results if r.wrong]
        blocks.append(
            "\n".join([f"{len(done.results) - len(wrong)} cases right, {len(wrong)} wrong", *wrong])
        )
    blocks += [f"FAILED {name}: {reason}" for name, reason in done.failed.items()]
    if done.left_out:
        blocks.append(f"left out, {len(done.left_out)} cases: {', '.join(done.left_out)}")
    return "\n\n".join(blocks) + "\n"


def floors_table(results: Sequence[Result], gpu: Gpu) -> str:
    """How near each case comes to what bandwidth and matrix peak allow."""
    cells = {}
    for result in results:
        floor, spent = device_cases.floor(result.case, gpu), result.time(OURS)
        if floor is not None and spent is not None:
            cells[result.case.shape, report.column(result)] = (f"{floor / spent.median:.0%}",)
    return report.grid(cells) if cells else ""


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--backend", default="cuda", choices=tuple(DEVICES), help="whose kernels are ours (cuda)")
    add("--only", default="", metavar="REGEX", help="cases whose name matches; see --list")
    add("--list", action="store_true", help="print the names of the cases and stop")
    add("--check", action="store_true", help="small shapes, checked and not timed")
    add("--eager", action="store_true", help="time calls from Python, without CUDA graphs")
    add("--seconds", type=float, default=240.0, metavar="S", help="start no case after that long (240)")
    add("--min-time", type=float, default=0.3, metavar="S", help="to time a case (0.3)")
    add("--repeats", type=int, default=7, metavar="N", help="least number of rounds (7)")
    add("--output", type=Path, default=Path("gpu-output"), metavar="DIR", help="default: gpu-output")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())

"""Check the kernels, then time them beside torch, bitsandbytes and PEFT in one interleaved run.

    python bench/run.py --quick            # under a minute
    python bench/run.py                    # all standard cases
    python bench/run.py --only forward-4096x4096 --isa avx2
    python bench/run.py --only '^(block|memory)'
    python bench/run.py --only '^(sass|triton)'

Every case is checked against the fp64 reference first; what is wrong is reported, never timed. A ratio is the
peer's time / our time: above 1 we win. A cost is our time / that of a cheaper job of ours. The cases called
memory-... count the bytes that a forward saves for its backward. Those called sass-... and triton-... compile
the kernels for cards that need not be here: the CUDA kernels' instructions are put beside what a card allows,
of the Triton kernels registers, spills and the like are told. Writes results.jsonl, table.txt and ratios.png
to the output folder. Exits with 1 when a result was wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

# At the end: an installed peft_kernels, with its compiled library, goes before the source tree.
sys.path.append(str(Path(__file__).resolve().parent.parent))
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))  # results are checked by testing.py


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    # These are read when torch and bitsandbytes are imported.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.threads:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
    import torch

    warnings.filterwarnings("ignore", category=FutureWarning)  # of peers about each other
    if options.threads:
        torch.set_num_threads(options.threads)
    import testing
    from bench import cases, compiled, memory, triton_cases

    timed = cases.quick(options.dtype) if options.quick else cases.standard(options.dtype, options.full)
    kernels = [] if options.quick else [*compiled.standard(), *triton_cases.standard()]
    standard: list[Any] = [*timed, *memory.standard(options.dtype), *kernels]
    chosen = [case for case in standard if re.search(options.only, case.name)]
    if options.list:
        print("\n".join(case.name for case in chosen))
        return 0
    if not chosen:
        print(f"--only: no case matches {options.only!r}; see --list", file=sys.stderr)
        return 2
    if options.isa and (reason := testing.unavailable(f"cpu-{options.isa}")):
        print(f"--isa: {reason}", file=sys.stderr)
        return 2
    with testing.running_on(f"cpu-{options.isa}") if options.isa else contextlib.nullcontext():
        return _run(chosen, options)


def _run(chosen: Sequence, options: argparse.Namespace) -> int:  # type: ignore[type-arg]
    from bench import chart, compiled, harness, machine, memory, report, triton_cases

    facts = machine.describe()
    header = machine.header(facts)
    print(header, flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    results: list[harness.Result] = []
    saved: list[memory.Saved] = []
    kernels: list[compiled.Compiled] = []
    triton: list[triton_cases.Compiled] = []
    started = time.perf_counter()
    with (
        contextlib.suppress(KeyboardInterrupt),  # what was measured so far is still reported
        open(options.output / "results.jsonl", "w", encoding="utf-8") as lines,
    ):
        for number, case in enumerate(chosen, 1):
            head = f"[{number:>{len(str(len(chosen)))}}/{len(chosen)}] {case.name}: "
            progress = partial(_show, head)
            if isinstance(case, memory.Case):
                progress("measure")
                saved.append(memory.measure(case))
                json_line = report.saved_json_line(saved[-1], facts)
                line = report.saved_progress_line(saved[-1])
            elif isinstance(case, compiled.Case):
                progress("compile")
                kernels.append(compiled.measure(case))
                json_line = report.compiled_json_line(kernels[-1], facts)
                line = report.compiled_progress_line(kernels[-1])
            elif isinstance(case, triton_cases.Case):
                progress("compile")
                triton.append(triton_cases.measure(case))
                json_line = report.triton_json_line(triton[-1], facts)
                line = report.triton_progress_line(triton[-1])
            else:
                results.append(harness.measure(case, options.min_time, options.repeats, progress=progress))
                json_line, line = report.json_line(results[-1], facts), report.progress_line(results[-1])
            lines.write(json_line + "\n")
            lines.flush()
            _show("", "")
            print(head + line, flush=True)
    done = len(results) + len(saved) + len(kernels) + len(triton)
    if not done:
        return 130
    body = report.render(results, saved, kernels, triton)
    print("\n" + body)
    (options.output / "table.txt").write_text(f"{header}\n\n{body}", encoding="utf-8")
    no_picture = chart.draw(results, options.output / "ratios.png", "\n".join(header.splitlines()[:3]))
    picture = f"no picture: {no_picture}" if no_picture else "ratios.png"
    print(f"{options.output}: results.jsonl, table.txt, {picture} ({time.perf_counter() - started:.0f} s)")
    if done < len(chosen):
        return 130
    return 1 if any(result.wrong for result in results) else 0


def _show(head: str, phase: str) -> None:
    """Say on a terminal what is being done; the next text takes its place."""
    if sys.stdout.isatty():
        print(f"\r\x1b[K{head}{phase}", end="", flush=True)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="a few small cases")
    add("--full", action="store_true", help="the 14336x4096 layer too")
    add("--only", default="", metavar="REGEX", help="cases whose name matches; see --list")
    add("--list", action="store_true", help="print the names of the cases and stop")
    add("--dtype", default="bf16", choices=("bf16", "fp32", "fp16"), help="of activations and dense weights")
    add("--isa", default="", metavar="LEVEL", help="hold our kernels to scalar, avx2, avx512, ...")
    add("--threads", type=int, default=0, metavar="N", help="for all contenders (torch's choice)")
    add("--min-time", type=float, default=None, metavar="SECONDS", help="to time a case (3; quick: 1)")
    add("--repeats", type=int, default=5, metavar="N", help="least number of rounds (5)")
    add("--output", type=Path, default=Path("bench-output"), metavar="DIR", help="default: bench-output")
    options = parser.parse_args(arguments)
    if options.min_time is None:
        options.min_time = 1.0 if options.quick else 3.0
    if options.repeats < 1 or options.threads < 0:
        parser.error("--repeats and --threads take positive numbers")
    return options


if __name__ == "__main__":
    sys.exit(main())

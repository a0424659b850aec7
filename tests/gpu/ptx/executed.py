"""Coverage of the op tests: which PTX instructions of each CUDA kernel they never execute.

    python tests/gpu/ptx/executed.py               # runs the tests of back end `ptx`, then reports
    python tests/gpu/ptx/executed.py --only Shrink # kernels whose name contains this
    python tests/gpu/ptx/executed.py --folder F --check  # checks the files in F against KNOWN

A process whose environment names a folder in PEFT_KERNELS_PTX_EXECUTED writes its execution counts there
(`leave`, called by conftest.py at the end).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent.parent.parent
FOLDER = "PEFT_KERNELS_PTX_EXECUTED"
FAMILIES = (
    *("nf4", "nf4_absmax", "nf4_format", "linear", "lora", "lora_dropout", "lora_multi", "dora", "gated"),
    *("dropout", "compute_dtype", "gradients", "cuda_paths", "wgmma_cuda", "experts_cuda", "experts_grouped"),
    "experts_wgmma_cuda",
    *("adamw", "adamw_cuda", "bottleneck", "bottleneck_cuda", "multi_bottleneck", "multi_bottleneck_cuda"),
    *("cross_entropy", "cross_entropy_cuda"),
    *("rms_norm", "rms_norm_cuda", "rotary", "rotary_cuda"),
)

SAME_PTX = {90: 80, 120: 100}
"""Architectures that count as another one, for which nvcc writes the same PTX (test_texts.py)."""


@dataclass
class Kernel:
    """A kernel for one architecture: its instructions in order, and the execution count of each."""

    name: str
    architecture: int
    lines: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    times: list[int] = field(default_factory=list)

    @property
    def missed(self) -> list[int]:
        return [i for i, times in enumerate(self.times) if times == 0]

    @property
    def share(self) -> float:
        """The share of its instructions that were executed; 0 if the kernel never ran."""
        return 1 - len(self.missed) / len(self.times) if self.times else 0.0


def leave(extension: ModuleType) -> None:
    """Writes the execution counts of this process, if the environment asks for it."""
    if folder := os.environ.get(FOLDER):
        path = Path(folder, f"{os.getpid()}.json")
        path.write_text(json.dumps(extension.executed()), encoding="utf-8")


def read(folder: Path) -> list[Kernel]:
    """Returns the kernels, with the counts of all processes added up."""
    kernels: dict[tuple[int, int, str], Kernel] = {}
    for path in sorted(folder.glob("*.json")):
        for binary, architecture, instructions, never_run in json.loads(path.read_text(encoding="utf-8")):
            seen: dict[str, list[tuple[str, str, int]]] = defaultdict(list)
            for name, line, text, times in instructions:
                seen[name].append((line, text, times))
            same = SAME_PTX.get(architecture, architecture)
            for name in (*seen, *never_run):
                kernel = kernels.setdefault((same, binary, name), Kernel(name, same))
                if name in seen and not kernel.times:
                    kernel.lines, kernel.texts, kernel.times = map(list, zip(*seen[name], strict=True))
                elif name in seen:
                    kernel.times = [a + b[2] for a, b in zip(kernel.times, seen[name], strict=True)]
    return sorted(kernels.values(), key=lambda kernel: (kernel.architecture, kernel.name))


def run_tests(folder: Path, arguments: Sequence[str] = ()) -> None:
    """Runs the op tests of `ptx` in a subprocess. Raises RuntimeError with its output if one fails."""
    files = [str(next((ROOT / "tests").rglob(f"test_{family}.py"))) for family in FAMILIES]
    options = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "ptx"]
    command = [sys.executable, *options, *files, *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {FOLDER: str(folder)}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout[-4000:]}{done.stderr[-2000:]}")


@dataclass(frozen=True)
class Known:
    """Kernels that the op tests are known to cover less."""

    kernels: str
    """Regular expression of their names."""
    least: float
    """Minimum share of their instructions that is executed."""
    reason: str


MOST = 0.8
"""Minimum share for every other kernel."""
KNOWN = (
    Known(r"^DequantizeElements<(bf16|fp16)>", 0.15, "odd parts, which test_parts.py covers and no op uses"),
    Known(r"^LoraShrink<\w+, true, true>", 0.7, "eight tiles; a B is fp32 or 16-bit, not both"),
    Known(r"^Experts(Shrink|OverRows)<", 0.25, "dropout and row groups of LoraShrink and LoraOverRows"),
    Known(r"^BottleneckExpand<", 0.4, "dropout and row groups of LoraExpand"),
    Known(r"^StoreTable", 0.6, "a loop that is unrolled for more words than a launch has"),
    Known(r"^LinearDx<\w+, WideTable, 4>", 0.0, "no plan uses it (linear_dx.cu): it does not fit"),
)


def unknown(kernels: Sequence[Kernel]) -> list[str]:
    """Returns kernels with less coverage than known, and entries of KNOWN that match no kernel."""
    found = []
    for kernel in kernels:
        least = next((known.least for known in KNOWN if re.search(known.kernels, kernel.name)), MOST)
        if kernel.share < least:
            found.append(f"sm_{kernel.architecture} {kernel.name}: {kernel.share:.1%}, expected {least:.0%}")
    names = [kernel.name for kernel in kernels]
    return found + [
        f"no kernel is called {known.kernels}"
        for known in KNOWN
        if not any(re.search(known.kernels, name) for name in names)
    ]


def table(kernels: Sequence[Kernel]) -> str:
    lines = []
    for kernel in kernels:
        lines.append(f"sm_{kernel.architecture} {kernel.name}: {kernel.share:.1%} of {len(kernel.times)}")
        lines += [f"    {kernel.lines[i]}: {kernel.texts[i]}" for i in kernel.missed]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="kernels whose name has this")
    parser.add_argument("--architecture", type=int, default=80)
    parser.add_argument("--folder", type=Path, help="with the files of earlier tests")
    parser.add_argument("--check", action="store_true", help="fail if coverage is below KNOWN")
    options, arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as made:
        folder = options.folder or Path(made)
        if options.folder is None:
            run_tests(folder, arguments)
        # Without the kernels of this folder's own tests, and those that tests ran for other cards.
        kernels = [
            kernel
            for kernel in read(folder)
            if options.only in kernel.name
            and not kernel.name.startswith("cases::")
            and kernel.architecture == options.architecture
        ]
    if not options.check:
        print(table(kernels))
    elif not kernels:
        print("executed.py: back end ptx did not run, nothing to check")
    elif found := unknown(kernels):
        print("\n".join(found))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

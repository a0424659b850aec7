"""Checkpoints damaged at random: each is either refused in one sentence or can be used.

`python tests/checkpoints/fuzz_checkpoints.py --cases 10000` (`make fuzz`). A failure names its case;
`--only NUMBER` runs that one again.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from checkpoint_damage import DAMAGE, Mixture, Net, tensors, write_checkpoint
from fuzz_checks import check_sentence, check_values, fill
from torch import Tensor, nn

from peft_kernels.checkpoints.checks import faults
from peft_kernels.checkpoints.folder import Checkpoint
from peft_kernels.checkpoints.header import CheckpointError
from peft_kernels.checkpoints.load import load_checkpoint
from peft_kernels.core.formats import FORMATS

EVERY = 16
"""One of so many cases is a folder that transformers loads, which takes several times as long."""
TESTS = Path(__file__).resolve().parent.parent


class Sample:
    """A model and a valid checkpoint of it."""

    def __init__(self, folder: Path, model: nn.Module) -> None:
        self.model, self.sound = model, write_checkpoint(folder, model)
        self.files = {path.name: path.read_bytes() for path in self.sound.iterdir()}


class Fuzzer:
    """Damages a copy of a valid checkpoint in every case, of all formats. Each third has packed experts."""

    def __init__(self, folder: Path, formats: Iterable[str] = FORMATS) -> None:
        self.samples = [
            Sample(folder / f"{format}-{make.__name__}-{number}", make(format))
            for format in formats
            for number, make in enumerate((Net, Net, Mixture))
        ]
        import fuzz_folders

        self.folders, self.broken = fuzz_folders.folders(folder), folder / "broken"
        self.outcomes: Counter[str] = Counter()

    def case(self, number: int) -> None:
        """Raises AssertionError or the reader's own error if the reader mishandles a damaged checkpoint."""
        rng = random.Random(number)
        if number % EVERY == EVERY - 1:
            folder = self.folders[number // EVERY % len(self.folders)]
            self.outcomes[folder.case(self.broken, rng)] += 1
            return
        sample = self.samples[number % len(self.samples)]
        fill(self.broken, sample.files)
        kinds = list(DAMAGE)
        kind = rng.choices(kinds, [DAMAGE[k][1] for k in kinds])[0]
        DAMAGE[kind][0](self.broken, rng)
        self.check(sample, self.broken, kind)

    def check(self, sample: Sample, folder: Path, kind: str) -> None:
        model, before = sample.model, tensors(sample.model)
        try:
            load_checkpoint(model, folder)
        except CheckpointError as error:
            check_sentence(str(error))
            after = tensors(model)
            assert before.keys() == after.keys() and all(same(before[k], after[k]) for k in before), (
                "half-loaded"
            )
            self.outcomes[f"{kind} refused"] += 1
        else:
            use(model)
            self.outcomes[f"{kind} accepted"] += 1
            load_checkpoint(model, sample.sound)
        try:
            found = list(faults(Checkpoint.examine(folder)))
        except CheckpointError as error:
            found = [str(error)]
        for sentence in found:
            check_sentence(sentence)


def use(model: Any) -> None:
    """Runs an accepted model and checks that it reads nothing beyond its memory."""
    for layer in (model.up, model.odd, model.down):
        weight = layer.weight.dequantize(torch.float32)
        assert weight.shape[-2:] == (layer.out_features, layer.in_features)
        layer(torch.ones(2, weight.shape[-1]))
        layer(torch.ones(17, weight.shape[-1], dtype=torch.bfloat16))
        check_values(layer.weight)


def same(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype and a.shape == b.shape and a.view(torch.uint8).equal(b.view(torch.uint8))
        if a.dim()
        else True
    )


def run(numbers: Iterable[int], folder: Path, formats: Iterable[str] = FORMATS) -> Counter[str]:
    fuzzer = Fuzzer(folder, formats)
    for number in numbers:
        try:
            fuzzer.case(number)
        except Exception as error:
            raise AssertionError(f"case {number}: {type(error).__name__}: {error}") from error
    return fuzzer.outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--only", type=int, help="run one case")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sys.path += map(str, sorted({path.parent for path in TESTS.rglob("*.py")}))  # as conftest.py does
    numbers = range(arguments.cases) if arguments.only is None else range(arguments.only, arguments.only + 1)
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        start = time.monotonic()
        outcomes = run(numbers, Path(folder))
    for outcome, count in sorted(outcomes.items()):
        print(f"{count:6} {outcome}")
    print(f"{len(numbers)} cases in {time.monotonic() - start:.0f} s: none did what a checkpoint must not do")


if __name__ == "__main__":
    main()

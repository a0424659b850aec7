"""Checkpoints damaged at random: each is either refused in one sentence or can be used.

`python tests/checkpoints/fuzz_checkpoints.py --cases 10000` (`make fuzz`). A failure names its case;
`--only NUMBER` runs that one again.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from checkpoint_damage import DAMAGE, Mixture, Net, tensors, write_checkpoint
from torch import Tensor, nn

from peft_kernels.checkpoints.checks import faults
from peft_kernels.checkpoints.folder import Checkpoint
from peft_kernels.checkpoints.header import CheckpointError
from peft_kernels.checkpoints.load import load_checkpoint

LONGEST_SENTENCE = 700


class Sample:
    """A model and a valid checkpoint of it."""

    def __init__(self, folder: Path, model: nn.Module) -> None:
        self.model, self.sound = model, write_checkpoint(folder, model)
        self.files = {path.name: path.read_bytes() for path in self.sound.iterdir()}


class Fuzzer:
    """Damages a copy of a valid checkpoint in every case; each third has packed experts."""

    def __init__(self, folder: Path) -> None:
        layers, experts = Sample(folder / "layers", Net()), Sample(folder / "experts", Mixture())
        self.samples, self.broken = (layers, layers, experts), folder / "broken"
        self.outcomes: Counter[str] = Counter()

    def case(self, number: int) -> None:
        """Raises AssertionError or the reader's own error if the reader mishandles a damaged checkpoint."""
        rng = random.Random(number)
        shutil.rmtree(self.broken, ignore_errors=True)
        self.broken.mkdir()
        sample = self.samples[number % len(self.samples)]
        for name, data in sample.files.items():
            (self.broken / name).write_bytes(data)
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
        scales = layer.weight.absmax2 if layer.weight.double_quant else layer.weight.absmax
        assert bool(torch.isfinite(scales).all() and (scales >= 0).all()), "scales that no weight has"
        assert bool(torch.isfinite(weight).all()), "weights that are not finite"


def same(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype and a.shape == b.shape and a.view(torch.uint8).equal(b.view(torch.uint8))
        if a.dim()
        else True
    )


def check_sentence(text: str) -> None:
    assert text.isprintable() and 10 < len(text) < LONGEST_SENTENCE, f"no sentence: {text[:1000]!r}"


def run(numbers: Iterator[int] | range, folder: Path) -> Counter[str]:
    fuzzer = Fuzzer(folder)
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

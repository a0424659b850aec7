"""Plans the memory of fine-tuning by method, from the configuration alone.

Bytes of weights, adapters, gradients, optimiser state, loss, and saved activations with and without
checkpointing; which methods fit into --memory, and the largest batch. Activations of mixtures of experts are
planned only if packed. Nothing is loaded.
"""

from __future__ import annotations

import argparse
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.header import CheckpointError
from ..core.formats import FORMATS
from . import memory
from .architecture import CHECKED, build, describe
from .base import Base, base_of
from .output import Output, size
from .sizes import METHODS, OPTIMISERS, Model, Run

_ASSUMED = "a model patched by pk.patch, attention by a fused kernel, no padding, gradients accumulated"
_LARGEST_BATCH = 1 << 16
_LABELS = {
    "weights": "weights",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimiser": "optimiser state",
    "activations": "activations",
    "activations_checkpointed": "  with checkpointing",
    "loss": "loss",
    "loss_work": "  while it runs",
    "total": "most at any time",
    "total_checkpointed": "  with checkpointing",
    "fits": "fits into {}",
    "largest_batch": "largest batch",
    "fits_checkpointed": "fits into {}, with checkpointing",
    "largest_batch_checkpointed": "largest batch, with checkpointing",
}
"""Rows of the table, by the key of a plan."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="MODEL_DIR|config.json", type=Path)
    parser.add_argument(
        "--method", type=_methods, default=list(METHODS), help=f"some of {','.join(METHODS)} (all)"
    )
    parser.add_argument("--seq", type=_positive, default=2048, help="tokens of a sequence (2048)")
    parser.add_argument("--batch", type=_positive, default=1, help="sequences of a batch (1)")
    parser.add_argument("--rank", type=_positive, default=16, help="of LoRA and DoRA (16)")
    parser.add_argument(
        "--optim", type=_optimiser, default="adamw", choices=OPTIMISERS, help="the optimiser (adamw)"
    )
    parser.add_argument("--memory", type=byte_count, help="of the device, as 24GB or 80GiB")
    parser.add_argument(
        "--reserve",
        type=lambda text: 0 if text == "0" else byte_count(text),
        default=10**9,
        help="part of --memory for the CUDA context, fragmentation and the kernels' work space (1GB)",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (the configuration's)"
    )
    parser.add_argument(
        "--target-modules", nargs="+", metavar="NAME", help="layers with adapters (all linear ones)"
    )
    parser.add_argument(
        "--target-parameters", nargs="+", default=[], metavar="NAME", help="weights of experts with adapters"
    )
    parser.add_argument("--format", choices=FORMATS, help="of the weights that QLoRA packs (nf4)")
    parser.add_argument("--experts", action="store_true", help="QLoRA with packed mixtures of experts")
    parser.add_argument(
        "--kbit-prepared",
        action="store_true",
        dest="prepared",
        help="QLoRA after PEFT's prepare_model_for_kbit_training",
    )
    parser.add_argument("--reduction", type=_positive, default=16, help="of bottleneck adapters (16)")
    parser.add_argument("--virtual-tokens", type=_positive, default=20, help="of prefix tuning (20)")


def run(arguments: argparse.Namespace, out: Output) -> bool:
    built = build(arguments.path)
    base = base_of(arguments.path, built)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    targets = arguments.target_modules, arguments.target_parameters
    model = describe(built, dtype, *targets, base.packed, base.linears)
    _check(arguments, model, base)
    runs = _runs(arguments, model, base)
    limit = None if arguments.memory is None else arguments.memory - arguments.reserve
    try:
        plans = {one.method: _plan(model, one, limit) for one in runs}
    except ValueError as error:  # rows that the format cannot have
        raise CheckpointError(str(error)) from error
    out.say(
        f"{type(built).__name__}: {model.numel / 1e9:.3g} billion parameters, batch {arguments.batch} x "
        f"{arguments.seq} tokens, rank {arguments.rank}, {arguments.optim}",
        "bold",
    )
    _print(plans, arguments.memory, out)
    notes = list(_notes(built.config.model_type, model, base, runs, arguments))
    for note in notes:
        out.say(note)
    asked = {key: getattr(arguments, key) for key in ("batch", "seq", "memory", "reserve")}
    names = {"model": type(built).__name__, "parameters": model.numel}
    out.result(names | asked | {"methods": plans, "notes": notes})
    return True


def _check(arguments: argparse.Namespace, model: Model, base: Base) -> None:
    """Raises CheckpointError for options that do not fit the model or each other."""
    if base.is_packed and arguments.format is not None:
        raise CheckpointError(
            f"format: expected none for a model that is packed ({base.title}), got {arguments.format}"
        )
    if base.refusal and set(arguments.method) == {"qlora"}:
        raise CheckpointError(
            f"{arguments.path}: expected a dense model for qlora, or one that is loaded packed, got one that "
            f"is quantised ({base.title}); {base.refusal}"
        )
    if arguments.experts and not (model.experts if base.packed is None else base.experts):
        raise CheckpointError("experts: expected a model with experts that can be packed, got none")
    if arguments.target_parameters and not {"lora", "qlora"}.issuperset(arguments.method):
        got = ",".join(arguments.method)
        raise CheckpointError(f"target-parameters: expected --method lora, qlora or both, got {got}")


def _runs(arguments: argparse.Namespace, model: Model, base: Base) -> list[Run]:
    """A run for each method that can be planned: no QLoRA if loading refuses the model."""
    names = ("batch", "seq", "rank", "optim", "reduction", "virtual_tokens", "prepared")
    settings = {name: getattr(arguments, name) for name in names}
    settings |= {
        "experts": arguments.experts or base.experts,
        "format": arguments.format or "nf4",
    } | base.form
    like_llama = model.block is not None and not model.block.experts
    methods = [
        method
        for method in arguments.method
        if (like_llama or method not in ("adapter", "prefix")) and not (base.refusal and method == "qlora")
    ]
    return [Run(method, **settings) for method in methods]


def _plan(model: Model, one: Run, limit: int | None) -> dict[str, Any]:
    plan: dict[str, Any] = {
        "weights": memory.weights(model, one),
        "adapters": memory.adapters(model, one),
        "gradients": memory.gradients(model, one),
        "optimiser": memory.optimiser(model, one),
    }
    if model.block is None or (model.block.experts and not one.packs_experts):
        return plan
    plan |= {
        "activations": memory.activations(model, one),
        "activations_checkpointed": memory.checkpointed(model, one),
        "loss": memory.loss(model, one),
        "loss_work": memory.loss_work(model, one),
        "total": memory.total(model, one, checkpointing=False),
        "total_checkpointed": memory.total(model, one, checkpointing=True),
    }
    if limit is not None:
        for suffix, checkpointing in (("", False), ("_checkpointed", True)):
            plan[f"fits{suffix}"] = plan[f"total{suffix}"] <= limit
            plan[f"largest_batch{suffix}"] = largest_batch(model, one, checkpointing, limit)
    return plan


def largest_batch(model: Model, one: Run, checkpointing: bool, limit: int) -> int:
    """The largest batch that fits into `limit` bytes, or 0."""

    def total(batch: int) -> int:
        return memory.total(model, replace(one, batch=batch), checkpointing)

    return bisect_right(range(1, _LARGEST_BATCH + 1), limit, key=total)


def _print(plans: dict[str, dict[str, Any]], limit: int | None, out: Output) -> None:
    def text(plan: dict[str, Any], key: str) -> str:
        if key not in plan:
            return "?"
        if key.startswith("fits"):
            return "yes" if plan[key] else "no"
        return str(plan[key]) if key.startswith("largest") else size(plan[key])

    rows = [
        (label.format(size(limit or 0)), *(text(plan, key) for plan in plans.values()))
        for key, label in _LABELS.items()
        if any(key in plan for plan in plans.values())
    ]
    out.table(("", *(f"{method}>" for method in plans)), rows)


def _notes(
    name: str, model: Model, base: Base, runs: list[Run], arguments: argparse.Namespace
) -> Iterator[str]:
    """What the figures assume and leave out. `name` is the model's type."""
    qlora = [one for one in runs if one.method == "qlora"]
    if model.block is None:
        yield f"activations are not known for layers like those of {name}, so it is unknown what fits"
    else:
        yield f"assumed: {_ASSUMED}"
        if qlora and not arguments.prepared:
            yield "QLoRA after PEFT's prepare_model_for_kbit_training takes more: see --kbit-prepared"
        if name not in CHECKED:
            yield f"activations of {name} are computed as Llama's, without measurements"
    if model.experts:
        if any(not one.experts for one in qlora):
            dense = size(model.itemsize * sum(each.numel for each in model.experts))
            yield f"{dense} of QLoRA's weights are experts, which stay dense: --experts packs them"
        if model.block is not None and not all(one.packs_experts for one in runs):
            yield (
                "activations of dense experts depend on transformers' experts_implementation: they are not "
                "planned, so it is unknown what fits"
            )
        all_linear = arguments.target_modules is None and not arguments.target_parameters
        if all_linear and any(one.is_lora for one in runs):
            yield (
                "adapters are on linear layers; for all-linear some versions of PEFT also put them on "
                "experts: see --target-parameters"
            )
    yield from _notes_on_base(base)
    if arguments.memory is not None:
        kept = size(arguments.reserve)
        yield f"kept for the CUDA context, fragmentation and work space: {kept} (--reserve)"


def _notes_on_base(base: Base) -> Iterator[str]:
    if base.refusal:
        yield (
            f"the model is quantised ({base.title}), and loading refuses it ({base.refusal}): these are the "
            "figures of the dense model, without QLoRA"
        )
    if base.is_packed:
        yield (
            f"the model is packed ({base.title}): qlora is for its weights as they are, other methods for "
            "the dequantised model"
        )
        if base.packed is None:
            yield "the files of the weights are not there: packed sizes are the format's usual ones"


def _optimiser(text: str) -> str:
    """An optimiser by our name, its class (AdamW8bit) or Trainer's name (adamw_8bit)."""
    known = {name.replace("_", ""): name for name in OPTIMISERS}
    return known.get(text.lower().replace("_", ""), text)


def byte_count(text: str) -> int:
    """Bytes of a text such as 24GB (powers of ten) or 24GiB (powers of two)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"expected a size like 24GB or 80GiB, got {text!r}")
    power = ("", "K", "M", "G", "T").index(match[2].upper())
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return int(text)


def _methods(text: str) -> list[str]:
    for method in text.split(","):
        if method not in METHODS:
            raise argparse.ArgumentTypeError(f"expected some of {','.join(METHODS)}, got {method!r}")
    return text.split(",")

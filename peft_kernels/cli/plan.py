"""Plans the memory of fine-tuning by method, from the configuration alone.

Bytes of weights, adapters, gradients, optimiser state, loss, and saved activations with and without
checkpointing; which methods fit into --memory, and the largest batch. Activations of mixtures of experts are
planned only if packed. Nothing is loaded.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
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

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
_ASSUMED = "a model patched by pk.patch, attention by a fused kernel, no padding, gradients accumulated"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="MODEL_DIR|config.json", type=Path)
    parser.add_argument(
        "--method", type=_methods, default=list(METHODS), help=f"some of {','.join(METHODS)} (all)"
    )
    parser.add_argument("--seq", type=_positive, default=2048, help="tokens of a sequence (2048)")
    parser.add_argument("--batch", type=_positive, default=1, help="sequences of a batch (1)")
    parser.add_argument("--rank", type=_positive, default=16, help="of LoRA and DoRA (16)")
    parser.add_argument(
        "--optim", type=_optimiser, default="adamw", help=f"one of {','.join(OPTIMISERS)} (adamw)"
    )
    parser.add_argument("--memory", type=byte_count, help="of the device, as 24GB or 80GiB")
    parser.add_argument(
        "--reserve",
        type=lambda text: 0 if text == "0" else byte_count(text),
        default=10**9,
        help="of --memory, for the CUDA context, fragmentation and kernels' work space (1GB)",
    )
    parser.add_argument("--dtype", choices=_DTYPES, help="of the weights (the configuration's)")
    parser.add_argument(
        "--target-modules", nargs="+", metavar="NAME", help="layers with adapters (all linear ones)"
    )
    parser.add_argument(
        "--target-parameters", nargs="+", default=[], metavar="NAME", help="weights of experts with adapters"
    )
    parser.add_argument("--format", choices=FORMATS, help="of the weights that QLoRA packs (nf4)")
    parser.add_argument("--experts", action="store_true", help="QLoRA with mixtures of experts packed too")
    parser.add_argument(
        "--kbit-prepared", action="store_true", help="QLoRA after PEFT's prepare_model_for_kbit_training"
    )
    parser.add_argument("--reduction", type=_positive, default=16, help="of bottleneck adapters (16)")
    parser.add_argument("--virtual-tokens", type=_positive, default=20, help="of prefix tuning (20)")


def run(arguments: argparse.Namespace, out: Output) -> bool:
    built = build(arguments.path)
    base = base_of(arguments.path, built)
    methods = _methods_for(base, arguments)
    dtype = _DTYPES[arguments.dtype] if arguments.dtype else None
    targets = arguments.target_modules, arguments.target_parameters
    model = describe(built, dtype, *targets, base.packed, base.linears)
    _check_experts(arguments, model, base)
    form: dict[str, Any] = {"format": arguments.format or "nf4"}
    runs = [
        Run(
            method,
            arguments.batch,
            arguments.seq,
            arguments.rank,
            arguments.optim,
            arguments.reduction,
            arguments.virtual_tokens,
            prepared=arguments.kbit_prepared,
            experts=arguments.experts or base.experts,
            **(form | base.form),
        )
        for method in methods
    ]
    if model.block is None or model.block.mixture is not None:
        runs = [one for one in runs if one.method in ("lora", "qlora", "dora", "full")]
    limit = None if arguments.memory is None else arguments.memory - arguments.reserve
    try:
        plans = {one.method: _plan(model, one, limit) for one in runs}
    except ValueError as error:  # rows that the format cannot have
        raise CheckpointError(str(error)) from error
    count = sum(torch.Size(shape).numel() for shape in model.parameters)
    out.say(
        f"{type(built).__name__}: {count / 1e9:.3g} billion parameters, batch {arguments.batch} x "
        f"{arguments.seq} tokens, rank {arguments.rank}, {arguments.optim}",
        "bold",
    )
    _print(plans, arguments.memory, out)
    no_note = arguments.kbit_prepared or "qlora" not in plans
    notes = _notes(built, model, no_note) + _notes_on_experts(model, runs, arguments.target_modules is None)
    notes += _notes_on_base(base)
    if limit is not None:
        kept = size(arguments.reserve)
        notes.append(f"kept for the CUDA context, fragmentation and work space: {kept} (--reserve)")
    for note in notes:
        out.say(note)
    out.result(
        {
            "model": type(built).__name__,
            "parameters": count,
            "batch": arguments.batch,
            "seq": arguments.seq,
            "memory": arguments.memory,
            "reserve": arguments.reserve,
            "methods": plans,
            "notes": notes,
        }
    )
    return True


def _plan(model: Model, one: Run, limit: int | None) -> dict[str, Any]:
    plan: dict[str, Any] = {
        "weights": memory.weights(model, one),
        "adapters": memory.adapters(model, one),
        "gradients": memory.gradients(model, one),
        "optimiser": memory.optimiser(model, one),
    }
    if model.block is None or (model.block.mixture is not None and not _packs(one)):
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
            plan[f"largest_batch{suffix}"] = memory.largest_batch(_fits(model, one, checkpointing, limit))
    return plan


def _packs(one: Run) -> bool:
    return one.experts and one.method == "qlora"


def _methods_for(base: Base, arguments: argparse.Namespace) -> list[str]:
    """The methods that a base allows: no QLoRA if loading refuses it."""
    methods: list[str] = arguments.method
    if base.is_packed and arguments.format is not None:
        raise CheckpointError(
            f"format: expected none for a model that is packed ({base.title}), got {arguments.format}"
        )
    if base.refusal:
        methods = [method for method in methods if method != "qlora"]
    if not methods:
        raise CheckpointError(
            f"{arguments.path}: expected a dense model for qlora, or one that is loaded packed, got one that "
            f"is quantised ({base.title}); {base.refusal}"
        )
    return methods


def _check_experts(arguments: argparse.Namespace, model: Model, base: Base) -> None:
    if arguments.experts and not (model.experts if base.packed is None else base.experts):
        raise CheckpointError("experts: expected a model with experts that can be packed, got none")
    if arguments.target_parameters and not {"lora", "qlora"}.issuperset(arguments.method):
        got = ",".join(arguments.method)
        raise CheckpointError(f"target-parameters: expected --method lora, qlora or both, got {got}")


def _fits(model: Model, one: Run, checkpointing: bool, limit: int) -> Callable[[int], bool]:
    def fits(batch: int) -> bool:
        changed = Run(**{**vars(one), "batch": batch})
        return memory.total(model, changed, checkpointing) <= limit

    return fits


def _print(plans: dict[str, dict[str, Any]], limit: int | None, out: Output) -> None:
    lines = [
        ("weights", "weights"),
        ("adapters", "adapters"),
        ("gradients", "gradients"),
        ("optimiser", "optimiser state"),
        ("activations", "activations"),
        ("activations_checkpointed", "  with checkpointing"),
        ("loss", "loss"),
        ("loss_work", "  while it runs"),
        ("total", "most at any time"),
        ("total_checkpointed", "  with checkpointing"),
    ]
    rows = [
        (label, *(size(plan[key]) if key in plan else "?" for plan in plans.values()))
        for key, label in lines
        if any(key in plan for plan in plans.values())
    ]
    if limit is not None and any("fits" in plan for plan in plans.values()):
        words = {True: "yes", False: "no", None: "?"}
        for suffix, label in (("", ""), ("_checkpointed", ", with checkpointing")):
            fits = (words[plan.get(f"fits{suffix}")] for plan in plans.values())
            largest = (str(plan.get(f"largest_batch{suffix}", "?")) for plan in plans.values())
            rows += [(f"fits into {size(limit)}{label}", *fits), (f"largest batch{label}", *largest)]
    out.table(("", *(f"{method}>" for method in plans)), rows)


def _notes(built: Any, model: Model, prepared: bool) -> list[str]:
    name = built.config.model_type
    if model.block is None:
        return [f"activations are not known for layers like those of {name}, so it is unknown what fits"]
    notes = [f"assumed: {_ASSUMED}"]
    if not prepared:
        notes.append("QLoRA after PEFT's prepare_model_for_kbit_training takes more: see --kbit-prepared")
    if name not in CHECKED:
        notes.append(f"activations of {name} are computed as Llama's, without measurements")
    return notes


def _notes_on_base(base: Base) -> list[str]:
    if base.refusal:
        return [
            f"the model is quantised ({base.title}), and loading refuses it ({base.refusal}): these are the "
            "figures of the dense model, without QLoRA"
        ]
    if not base.is_packed:
        return []
    notes = [
        f"the model is packed ({base.title}): qlora is for its weights as they are, other methods for the "
        "dequantised model"
    ]
    if base.packed is None:
        notes.append("of packed weights only the configuration is there: their sizes are the format's usual")
    return notes


def _notes_on_experts(model: Model, runs: list[Run], all_linear: bool) -> list[str]:
    if not model.experts:
        return []
    notes, adapted = [], any(each.adapted for each in model.experts)
    dense = sum(each.count * each.numel for each in model.experts) * model.itemsize
    if any(one.method == "qlora" and not one.experts for one in runs):
        notes.append(f"of QLoRA's weights {size(dense)} are experts, which stay dense: --experts packs them")
    if model.block is not None and not all(map(_packs, runs)):
        notes.append(
            "activations of dense experts depend on transformers' experts_implementation: they are not "
            "planned, so it is unknown what fits"
        )
    if all_linear and not adapted and any(one.method in ("lora", "qlora", "dora") for one in runs):
        notes.append(
            "adapters are on linear layers; some versions of PEFT put them on experts too for all-linear: "
            "see --target-parameters"
        )
    return notes


def _optimiser(text: str) -> str:
    """An optimiser by our name, its class (AdamW8bit) or Trainer's name (adamw_8bit)."""

    def plain(name: str) -> str:
        return name.lower().replace("_", "")

    for name in OPTIMISERS:
        if plain(name) == plain(text):
            return name
    raise argparse.ArgumentTypeError(f"expected one of {','.join(OPTIMISERS)}, got {text!r}")


def byte_count(text: str) -> int:
    """Bytes of a text such as 24GB (powers of ten) or 24GiB (powers of two)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"expected a size like 24GB or 80GiB, got {text!r}")
    unit = _UNITS[match[2].upper()]
    if match[3]:
        unit = 1024 ** list(_UNITS).index(match[2].upper())
    return int(float(match[1]) * unit)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return int(text)


def _methods(text: str) -> list[str]:
    methods = list(dict.fromkeys(text.split(",")))
    for method in methods:
        if method not in METHODS:
            raise argparse.ArgumentTypeError(f"expected some of {','.join(METHODS)}, got {method!r}")
    return methods

"""quantize_model: nn.Linear -> NF4Linear, in place, one layer at a time."""

from __future__ import annotations

import difflib
import logging
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from .code_tables import BLOCKSIZES, WEIGHT_DTYPES
from .integrations.transformers import HEAD_NAMES, heads, is_linear
from .nf4_model import ModelLink, announce, record_of
from .nn import NF4Linear

logger = logging.getLogger("peft_kernels")

_PROGRESS_FROM = 200_000_000  # weights; below, quantising takes a second or two
_WRAPPED = (".base_layer", ".original_module")  # where PEFT keeps what it wraps


@dataclass
class QuantizeReport:
    """What `quantize_model` did with a model. `print(report)` sums it up."""

    layers: list[str] = field(default_factory=list)
    """Names of the layers that are NF4."""
    bytes_before: int = 0
    """Of all parameters of the model."""
    bytes_after: int = 0
    left: dict[str, str] = field(default_factory=dict)
    """Why a linear layer, or a set of experts, stayed as it was, by name."""

    def __str__(self) -> str:
        before, after = (f"{n / 1e9:.3g} GB" if n >= 1e9 else f"{n / 1e6:.3g} MB" for n in self._bytes)
        layers = "1 layer is" if len(self.layers) == 1 else f"{len(self.layers)} layers are"
        lines = [f"peft_kernels: {layers} NF4, the model takes {after} of {before}"]
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            by_reason.setdefault(reason, []).append(name)
        for reason, names in by_reason.items():
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            lines.append(
                f"{len(names)} left as {'it is' if len(names) == 1 else 'they are'} ({shown}): {reason}"
            )
        return "\n".join(lines)

    @property
    def _bytes(self) -> tuple[int, int]:
        return self.bytes_before, self.bytes_after


def report_of(model: nn.Module) -> QuantizeReport | None:
    """What `quantize_model` did with a model, or with one inside it (under PEFT, say).

    None when it has done nothing, or no NF4 layer is left."""
    record = record_of(model)
    return None if record is None else record.report


def quantize_model(
    model: nn.Module,
    skip: Iterable[str] | None = None,
    blocksize: int = 64,
    double_quant: bool = True,
    progress: bool | None = None,
    compute_dtype: torch.dtype | None = None,
    modules_to_not_convert: Iterable[str] | None = None,
) -> nn.Module:
    """Replace every linear layer of a model by an NF4Linear: nn.Linear, and FalconLinear and Conv1D (GPT-2)
    of transformers. `report_of(model)` tells which, what that saved, and why others were left.

    A Conv1D keeps its weight as (in_features, out_features); the NF4Linear in its place holds the transposed
    one, (out_features, in_features), under the same name. PEFT takes it for an nn.Linear
    (fan_in_fan_out=False), and it is a Conv1D again after `merge_and_unload`.

    Parameters
    ----------
    model : nn.Module
        Changed in place. Peak memory is the model and one layer.
    skip : names, optional
        Modules to leave alone with all that is in them: a full name, or consecutive parts of one ("lm_head",
        "vision_tower", "layers.0.mlp"). By default the heads: lm_head, score, classifier, qa_outputs,
        summary, v_head, and what a transformers model names (output embeddings, tied weights, modules kept in
        fp32) or has beside its base model for classification, question answering or rewards. `skip=()` packs
        them too.

        A layer whose weight is shared with another module (tied embeddings) or that stands in two places is
        always left alone, and so are PEFT's adapters and other subclasses of nn.Linear.
    blocksize, double_quant
        As `NF4Weight.quantize`.
    progress : bool, optional
        Show a progress bar; by default for models with more than 200 million weights to quantise.
    compute_dtype : torch.dtype, optional
        Of every layer, see `nn.NF4Linear`; by default the type of its weight.
    modules_to_not_convert : names, optional
        transformers' word for `skip`.

    Returns
    -------
    nn.Module
        The model itself. `is_loaded_in_4bit` is set on it, as on a model of bitsandbytes', for as long as it
        has an NF4 layer.

    Raises
    ------
    ValueError
        A weight has NaN, Inf or an unfit dtype (named), the blocksize is unfit, or a name in `skip` fits no
        module. The model is then unchanged: every layer is checked before the first is replaced.
    """
    if skip is not None and modules_to_not_convert is not None:
        raise ValueError("skip: expected it or modules_to_not_convert (they are the same), got both")
    names = skip if skip is not None else modules_to_not_convert
    names = (names,) if isinstance(names, str) else None if names is None else tuple(names)
    if is_linear(model) or isinstance(model, nn.Linear):
        raise ValueError(
            "model: expected a module that contains nn.Linear layers, got one; use NF4Linear.from_linear"
        )
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize: expected one of {BLOCKSIZES}, got {blocksize}")
    if compute_dtype not in (None, *WEIGHT_DTYPES):
        raise ValueError(f"compute_dtype: expected float32, bfloat16 or float16, got {compute_dtype}")
    if names is not None:
        _check_names(model, names)
    report = QuantizeReport(bytes_before=_nbytes(model))
    targets = dict(_targets(model, names, report))
    for name, linear in targets.items():
        _check(f"{name}.weight", linear.weight)
    _warn_about_experts(model, report)

    total = sum(linear.weight.numel() for linear in targets.values())
    show = total > _PROGRESS_FROM if progress is None else progress
    link, names_of_targets = ModelLink(), list(targets)
    del targets  # the only reference to each dense layer is the model's, so that it is freed when replaced
    with _Progress(total, show) as bar:
        for name in names_of_targets:
            parent_name, _, child = name.rpartition(".")
            parent = model.get_submodule(parent_name)
            linear = getattr(parent, child)
            layer = NF4Linear.from_linear(
                linear, blocksize, double_quant, name=f"{name}.weight", compute_dtype=compute_dtype
            )
            layer.link = link
            setattr(parent, child, layer)
            bar.update(linear.weight.numel())
            del linear
    layers = {name: m for name, m in model.named_modules() if isinstance(m, NF4Linear)}
    if layers:
        for layer in layers.values():
            layer.link = link
        report.layers, report.bytes_after = list(layers), _nbytes(model)
        earlier = report_of(model)
        if earlier is not None:
            report.bytes_before = max(earlier.bytes_before, report.bytes_before)
        announce(model, link, report)
        logger.info("%s", report)
    return model


def choose_layers(model: nn.Module, skip: Iterable[str] = ()) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers that `quantize_model` would replace by default, less those named in `skip`; and why other
    linear layers would stay, by name. On the meta device too. ValueError when a name fits no module."""
    skip = tuple(skip)
    _check_names(model, skip)
    report = QuantizeReport()
    chosen = dict(_targets(model, None, report))
    for name in [name for name in chosen if any(_fits(key, name) for key in skip)]:
        del chosen[name]
        report.left[name] = "named in skip"
    return chosen, report.left


def _targets(
    model: nn.Module, skip: tuple[str, ...] | None, report: QuantizeReport
) -> Iterator[tuple[str, Any]]:
    """The layers to quantise, by name; `report.left` tells why others stay."""
    owners: Counter[int] = Counter()
    for module in model.modules():
        if isinstance(module, NF4Linear):
            module.settle()
        owners.update(id(part) for parts in (module._modules, module._parameters) for part in parts.values())
    adapters = set(_adapter_modules(model))
    stay = heads(model) if skip is None else {}
    default = "a head that may be trained; skip=() would pack it"
    for name, module in model.named_modules():
        if isinstance(module, NF4Linear) or module in adapters:
            continue
        if not isinstance(module, nn.Linear) and not is_linear(module):
            continue
        weight = module._parameters.get("weight")
        named = HEAD_NAMES if skip is None else skip
        if not is_linear(module):
            report.left[name] = _reason_other(module)
        elif any(_fits(part, name) for part in named):
            report.left[name] = "named in skip" if skip is not None else default
        elif module in stay:
            report.left[name] = f"{stay[module]}; skip=() would pack it"
        elif owners[id(weight)] > 1 or owners[id(module)] > 1:
            report.left[name] = "it shares its weight with another place in the model"
        elif type(weight) is not nn.Parameter:
            report.left[name] = f"its weight is a {type(weight).__name__}"
        else:
            yield name, module


def _reason_other(module: nn.Module) -> str:
    weight = module._parameters.get("weight")
    if hasattr(weight, "quant_state") or hasattr(weight, "SCB"):
        return "quantised by bitsandbytes"
    own = type(module).forward is not nn.Linear.forward
    return f"a subclass of nn.Linear{' with a forward of its own' if own else ''}, {type(module).__name__}"


def _plain(name: str) -> str:
    """A module's name as it was before PEFT wrapped it."""
    for part in _WRAPPED:
        name = name.removesuffix(part)
    return name.removeprefix("base_model.model.")


def _fits(key: str, name: str) -> bool:
    """Whether `key` is the name, or consecutive parts of it."""
    return f".{key}." in f".{name}." or f".{key}." in f".{_plain(name)}."


def _check_names(model: nn.Module, skip: tuple[str, ...]) -> None:
    known = [name for name, _ in model.named_modules() if name]
    for key in skip:
        if any(_fits(key, name) for name in known):
            continue
        parts = sorted({part for name in known for part in (name, name.rpartition(".")[2])})
        near = difflib.get_close_matches(key, parts, n=3, cutoff=0.5)
        hint = f"; near it are {', '.join(near)}" if near else ""
        raise ValueError(f"skip: expected names of modules of the model, got {key!r}, which fits none{hint}")


def _nbytes(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


def _check(name: str, weight: torch.Tensor) -> None:
    if weight.device.type == "meta":
        raise ValueError(f"{name}: expected a loaded weight, got one on the meta device")
    if weight.dtype not in WEIGHT_DTYPES:
        raise ValueError(f"{name}: expected float32, bfloat16 or float16, got {weight.dtype}")
    # One reduction, no boolean copy of the weight: a sum is finite only if every term is (and may overflow:
    # then look).
    if not bool(torch.isfinite(weight.detach().sum(dtype=torch.float32))):
        bad = int((~torch.isfinite(weight.detach())).sum())
        if bad:
            raise ValueError(f"{name}: expected finite values, got {bad} NaN or Inf among {weight.numel()}")


def _warn_about_experts(model: nn.Module, report: QuantizeReport) -> None:
    """Mixture-of-experts weights kept as one 3-D parameter are no nn.Linear: say that they stay dense."""
    experts = [
        f"{name}.{key}"
        for name, module in model.named_modules()
        for key, p in module.named_parameters(recurse=False)
        if p.dim() == 3 and p.is_floating_point() and p.numel() > 1e6 and not isinstance(module, _ConvNd)
    ]
    report.left.update(dict.fromkeys(experts, "experts in one three-dimensional parameter"))
    if experts:
        logger.warning(
            "%d three-dimensional parameters (mixture-of-experts weights) stay dense, the first: %s",
            len(experts),
            experts[0],
        )


class _Progress:
    """tqdm when it is wanted and there, else nothing."""

    def __init__(self, total: int, show: bool) -> None:
        self._bar = None
        if show:
            try:
                from tqdm.auto import tqdm
            except ImportError:
                logger.info("quantising %d weights (install tqdm for a progress bar)", total)
            else:
                self._bar = tqdm(total=total, desc="quantising to NF4", unit="w", unit_scale=True)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, n: int) -> None:
        if self._bar is not None:
            self._bar.update(n)


def _adapter_modules(model: nn.Module) -> Iterator[nn.Module]:
    """What PEFT has added to a model and may train: everything inside its layers but the layers they wrap."""
    if "peft" not in sys.modules:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for module in model.modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            for name, child in module.named_children():
                if name not in ("base_layer", "original_module"):
                    yield from child.modules()

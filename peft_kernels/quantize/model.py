"""quantize_model: replaces nn.Linear by NF4Linear in place, one layer at a time."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..core.code_tables import WEIGHT_DTYPES
from ..core.formats import check_form
from ..core.wrong_types import names_wrong_types
from ..nf4.experts_forward import weight_names
from ..nf4.experts_packing import NF4Experts, pack
from ..nf4.model import ModelLink, mark_quantized, owners
from ..nf4.offload import is_offloaded
from ..nn import NF4Linear
from .architectures import is_linear
from .report import QuantizeReport, nbytes_of, report_of
from .targets import check_names, expert_targets, targets, warn_about_experts

__all__ = ["QuantizeReport", "quantize_model", "report_of"]

logger = logging.getLogger("peft_kernels")

_PROGRESS_FROM = 200_000_000  # values; fewer take a second or two


@names_wrong_types
def quantize_model(
    model: nn.Module,
    skip: Iterable[str] | None = None,
    blocksize: int | None = None,
    double_quant: bool = True,
    progress: bool | None = None,
    compute_dtype: torch.dtype | None = None,
    modules_to_not_convert: Iterable[str] | None = None,
    experts: bool = False,
    format: str = "nf4",
) -> nn.Module:
    """Replaces every linear layer of a model by an NF4Linear: nn.Linear, and FalconLinear and Conv1D (GPT-2)
    of transformers. `report_of(model)` lists them, the memory saved, and why others were skipped.

    The NF4Linear of a Conv1D holds the transposed weight, (out_features, in_features), under the same name.
    PEFT treats it as nn.Linear (fan_in_fan_out=False), and it is a Conv1D again after `merge_and_unload`.

    Parameters
    ----------
    model : nn.Module
        Changed in place. Peak memory is the model and one layer. On the meta device the NF4 weights are
        empty, for `model.load_state_dict(state_dict, assign=True)`.
    skip : names, optional
        Modules to skip with their submodules: a full name, or consecutive parts of one ("lm_head",
        "vision_tower", "layers.0.mlp"). By default the heads: lm_head, score, classifier, qa_outputs,
        summary, v_head; output embeddings, tied weights and modules kept in fp32 of a transformers model; and
        its heads for classification, question answering or rewards. `skip=()` packs them too.

        Always skipped: layers with shared weights (tied embeddings) or in two places, PEFT's adapters, and
        other subclasses of nn.Linear.
    blocksize, double_quant
        As `PackedWeight.quantize`.
    progress : bool, optional
        Show a progress bar; by default if more than 200 million values are quantised.
    compute_dtype : torch.dtype, optional
        See `nn.NF4Linear`; by default the dtype of each weight.
    modules_to_not_convert : names, optional
        transformers' name for `skip`.
    experts : bool
        Also pack the experts of transformers 5 (Mixtral, Qwen3-MoE, GPT-OSS, DeepSeek, ...): parameters of
        three dimensions, and most of such a model. Off by default, because bitsandbytes has no format for
        them: only this package reads the saved model. A warning reports the bytes that stay dense.
    format : str
        As `PackedWeight.quantize`. Only this package reads a saved model in another format than "nf4" and
        "fp4".

    Returns
    -------
    nn.Module
        The model itself, with `is_loaded_in_4bit` set, as for bitsandbytes, while it has an NF4 layer. A
        model of transformers (5.23 or later) saves a 4-bit checkpoint, which `integrations.transformers`
        reads without bitsandbytes, and has a `dequantize()`.

    Raises
    ------
    ValueError
        A weight has NaN, Inf or an unsupported dtype, the blocksize is unsupported, a name in `skip` matches
        no module, or some but not all weights are on the meta device. All layers are checked before the first
        is replaced, so the model is then unchanged.
    """
    names = _names(skip, modules_to_not_convert)
    if is_linear(model) or isinstance(model, nn.Linear):
        raise ValueError(
            "model: expected a module that contains nn.Linear layers, got one; use NF4Linear.from_linear"
        )
    blocksize = check_form(format, blocksize)
    if compute_dtype not in (None, *WEIGHT_DTYPES):
        raise ValueError(f"compute_dtype: expected float32, bfloat16 or float16, got {compute_dtype}")
    if names is not None:
        check_names(model, names)
    report = QuantizeReport(bytes_before=nbytes_of(model))
    linears, sets, total = _checked_targets(model, names, experts, report)
    show = total > _PROGRESS_FROM if progress is None else progress
    link = ModelLink()
    with _Progress(total, show) as bar:
        for name in linears:
            parent_name, _, child = name.rpartition(".")
            parent = model.get_submodule(parent_name)
            linear = getattr(parent, child)
            layer = NF4Linear.from_linear(
                linear, blocksize, double_quant, f"{name}.weight", compute_dtype, format
            )
            layer.link = link
            setattr(parent, child, layer)
            bar.update(linear.weight.numel())
            del linear
        for name, module in sets.items():
            size = _size(module)
            pack(module, blocksize, double_quant, name, compute_dtype, format)
            bar.update(size)
    layers: dict[str, Any] = {
        name: module for name, module in model.named_modules() if isinstance(module, (NF4Linear, NF4Experts))
    }
    if layers:
        for layer in layers.values():
            layer.link = link
        report.layers, report.bytes_after = list(layers), nbytes_of(model)
        earlier = report_of(model)
        if earlier is not None:
            report.bytes_before = max(earlier.bytes_before, report.bytes_before)
        mark_quantized(model, link, report)
        _attach_quantizer(model, blocksize, double_quant, names, compute_dtype, experts, format)
        logger.info("%s", report)
    return model


def _names(skip: Any, modules_to_not_convert: Any) -> tuple[str, ...] | None:
    if skip is not None and modules_to_not_convert is not None:
        raise ValueError("skip: expected it or modules_to_not_convert (they are the same), got both")
    names = skip if skip is not None else modules_to_not_convert
    return (names,) if isinstance(names, str) else None if names is None else tuple(names)


def _attach_quantizer(model: nn.Module, *arguments: Any) -> None:
    """Attaches a quantiser for `save_pretrained` and `dequantize` of transformers models."""
    if "transformers" not in sys.modules:
        return
    from transformers import PreTrainedModel
    from transformers.quantizers.base import HfQuantizer

    if not hasattr(HfQuantizer, "get_new_dtype"):
        return  # transformers before 5.23 has another interface

    from .transformers.config import NF4Config
    from .transformers.quantizer import attach

    blocksize, double_quant, names, compute_dtype, experts, format = arguments
    for owner in owners(model):
        if isinstance(owner, PreTrainedModel):
            config = NF4Config(blocksize, double_quant, names, compute_dtype, experts=experts, format=format)
            attach(owner, config)


def _checked_targets(
    model: nn.Module, names: tuple[str, ...] | None, experts: bool, report: QuantizeReport
) -> tuple[list[str], dict[str, Any], int]:
    """Linear layers, experts, and how many values they have, after checks of all. The layers by name alone,
    so that each dense one is freed when it is replaced."""
    found = dict(targets(model, names, report.left))
    sets = dict(expert_targets(model, names, report.left))
    if not experts:
        sets.clear()
    warn_about_experts(model, report.left, sets)
    weights = {f"{name}.weight": linear.weight for name, linear in found.items()}
    for name, module in sets.items():
        weights |= {f"{name}.{key}": module._parameters[key] for key in weight_names(module)}
    _check_all(weights, {**found, **sets})
    return list(found), sets, sum(weight.numel() for weight in weights.values())


def _size(experts: Any) -> int:
    return sum(experts._parameters[key].numel() for key in weight_names(experts))


def _check_all(weights: dict[str, Any], modules: dict[str, nn.Module]) -> None:
    """Checks that all weights are loaded or none is. Offloaded weights are on the meta device between
    calls."""
    offloaded = next((name for name, module in modules.items() if is_offloaded(module)), None)
    if offloaded is not None:
        raise ValueError(
            f"{offloaded}: expected a loaded layer, got one whose weights accelerate offloads (device_map): "
            "quantize the model before it is dispatched, or while it is read (NF4Config)"
        )
    empty = [name for name, weight in weights.items() if weight.is_meta]
    if empty and len(empty) < len(weights):
        raise ValueError(
            f"{empty[0]}: expected all weights loaded, or all on the meta device, got {len(empty)} of "
            f"{len(weights)} there"
        )
    for name, weight in weights.items():
        _check(name, weight)


def _check(name: str, weight: torch.Tensor) -> None:
    if weight.dtype not in WEIGHT_DTYPES:
        raise ValueError(f"{name}: expected float32, bfloat16 or float16, got {weight.dtype}")
    if weight.is_meta:
        return
    # A sum is finite only if every term is, which avoids a boolean copy of the weight. It may overflow; then
    # all values are checked.
    if not bool(torch.isfinite(weight.detach().sum(dtype=torch.float32))):
        bad = int((~torch.isfinite(weight.detach())).sum())
        if bad:
            raise ValueError(f"{name}: expected finite values, got {bad} NaN or Inf among {weight.numel()}")


class _Progress:
    """A tqdm progress bar, if shown and installed."""

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

"""quantize_model: nn.Linear -> NF4Linear, in place, one layer at a time."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from .code_tables import BLOCKSIZES, WEIGHT_DTYPES
from .integrations.peft import adapter_modules
from .nn import NF4Linear

logger = logging.getLogger("peft_kernels")

_PROGRESS_FROM = 200_000_000  # weights; below, quantising takes a second or two


def quantize_model(
    model: nn.Module,
    skip: Iterable[str] = ("lm_head",),
    blocksize: int = 64,
    double_quant: bool = True,
    progress: bool | None = None,
) -> nn.Module:
    """Replace every nn.Linear of a model by an NF4Linear.

    Parameters
    ----------
    model : nn.Module
        Changed in place. Peak memory is the model and one layer.
    skip : names
        Layers to leave alone: the full name, or the last part of it ("lm_head"). A layer whose weight is
        shared with another module (tied embeddings) or that stands in two places is always left alone, and so
        are PEFT's adapters and everything that is not exactly nn.Linear.
    blocksize, double_quant
        As `NF4Weight.quantize`.
    progress : bool, optional
        Show a progress bar; by default for models with more than 200 million weights to quantise.

    Returns
    -------
    nn.Module
        The model itself.

    Raises
    ------
    ValueError
        A weight has NaN, Inf or an unfit dtype (named), or the blocksize is unfit. The model is then
        unchanged: every layer is checked before the first is replaced.
    """
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    if isinstance(model, nn.Linear):
        raise ValueError(
            "model: expected a module that contains nn.Linear layers, got one; use NF4Linear.from_linear"
        )
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize: expected one of {BLOCKSIZES}, got {blocksize}")
    targets = dict(_targets(model, skip))
    for name, linear in targets.items():
        _check(f"{name}.weight", linear.weight)
    _warn_about_experts(model)

    total = sum(linear.weight.numel() for linear in targets.values())
    show = total > _PROGRESS_FROM if progress is None else progress
    names = list(targets)
    del targets  # the only reference to each dense layer is the model's, so that it is freed when replaced
    with _Progress(total, show) as bar:
        for name in names:
            parent_name, _, child = name.rpartition(".")
            parent = model.get_submodule(parent_name)
            linear = getattr(parent, child)
            setattr(
                parent, child, NF4Linear.from_linear(linear, blocksize, double_quant, name=f"{name}.weight")
            )
            bar.update(linear.weight.numel())
            del linear
    return model


def _targets(model: nn.Module, skip: tuple[str, ...]) -> Iterator[tuple[str, nn.Linear]]:
    owners: Counter[int] = Counter()
    for module in model.modules():
        if isinstance(module, NF4Linear):
            module.settle()
        owners.update(id(part) for parts in (module._modules, module._parameters) for part in parts.values())
    adapters = set(adapter_modules(model))
    for name, module in model.named_modules():
        if type(module) is not nn.Linear or module in adapters:
            continue
        plain = name.removesuffix(".base_layer").removesuffix(".original_module")  # what PEFT wraps
        if not {name, plain, plain.rpartition(".")[2]}.isdisjoint(skip):
            continue
        if owners[id(module.weight)] > 1 or owners[id(module)] > 1:
            logger.info("%s is left dense: it shares its weight with another place in the model", name)
            continue
        yield name, module


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


def _warn_about_experts(model: nn.Module) -> None:
    """Mixture-of-experts weights kept as one 3-D parameter are no nn.Linear: say that they stay dense."""
    experts = [
        f"{name}.{key}"
        for name, module in model.named_modules()
        for key, p in module.named_parameters(recurse=False)
        if p.dim() == 3 and p.is_floating_point() and p.numel() > 1e6 and not isinstance(module, _ConvNd)
    ]
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

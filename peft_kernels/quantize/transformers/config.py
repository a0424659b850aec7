"""NF4Config: the quantisation config of a 4-bit model for transformers and `config.json`.

On disk it equals bitsandbytes' configuration, so that readers of bitsandbytes' checkpoints read ours. In
memory it has its own method name, because bitsandbytes' makes transformers import bitsandbytes."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

import torch
import transformers
from transformers.quantizers.auto import register_quantization_config
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ...core.code_tables import WEIGHT_DTYPES
from ...core.formats import check_form
from ...nf4 import packed_format
from ...nf4.bitsandbytes_format import BLOCKSIZE_KEY, DEFAULT_BLOCKSIZE, QUANT_TYPES, configuration
from ...nf4.owners import OWNERS, Owner, owner_of
from ...nf4.packed_format import METHOD

if not hasattr(HfQuantizer, "get_new_dtype"):  # the quantiser interface changed in 5.23
    raise ImportError(f"transformers: expected 5.23 or later, got {transformers.__version__}")


@register_quantization_config(METHOD)
class NF4Config(QuantizationConfigMixin):
    """Loads a transformers model in 4 bits: `from_pretrained(path, quantization_config=NF4Config())`.

    Each weight is quantised while it is read, so the model never exists in 16 bits. `save_pretrained` writes
    bitsandbytes' format. Read a checkpoint in that format with `config=read_config(path)`.

    Parameters
    ----------
    blocksize : int
        Number of consecutive values that share a scale: 32, 64, ..., 4096. bitsandbytes' is 64.
    double_quant : bool
        Quantise the scales too.
    modules_to_not_convert : names, optional
        Modules to keep dense with their submodules, as `quantize_model(skip=...)`; by default the heads.
    compute_dtype : torch.dtype, optional
        Dtype to which fp32 activations are rounded, see `nn.NF4Linear`; by default the weights' dtype.
    experts : bool
        Pack experts too, as `quantize_model(experts=True)`. bitsandbytes has no format for them:
        `save_pretrained` then writes a configuration that only this package reads.
    format : str
        "nf4"; "fp4", bitsandbytes' default; "mxfp4" or "nvfp4", which are saved for this package only.
    stored : dict, optional
        The `quantization_config` of a checkpoint in another owner's format, which is saved as it was read.
        `read_config` sets it.

    Raises
    ------
    ValueError
        An invalid argument.
    """

    _dense: list[str] | None = None
    _weight_dtype: torch.dtype | None = None
    _with_experts: bool | None = None

    def __init__(
        self,
        blocksize: int | None = None,
        double_quant: bool = True,
        modules_to_not_convert: Iterable[str] | None = None,
        compute_dtype: torch.dtype | str | None = None,
        quant_method: str = METHOD,
        experts: bool = False,
        format: str = "nf4",
        stored: Mapping[str, Any] | None = None,
    ) -> None:
        _expect("quant_method", METHOD, quant_method, quant_method == METHOD)
        blocksize = check_form(format, blocksize)
        _expect("double_quant", "True or False", double_quant, isinstance(double_quant, bool))
        _expect("experts", "True or False", experts, isinstance(experts, bool))
        self.experts, self.format = experts, format
        known = stored is None or owner_of(stored) is not None
        _expect("stored", f"the configuration of one of {', '.join(OWNERS)}", stored, known)
        self.stored = None if stored is None else deepcopy(dict(stored))
        self.quant_method = METHOD  # type: ignore[assignment]
        self.blocksize, self.double_quant = blocksize, double_quant
        names = modules_to_not_convert
        if names is not None:
            names = [names] if isinstance(names, str) else names
            strings = isinstance(names, Iterable) and all(isinstance(name, str) for name in names)
            _expect("modules_to_not_convert", "names of modules", names, strings)
            names = list(names)
        self.modules_to_not_convert = names
        self.compute_dtype = None if compute_dtype is None else _dtype("compute_dtype", compute_dtype)

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Reads the entry of a `config.json`: bitsandbytes', another owner's, or one with our parameters."""
        numbers = dict(config_dict)
        if numbers.get("quant_method") != METHOD:
            owner = owner_of(numbers)
            numbers = _from_bitsandbytes(numbers) if owner is None else _from_owner(owner, numbers)
        known = inspect.signature(cls).parameters
        other = next((key for key in numbers if key not in known), None)
        _expect("quantization_config", f"keys among {', '.join(known)}", other, other is None)
        return super().from_dict(numbers, return_unused_kwargs, **kwargs)

    @property
    def owner(self) -> Owner | None:
        """The owner of the checkpoint's format, if it is neither bitsandbytes' nor ours."""
        return None if self.stored is None else owner_of(self.stored)

    def describe(self, dense: list[str], dtype: torch.dtype, experts: bool = False) -> None:
        """Sets, before saving, the dense linear layers (in an owner's format: those that became dense), the
        dtype of weights, and whether experts are packed."""
        self._dense, self._weight_dtype, self._with_experts = dense, dtype, experts

    def to_dict(self) -> dict[str, Any]:
        """The entry of `config.json`: the owner's, bitsandbytes' keys, or our own with packed experts."""
        if self.stored is not None and self.owner is not None:
            return self.owner.configuration(deepcopy(self.stored), self._dense or [])
        dense = self.modules_to_not_convert if self._dense is None else self._dense
        experts = self.experts if self._with_experts is None else self._with_experts
        if experts or self.format not in QUANT_TYPES:
            return packed_format.configuration(
                self.blocksize, self.double_quant, self.compute_dtype, dense, experts, self.format
            )
        return configuration(
            self.blocksize, self.double_quant, self.compute_dtype or self._weight_dtype, dense, self.format
        )


def _from_bitsandbytes(numbers: Mapping[str, Any]) -> dict[str, Any]:
    method = numbers.get("quant_method")
    method = getattr(method, "value", method)
    four_bits = bool(numbers.get("load_in_4bit", numbers.get("_load_in_4bit", False)))
    got = "load_in_8bit" if numbers.get("load_in_8bit") else method
    _expect("quantization_config", "bitsandbytes in 4 bits", got, method == "bitsandbytes" and four_bits)
    kind = numbers.get("bnb_4bit_quant_type", "fp4")
    _expect("bnb_4bit_quant_type", f"one of {QUANT_TYPES}", kind, kind in QUANT_TYPES)
    dtype = numbers.get("bnb_4bit_compute_dtype")
    return {
        "blocksize": numbers.get(BLOCKSIZE_KEY, DEFAULT_BLOCKSIZE),
        "double_quant": bool(numbers.get("bnb_4bit_use_double_quant", False)),
        "modules_to_not_convert": numbers.get("llm_int8_skip_modules"),
        "compute_dtype": None if dtype is None else _dtype("bnb_4bit_compute_dtype", dtype),
        "format": kind,
    }


def _from_owner(owner: Owner, numbers: Mapping[str, Any]) -> dict[str, Any]:
    # An object of transformers has an enum for the name.
    stored = dict(numbers) | {"quant_method": owner.method}
    return {"double_quant": False, "format": owner.format, "stored": stored}


def _dtype(argument: str, value: Any) -> torch.dtype:
    dtype: Any = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    _expect(argument, "float32, bfloat16 or float16", value, dtype in WEIGHT_DTYPES)
    return dtype


def _expect(argument: str, expected: Any, got: Any, holds: bool) -> None:
    if not holds:
        raise ValueError(f"{argument}: expected {expected}, got {got!r}")

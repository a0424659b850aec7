"""Loads transformers models in 4 bits, and bitsandbytes' checkpoints without bitsandbytes."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig
from transformers.quantizers import auto

from ..nf4.model import METHOD
from ..quantize.transformers.config import NF4Config
from ..quantize.transformers.quantizer import NF4Quantizer

__all__ = ["NF4Config", "NF4Quantizer", "disable", "enable", "read_config"]

_BITSANDBYTES = "bitsandbytes_4bit"
_theirs: list[Any] = []  # the quantiser that `enable` replaced


def read_config(path: Any, **kwargs: Any) -> Any:
    """The configuration of a 4-bit checkpoint, to load it without bitsandbytes.

    `AutoModelForCausalLM.from_pretrained(path, config=read_config(path))` reads checkpoints of bitsandbytes
    and of this package. The file determines which layers are in 4 bits and their blocksizes.

    Parameters
    ----------
    path
        A folder or a name on the hub.
    **kwargs
        As for `AutoConfig.from_pretrained`: revision, token, overrides of the configuration.

    Raises
    ------
    ValueError
        The checkpoint is not quantised, or by another method (8 bits, FP4, others).
    """
    config = AutoConfig.from_pretrained(path, **kwargs)
    text = config.get_text_config(decoder=True)
    owner = text if getattr(config, "quantization_config", None) is None else config
    stored = getattr(owner, "quantization_config", None)
    if stored is None:
        raise ValueError(
            f"path: expected a checkpoint in 4 bits, got one without a quantization_config, {path}; load it "
            "with quantization_config=NF4Config()"
        )
    ours = NF4Config.from_dict(stored)
    vars(owner).pop("quantization_config")
    config.quantization_config = {
        "quant_method": METHOD,
        "blocksize": ours.blocksize,
        "double_quant": ours.double_quant,
        "modules_to_not_convert": ours.modules_to_not_convert,
        "compute_dtype": ours.compute_dtype,
        "experts": ours.experts,
    }
    return config


def enable() -> None:
    """Loads NF4 models of bitsandbytes' configuration with NF4Linear, in the whole process, until
    `disable()`.

    Applies to `BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")` and 4-bit checkpoints, also
    in AutoPeftModel and TRL, and needs no bitsandbytes. FP4 and 8 bits still use bitsandbytes."""
    if not _theirs:
        _theirs.append(auto.AUTO_QUANTIZER_MAPPING[_BITSANDBYTES])
        auto.AUTO_QUANTIZER_MAPPING[_BITSANDBYTES] = _nf4_or_theirs  # type: ignore[assignment]


def disable() -> None:
    """Undoes `enable()`. Loaded models are not changed."""
    if _theirs:
        auto.AUTO_QUANTIZER_MAPPING[_BITSANDBYTES] = _theirs.pop()


def _nf4_or_theirs(config: Any, **kwargs: Any) -> Any:
    kind = NF4Quantizer if config.bnb_4bit_quant_type == "nf4" else _theirs[0]
    return kind(config, **kwargs)

"""Loads transformers models in 4 bits, and 4-bit checkpoints without the libraries that wrote them."""

from __future__ import annotations

import functools
from typing import Any

from transformers import AutoConfig
from transformers.quantizers import auto

from ..nf4.owners.compressed_tensors import FORMAT as NVFP4_FORMAT
from ..nf4.packed_format import METHOD
from ..quantize.transformers.config import NF4Config
from ..quantize.transformers.quantizer import NF4Quantizer

__all__ = ["NF4Config", "NF4Quantizer", "disable", "enable", "read_config"]

_theirs: list[tuple[dict[str, Any], str, Any]] = []
"""What `enable` replaced: a mapping of transformers, a key, and its value, None if there was none."""


def read_config(path: Any, **kwargs: Any) -> Any:
    """The configuration of a 4-bit checkpoint, to load it without bitsandbytes.

    `AutoModelForCausalLM.from_pretrained(path, config=read_config(path))` reads checkpoints of bitsandbytes
    and of this package, MXFP4 (GPT-OSS), and NVFP4 of compressed-tensors and modelopt. The file determines
    which layers are in 4 bits and their blocksizes.

    Parameters
    ----------
    path
        A folder or a name on the hub.
    **kwargs
        As for `AutoConfig.from_pretrained`: revision, token, overrides of the configuration.

    Raises
    ------
    ValueError
        The checkpoint is not quantised, or in another format (8 bits, others).
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
        "format": ours.format,
        "stored": ours.stored,
    }
    return config


def enable() -> None:
    """Loads 4-bit models of bitsandbytes' configuration, and the checkpoints that `read_config` reads, with
    NF4Linear and NF4Experts, in the whole process, until `disable()`.

    Applies to `BitsAndBytesConfig(load_in_4bit=True)` and 4-bit checkpoints, also in AutoPeftModel and TRL,
    and needs no bitsandbytes and no compressed-tensors. Other quantisation is left to transformers: 8 bits,
    other formats of compressed-tensors, and `Mxfp4Config(dequantize=True)`."""
    if _theirs:
        return
    _replace(auto.AUTO_QUANTIZER_MAPPING, "bitsandbytes_4bit", NF4Quantizer)
    mxfp4 = auto.AUTO_QUANTIZER_MAPPING["mxfp4"]
    _replace(auto.AUTO_QUANTIZER_MAPPING, "mxfp4", functools.partial(_for_mxfp4, mxfp4))
    # Their configuration needs the library.
    theirs = auto.AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"]
    _replace(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "compressed-tensors", _ForNvfp4(theirs))
    _replace(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "modelopt", NF4Config)


def disable() -> None:
    """Undoes `enable()`. Loaded models are not changed."""
    while _theirs:
        mapping, key, value = _theirs.pop()
        if value is None:
            del mapping[key]
        else:
            mapping[key] = value


def _replace(mapping: dict[str, Any], key: str, value: Any) -> None:
    _theirs.append((mapping, key, mapping.get(key)))
    mapping[key] = value


def _for_mxfp4(theirs: Any, config: Any, pre_quantized: bool = True) -> Any:
    """The quantiser for a Mxfp4Config: ours for packed checkpoints that should stay packed."""
    ours = pre_quantized and not config.dequantize
    return (NF4Quantizer if ours else theirs)(config, pre_quantized=pre_quantized)


class _ForNvfp4:
    """Stands for the class of compressed-tensors' configurations: NVFP4 becomes an NF4Config."""

    def __init__(self, theirs: Any) -> None:
        self.theirs = theirs

    def from_dict(self, config: dict[str, Any]) -> Any:
        cls = NF4Config if config.get("format") == NVFP4_FORMAT else self.theirs
        return cls.from_dict(config)

"""Loads transformers models in 4 bits, and 4-bit checkpoints without the libraries that wrote them."""

from __future__ import annotations

import copy
import functools
import weakref
from typing import Any

from transformers import AutoConfig
from transformers.quantizers import auto

from ..nf4.owners import owner_of
from ..nf4.packed_format import METHOD
from ..quantize.transformers.config import NF4Config
from ..quantize.transformers.quantizer import NF4Quantizer

__all__ = ["NF4Config", "NF4Quantizer", "disable", "enable", "read_config"]

_theirs: list[tuple[dict[str, Any], str, Any]] = []
"""What `enable` replaced: a mapping of transformers, a key, and its value, None if there was none."""

_in_file: dict[int, dict[str, Any]] = {}
"""The `quantization_config` of which an object of transformers was made, by its id."""


def read_config(path: Any, **kwargs: Any) -> Any:
    """The configuration of a packed checkpoint, to load it without the library that wrote it.

    `AutoModelForCausalLM.from_pretrained(path, config=read_config(path))` reads checkpoints of bitsandbytes
    and of this package, GPTQ and AWQ, MXFP4 (GPT-OSS), FP8 in blocks (DeepSeek, Qwen), and NVFP4, int4,
    int8 and FP8 of compressed-tensors and modelopt. The file determines which layers are packed and their
    blocksizes.

    Parameters
    ----------
    path
        A folder or a name on the hub.
    **kwargs
        As for `AutoConfig.from_pretrained`: revision, token, overrides of the configuration.

    Raises
    ------
    ValueError
        The checkpoint is not quantised, or in another format (8-bit integers, others).
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

    Applies to `BitsAndBytesConfig(load_in_4bit=True)` and packed checkpoints, also in AutoPeftModel and TRL,
    and needs none of the libraries that wrote them. What `read_config` refuses is left to transformers, and
    so is `dequantize=True` in a Mxfp4Config or FineGrainedFP8Config."""
    if _theirs:
        return
    _replace(auto.AUTO_QUANTIZER_MAPPING, "bitsandbytes_4bit", NF4Quantizer)
    for method in ("mxfp4", "gptq", "awq", "fp8"):
        theirs = auto.AUTO_QUANTIZER_MAPPING[method]
        _replace(auto.AUTO_QUANTIZER_MAPPING, method, functools.partial(_quantizer, theirs))
        configs = auto.AUTO_QUANTIZATION_CONFIG_MAPPING
        _replace(configs, method, _Remembering(configs[method]))
    # Their configuration needs the library.
    config = auto.AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"]
    _replace(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "compressed-tensors", _Config(config))
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


def _quantizer(theirs: Any, config: Any, pre_quantized: bool = True) -> Any:
    """Ours for packed checkpoints that we read and that should stay packed."""
    stored = _in_file.get(id(config)) or config.to_dict()
    if pre_quantized and not getattr(config, "dequantize", False) and _reads(stored):
        return NF4Quantizer(NF4Config.from_dict(stored), pre_quantized=True)
    return theirs(config, pre_quantized=pre_quantized)


class _Remembering:
    """Stands for a class of configurations, whose objects have keys of their own and lack some of the file's:
    remembers what the file had."""

    def __init__(self, theirs: Any) -> None:
        self.theirs = theirs

    def from_dict(self, config: dict[str, Any]) -> Any:
        made = self.theirs.from_dict(config)
        _in_file[id(made)] = copy.deepcopy(config)
        weakref.finalize(made, _in_file.pop, id(made))
        return made


class _Config:
    """Stands for a class of configurations: those of formats that we read become an NF4Config."""

    def __init__(self, theirs: Any) -> None:
        self.theirs = theirs

    def from_dict(self, config: dict[str, Any]) -> Any:
        return (NF4Config if _reads(config) else self.theirs).from_dict(config)


def _reads(config: dict[str, Any]) -> bool:
    try:
        return owner_of(config) is not None
    except ValueError:
        return False

"""What a model with NF4 layers tells other libraries, and takes back when the last one is gone."""

from __future__ import annotations

import functools
import importlib.util
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from .weight import NF4Weight

RECORD = "_peft_kernels_nf4"
METHOD = "peft_kernels_nf4"
"""What transformers calls the way in which our models are quantised."""

# PEFT's and TRL's kbit preparation turn checkpointing on for such a model, TRL does not cast it, Trainer
# makes no DataParallel of it. Not `is_quantized`: transformers then asks for an `hf_quantizer`, and refuses
# half() and float(), which are right here. Accelerate takes a 4-bit model without a `quantization_method` for
# one of bitsandbytes.
_FLAGS = {"is_loaded_in_4bit": True, "quantization_method": METHOD}


class ModelLink:
    """From a layer back to the model that `quantize_model` was given, without keeping it alive.

    A copy of the model links to the copy; a copy of a layer alone links to nothing.
    """

    _model: weakref.ref[nn.Module] | None = None

    def tie(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    @property
    def model(self) -> nn.Module | None:
        return None if self._model is None else self._model()

    def holds(self, layer: nn.Module) -> bool:
        """Whether the layer stands in the model itself, not inside what PEFT wraps around it."""
        return self.model is not None and any(
            child is layer and name not in ("base_layer", "original_module")
            for module in self.model.modules()
            for name, child in module._modules.items()
        )

    def layer_gone(self) -> None:
        """A layer has become an ordinary one. Was it the last?"""
        model = self.model
        if model is not None and not any(isinstance(weight, NF4Weight) for weight in model.parameters()):
            _take_back(model)

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelLink:
        new = memo[id(self)] = ModelLink()
        copied = memo.get(id(self.model))
        if copied is not None:
            new.tie(copied)
        return new

    def __reduce__(self) -> Any:
        return ModelLink, ()  # the model's record ties it again when the model is pickled with it


@dataclass
class Record:
    """What a model holds about its NF4 layers."""

    model: nn.Module
    link: ModelLink
    report: Any

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.link.tie(self.model)


def announce(model: nn.Module, link: ModelLink, report: Any) -> None:
    """Set on the model, and on the transformers models that it wraps, what other libraries look at."""
    link.tie(model)
    vars(model)[RECORD] = Record(model, link, report)
    for owner in owners(model):
        for name, value in _FLAGS.items():
            if not getattr(owner, name, False):
                vars(owner)[name] = value
        if hasattr(type(owner), "num_parameters") and importlib.util.find_spec("bitsandbytes") is None:
            vars(owner)["num_parameters"] = functools.partial(_num_parameters, owner)


def record_of(model: nn.Module) -> Record | None:
    """Of a model, or of the first module inside it that has one."""
    return next((vars(m)[RECORD] for m in model.modules() if RECORD in vars(m)), None)


def _take_back(model: nn.Module) -> None:
    vars(model).pop(RECORD, None)
    for owner in owners(model):
        quantizer: Any = vars(owner).get("hf_quantizer")
        if quantizer is not None and quantizer.quantization_config.quant_method == METHOD:
            quantizer.remove_quantization_config(owner)
        if vars(owner).get("quantization_method") == METHOD:
            for name in (*_FLAGS, "num_parameters"):
                vars(owner).pop(name, None)


def _num_parameters(model: Any, *args: Any, **kwargs: Any) -> int:
    """transformers imports bitsandbytes to count the parameters of a 4-bit model."""
    flag = vars(model).pop("is_loaded_in_4bit", None)
    try:
        count: int = type(model).num_parameters(model, *args, **kwargs)
    finally:
        if flag is not None:
            vars(model)["is_loaded_in_4bit"] = flag
    return count


def owners(model: nn.Module) -> Iterator[nn.Module]:
    """The model itself, and the outermost transformers models inside it (a value head or PEFT around one)."""
    yield model
    if "transformers" not in sys.modules:
        return
    from transformers import PreTrainedModel

    inner = [] if isinstance(model, PreTrainedModel) else [model]
    while inner:
        for child in inner.pop().children():
            if isinstance(child, PreTrainedModel):
                yield child
            else:
                inner.append(child)

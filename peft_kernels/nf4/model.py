"""Attributes that mark a model with NF4 layers for other libraries, removed with its last NF4 layer."""

from __future__ import annotations

import functools
import importlib.util
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from .packed_format import METHOD
from .weight import PackedWeight

RECORD = "_peft_kernels_nf4"

# With these, PEFT's and TRL's kbit preparation enable checkpointing, TRL does not cast the model, and Trainer
# does not wrap it in DataParallel. `is_quantized` is not set: transformers would then require an
# `hf_quantizer` and refuse half() and float(), which work here. Without `quantization_method`, accelerate
# takes a 4-bit model for one of bitsandbytes.
_FLAGS = {"is_loaded_in_4bit": True, "quantization_method": METHOD}


class ModelLink:
    """Weak reference from a layer to the model that `quantize_model` was given.

    A copied model links to the copy; a copied layer links to nothing.
    """

    _model: weakref.ref[nn.Module] | None = None

    def set_model(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    @property
    def model(self) -> nn.Module | None:
        return None if self._model is None else self._model()

    def holds(self, layer: nn.Module) -> bool:
        """Whether the layer is in the model itself, not wrapped by PEFT."""
        return self.model is not None and any(
            child is layer and name not in ("base_layer", "original_module")
            for module in self.model.modules()
            for name, child in module._modules.items()
        )

    def layer_gone(self) -> None:
        """Called when a layer became an ordinary one; unmarks the model if it was the last NF4 layer."""
        model = self.model
        if model is not None and not any(isinstance(weight, PackedWeight) for weight in model.parameters()):
            _unmark(model)

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelLink:
        new = memo[id(self)] = ModelLink()
        copied = memo.get(id(self.model))
        if copied is not None:
            new.set_model(copied)
        return new

    def __reduce__(self) -> Any:
        return ModelLink, ()  # the model's record restores it when the model is unpickled


@dataclass
class Record:
    """The record that a model keeps about its NF4 layers."""

    model: nn.Module
    link: ModelLink
    report: Any

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.link.set_model(self.model)


def mark_quantized(model: nn.Module, link: ModelLink, report: Any) -> None:
    """Sets the record on the model, and flags for other libraries on it and the transformers models
    inside."""
    link.set_model(model)
    vars(model)[RECORD] = Record(model, link, report)
    for owner in owners(model):
        for name, value in _FLAGS.items():
            if not getattr(owner, name, False):
                vars(owner)[name] = value
        if hasattr(type(owner), "num_parameters") and importlib.util.find_spec("bitsandbytes") is None:
            vars(owner)["num_parameters"] = functools.partial(_num_parameters, owner)


def record_of(model: nn.Module) -> Record | None:
    """The record of a model, or of the first module inside it that has one."""
    return next((vars(m)[RECORD] for m in model.modules() if RECORD in vars(m)), None)


def _unmark(model: nn.Module) -> None:
    vars(model).pop(RECORD, None)
    for owner in owners(model):
        quantizer: Any = vars(owner).get("hf_quantizer")
        if quantizer is not None and quantizer.quantization_config.quant_method == METHOD:
            quantizer.remove_quantization_config(owner)
        if vars(owner).get("quantization_method") == METHOD:
            for name in (*_FLAGS, "num_parameters"):
                vars(owner).pop(name, None)


def _num_parameters(model: Any, *args: Any, **kwargs: Any) -> int:
    """`num_parameters` without the 4-bit flag, for which transformers would import bitsandbytes."""
    flag = vars(model).pop("is_loaded_in_4bit", None)
    try:
        count: int = type(model).num_parameters(model, *args, **kwargs)
    finally:
        if flag is not None:
            vars(model)["is_loaded_in_4bit"] = flag
    return count


def owners(model: nn.Module) -> Iterator[nn.Module]:
    """The model, and the outermost transformers models inside it (wrapped by PEFT or a value head)."""
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

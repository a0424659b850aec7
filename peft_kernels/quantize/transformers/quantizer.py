"""The transformers quantiser for NF4Config, used by from_pretrained, save_pretrained and dequantize."""

from __future__ import annotations

import functools
import logging
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import WeightRenaming, apply_renamings, rename_source_key
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import Mxfp4Config

from ...core.formats import FORMATS
from ...core.packed_state import PARALLEL
from ...nf4.experts_forward import weight_names
from ...nf4.experts_packing import NF4Experts, adopt, packed_weights, unpack
from ...nf4.model import ModelLink, mark_quantized
from ...nf4.packed_format import METHOD
from ...nf4.sharded import tensor_parallel
from ...nf4.sharded.checks import is_tensor_parallel
from ...nf4.weight import PackedWeight
from ...nn import NF4Linear
from ..architectures import is_linear
from ..report import QuantizeReport, nbytes_of
from ..targets import check_names, expert_targets, targets, warn_about_experts
from . import layouts, owned, stacking
from .config import NF4Config
from .conversion import Errors, Quantize, Read, packed_form
from .mapped_files import MappedFiles

logger = logging.getLogger("peft_kernels")


@register_quantizer(METHOD)
class NF4Quantizer(HfQuantizer):
    """Replaces linear layers by NF4Linear before anything is read, and loads NF4 weights into them."""

    quantization_config: NF4Config
    is_trainable = True  # with adapters of PEFT
    is_compileable = True
    attached = False
    """Whether the model existed before the quantiser."""
    by_their_rules = False
    """Whether module names are patterns, as in bitsandbytes' configuration."""

    loaded: frozenset[str] = frozenset()
    """Modules that were packed in an owner's file."""

    def __init__(
        self, quantization_config: NF4Config | BitsAndBytesConfig | Mxfp4Config, **kwargs: Any
    ) -> None:
        self.by_their_rules = isinstance(quantization_config, BitsAndBytesConfig)
        if not isinstance(quantization_config, NF4Config):
            quantization_config = NF4Config.from_dict(quantization_config.to_dict())
        super().__init__(quantization_config, **kwargs)
        self.errors = Errors()
        self.report = QuantizeReport()
        self.in_four_bits: set[str] = set()
        self.experts_in_four_bits: set[str] = set()
        self.items: dict[str, list[str]] = {}  # names of the tensors of an owner's packed weights
        self.packs: Callable[[str], bool] = bool  # whether the weight of a name will be packed
        self.with_packed: set[str] = set()  # names of those, and of tensors in one with them in the file
        self.stacks: dict[str, stacking.Stack] = {}  # weights of experts that are layers in the file
        self.experts: dict[str, Any] = {}  # modules that will hold packed weights, by name
        self.replaced: list[tuple[Any, Any]] = []
        self.files = MappedFiles()

    def is_serializable(self) -> bool:
        return True

    # Loading

    def validate_environment(self, device_map: Any = None, **_: Any) -> None:
        if not isinstance(device_map, dict):
            return
        kinds = {_kind_of(device) for device in device_map.values()}
        if "disk" in kinds or len(kinds) > 1:
            raise ValueError(
                f"device_map: expected all of a 4-bit model on the CPU or all of it on GPUs, got {device_map}"
            )

    def update_device_map(self, device_map: Any) -> Any:
        """Loads to this process's GPU, if there is one, like `device_map="cuda"`."""
        if device_map is None and torch.cuda.is_available():
            local, current = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.current_device()
            return {"": local if current == 0 and local < torch.cuda.device_count() else current}
        return device_map

    @property
    def quantized_element_size(self) -> float:
        config = self.quantization_config
        return FORMATS[config.format].bytes_per_value(config.blocksize, config.double_quant)

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        """transformers asks for one of several tensors that it makes of one: whether any is packed."""
        return self._packs(model, param_name) or param_name in self.with_packed

    def _packs(self, model: Any, param_name: str) -> bool:
        module, _dot, name = param_name.rpartition(".")
        if name == "weight":
            return isinstance(model.get_submodule(module), NF4Linear)
        return module in self.experts and name in weight_names(model.get_submodule(module))

    def get_quantize_ops(self) -> Quantize:
        return Quantize(self.quantization_config, self.errors, self.files, self.packs)

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> list[Any]:
        tensor_parallel.check_distributed_config(model)
        cut = tensor_parallel.tp_size(model) > 1
        if cut:
            self._prepare_to_cut(model, weight_conversions)
        if not self.pre_quantized:
            self.packs = functools.partial(self._packs, model)
            for names in layouts.stored_together(model, weight_conversions):
                if any(map(self.packs, names)):
                    self.with_packed |= names
            if not self.experts:
                return list(weight_conversions)
            self.replaced = layouts.gathering(weight_conversions, self.packs, self.files)
            return [stands_for for _, stands_for in self.replaced]
        rest = self.quantization_config, self.errors, self.files
        renamings = [each for each in weight_conversions if isinstance(each, WeightRenaming)]
        experts = [apply_renamings(name, renamings) for name in sorted(self.experts_in_four_bits)]
        stacked = {name for stack in self.stacks.values() for name in stack.names}
        layers = [apply_renamings(name, renamings) for name in sorted(self.in_four_bits - stacked)]
        items = [
            apply_renamings(item, renamings)
            for name in self.items.keys() - stacked
            for item in self.items[name]
        ]
        pairs = stacking.replaced(weight_conversions, self.stacks, *rest)
        readers = [reader for _, reader in pairs]
        layouts.check_own(readers, [*layers, *experts], packed_form(self.quantization_config))
        spares = layouts.TensorsOf(frozenset((*layers, *experts)), frozenset(items))
        readers = layouts.sparing(readers, spares)
        self.replaced = [(own, reader) for (own, _), reader in zip(pairs, readers, strict=True)]
        return [*readers, *layouts.reading_experts(experts, *rest), layouts.reading(*rest, cut)]

    def _prepare_to_cut(self, model: Any, weight_conversions: Any) -> None:
        """Before a tensor-parallel plan is applied: makes layers that are dense in the file ordinary ones,
        and raises ValueError if others cannot be split."""
        if self.quantization_config.owner is not None:
            title = self.quantization_config.owner.title
            raise ValueError(f"distributed_config: expected none for a checkpoint in {title}, got a plan")
        if self.pre_quantized:
            renamings = [each for each in weight_conversions if isinstance(each, WeightRenaming)]
            about: Any = renamings, [], model.base_model_prefix, model.state_dict()
            packed = {rename_source_key(name, *about)[0] for name in self.in_four_bits}
            for name, module in list(model.named_modules()):
                if isinstance(module, NF4Linear) and f"{name}.weight" not in packed:
                    module.weight = nn.Parameter(module.weight.detach())
        layers = [name for name, module in model.named_modules() if isinstance(module, NF4Linear)]
        experts = self.experts if not self.pre_quantized or self.experts_in_four_bits else {}
        own = self.quantization_config
        tensor_parallel.check(model, layers, experts, own.format, own.blocksize)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        for operation in getattr(converter, "operations", ()):
            if isinstance(operation, Read):
                operation.dtype = dtype
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Any = None, **_: Any
    ) -> None:
        self.files = MappedFiles(checkpoint_files or ())
        tied = model.all_tied_weights_keys
        twice = sum(model.get_parameter_or_buffer(key).nbytes for key in tied)
        config, report = self.quantization_config, QuantizeReport(bytes_before=nbytes_of(model) - twice)
        names = config.modules_to_not_convert
        if self.pre_quantized:
            names = []  # the file determines which layers are in 4 bits
            text = model.config.get_text_config(decoder=True)
            if text is not model.config:  # where the file may have had it; the model's own stands for it
                vars(text).pop("quantization_config", None)
            stored = layouts.names_in(checkpoint_files or ())
            found = layouts.in_four_bits(stored, config.owner)
            self.in_four_bits, self.experts_in_four_bits = found
            self.items = {} if config.owner is None else config.owner.weights(stored)
            self.stacks = stacking.stacks_of(model, stored, config.owner)
        elif names is not None and self.by_their_rules:
            patterns = [*names, *(model._keep_in_fp32_modules or ())]
            every = [name for name, module in model.named_modules() if is_linear(module)]
            names = [name for name in every if not should_convert_module(name, patterns)]
        elif names is not None:
            check_names(model, names, "modules_to_not_convert")
        skip = None if names is None else tuple(names)
        for name, linear in list(targets(model, skip, report.left, {*tied, *tied.values()})):
            model.set_submodule(name, NF4Linear.awaiting(linear, config.compute_dtype))
        sets = dict(expert_targets(model, skip, report.left, {*tied, *tied.values()}))
        if config.experts or self.experts_in_four_bits or self.stacks:
            self.experts = sets
        warn_about_experts(model, report.left, self.experts)
        self.report = report

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        errors, report, link = self.errors, self.report, ModelLink()
        self.errors, self.report, self.files = Errors(), QuantizeReport(), MappedFiles()
        errors.check()
        layouts.forget_loading(model, self.replaced)
        self.replaced, self.stacks, self.items = [], {}, {}
        self.packs, self.with_packed = bool, set()
        for experts in self.experts.values():
            if packed_weights(experts):
                adopt(experts, self.quantization_config.compute_dtype)
        self.experts = {}
        layers: dict[str, Any] = {
            name: module for name, module in model.named_modules() if packed_weights(module)
        }
        if not layers:
            logger.warning("no layer of %s is NF4: %s", type(model).__name__, report.left or "it has none")
            self.remove_quantization_config(model)
            return model
        for layer in layers.values():
            layer.link = link
        tensor_parallel.remove_mesh_names(model)
        report.layers, report.bytes_after = list(layers), nbytes_of(model)
        mark_quantized(model, link, report)
        if self.quantization_config.owner is not None:
            self.loaded = frozenset(layers)
            _log_unused(self.quantization_config)
        logger.info("%s", report)
        return model

    # Saving

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Updates the configuration before saving with the layers that are in 4 bits now."""
        modules = model.named_modules()
        packed = {f"{name}.{key}" for name, module in modules for key in packed_weights(module)}
        linear = {name.removesuffix(".weight") for name in packed if name.endswith(".weight")}
        owner = self.quantization_config.owner
        layouts.restore(model)
        if packed:
            experts = len(linear) < len(packed)
            dense = names_of_dense(model, linear) if owner is None else owned.now_dense(model, self.loaded)
            self.quantization_config.describe(dense, model.dtype, experts)
            model.config.quantization_config = self.quantization_config
            if self.attached:
                _drop_config_after_saving(model)
        else:  # all merged or permanently dense
            vars(model.config).pop("quantization_config", None)
        if packed and owner is not None:
            items = owned.state_dict(model, owner)
            names = (name for weight in owner.weights(items).values() for name in weight)
            layouts.keep_own(model, packed, names)
            return items, {}
        layouts.keep_own(model, packed)
        cut = any(is_tensor_parallel(weight) for weight in model.parameters())
        return tensor_parallel.gather_state_dict(model) if cut else None, {}

    # Back to dense

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        if isinstance(dtype, str):  # as `config.dtype` is after saving
            dtype = getattr(torch, dtype)
        for name, weight in model.named_parameters():
            if is_tensor_parallel(weight):
                raise RuntimeError(f"{name}: {PARALLEL}, expected dequantize() of a model in one process")
        other = dtype is not None and dtype != model.dtype
        layers: dict[Any, list[Any]] = {}
        for module in model.modules():
            weights = [w for w in module._parameters.values() if isinstance(w, PackedWeight)]
            if weights:
                layers[module] = weights
        usual = Counter(weight.dtype for weights in layers.values() for weight in weights).most_common(1)
        for layer, (weight, *_) in layers.items():
            # Keeps layers in fp32, such as routers.
            own = dtype if other or weight.dtype == usual[0][0] else weight.dtype
            if isinstance(layer, NF4Experts):
                unpack(layer, own)
            else:
                layer.weight = nn.Parameter(weight.dequantize(own), requires_grad=False)
        self.remove_quantization_config(model)
        return model.to(dtype) if other else model

    def remove_quantization_config(self, model: Any) -> None:
        layouts.restore(model)
        for name in ("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit"):
            vars(model).pop(name, None)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                for name in ("quantization_config", "_is_quantized"):
                    vars(module.config).pop(name, None)


def attach(model: Any, config: NF4Config) -> None:
    """Makes a model that was quantised in memory save and dequantize like one loaded in 4 bits."""
    if getattr(model, "hf_quantizer", None) is None:
        quantizer = vars(model)["hf_quantizer"] = NF4Quantizer(config, pre_quantized=False)
        quantizer.attached = True


def _log_unused(config: NF4Config) -> None:
    unused = config.owner.unused(config.stored) if config.owner and config.stored else ""
    if unused:
        logger.warning("%s has no effect here: only weights are quantised; it is saved again", unused)


def _drop_config_after_saving(model: Any) -> None:
    """Removes the quantisation config after saving: models made by hand may share a configuration.

    `save_pretrained` writes the configuration and then reads the state dict.
    """

    def forget(*_: Any) -> None:
        vars(model.config).pop("quantization_config", None)
        hook.remove()

    hook = model.register_state_dict_pre_hook(forget)


def names_of_dense(model: nn.Module, packed: set[str]) -> list[str]:
    """Names with which bitsandbytes' readers skip the dense linear layers and no packed one.

    They match a name at the beginning or the end of a module's, and as a regular expression.
    """
    names = []
    for name, module in model.named_modules():
        if name not in packed and (is_linear(module) or isinstance(module, nn.Linear)):
            alone = all(should_convert_module(other, [name]) for other in packed)
            names.append(name if alone else f"{name}$")
    return names


def _kind_of(device: Any) -> str:
    if device == "disk":
        return "disk"
    kind = "gpu" if isinstance(device, int) else torch.device(device).type
    return kind if kind in ("cpu", "meta") else "gpu"

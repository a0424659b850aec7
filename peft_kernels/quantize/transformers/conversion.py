"""Conversions of a checkpoint's tensors to NF4 weights, one at a time, while transformers reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps

from ...core.formats import FORMATS
from ...core.wrong_types import an
from ...nf4.experts_packing import computes_experts
from ...nf4.owners import Owner
from ...nf4.sharded import tensor_parallel
from ...nf4.sharded.checks import is_dtensor
from ...nf4.weight import PackedWeight
from ...nn import NF4Linear
from .config import NF4Config
from .mapped_files import MappedFiles

_ALIGNMENT = 64


class Errors:
    """Collects errors about weights.

    transformers replaces errors of conversions by one that names no tensor. So the first is raised after
    reading; nothing is quantised after it.
    """

    def __init__(self) -> None:
        self.messages: list[str] = []

    def check(self) -> None:
        if self.messages:
            raise ValueError(self.messages[0])

    def add(self, error: ValueError) -> None:
        self.messages.append(str(error))


class _Conversion(ConversionOps):
    def __init__(self, config: NF4Config, errors: Errors, files: MappedFiles) -> None:
        self.config, self.errors, self.files = config, errors, files

    def __deepcopy__(self, memo: Any) -> Any:
        """transformers copies it for each weight; errors and files stay shared."""
        return type(self)(self.config, self.errors, self.files)

    def guarded(self, key: str, layer: nn.Module, value: Any) -> Any:
        """The result of `_convert`, or after an error the layer's own parameter without data."""
        if not self.errors.messages:
            try:
                return self._convert(key, layer, value)
            except ValueError as error:
                self.errors.add(error)
        return getattr(layer, key.rpartition(".")[2])

    def _convert(self, key: str, layer: Any, value: Any) -> nn.Parameter:
        raise NotImplementedError


class SplitExperts:
    """The weight of all experts in a checkpoint with a tensor per expert: expert e is the concatenation of
    the e-th tensors of all lists."""

    def __init__(self, name: str, lists: list[list[Tensor]], files: MappedFiles) -> None:
        self.name, self.lists, self.files = name, lists, files
        self.device = lists[0][0].device
        out_features = sum(each[0].shape[0] for each in lists)
        self.shape = (len(lists[0]), out_features, *lists[0][0].shape[1:])

    def experts(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yields the experts one at a time, and releases the memory of earlier ones."""
        for each in self.lists:
            if len(each) != len(self.lists[0]):
                raise ValueError(f"{self.name}: expected {len(self.lists[0])} experts, got {len(each)}")
        for e, tensors in enumerate(zip(*self.lists, strict=True)):
            for tensor, first in zip(tensors, (each[0] for each in self.lists), strict=True):
                expect_shape(f"{self.name}[{e}]", tuple(first.shape), tuple(tensor.shape))
            yield (torch.cat(tensors) if len(tensors) > 1 else tensors[0]).to(dtype)
            for tensor in tensors:
                self.files.release(tensor)


class Gather(ConversionOps):
    """Replaces transformers' merging of experts: experts that are packed are merged by packing."""

    def __init__(self, operations: list[Any], packs: Callable[[str], bool], files: MappedFiles) -> None:
        self.operations, self.packs, self.files = operations, packs, files

    def __deepcopy__(self, memo: Any) -> Any:
        return type(self)(self.operations, self.packs, self.files)

    def convert(self, input_dict: dict[str, Any], *_: Any, **about: Any) -> dict[str, Any]:
        name: str = about["full_layer_name"]
        if self.packs(name):
            lists = [input_dict[pattern] for pattern in about["source_patterns"] if pattern in input_dict]
            return {name: SplitExperts(name, lists, self.files)}
        for operation in self.operations:
            input_dict = operation.convert(input_dict, **about)
        return input_dict


class Quantize(_Conversion):
    """Quantises dense weights: those of the results of a model's conversion that are to be packed."""

    def __init__(
        self, config: NF4Config, errors: Errors, files: MappedFiles, packs: Callable[[str], bool]
    ) -> None:
        super().__init__(config, errors, files)
        self.packs = packs

    def __deepcopy__(self, memo: Any) -> Any:
        return type(self)(self.config, self.errors, self.files, self.packs)

    def convert(self, input_dict: dict[str, Any], *_: Any, **about: Any) -> dict[str, Any]:
        found = {}
        for key, value in input_dict.items():
            layer, value = _owner(about, key), value[0] if isinstance(value, list) else value
            found[key] = (
                self.guarded(key, layer, value) if self.packs(key) else self._dense(key, layer, value)
            )
        return found

    @staticmethod
    def _dense(key: str, layer: Any, value: Tensor) -> Tensor:
        own = getattr(layer, key.rpartition(".")[2])
        expect_shape(key, tuple(own.shape), tuple(value.shape))
        return value.to(own.dtype)

    def _convert(self, key: str, layer: Any, value: Tensor) -> nn.Parameter:
        own, config = getattr(layer, key.rpartition(".")[2]), self.config
        on_meta = value.device.type == "meta"
        options = config.blocksize, config.double_quant, not on_meta, key, config.format
        if own.dim() == 3:
            expect_shape(key, tuple(own.shape), tuple(value.shape))
            parts = (
                value if isinstance(value, SplitExperts) else SplitExperts(key, [list(value)], MappedFiles())
            )
            experts = parts.experts(own.dtype)
            turned = (one.mT for one in experts) if layer.is_transposed else experts
            weight = PackedWeight.quantize_experts(turned, own.shape[0], *options)
        else:
            weight = PackedWeight.quantize(_as_linear(key, layer, value).to(own.dtype), *options)
            weight = tensor_parallel.local_slice(weight, layer)
        if isinstance(value, Tensor):
            self.files.release(value)
        return nn.Parameter(weight, requires_grad=False)


class Read(_Conversion):
    """Assembles the items of a packed weight; a dense weight stays dense. `items` maps patterns to items."""

    hf_quantizer = True  # makes transformers ask `get_new_dtype` about casts
    dtype: torch.dtype | None = None
    """Dtype of dense weights."""

    def __init__(self, config: NF4Config, errors: Errors, files: MappedFiles, items: dict[str, Any]) -> None:
        super().__init__(config, errors, files)
        self.items = items

    def __deepcopy__(self, memo: Any) -> Any:
        return type(self)(self.config, self.errors, self.files, self.items)

    def named(self, found: dict[str, Any]) -> dict[str, Any]:
        """Tensors by item."""
        return {
            self.items[pattern]: value[0] if isinstance(value, list) else value
            for pattern, value in found.items()
        }

    def convert(self, input_dict: dict[str, Any], *_: Any, **about: Any) -> dict[str, Any]:
        items = self.named(input_dict)
        key: str = about["full_layer_name"]
        layer = _owner(about, key)
        if key.endswith(".weight") and isinstance(layer, NF4Linear):
            value = self.guarded(key, layer, items)
            if not (self.errors.messages and is_dtensor(value)):
                return {key: value}
            value._is_hf_initialized = True  # a meta DTensor cannot be initialised; the error follows
            about["missing_keys"].discard(key)
            return {}
        if len(items) > 1 or not _is_dense(items):
            self.errors.add(self._packed(key, layer))
            return {key: getattr(layer, key.rpartition(".")[2])}
        return {key: self._dense(items["weight"])} if "weight" in items else {}

    def _convert(self, key: str, layer: Any, items: dict[str, Tensor]) -> nn.Parameter:
        weight = items.get("weight")
        if weight is not None and len(items) == 1 and weight.is_floating_point() and _is_dense(items):
            return nn.Parameter(_as_linear(key, layer, self._dense(weight)))
        owner = self.config.owner
        if owner is not None:
            return self._owned(key, layer, (layer.out_features, layer.in_features), items, owner)
        sharded = is_dtensor(layer.weight)
        named = {
            key + name.removeprefix("weight"): item if sharded else self._aligned(item)
            for name, item in items.items()
        }
        packed = PackedWeight.from_state_dict(named, key.removesuffix("weight"))
        expect_shape(key, (layer.out_features, layer.in_features), tuple(packed.shape))
        packed._state.name = key
        if sharded:  # only the local slice is read from the mapped file
            packed = tensor_parallel.local_slice(packed, layer)
            self.files.release(items["weight"])
        if layer.compute_dtype == packed.dtype:
            layer.compute_dtype = None  # the default; PEFT casts adapters to an explicit one
        return nn.Parameter(packed, requires_grad=False)

    def _owned(
        self, key: str, layer: Any, shape: tuple[int, ...], tensors: dict[str, Tensor], owner: Owner
    ) -> nn.Parameter:
        """A weight from the tensors of another owner's format, by part of their names."""
        state, aside = owner.read(tensors, key)
        expect_shape(key, shape, state.shape)
        assert state.packed is not None and state.absmax is not None
        state.packed, state.absmax = self._aligned(state.packed), self._aligned(state.absmax)
        used = {state.packed.data_ptr(), state.absmax.data_ptr()}
        for tensor in tensors.values():
            if tensor.data_ptr() not in used:
                self.files.release(tensor)
        if aside:
            layer.aside = aside
        weight = PackedWeight(state, getattr(layer, key.rpartition(".")[2]).dtype)
        return nn.Parameter(weight, requires_grad=False)

    def _aligned(self, item: Tensor) -> Tensor:
        """An aligned copy, for speed: tensors in a file may be unaligned."""
        if item.data_ptr() % _ALIGNMENT == 0:
            return item
        copied = item.clone()
        self.files.release(item)
        return copied

    def _packed(self, key: str, layer: Any) -> ValueError:
        form = packed_form(self.config)
        return ValueError(f"{key}: expected a dense weight for {an(layer)}, got {form}")

    def _dense(self, weight: Tensor) -> Tensor:
        return weight if self.dtype is None else weight.to(self.dtype)


class ReadExperts(Read):
    """Assembles the items of packed experts. `items` maps patterns to suffixes of items."""

    def convert(self, input_dict: dict[str, Any], *_: Any, **about: Any) -> dict[str, Any]:
        key: str = about["full_layer_name"]
        items = {key + suffix: value for suffix, value in self.named(input_dict).items()}
        return {key: self.guarded(key, _owner(about, key), items)}

    def _convert(self, key: str, layer: Any, items: dict[str, Tensor]) -> nn.Parameter:
        prefix, dot, name = key.rpartition(".")
        if not computes_experts(layer):
            raise self._packed(key, layer)
        own, owner = getattr(layer, name), self.config.owner
        shape = tuple((own.mT if layer.is_transposed else own).shape)
        if owner is not None:
            tensors = {owner.part_of(key, item): tensor for item, tensor in items.items()}
            return self._owned(key, layer, shape, tensors, owner)
        aligned = {item: self._aligned(tensor) for item, tensor in items.items()}
        packed = PackedWeight.from_state_dict(aligned, prefix + dot, name)
        expect_shape(key, shape, tuple(packed.shape))
        packed._state.name = key
        return nn.Parameter(packed, requires_grad=False)


def packed_form(config: NF4Config) -> str:
    """What the packed weights of a checkpoint are in, in messages."""
    return "4 bits" if config.owner is None else config.owner.title


def _is_dense(items: dict[str, Tensor]) -> bool:
    """Whether no item holds codes of a byte, which are nothing without scales."""
    codes = {one.code_dtype for one in FORMATS.values()}
    return all(item.dtype not in codes for item in items.values())


def _owner(about: dict[str, Any], key: str) -> Any:
    return about["model"].get_submodule(key.rpartition(".")[0])


def _as_linear(key: str, layer: Any, value: Tensor) -> Tensor:
    """A weight as (out_features, in_features): a Conv1D's is stored transposed."""
    if not issubclass(layer.plain_class, nn.Linear) and value.dim() == 2:
        value = value.t()
    expect_shape(key, (layer.out_features, layer.in_features), tuple(value.shape))
    return value


def expect_shape(key: str, expected: tuple[int, ...], got: tuple[int, ...]) -> None:
    if got != expected:
        raise ValueError(f"{key}: expected shape {expected}, got {got}")

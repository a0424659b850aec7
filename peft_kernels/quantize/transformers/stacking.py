"""Packed linear layers of a checkpoint that transformers merges into experts: all that make one weight become
one packed weight."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ...core.packed_state import PackedState
from ...nf4.experts_packing import computes_experts
from ...nf4.owners import Owner
from ...nf4.owners.owner import missing
from ...nf4.owners.stacked import Stacked, joined
from ...nf4.weight import PackedWeight
from .config import NF4Config
from .conversion import Errors, Read, expect_shape
from .layouts import merges_experts
from .mapped_files import MappedFiles

_PATTERN = re.compile(r"[\w.]*\*\.[\w.]*weight")
"""Names of layers that differ in the number of the expert alone."""
_NUMBER = re.compile(r"\.\d{1,9}\.")


@dataclass
class Stack:
    """The layers in a file of one weight of experts."""

    sources: list[str]
    """Patterns of an expert's layers, in the order of their rows."""
    weights: list[list[str]]
    """Names of each expert's layers in the file."""

    @property
    def names(self) -> list[str]:
        return [name for expert in self.weights for name in expert]

    def of(self, layers: Mapping[str, PackedState]) -> list[list[PackedState]]:
        """The layers of each expert, from all layers by name."""
        return [[layers[each] for each in expert] for expert in self.weights]


def stacks_of(model: Any, names: Iterable[str], owner: Owner | None) -> dict[str, Stack]:
    """The weights of experts of which a checkpoint has packed layers, by name in the model.

    Raises ValueError for a tensor that is missing among them.
    """
    if owner is None or owner.experts:
        return {}
    there = dict.fromkeys(names)
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    takers = [each for each in transforms if isinstance(each, WeightConverter)]
    sources = {source: each for each in takers if stackable(each) for source in each.source_patterns}
    about = model.base_model_prefix, model.state_dict()
    packed = owner.weights(there)
    found: dict[str, dict[tuple[str, int], str]] = {}
    for weight in {**packed, **{name: [] for name in there if name.endswith(".weight")}}:
        if sources and _NUMBER.search(weight) is not None:
            target, source = rename_source_key(weight, renamings, takers, *about)
            if source in sources:
                after = source.rpartition("*")[2]
                number = weight.removesuffix(after).rpartition(".")[2]
                found.setdefault(target, {})[source, int(number)] = weight
    stacks = {}
    for target, layers in found.items():
        if any(weight in packed for weight in layers.values()):
            stack = stacks[target] = Stack([*sources[next(iter(layers))[0]].source_patterns], [])
            _collect(stack, layers, there, owner)
    return stacks


def stackable(conversion: Any) -> bool:
    """Whether a conversion makes one weight of the layers of experts."""
    if not merges_experts(conversion):
        return False
    return all(_PATTERN.fullmatch(source) for source in conversion.source_patterns) and not any(
        "\\" in target for target in conversion.target_patterns
    )


def _collect(stack: Stack, layers: dict[tuple[str, int], str], there: dict[str, None], owner: Owner) -> None:
    """Collects the layers, by source and number, of all experts. Raises ValueError for the first tensor that
    is missing: an optional one if any layer has it, one of `Owner.beside` if another expert has it."""
    parts = [part for part in owner.parts if part not in owner.optional]
    parts += [
        part for part in owner.optional if any(owner.stem(name) + part in there for name in layers.values())
    ]
    beside: dict[str, dict[str, None]] = {source: {} for source in stack.sources}
    for (source, _), name in layers.items():
        beside[source] |= {part: None for part in owner.beside if owner.stem(name) + part in there}
    (source, _), some = next(iter(layers.items()))
    before = some.removesuffix(source.rpartition("*")[2]).rpartition(".")[0]
    for e in range(1 + max(number for _, number in layers)):
        names = []
        for source in stack.sources:
            after = source.rpartition("*")[2]
            names.append(layers.get((source, e), f"{before}.{e}{after}"))
            for part in (*parts, *beside[source]):
                if owner.stem(names[-1]) + part not in there:
                    raise missing(owner.stem(names[-1]) + part)
        stack.weights.append(names)


class ReadStacked(Read):
    """Packs one weight of experts from packed layers. Dense ones are merged by transformers' operations.

    `items` maps patterns of tensors to those of the layers, and parts.
    """

    def __init__(
        self,
        config: NF4Config,
        errors: Errors,
        files: MappedFiles,
        operations: list[Any],
        items: dict[str, tuple[str, str]],
        stacks: dict[str, Stack],
    ) -> None:
        super().__init__(config, errors, files, items)
        self.operations, self.stacks = operations, stacks

    def __deepcopy__(self, memo: Any) -> Any:
        shared = self.operations, self.items, self.stacks
        return type(self)(self.config, self.errors, self.files, *shared)

    def convert(self, input_dict: dict[str, Any], *_: Any, **about: Any) -> dict[str, Any]:
        key: str = about["full_layer_name"]
        layer = about["model"].get_submodule(key.rpartition(".")[0])
        lists = {self.items[pattern]: found for pattern, found in input_dict.items()}
        codes = [tensor for found in lists.values() for tensor in found]
        if key in self.stacks or any(tensor.element_size() == 1 for tensor in codes):
            target: str = about["target_patterns"][0]
            return {key: self.guarded(key, layer, (lists, target))}
        found: Any = {source: [self._dense(tensor) for tensor in each] for (source, _), each in lists.items()}
        about["source_patterns"] = list(dict.fromkeys(source for source, _ in self.items.values()))
        for operation in self.operations:
            found = operation.convert(found, **about)
        return dict(found)

    def _convert(self, key: str, layer: Any, value: Any) -> nn.Parameter:
        lists, target = value
        owner, name = self.config.owner, key.rpartition(".")[2]
        assert owner is not None
        if not computes_experts(layer):
            raise self._packed(key, layer)
        stack = self.stacks.get(key)
        if stack is None:  # no layer has the tensors that mark packed ones
            (source, _), *_ = lists
            first = key.removesuffix(target) + source.replace("*", "0")
            raise missing(
                owner.stem(first) + next(each for each in owner.parts if (source, each) not in lists)
            )
        layout = Stacked(target, stack.sources, [], [])
        state = joined(self._read(stack, lists, layout, owner), len(stack.weights), key)
        expect_shape(key, tuple(getattr(layer, name).shape), state.shape)
        layer.stacks = {**(getattr(layer, "stacks", None) or {}), name: layout}
        return nn.Parameter(PackedWeight(state, getattr(layer, name).dtype), requires_grad=False)

    def _read(
        self, stack: Stack, lists: dict[tuple[str, str], list[Tensor]], layout: Stacked, owner: Owner
    ) -> Iterator[list[PackedState]]:
        """Yields the layers of one expert at a time, and releases the memory of earlier ones."""
        for e, weights in enumerate(stack.weights):
            found, asides = [], list[dict[str, Tensor]]()
            used: list[Tensor] = []
            for source, weight in zip(stack.sources, weights, strict=True):
                tensors = {part: each[e] for (other, part), each in lists.items() if other == source}
                state, aside = owner.read(tensors, weight)
                found.append(state)
                first = layout.asides[0][len(asides)] if layout.asides else {}
                asides.append({part: _same(tensor, first.get(part)) for part, tensor in aside.items()})
                used += tensors.values()
            layout.asides.append(asides)
            layout.rows = layout.rows or [state.shape[0] for state in found]
            yield found
            for tensor in used:
                self.files.release(tensor)


def _same(tensor: Tensor, first: Tensor | None) -> Tensor:
    """What the first expert's layer has, if it is equal, so that indices of groups are kept once."""
    alike = first is not None and first.dtype == tensor.dtype and not (first.is_meta or tensor.is_meta)
    return first if alike and first is not None and torch.equal(first, tensor) else tensor


def replaced(
    conversions: Iterable[Any],
    stacks: dict[str, Stack],
    config: NF4Config,
    errors: Errors,
    files: MappedFiles,
) -> list[tuple[Any, Any]]:
    """Pairs of a model's conversions and those to read with: conversions that merge experts take packed ones
    too."""
    pairs = []
    for conversion in conversions:
        new, owner = conversion, config.owner
        if owner is not None and not owner.experts and stackable(conversion):
            items = {
                source.removesuffix("weight") + part: (source, part)
                for source in conversion.source_patterns
                for part in dict.fromkeys(("weight", *owner.parts, *owner.beside))
            }
            operation = ReadStacked(config, errors, files, list(conversion.operations), items, stacks)
            new = conversion.copy(list(items), conversion.target_patterns, operations=[operation])
        pairs.append((conversion, new))
    return pairs

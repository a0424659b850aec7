"""Weight conversions of transformers for models with packed layers.

Some models split tensors of their files (q, k and v out of one), transpose or concatenate them, and undo that
when saved. Packed weights cannot be split or transposed: they are saved and read in the model's own layout,
under its own names, and so are dense weights that would be in one tensor with them. Conversions spare these.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from safetensors import safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    apply_converters,
)

from ...nf4 import packed_format
from ...nf4.bitsandbytes_format import STATE_ITEMS, TENSOR_ITEMS
from ...nf4.owners import Owner
from ...nf4.owners.owner import missing
from .config import NF4Config
from .conversion import Errors, Gather, Read, ReadExperts
from .mapped_files import MappedFiles

_OUR_ITEMS = (*packed_format.TENSOR_ITEMS, *packed_format.STATE_ITEMS)
_CONVERSIONS, _KEPT = "_weight_conversions", "_peft_kernels_weight_conversions"


def reading(config: NF4Config, errors: Errors, files: MappedFiles, sharded: bool = False) -> WeightConverter:
    """A converter that collects the items of a 4-bit weight. `sharded` leaves them in the mapped file, of
    which only a slice will be read."""
    if config.owner is None:
        parts = ["weight", *(f"weight.{item}" for item in (*TENSOR_ITEMS, *STATE_ITEMS, *_OUR_ITEMS))]
    else:
        parts = ["weight", *config.owner.parts, *config.owner.beside]
    # Whole names: a layer's own may contain one, as in `inject_weight.weight`.
    items = {rf"\.{re.escape(part)}$": part for part in parts}
    options = {"force_cpu": True} if sharded else {}
    return WeightConverter(list(items), ".weight", [Read(config, errors, files, items)], **options)


def reading_experts(
    names: Iterable[str], config: NF4Config, errors: Errors, files: MappedFiles
) -> list[WeightConverter]:
    """Converters that collect the items of packed experts by full names after renaming: the end of a name
    (`down_proj`) is not unique."""
    converters = []
    for name in names:
        suffixes = ["", *(f".{item}" for item in _OUR_ITEMS)]
        if config.owner is not None:
            suffixes = list(config.owner.parts)
        items = {f"^{re.escape(name + suffix)}$": suffix for suffix in suffixes}
        operation = ReadExperts(config, errors, files, items)
        converters.append(WeightConverter(list(items), name, [operation]))
    return converters


def names_in(files: Iterable[str]) -> list[str]:
    """Names of the tensors in a checkpoint."""
    names: list[str] = []
    for file in files:
        if str(file).endswith(".safetensors"):
            with safe_open(file, framework="pt") as opened:
                names += opened.keys()
    return names


def in_four_bits(names: Iterable[str], owner: Owner | None) -> tuple[set[str], set[str]]:
    """Names of the packed weights among those of a checkpoint's tensors, of layers and of experts: those with
    an item of the state, or a tensor that marks them in the owner's format. Raises ValueError for one without
    codes."""
    layers: set[str] = set()
    experts: set[str] = set()
    if owner is not None:
        found = experts if owner.experts else layers
        for weight, tensors in owner.weights(names).items():
            found.add(weight)
            codes = owner.stem(weight) + owner.codes
            if codes not in tensors:
                raise missing(codes)
    for item in (*STATE_ITEMS, *packed_format.STATE_ITEMS):
        found = experts if item in packed_format.EXPERTS_STATE_ITEMS else layers
        found |= {name.removesuffix(f".{item}") for name in names if name.endswith(f".{item}")}
    return layers, experts


@dataclass(frozen=True)
class TensorsOf:
    """Whether a name is that of a weight, of an item of one (`weight.absmax`), or another one."""

    weights: frozenset[str]
    others: frozenset[str]

    def __call__(self, name: str) -> bool:
        if name in self.others:
            return True
        while name and name not in self.weights:
            name = name.rpartition(".")[0]
        return bool(name)

    def __deepcopy__(self, memo: Any) -> TensorsOf:
        """transformers copies a conversion for each tensor that it makes."""
        return self


class Sparing(WeightConverter):
    """A conversion that leaves some tensors as they are."""

    __slots__ = ("spares",)
    spares: TensorsOf

    @classmethod
    def of(cls, conversion: WeightConverter, spares: TensorsOf) -> Sparing:
        sources, targets = conversion._original_source_patterns, conversion._original_target_patterns
        new = cls(list(sources), list(targets), list(conversion.operations), conversion.force_cpu)
        new.scope_prefix, new.base_model_prefix = conversion.scope_prefix, conversion.base_model_prefix
        new.spares = spares
        return new

    def copy(self, source_patterns: Any, target_patterns: Any, **kwargs: Any) -> Any:
        new: Any = super().copy(source_patterns, target_patterns, **kwargs)
        new.spares = self.spares
        return new

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        return (source_key, None) if self.spares(source_key) else super().rename_source_key(source_key)


def sparing(conversions: Iterable[Any], spares: TensorsOf) -> list[Any]:
    """The conversions; those that do more than renaming leave those tensors."""
    return [Sparing.of(each, spares) if isinstance(each, WeightConverter) else each for each in conversions]


def check_own(conversions: Iterable[Any], packed: Iterable[str], form: str) -> None:
    """Raises ValueError for a packed weight that the model would convert to another one."""
    packed = list(packed)
    for conversion in conversions:
        if isinstance(conversion, WeightConverter):
            copied = Sparing.of(conversion, TensorsOf(frozenset(), frozenset()))  # looking marks it as used
            for key in packed:
                new, pattern = copied.rename_source_key(key)
                if pattern is not None and new != key:
                    raise ValueError(
                        f"{key}: expected a dense weight, which this model converts to {new}, got {form}; "
                        "quantise the checkpoint in 16 bits"
                    )


def gathering(
    conversions: Iterable[Any], packs: Callable[[str], bool], files: MappedFiles
) -> list[tuple[Any, Any]]:
    """Pairs of a model's conversions and their replacements while experts are packed: conversions that merge
    experts are replaced by ones that leave merging to packing."""
    found = []
    for conversion in conversions:
        replacement = conversion
        if merges_experts(conversion):
            sources, targets = conversion._original_source_patterns, conversion._original_target_patterns
            gather = Gather(list(conversion.operations), packs, files)
            replacement = conversion.copy(list(sources), list(targets), operations=[gather])
        found.append((conversion, replacement))
    return found


def merges_experts(conversion: Any) -> bool:
    """Whether a conversion stacks experts, perhaps after concatenating parts of each."""
    operations = getattr(conversion, "operations", ())
    kinds = [(type(operation), getattr(operation, "dim", None)) for operation in operations]
    return kinds in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])


def forget_loading(model: Any, replaced: Iterable[tuple[Any, Any]]) -> None:
    """Restores the model's conversions after loading, without those that read packed weights: these are saved
    as they are."""
    conversions = getattr(model, _CONVERSIONS, None)
    if conversions:
        own = {id(replacement): conversion for conversion, replacement in replaced}
        found = [own.get(id(conversion), conversion) for conversion in conversions]
        vars(model)[_CONVERSIONS] = [each for each in found if not _reads_packed(each)]


def _reads_packed(conversion: Any) -> bool:
    return any(isinstance(operation, Read) for operation in getattr(conversion, "operations", ()))


def stored_together(model: Any, conversions: Iterable[Any]) -> list[set[str]]:
    """Sets of names of a model's tensors that have a tensor of a file in common."""
    back: list[Any] = [each.reverse_transform() for each in conversions if isinstance(each, WeightConverter)]
    back.reverse()
    found: dict[str, set[str]] = defaultdict(set)
    for named in (model.named_parameters, model.named_buffers) if back else ():
        for name, _ in named(remove_duplicate=False):
            stored, pattern = apply_converters(name, back)
            if pattern is not None:
                found[stored].add(name)
    return list(found.values())


def keep_own(model: Any, packed: set[str], items: Iterable[str] = ()) -> None:
    """Makes the next save keep the named weights in the model's own layout, and dense ones that would be in
    one tensor with them. `items` are tensors of packed weights under other names."""
    conversions = getattr(model, _CONVERSIONS, None)
    if conversions is None:  # as transformers does for a model that was not loaded
        found = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [each for each in found if not isinstance(each, PrefixChange)]
    if any(isinstance(each, WeightConverter) for each in conversions):
        own = packed.union(*(names for names in stored_together(model, conversions) if names & packed))
        vars(model)[_KEPT] = vars(model).get(_CONVERSIONS)
        vars(model)[_CONVERSIONS] = sparing(conversions, TensorsOf(frozenset(own), frozenset(items)))


def restore(model: Any) -> None:
    """Undoes `keep_own`."""
    if _KEPT in vars(model):
        vars(model)[_CONVERSIONS] = vars(model).pop(_KEPT)

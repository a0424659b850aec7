"""Weight conversions of transformers for models with packed layers.

Some models split tensors of their files (q, k and v out of one), transpose or concatenate them, and undo that
when saved. Packed weights cannot be split or transposed: they are saved and read in the model's own layout,
under its own names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from safetensors import safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, PrefixChange, WeightConverter

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
        items = ["", *(f".{item}" for item in (*TENSOR_ITEMS, *STATE_ITEMS, *_OUR_ITEMS))]
        parts = [f"weight{item}" for item in items]
    else:
        parts = ["weight", *config.owner.parts, *config.owner.beside]
    options = {"force_cpu": True} if sharded else {}
    return WeightConverter(list(dict.fromkeys(parts)), "weight", [Read(config, errors, files)], **options)


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


def to_read(conversions: Iterable[Any], packed: set[str], form: str) -> list[Any]:
    """A model's conversions without those of weights that are packed under the model's own names.

    Raises ValueError for a packed weight that the model would convert.
    """
    kept = []
    for conversion in conversions:
        own = False
        for key in packed if isinstance(conversion, WeightConverter) else ():
            new, pattern = conversion.rename_source_key(key)
            if pattern is not None and new != key:
                raise ValueError(
                    f"{key}: expected a dense weight, which this model converts to {new}, got {form}; "
                    "quantise the checkpoint in 16 bits"
                )
            own = own or pattern is not None
        if not own:
            kept.append(conversion)
    return kept


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


def forget_loading(model: Any, gathered: Iterable[tuple[Any, Any]]) -> None:
    """Restores the model's conversions after loading, without those for packed experts, which are saved as
    they are."""
    conversions = getattr(model, _CONVERSIONS, None)
    if conversions:
        own = {id(replacement): conversion for conversion, replacement in gathered}
        vars(model)[_CONVERSIONS] = [own.get(id(c), c) for c in conversions if not _reads_experts(c)]


def _reads_experts(conversion: Any) -> bool:
    operations = getattr(conversion, "operations", ())
    return any(isinstance(operation, ReadExperts) for operation in operations)


def keep_own(model: Any, packed: set[str]) -> None:
    """Makes the next save keep the named weights in the model's own layout."""
    conversions = getattr(model, _CONVERSIONS, None)
    if conversions is None:  # as transformers does for a model that was not loaded
        found = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [each for each in found if not isinstance(each, PrefixChange)]
    kept = [each for each in conversions if not _touches(each, packed)]
    if len(kept) < len(conversions):
        vars(model)[_KEPT] = vars(model).get(_CONVERSIONS)
        vars(model)[_CONVERSIONS] = kept


def restore(model: Any) -> None:
    """Undoes `keep_own`."""
    if _KEPT in vars(model):
        vars(model)[_CONVERSIONS] = vars(model).pop(_KEPT)


def _touches(conversion: Any, packed: set[str]) -> bool:
    if not isinstance(conversion, WeightConverter):
        return False
    if any(isinstance(operation, Read) for operation in conversion.operations):
        return False
    reverse = conversion.reverse_transform()
    return any(reverse.rename_source_key(name)[1] is not None for name in packed)

"""In which layout the layers of a model stand in its file.

Some models of transformers cut tensors of their files into layers (q, k and v out of one), turn them, or glue
them together, and undo that when they are saved. 4 bits cannot be cut or turned: packed layers are saved as
the model has them, under the model's own names, and read back so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from safetensors import safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, PrefixChange, WeightConverter

from ...nf4 import experts_format
from ...nf4.bitsandbytes_format import STATE_ITEM, STATE_PREFIX, TENSOR_ITEMS
from .config import NF4Config
from .conversion import Errors, Gather, Read, ReadExperts
from .mapped_files import MappedFiles

_FP4 = f"{STATE_PREFIX}fp4"  # read so that it can be refused
_CONVERSIONS, _KEPT = "_weight_conversions", "_peft_kernels_weight_conversions"


def reading(config: NF4Config, errors: Errors, files: MappedFiles, cut: bool = False) -> WeightConverter:
    """What collects the items of a weight in 4 bits; `cut`: as they lie in the file, of which a part is to be
    read."""
    items = ["weight", *(f"weight.{item}" for item in (*TENSOR_ITEMS, STATE_ITEM, _FP4))]
    options = {"force_cpu": True} if cut else {}
    return WeightConverter(items, "weight", [Read(config, errors, files)], **options)


def reading_experts(
    names: Iterable[str], config: NF4Config, errors: Errors, files: MappedFiles
) -> list[WeightConverter]:
    """What collects the items of packed experts, by the names that they have once all are renamed: the end of
    a name (`down_proj`) is that of other layers too."""
    converters = []
    for name in names:
        suffixes = ["", *(f".{item}" for item in (*experts_format.TENSOR_ITEMS, experts_format.STATE_ITEM))]
        items = {f"^{re.escape(name + suffix)}$": suffix for suffix in suffixes}
        operation = ReadExperts(config, errors, files, items)
        converters.append(WeightConverter(list(items), name, [operation]))
    return converters


def in_four_bits(files: Iterable[str], item: str = STATE_ITEM) -> set[str]:
    """Names of the weights that are in 4 bits in a checkpoint, and have an item of that name."""
    suffix, found = f".{item}", set()
    for file in files:
        if str(file).endswith(".safetensors"):
            with safe_open(file, framework="pt") as opened:
                keys = list(opened.keys())
            found |= {key.removesuffix(suffix) for key in keys if key.endswith(suffix)}
    return found


def to_read(conversions: Iterable[Any], packed: set[str]) -> list[Any]:
    """A model's conversions but for those of weights that are in 4 bits under the model's own names.

    ValueError for a weight in 4 bits that the model wants cut into others.
    """
    kept = []
    for conversion in conversions:
        own = False
        for key in packed if isinstance(conversion, WeightConverter) else ():
            new, pattern = conversion.rename_source_key(key)
            if pattern is not None and new != key:
                raise ValueError(
                    f"{key}: expected a dense weight, which this model converts to {new}, got 4 bits; "
                    "quantise the checkpoint in 16 bits"
                )
            own = own or pattern is not None
        if not own:
            kept.append(conversion)
    return kept


def gathering(
    conversions: Iterable[Any], packs: Callable[[str], bool], files: MappedFiles
) -> list[tuple[Any, Any]]:
    """A model's conversions, each with what is to stand for it while experts are packed: of those that merge
    experts, stacked and one below the other, one that leaves merging to packing."""
    found = []
    for conversion in conversions:
        stands_for = conversion
        if merges_experts(conversion):
            sources, targets = conversion._original_source_patterns, conversion._original_target_patterns
            gather = Gather(list(conversion.operations), packs, files)
            stands_for = conversion.copy(list(sources), list(targets), operations=[gather])
        found.append((conversion, stands_for))
    return found


def merges_experts(conversion: Any) -> bool:
    """Whether a conversion puts experts on top of each other, in each of them one part below the other."""
    operations = getattr(conversion, "operations", ())
    kinds = [(type(operation), getattr(operation, "dim", None)) for operation in operations]
    return kinds in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])


def forget_loading(model: Any, gathered: Iterable[tuple[Any, Any]]) -> None:
    """After loading: the model's own conversions for those of `gathering`, and none for packed experts, which
    are written as they are."""
    conversions = getattr(model, _CONVERSIONS, None)
    if conversions:
        own = {id(stands_for): conversion for conversion, stands_for in gathered}
        vars(model)[_CONVERSIONS] = [own.get(id(c), c) for c in conversions if not _reads_experts(c)]


def _reads_experts(conversion: Any) -> bool:
    operations = getattr(conversion, "operations", ())
    return any(isinstance(operation, ReadExperts) for operation in operations)


def keep_own(model: Any, packed: set[str]) -> None:
    """Have the next save leave the named weights in the layout that the model has."""
    conversions = getattr(model, _CONVERSIONS, None)
    if conversions is None:  # as transformers takes them for a model that was not loaded
        found = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [each for each in found if not isinstance(each, PrefixChange)]
    kept = [each for each in conversions if not _touches(each, packed)]
    if len(kept) < len(conversions):
        vars(model)[_KEPT] = vars(model).get(_CONVERSIONS)
        vars(model)[_CONVERSIONS] = kept


def restore(model: Any) -> None:
    """Undo `keep_own`."""
    if _KEPT in vars(model):
        vars(model)[_CONVERSIONS] = vars(model).pop(_KEPT)


def _touches(conversion: Any, packed: set[str]) -> bool:
    if not isinstance(conversion, WeightConverter):
        return False
    if any(isinstance(operation, Read) for operation in conversion.operations):
        return False
    reverse = conversion.reverse_transform()
    return any(reverse.rename_source_key(name)[1] is not None for name in packed)

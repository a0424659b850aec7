"""Maps names of tensors in a checkpoint to transformers' names in a model, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Names:
    """Names of one model. Call `in_model` for all names of the checkpoint before `written`.

    Attributes
    ----------
    order : callable
        Sort key of transformers for names before it collects the parts of a tensor.
    """

    order: Callable[[str], Any]

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        self._prefix, self._there = model.base_model_prefix, dict.fromkeys(model.state_dict(), True)
        self.order, self._rename = dot_natural_key, rename_source_key
        transforms = get_model_conversion_mapping(model)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]

    def in_model(self, name: str) -> tuple[str, str | None]:
        """The name in the model, and the pattern of the converter that takes the tensor, if any."""
        about = self._prefix, self._there
        found, pattern = self._rename(name, self._renamings, self._converters, *about)
        if found not in self._there and name in self._there:  # already the model's own name
            found, pattern = self._rename(name, [], [], *about)
        return found, pattern

    def converter(self, pattern: str) -> Any:
        """The converter with this pattern; as in transformers, the last one."""
        return next(each for each in reversed(self._converters) if pattern in each.source_patterns)

    def written(self, name: str) -> str:
        """The name under which `save_pretrained` saves an unconverted tensor of this model."""
        for renaming in reversed(self._renamings):
            if renaming.was_used():
                name, _ = renaming.reverse_transform().rename_source_key(name)
        return name

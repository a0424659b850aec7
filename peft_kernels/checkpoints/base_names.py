"""Maps the layers and parameters that an adapter names to tensors in a model's folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from ..nf4.experts_packing import computes_experts
from .architecture import compare_with, on_meta
from .checks import nf4_weights
from .experts_tensors import ExpertsWeight, find
from .folder import Checkpoint
from .names import Names
from .owned_entries import as_dense
from .rows import read_layout


@dataclass(frozen=True)
class Kind:
    """Kind of a layer into which LoRA can be merged."""

    transposed: bool
    """Whether its weight is (in_features, out_features)."""


class BaseNames:
    """Names in a model's folder. Reads no values but single numbers.

    Attributes
    ----------
    checkpoint : Checkpoint
        Without packed weights in owners' formats: these are as the dense ones that they stand for.
    files : dict
        Names in the files of tensors that are stored unconverted; for packed weights, of the codes.
    packed : dict
        Packed weights with all their items, by names in the files.
    what, source : str
        The base, for messages; and how its layers were determined.
    embeddings : set
        Paths of token embeddings and output heads.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._model: Any = None
        try:
            self._model, why_not = on_meta(checkpoint), ""
        except Exception as error:  # transformers raises anything on a configuration that it does not know
            why_not = " ".join(str(error).split())[:100] or type(error).__name__
        self.known = self._model is not None
        checkpoint = self.checkpoint = as_dense(checkpoint, self._model)
        self.packed = nf4_weights(checkpoint.entries)
        items = {item for weight, names in self.packed.items() for item in names if item != weight}
        self.files: dict[str, str] = {}
        self.embeddings: set[str] = set()
        self._forms: dict[str, tuple[int, ...]] = {}
        if self._model is None:
            self.what = f"an architecture that transformers does not know ({why_not})"
            self.source = f"names, as transformers does not know it ({why_not})"
            self.files = {name: name for name in checkpoint.entries if name not in items}
            return
        self.what = type(self._model).__name__
        self.source = f"{self.what} of transformers"
        self._names, self._modules = Names(self._model), dict(self._model.named_modules())
        self._parameters = dict(self._model.named_parameters(remove_duplicate=False))
        for name in sorted(checkpoint.entries.keys() - items):
            target, pattern = self._names.in_model(name)
            if pattern is None:
                self.files[target] = name
        for get in ("get_input_embeddings", "get_output_embeddings"):
            module = getattr(self._model, get)()
            self.embeddings |= {path for path, other in self._modules.items() if other is module}

    def faults(self) -> list[str]:
        """Missing tensors, and ones of other shapes than the architecture's."""
        return compare_with(self.checkpoint, self._model).faults if self.known else []

    # Modules and parameters, by paths in adapters.

    def module_path(self, path: str) -> str | None:
        """The path of a module in the model, or None."""
        if self._model is None:
            return path if f"{path}.weight" in self.files else None
        if path in self._modules:
            return path
        found = self._names.in_model(f"{path}.weight")[0].removesuffix(".weight")
        return found if found in self._modules else None

    def module(self, path: str) -> nn.Module | None:
        return None if self._model is None else self._modules[path]

    def parameter_path(self, name: str) -> str:
        if self._model is None or name in self._parameters:
            return name
        return self._names.in_model(name)[0]

    def kind_of(self, module: nn.Module | None, embedding: bool, fan_in_fan_out: bool) -> Kind | None:
        """The kind of a module, or None if LoRA cannot be merged into it. Like PEFT, determines transposition
        by class."""
        if module is None:
            return None if embedding else Kind(fan_in_fan_out)
        if embedding:
            return Kind(True) if isinstance(module, nn.Embedding) else None
        if isinstance(module, nn.Linear):
            return Kind(False)
        return Kind(True) if type(module).__name__ == "Conv1D" else None

    def tied_with(self, name: str) -> list[str]:
        """Names of parameters that share the tensor."""
        if self._model is None or name not in self._parameters:
            return []
        tensor = self._parameters[name]
        return [other for other, there in self._parameters.items() if there is tensor and other != name]

    # What an adapter must contain according to its configuration.

    def targeted(self, config: dict[str, Any]) -> Iterator[str]:
        """Paths of the layers that PEFT wraps, if the configuration names them by suffixes only."""
        targets, parameters = config.get("target_modules"), config.get("target_parameters") or []
        restricted = any(config.get(name) for name in ("exclude_modules", "modules_to_save"))
        restricted = restricted or config.get("layers_to_transform") is not None
        if self._model is None or restricted:
            return
        ends = tuple(f".{target}" for target in targets) if isinstance(targets, list) else ()
        parameter_ends = tuple(f".{target}" for target in parameters)
        for path, module in self._modules.items():
            of_module = f".{path}".endswith(ends) and self.kind_of(module, False, False) is not None
            names = (name for name, _ in module.named_parameters(recurse=False))
            if of_module or any(f".{path}.{name}".endswith(parameter_ends) for name in names):
                yield path

    def saved(self, config: dict[str, Any]) -> Iterator[str]:
        """Names of the parameters of `modules_to_save`."""
        saved = tuple(config.get("modules_to_save") or ())
        for path, module in self._modules.items() if self._model is not None and saved else ():
            if path.endswith(saved):
                for name, _ in module.named_parameters():
                    yield f"{path}.{name}"

    # Files.

    def is_packed(self, file_name: str) -> bool:
        return file_name in self.packed

    def shape_of(self, file_name: str) -> tuple[int, ...]:
        """The shape of a tensor; of a packed weight, its dense shape."""
        if file_name not in self.packed:
            return self.checkpoint.entries[file_name].shape
        if file_name not in self._forms:
            state, _ = read_layout(self.checkpoint, file_name, self.packed[file_name])
            self._forms[file_name] = tuple(state.shape)
        return self._forms[file_name]

    def experts(self, name: str) -> ExpertsWeight | None:
        """A weight of experts that the files store in parts."""
        return self._experts.get(name)

    @cached_property
    def transposed(self) -> set[str]:
        """Names in the files of packed weights that the model has as (in_features, out_features)."""
        found = set()
        for name, file_name in self.files.items() if self.known else ():
            module = self._modules.get(name.rpartition(".")[0])
            transposed = type(module).__name__ == "Conv1D" or getattr(module, "is_transposed", False)
            if file_name in self.packed and transposed:
                found.add(file_name)
        return found

    @cached_property
    def _experts(self) -> dict[str, ExpertsWeight]:
        modules = {path: module for path, module in self._modules.items() if computes_experts(module)}
        return find(self.checkpoint, self._model, modules, self._names)

    def written(self, name: str) -> str:
        """The name that a new parameter gets in the files."""
        return self._names.written(name)

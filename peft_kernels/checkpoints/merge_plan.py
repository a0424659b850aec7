"""Plans which tensors of a base an adapter changes, and how, before any is read."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ..core.code_tables import WEIGHT_DTYPES
from ..core.wrong_types import an
from .base_names import BaseNames
from .changes import AddedBias, Both, Change, Experts, LowRank, Replaced
from .folder import Checkpoint
from .header import CheckpointError, Entry, shown
from .lora_folder import CONFIG, WEIGHTS, LoraFolder, scaling_of
from .mergeable import WITH_PEFT

_BASE_LAYER = ".base_layer"


@dataclass
class Plan:
    base: Checkpoint
    """As `BaseNames.checkpoint`."""
    source: str
    """How the base's tensors were determined."""
    packed: dict[str, list[str]]
    """Packed weights of the base with their items."""
    changes: dict[str, Change | Experts] = field(default_factory=dict)
    """Changes by names in the base's files."""
    added: dict[str, tuple[Entry, Change | None]] = field(default_factory=dict)
    """New tensors for weights that were tied: the base's tensor and its change."""
    transposed: set[str] = field(default_factory=set)
    """Packed weights that the model has as (in_features, out_features); packed ones never are."""
    untied: bool = False
    """Whether tied weights become separate."""


def plan_merge(checkpoint: Checkpoint, folder: LoraFolder, partial: bool = False) -> Plan:
    """The plan. Raises CheckpointError if the adapter does not fit the base or cannot be merged; and unless
    `partial`, if the base lacks tensors of its architecture."""
    base = BaseNames(checkpoint)
    faults = [] if partial else base.faults()
    if faults:
        more = f"; {len(faults) - 1} more such faults" if len(faults) > 1 else ""
        raise CheckpointError(f"{faults[0]}{more} (--partial merges into what is there)")
    plan = Plan(base.checkpoint, base.source, base.packed, transposed=base.transposed)
    _Planner(base, folder, plan).run()
    return plan


class _Planner:
    def __init__(self, base: BaseNames, folder: LoraFolder, plan: Plan) -> None:
        self._base, self._folder, self._plan = base, folder, plan
        self._config = folder.config

    def run(self) -> None:
        self._check_complete()
        wrapped: dict[str, dict[str, dict[str, Entry]]] = {}
        for path, parts in self._folder.layers.items():
            bare = path
            while bare.endswith(_BASE_LAYER):
                bare = bare[: -len(_BASE_LAYER)]
            wrapped.setdefault(bare, {})[path] = parts
        for path, wrappers in wrapped.items():
            self._layer(path, wrappers)
        for name, entry in self._folder.plain.items():
            self._replace(name, entry)
        self._untie()

    # LoRA on modules and parameters.

    def _layer(self, path: str, wrappers: dict[str, dict[str, Entry]]) -> None:
        here = self._base.module_path(path)
        if here is None:
            raise CheckpointError(f"{WEIGHTS}: {shown(path)}: expected a layer of {self._base.what}")
        module = self._base.module(here)
        parameters = self._parameters(here, module)
        if parameters:
            paths = [path + _BASE_LAYER * depth for depth in reversed(range(len(parameters)))]
            if set(paths) != wrappers.keys():
                expected = f"adapters of {', '.join(parameters)}"
                raise CheckpointError(
                    f"{WEIGHTS}: {shown(path)}: expected {expected}, as target_parameters has them, "
                    f"got {len(wrappers)}"
                )
            for wrapper, name in zip(paths, parameters, strict=True):
                self._parameter(here, module, name, wrappers[wrapper])
            return
        if wrappers.keys() != {path}:
            raise CheckpointError(f"{WEIGHTS}: {shown(path)}: expected one adapter, got {len(wrappers)}")
        self._module(here, module, wrappers[path])

    def _parameters(self, path: str, module: nn.Module | None) -> list[str]:
        """Parameters that PEFT wraps, innermost first."""
        targets = self._config.get("target_parameters") or []
        if module is None:
            return []
        ends = tuple(f".{target}" for target in targets)
        names = [name for name, _ in module.named_parameters(recurse=False)]
        return [name for name in names if f".{path}.{name}".endswith(ends)]

    def _module(self, path: str, module: nn.Module | None, parts: dict[str, Entry]) -> None:
        name, embedding = f"{path}.weight", "embedding_a" in parts
        kind = self._base.kind_of(module, embedding, bool(self._config.get("fan_in_fan_out")))
        if kind is None:
            expected = "an embedding" if embedding else "a linear layer"
            got = an(module) if module is not None else f"one in {self._base.what}"
            raise CheckpointError(f"{WEIGHTS}: {shown(path)}: expected {expected}, got {got}{WITH_PEFT}")
        a, b = (parts["embedding_a"], parts["embedding_b"]) if embedding else (parts["a"], parts["b"])
        r, out_features, in_features = a.shape[0], b.shape[0], a.shape[1]
        _expect(b, (out_features, r))
        if "magnitude" in parts:
            _expect(parts["magnitude"], (out_features,))
        file_name = self._found(name)
        shape = (in_features, out_features) if kind.transposed else (out_features, in_features)
        if file_name in self._plan.transposed:
            kind, shape = replace(kind, transposed=False), (out_features, in_features)
        self._fits(file_name, path, shape)
        scaling = scaling_of(self._config, path, r)
        magnitude = parts.get("magnitude")
        self._change(name, LowRank(a, b, scaling, magnitude, kind.transposed, rounded=embedding))
        if "bias" in parts:
            _expect(parts["bias"], (out_features,))
            self._found(f"{path}.bias")
            self._change(f"{path}.bias", AddedBias(parts["bias"], scaling))

    def _parameter(self, path: str, module: Any, name: str, parts: dict[str, Entry]) -> None:
        full = f"{path}.{name}"
        if set(parts) != {"a", "b"}:
            raise CheckpointError(f"{WEIGHTS}: {shown(full)}: expected a, b, got {', '.join(sorted(parts))}")
        a, b, shape = parts["a"], parts["b"], tuple(module._parameters[name].shape)
        if len(shape) == 2:
            _expect(a, (a.shape[0], shape[1]))
            _expect(b, (shape[0], a.shape[0]))
            self._fits(self._found(full), full, shape)
            self._change(full, LowRank(a, b, scaling_of(self._config, full, a.shape[0]), rounded=True))
            return
        if len(shape) != 3:
            raise CheckpointError(f"{WEIGHTS}: {shown(full)}: expected a parameter of 2 or 3 dimensions")
        transposed = bool(getattr(module, "is_transposed", False))
        experts, out_features, in_features = (shape[0], *(shape[:0:-1] if transposed else shape[1:]))
        r = a.shape[0] // experts
        _expect(a, (r * experts, in_features))
        _expect(b, (out_features, r * experts))
        scaling = scaling_of(self._config, full, r)
        self._experts(full, Experts(a, b, scaling, experts, transposed))

    def _experts(self, name: str, change: Experts) -> None:
        """Plans the change of experts that the file stores whole or in parts."""
        file_name = self._base.files.get(name)
        if file_name is not None:
            if file_name in self._plan.transposed:
                change = replace(change, transposed=False)
            one = (change.b.shape[0], change.a.shape[1])
            self._fits(file_name, name, (change.experts, *(one[::-1] if change.transposed else one)))
            self._change(name, change)
            return
        weight = self._base.experts(name)
        if weight is None:
            self._found(name)
            return
        weight.check()
        if not weight.merges:
            raise CheckpointError(
                f"{name}: expected experts that lie in the files as they are or apart, got ones that "
                f"transformers converts as a whole{WITH_PEFT}"
            )
        for expert, entries in enumerate(zip(*weight.parts.values(), strict=True)):
            start = 0
            for entry in entries:
                rows = change.of_expert(expert, start, start + entry.shape[0])
                self._plan.changes[entry.name] = rows
                start += entry.shape[0]

    # Tensors that are replaced.

    def _replace(self, name: str, entry: Entry) -> None:
        here = self._base.parameter_path(name)
        if not self._base.known and not here.endswith(".bias"):
            raise CheckpointError(
                f"{WEIGHTS}: {shown(entry.name)}: expected an architecture that transformers knows, "
                f"got {self._base.what}"
            )
        if not self._may_replace(here):
            raise CheckpointError(
                f"{WEIGHTS}: {shown(entry.name)}: expected LoRA, a tensor of modules_to_save, an embedding, "
                "or a bias where `bias` has them"
            )
        tied = self._base.tied_with(here)
        file_name = self._base.files.get(here) or next(
            (self._base.files[other] for other in tied if other in self._base.files), None
        )
        if file_name is None:
            raise CheckpointError(
                f"{WEIGHTS}: {shown(entry.name)}: expected a tensor that the base has, too, got none of this "
                f"name in {self._base.what}; give the folder of a model with the head that was trained"
            )
        shape = self._base.shape_of(file_name)
        if entry.shape != shape or self._base.is_packed(file_name):
            expected = f"shape {shape}" if entry.shape != shape else "no replacement of a weight in 4 bits"
            raise CheckpointError(
                f"{WEIGHTS}: {shown(entry.name)}: expected {expected}, as the base has it, got {entry.shape} "
                "(a vocabulary that was resized must be so in the base)"
            )
        if tied and self._config.get("ensure_weight_tying"):
            raise CheckpointError(f"{CONFIG}: ensure_weight_tying: expected none in an adapter to merge")
        self._plan.untied = self._plan.untied or bool(tied)
        if here in self._base.files:
            self._change(here, Replaced(entry), shared=True)
        else:
            source = self._base.checkpoint.entries[file_name]
            self._plan.added[self._base.written(here)] = (source, Replaced(entry))

    def _may_replace(self, name: str) -> bool:
        owner, _, item = name.rpartition(".")
        if item == "bias" and self._config.get("bias", "none") != "none":
            return True
        saved = self._config.get("modules_to_save") or []
        paths = owner.split(".")
        parents = [".".join(paths[: i + 1]) for i in range(len(paths))]
        if any(parent.endswith(module) for parent in parents for module in saved):
            return True
        return item == "weight" and owner in self._base.embeddings

    def _untie(self) -> None:
        """Stores the old value of weights whose tied twin is replaced, under their own names."""
        for name in [name for name, change in self._replaced().items() if isinstance(change, Replaced)]:
            for other in self._base.tied_with(name):
                written = self._base.written(other)
                if other not in self._base.files and written not in self._plan.added:
                    entry = self._base.checkpoint.entries[self._base.files[name]]
                    self._plan.added[written] = (entry, None)

    def _replaced(self) -> dict[str, Change | Experts]:
        in_model = {file_name: name for name, file_name in self._base.files.items()}
        return {in_model[name]: change for name, change in self._plan.changes.items() if name in in_model}

    # Shared checks.

    def _found(self, name: str) -> str:
        file_name = self._base.files.get(name)
        if file_name is not None:
            return file_name
        if self._base.tied_with(name):
            self._refuse_tied(name)
        raise CheckpointError(
            f"{WEIGHTS}: {shown(name)}: expected a tensor of this name in {self._base.what}, got none"
        )

    def _fits(self, file_name: str, name: str, shape: tuple[int, ...]) -> None:
        there = self._base.shape_of(file_name)
        if there != shape:
            raise CheckpointError(
                f"{WEIGHTS}: {shown(name)}: expected an adapter for a weight of shape {there}, "
                f"got one for {shape}"
            )

    def _change(self, name: str, change: Change | Experts, shared: bool = False) -> None:
        if not shared and self._base.tied_with(name):
            self._refuse_tied(name)
        file_name = self._base.files[name]
        dtype = self._base.checkpoint.entries[file_name].dtype
        if dtype not in WEIGHT_DTYPES and not self._base.is_packed(file_name):
            raise CheckpointError(f"{file_name}: expected float32, bfloat16 or float16, got {dtype}")
        before = self._plan.changes.get(file_name)
        if isinstance(before, LowRank) and isinstance(change, Replaced):
            change = Both(change, before)  # PEFT saves embeddings with their LoRA
        elif before is not None:
            raise CheckpointError(f"{WEIGHTS}: {shown(name)}: expected one change of a tensor, got two")
        self._plan.changes[file_name] = change

    def _refuse_tied(self, name: str) -> None:
        other = self._base.tied_with(name)[0]
        raise CheckpointError(
            f"{WEIGHTS}: {shown(name)}: expected a weight of its own, got one that {other} shares: merging "
            "would change that, too; save the base with tie_word_embeddings=False first"
        )

    def _check_complete(self) -> None:
        """Raises CheckpointError for tensors that the configuration implies and the file lacks."""
        for path in self._base.targeted(self._config):
            if path not in self._folder.layers:
                raise CheckpointError(
                    f"{WEIGHTS}: expected an adapter for {shown(path)}, as target_modules has it, got none"
                )
        for name in self._base.saved(self._config):
            if name not in self._folder.plain:
                raise CheckpointError(
                    f"{WEIGHTS}: expected {shown(name)}, as modules_to_save has it, got none"
                )


def _expect(entry: Entry, shape: tuple[int, ...]) -> None:
    if entry.shape != shape:
        raise CheckpointError(f"{WEIGHTS}: {shown(entry.name)}: expected shape {shape}, got {entry.shape}")

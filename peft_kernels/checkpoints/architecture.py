"""Builds the architecture that config.json names on the meta device, and compares a checkpoint with it."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .checks import nf4_weights, quantised_otherwise, read_nf4
from .folder import Checkpoint
from .header import CheckpointError, shown
from .json_file import read_json
from .names import Names
from .owned import joined_stack, owned_stacks, owned_weights, owner_in, read_owned

ADAPTER = "adapter_config.json"


def on_meta(checkpoint: Checkpoint) -> Any:
    """The model on the meta device. transformers may raise anything for an unknown configuration."""
    import transformers

    # The named class rather than an Auto class: a classifier has the same model_type.
    config = transformers.AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
    config.__dict__.pop("quantization_config", None)
    cls = getattr(transformers, _class_named(checkpoint) or "", None)
    with torch.device("meta"):
        if cls is None:
            return transformers.AutoModel.from_config(config)
        return cls._from_config(config)


def of_an_adapter(folder: Path) -> str:
    """What to do with a folder that has an adapter's configuration, and no model's."""
    try:
        config = read_json(folder / ADAPTER, 10_000_000)
    except CheckpointError:
        config = None
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    return f"an adapter, expected a model; its base is {shown(base) if base else 'not named'}"


class Comparison(NamedTuple):
    """Result of comparing a checkpoint with the architecture that config.json names."""

    faults: list[str]
    """A message for each missing tensor and each one of another shape."""
    model: str = ""
    """The class of the architecture, or "" if not compared."""
    reason: str = ""
    """Why it was not compared."""


def compare(checkpoint: Checkpoint) -> Comparison:
    if not checkpoint.path.is_dir():
        return Comparison([], reason="a file has no configuration")
    if not checkpoint.config and (checkpoint.path / ADAPTER).is_file():
        return Comparison([], reason=of_an_adapter(checkpoint.path))
    method = quantised_otherwise(checkpoint.config)
    if method and owner_in(checkpoint.config) is None:
        return Comparison([], reason=f"it is quantised by {method}, which has other tensors")
    try:
        model = on_meta(checkpoint)
    except Exception as error:
        return Comparison([], reason=str(error).strip().partition("\n")[0] or type(error).__name__)
    return compare_with(checkpoint, model)


def compare_with(checkpoint: Checkpoint, model: Any) -> Comparison:
    """`model` is on the meta device."""
    names, name = Names(model), type(model).__name__
    if _class_named(checkpoint) not in (None, name):
        return Comparison([], reason=f"transformers has no {shown(_class_named(checkpoint))}")
    state = model.state_dict()
    wanted = {key: tuple(tensor.shape) for key, tensor in state.items()}
    found: dict[str, tuple[int, ...] | None] = {}
    faults: list[str] = []
    converters: dict[str, Any] = {}
    packed = {*nf4_weights(checkpoint.entries), *owned_weights(checkpoint)}
    for key, shape in sorted(_shapes(checkpoint).items(), key=lambda item: names.order(item[0])):
        target, pattern = names.in_model(key)
        entry = checkpoint.entries.get(key)  # none of a weight whose tensors have other names
        if pattern is not None:
            converter = converters.setdefault(target, copy.deepcopy(names.converter(pattern)))
            dtype = torch.uint8 if entry is None else entry.dtype
            part = torch.empty(shape or (), dtype=dtype, device="meta")
            converter.add_tensor(target, key, pattern, part)
            continue
        found[target] = shape
        if target in state:
            faults += _faults_of(key, shape, entry, state[target], name, key in packed)
    try:
        stacks = owned_stacks(checkpoint, model)
    except CheckpointError as error:
        return Comparison([*faults, str(error)], name)
    for target, stack in stacks.items():
        converters.pop(target, None)
        try:
            shape = found[target] = _joined_shape(checkpoint, stack, target)
        except CheckpointError as error:
            faults.append(str(error))
            shape = found[target] = None
        if shape is not None and shape != wanted.get(target, shape):
            faults.append(f"{target}: expected shape {wanted[target]}, as {name} has it, got {shape}")
    for target, converter in converters.items():
        try:
            made = converter.convert(target, model=model, config=model.config)
        except Exception:  # operations of transformers may need values, and raise anything
            return Comparison(faults, reason=f"transformers cannot convert {target} without values")
        for key, value in made.items():
            shape = tuple((value[0] if isinstance(value, list) else value).shape)
            found[key] = shape
            if shape != wanted.get(key, shape):
                expected = f"expected parts of a tensor of shape {wanted[key]}, as {name} has it"
                faults.append(f"{shown(key)}: {expected}, got ones of {shape}")
    faults += [
        f"{key}: expected this tensor, as {name} has it, got none" for key in _missing(model, wanted, found)
    ]
    return Comparison(faults, name)


def _faults_of(
    key: str, shape: tuple[int, ...] | None, entry: Any, wanted: torch.Tensor, name: str, packed: bool
) -> Iterator[str]:
    """How a tensor differs from the one that the architecture `name` has in its place."""
    if shape is not None and not _fits(shape, tuple(wanted.shape), () if entry is None else entry.shape):
        yield f"{shown(key)}: expected shape {tuple(wanted.shape)}, as {name} has it, got {shape}"
    if wanted.is_floating_point() and entry is not None and not packed and not entry.dtype.is_floating_point:
        yield f"{shown(key)}: expected a floating dtype, as {name} has it, got {entry.dtype}"


def _class_named(checkpoint: Checkpoint) -> str | None:
    names = checkpoint.config.get("architectures")
    first = names[0] if isinstance(names, list) and names else None
    return first if isinstance(first, str) else None


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...] | None]:
    """Shapes of the weights, of packed ones as dense; None for those that cannot be read."""
    quantised, owned = nf4_weights(checkpoint.entries), owned_weights(checkpoint)
    items = {item for names in (*quantised.values(), *owned.values()) for item in names}
    found: dict[str, tuple[int, ...] | None] = {
        name: entry.shape for name, entry in checkpoint.entries.items() if name not in items
    }
    for weight, names in quantised.items():
        if weight in checkpoint.entries:
            try:
                found[weight] = tuple(read_nf4(checkpoint, weight, names, codes=False)[0].shape)
            except CheckpointError:  # reported by `checks`
                found[weight] = None
    for weight, names in owned.items():
        try:
            found[weight] = tuple(read_owned(checkpoint, weight, names).shape)
        except CheckpointError:
            found[weight] = None
    return found


def _joined_shape(checkpoint: Checkpoint, stack: Any, name: str) -> tuple[int, ...] | None:
    """Of a weight of experts; None if a layer cannot be read, which `checks` reports. Raises CheckpointError
    for layers that do not fit."""
    owned = owned_weights(checkpoint)
    try:
        layers = {one: read_owned(checkpoint, one, owned[one], headers=True) for one in stack.names}
    except CheckpointError:
        return None
    return tuple(joined_stack(stack, name, layers).shape)


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...], stored: tuple[int, ...]) -> bool:
    """Whether shapes match; packed weights may be transposed, since they are always (out_features,
    in_features)."""
    return shape == wanted or (shape != stored and sorted(shape) == sorted(wanted))


def _missing(model: Any, wanted: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Missing tensors, except aliases of present ones and those that transformers ignores."""
    alike: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        alike.setdefault(id(parameter), []).append(name)
    there = {name for group in alike.values() if any(name in found for name in group) for name in group}
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    return [
        name
        for name in wanted
        if name not in found and name not in there and not any(one.search(name) for one in ignored)
    ]

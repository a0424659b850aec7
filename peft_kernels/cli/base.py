"""How a folder, or a config.json, has a model's weights: dense, packed, or in a form that loading refuses."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoints.checks import nf4_weights, quantised_otherwise
from ..checkpoints.folder import CONFIG, Checkpoint, with_own_quantization
from ..checkpoints.header import CheckpointError, shown
from ..checkpoints.json_file import read_json
from ..checkpoints.names import Names
from ..checkpoints.owned import joined_stack, owned_stacks, owned_weights, owner_in, read_owned
from ..checkpoints.rows import read_layout
from ..core.formats import FORMATS
from ..core.packed_state import PackedState
from ..core.wrong_types import an
from ..nf4.experts_packing import computes_experts
from ..quantize.architectures import is_linear


@dataclass
class Base:
    """The weights of a base model."""

    title: str = ""
    """The format or the method in messages; "" for a dense model."""
    refusal: str = ""
    """Why it cannot be loaded as it is."""
    form: dict[str, Any] = field(default_factory=dict)
    """format, blocksize and double_quant of packed weights, by name in `Run`."""
    linears: bool = True
    experts: bool = False
    """Whether linear layers and experts are packed."""
    packed: dict[str, int] | None = None
    """Bytes of the packed weights in memory, by name; None without files."""

    @property
    def is_packed(self) -> bool:
        return bool(self.title) and not self.refusal


def base_of(path: Path, model: Any) -> Base:
    """Reads the configuration and headers. `model` is the dense one on the meta device.

    Raises CheckpointError for files that are damaged or do not fit the model, as loading does.
    """
    found = read_json(path / CONFIG if path.is_dir() else path, 10_000_000)
    found = with_own_quantization(found) if isinstance(found, dict) else {}
    stored = found.get("quantization_config")
    if not stored:
        return Base()
    if not isinstance(stored, dict):
        return Base("an unknown method", f"quantization_config: expected an object, got {shown(stored)}")
    from ..quantize.transformers.config import NF4Config
    from ..quantize.transformers.conversion import packed_form

    try:
        config = NF4Config.from_dict(stored)
    except ValueError as error:
        return Base(quantised_otherwise(found) or "4 bits", str(error))
    owner = config.owner
    base = Base(config.format.upper() if owner is None else owner.title)
    base.form = {name: getattr(config, name) for name in ("format", "blocksize", "double_quant")}
    base.experts = config.experts or owner is not None
    base.linears = owner is None or not owner.experts
    if owner is not None:
        base.form["blocksize"] = _blocksize(owner.format, stored, model)
    if path.is_dir() and any(path.glob("*.safetensors")):
        base.packed = _packed(Checkpoint.open(path), model, packed_form(config))
        base.experts = any(not name.endswith(".weight") for name in base.packed)
    return base


def _blocksize(format: str, stored: dict[str, Any], model: Any) -> int:
    """The longest blocks of the groups that an owner's configuration names, and of all rows, since a row's
    last group may be shorter; if it names none, ones that all rows have."""
    form, parts = FORMATS[format], [stored]
    parts += [group.get("weights") or {} for group in (stored.get("config_groups") or {}).values()]
    size = next((part["group_size"] for part in parts if part.get("group_size")), None)
    if size is None or size < 0:
        return min(form.blocksizes) if form.rows_have_blocks else form.default_blocksize
    if form.rows_have_blocks:
        size = math.gcd(size, *(each.in_features for each in model.modules() if isinstance(each, nn.Linear)))
    return max((each for each in form.blocksizes if each and size % each == 0), default=min(form.blocksizes))


def _packed(checkpoint: Checkpoint, model: Any, form: str) -> dict[str, int]:
    names, found = Names(model), dict[str, int]()
    owned = owned_weights(checkpoint)
    stacks = owned_stacks(checkpoint, model)
    in_stacks = {name for stack in stacks.values() for name in stack.names}
    owner = owner_in(checkpoint.config)
    marked = set() if owner is None else owner.weights(checkpoint.entries).keys()
    _refuse_conversions(model, marked - in_stacks, form)
    states: dict[str, PackedState] = {}
    for weight, items in (nf4_weights(checkpoint.entries) | owned).items():
        if weight in owned:
            state = read_owned(checkpoint, weight, items, headers=True)
        else:
            state, _ = read_layout(checkpoint, weight, items)
        states[weight if weight in in_stacks else names.in_model(weight)[0]] = state
    states |= {name: joined_stack(stack, name, states) for name, stack in sorted(stacks.items())}
    for name, state in states.items():
        if name not in in_stacks:
            _check(model, name, state.shape, form)
            found[name] = state.nbytes
    return found


def _refuse_conversions(model: Any, packed: Iterable[str], form: str) -> None:
    """Raises CheckpointError for a packed weight that transformers would convert."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    from ..quantize.transformers.layouts import check_own

    try:
        check_own(get_model_conversion_mapping(model), packed, form)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _check(model: Any, name: str, shape: tuple[int, ...], form: str) -> None:
    """Raises CheckpointError, as loading does, unless the model has a linear layer or experts there."""
    module, key = _owner(model, name)
    if module is None:
        return  # loading ignores it, and says so
    if not (is_linear(module) or isinstance(module, nn.Linear) or computes_experts(module)):
        raise CheckpointError(f"{name}: expected a dense weight for {an(module)}, got {form}")
    expected = tuple(module._parameters[key].shape)
    if getattr(module, "is_transposed", False) or (is_linear(module) and not isinstance(module, nn.Linear)):
        expected = (*expected[:-2], expected[-1], expected[-2])
    if shape != expected:
        raise CheckpointError(f"{name}: expected shape {expected}, got {tuple(shape)}")


def _owner(model: Any, name: str) -> tuple[Any, str]:
    """The module of a parameter, and its name there; no module if the model has none."""
    path, _dot, key = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None, key
    return (module if key in module._parameters else None), key

"""Lists the contents of a checkpoint by layer, and its faults.

Checks headers and index, every item of every packed weight, missing tensors of the architecture, and NaN and
Inf in all other tensors (which reads them; --quick does not). Packed experts are listed by layer. Exit code 1
if a fault is found."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoints.architecture import compare
from ..checkpoints.checks import faults, holds_experts, kind_of, nf4_weights, read_nf4
from ..checkpoints.folder import Checkpoint
from ..checkpoints.header import CheckpointError
from ..checkpoints.owned import owned_weights, owner_in, read_owned
from ..core.formats import FORMATS, WHOLE_ROWS
from ..core.packed_state import PackedState
from .output import Output, counted, size

_FAULTY = ", faulty"
_NUMBER = "\0"
"""Stands for a number in a pattern: no character of a name."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="DIR|FILE", type=Path)
    parser.add_argument("--quick", action="store_true", help="read only packed weights, without codes")


@dataclass
class Group:
    """Tensors whose names differ only in numbers, as those of layers 0 to 31."""

    pattern: str
    form: str
    shape: tuple[int, ...]
    experts: bool = False
    """Whether they are packed experts."""
    numbers: list[tuple[int, ...]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    """Bytes of each tensor."""

    @property
    def nbytes(self) -> int:
        return sum(self.sizes)

    @property
    def name(self) -> str:
        """The pattern with ranges such as `0-31`."""
        columns = iter(zip(*self.numbers, strict=True)) if self.numbers[0] else iter(())
        return re.sub(_NUMBER, lambda match: _ranges(set(next(columns))), self.pattern)


@dataclass
class Layer:
    """The packed experts of one layer."""

    name: str
    experts: int = 0
    weights: int = 0
    nbytes: int = 0
    faulty: int = 0
    """Number of faulty weights."""


def run(arguments: argparse.Namespace, out: Output) -> bool:
    checkpoint = Checkpoint.examine(arguments.path)
    total = sum(entry.nbytes for entry in checkpoint.entries.values())
    groups = grouped(checkpoint)
    with out.progress(total, "checking") as advance:
        found = list(faults(checkpoint, values=not arguments.quick, seen=advance))
    compared = compare(checkpoint)
    found += [fault for fault in compared.faults if fault not in found]
    forms: dict[str, int] = {}
    for group in groups:
        forms[group.form] = forms.get(group.form, 0) + group.nbytes
    rows = []
    for group in groups:
        shape = " x ".join(map(str, group.shape))
        rows.append((group.name, str(len(group.numbers)), shape, group.form, size(group.nbytes)))
    out.table(("tensors", "count>", "shape>", "form", "bytes>"), rows)
    layers = experts_by_layer(groups)
    if layers:
        out.table(("packed experts", "experts>", "weights>", "bytes a layer>", "faults>"), _rows(layers))
    shares = ", ".join(f"{size(nbytes)} {form}" for form, nbytes in forms.items())
    out.say(f"{size(total)} in {counted(len(checkpoint.files), 'file')}: {shares}", "bold")
    if compared.model:
        out.say(f"compared with {compared.model} of transformers")
    else:
        out.say(f"not compared with an architecture: {compared.reason}")
    for fault in found:
        out.say(f"fault: {fault}", "red")
    out.say(f"{counted(len(found), 'fault')} found" if found else "no faults found", "bold")
    out.result(
        {
            "path": str(arguments.path),
            "files": [file.name for file in checkpoint.files],
            "bytes": total,
            "bytes_by_form": forms,
            "tensors": [_as_json(group) for group in groups],
            "experts": [_layer_as_json(layer) for layer in layers],
            "architecture": compared.model or None,
            "faults": found,
        }
    )
    return not found


def grouped(checkpoint: Checkpoint) -> list[Group]:
    """Groups in the order of names, layers by number."""
    owned, owner = owned_weights(checkpoint), owner_in(checkpoint.config)
    quantised = nf4_weights(checkpoint.entries) | owned
    inside = {name for names in quantised.values() for name in names}
    groups: dict[tuple[str, str, tuple[int, ...]], Group] = {}
    for name in sorted(checkpoint.entries.keys() - inside | quantised.keys(), key=_natural):
        form, shape = (
            _owned_form(checkpoint, name, owned) if name in owned else _form(checkpoint, name, quantised)
        )
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", _NUMBER, name)
        items = quantised.get(name, [name])
        experts = owner is not None and owner.experts if name in owned else holds_experts(items)
        group = groups.setdefault((pattern, form, shape), Group(pattern, form, shape, experts))
        group.numbers.append(tuple(int(n) for n in re.findall(r"(?<=\.)\d+(?=\.)", name)))
        group.sizes.append(sum(checkpoint.entries[item].nbytes for item in items))
    return list(groups.values())


def experts_by_layer(groups: list[Group]) -> list[Layer]:
    """Packed experts by layer, the first number in a name."""
    found: dict[str, Layer] = {}
    for group in groups:
        if not group.experts:
            continue
        start = group.pattern.partition(_NUMBER)[0]
        for numbers, nbytes in zip(group.numbers, group.sizes, strict=True):
            name = f"{start}{numbers[0]}" if numbers else group.pattern
            layer = found.setdefault(name, Layer(name))
            layer.experts = max(layer.experts, *group.shape[:1], 0)
            layer.weights, layer.nbytes = layer.weights + 1, layer.nbytes + nbytes
            layer.faulty += group.form.endswith(_FAULTY)
    return [found[name] for name in sorted(found, key=_natural)]


def _rows(layers: list[Layer]) -> list[tuple[str, ...]]:
    """Table rows, with equal layers in one."""
    alike: dict[tuple[str, ...], list[Layer]] = {}
    for layer in layers:
        start, dot, number = layer.name.rpartition(".")
        numbered = start + dot if number.isdigit() else layer.name
        cells = str(layer.experts), str(layer.weights), size(layer.nbytes), str(layer.faulty)
        alike.setdefault((numbered, *cells), []).append(layer)
    rows: list[tuple[str, ...]] = []
    for row, members in alike.items():
        numbers = {int(layer.name[len(row[0]) :]) for layer in members if layer.name != row[0]}
        rows.append((row[0] + _ranges(numbers), *row[1:]))
    return rows


def _form(checkpoint: Checkpoint, name: str, quantised: dict[str, list[str]]) -> tuple[str, tuple[int, ...]]:
    if name not in quantised:
        entry = checkpoint.entries[name]
        return str(entry.dtype).removeprefix("torch."), entry.shape
    try:
        state, dtype = read_nf4(checkpoint, name, quantised[name], codes=False)
    except CheckpointError:
        return f"{kind_of(quantised[name])}{_FAULTY}", ()
    kind, dense = state.format.upper(), str(dtype).removeprefix("torch.")
    return f"{kind} of {dense}, {_blocks(state)}, {_scales(state)}", state.shape


def _blocks(state: PackedState) -> str:
    if state.blocksize == WHOLE_ROWS:
        return "a scale for each row"
    size = state.blocksize
    return f"blocks of {f'{size} x {size}' if FORMATS[state.format].is_square else size}"


def _scales(state: PackedState) -> str:
    scale = FORMATS[state.format].scale
    if scale == "half":
        return "16-bit scales" + (" and zero points" if state.offset is not None else "")
    if state.offset is not None:
        return "double-quantised"
    return f"{scale.upper() if FORMATS[state.format].by_code else 'fp32'} scales"


def _owned_form(
    checkpoint: Checkpoint, name: str, owned: dict[str, list[str]]
) -> tuple[str, tuple[int, ...]]:
    owner = owner_in(checkpoint.config)
    assert owner is not None
    try:
        state = read_owned(checkpoint, name, owned[name])
    except CheckpointError:
        return f"{owner.title}{_FAULTY}", ()
    return f"{owner.title}, {_blocks(state)}", state.shape


def _as_json(group: Group) -> dict[str, Any]:
    return {
        "name": group.name,
        "count": len(group.numbers),
        "shape": list(group.shape),
        "form": group.form,
        "bytes": group.nbytes,
    }


def _layer_as_json(layer: Layer) -> dict[str, Any]:
    return {
        "layer": layer.name,
        "experts": layer.experts,
        "weights": layer.weights,
        "bytes": layer.nbytes,
        "faults": layer.faulty,
    }


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _ranges(numbers: set[int]) -> str:
    """{0, 1, 2, 5} as "0-2,5"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)

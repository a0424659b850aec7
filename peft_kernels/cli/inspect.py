"""What is in a checkpoint, by layer, and what is wrong with it.

Looks at headers and index, at every item of every NF4 weight, and for NaN and Inf in all other tensors (which
reads them; --quick does not). Exit code 1 when a fault is found.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoints.checks import faults, nf4_weights, read_nf4
from ..checkpoints.folder import Checkpoint
from ..checkpoints.header import CheckpointError
from .output import Output, size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="DIR|FILE", type=Path)
    parser.add_argument("--quick", action="store_true", help="read of NF4 weights alone, and no codes")


@dataclass
class Group:
    """Tensors that differ in the numbers of their names alone: those of layers 0 to 31, say."""

    pattern: str
    form: str
    shape: tuple[int, ...]
    numbers: list[tuple[int, ...]] = field(default_factory=list)
    nbytes: int = 0

    @property
    def name(self) -> str:
        """With `0-31` in place of the numbers."""
        columns = iter(zip(*self.numbers, strict=True)) if self.numbers[0] else iter(())
        return re.sub("#", lambda match: _ranges(set(next(columns))), self.pattern)


def run(arguments: argparse.Namespace, out: Output) -> bool:
    checkpoint = Checkpoint.examine(arguments.path)
    total = sum(entry.nbytes for entry in checkpoint.entries.values())
    groups = grouped(checkpoint)
    with out.progress(total, "checking") as advance:
        found = list(faults(checkpoint, values=not arguments.quick, seen=advance))
    forms: dict[str, int] = {}
    for group in groups:
        forms[group.form] = forms.get(group.form, 0) + group.nbytes
    rows = []
    for group in groups:
        shape = " x ".join(map(str, group.shape))
        rows.append((group.name, str(len(group.numbers)), shape, group.form, size(group.nbytes)))
    out.table(("tensors", "count>", "shape>", "form", "bytes>"), rows)
    shares = ", ".join(f"{size(nbytes)} {form}" for form, nbytes in forms.items())
    out.say(f"{size(total)} in {_counted(len(checkpoint.files), 'file')}: {shares}", "bold")
    for fault in found:
        out.say(f"fault: {fault}", "red")
    out.say(f"{_counted(len(found), 'fault')} found" if found else "no faults found", "bold")
    out.result(
        {
            "path": str(arguments.path),
            "files": [file.name for file in checkpoint.files],
            "bytes": total,
            "bytes_by_form": forms,
            "tensors": [_as_json(group) for group in groups],
            "faults": found,
        }
    )
    return not found


def grouped(checkpoint: Checkpoint) -> list[Group]:
    """In the order of the names, layers by number."""
    quantised = nf4_weights(checkpoint.entries)
    inside = {name for names in quantised.values() for name in names}
    groups: dict[tuple[str, str, tuple[int, ...]], Group] = {}
    for name in sorted(checkpoint.entries.keys() - inside | quantised.keys(), key=_natural):
        form, shape = _form(checkpoint, name, quantised)
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "#", name)
        group = groups.setdefault((pattern, form, shape), Group(pattern, form, shape))
        group.numbers.append(tuple(int(n) for n in re.findall(r"(?<=\.)\d+(?=\.)", name)))
        group.nbytes += sum(checkpoint.entries[item].nbytes for item in quantised.get(name, [name]))
    return list(groups.values())


def _form(checkpoint: Checkpoint, name: str, quantised: dict[str, list[str]]) -> tuple[str, tuple[int, ...]]:
    if name not in quantised:
        entry = checkpoint.entries[name]
        return str(entry.dtype).removeprefix("torch."), entry.shape
    try:
        state, dtype = read_nf4(checkpoint, name, quantised[name], codes=False)
    except CheckpointError:
        return "NF4, faulty", ()
    scales = "double-quantised" if state.double_quant else "fp32 scales"
    return f"NF4 of {str(dtype).removeprefix('torch.')}, blocks of {state.blocksize}, {scales}", state.shape


def _as_json(group: Group) -> dict[str, Any]:
    return {
        "name": group.name,
        "count": len(group.numbers),
        "shape": list(group.shape),
        "form": group.form,
        "bytes": group.nbytes,
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


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"

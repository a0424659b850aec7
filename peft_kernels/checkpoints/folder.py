"""A checkpoint: one safetensors file, or a folder of shards with an index and a configuration."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from .header import CheckpointError, Entry, read_header, shown
from .json_file import read_json

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
_QUANTIZATION = "quantization_config"
_LARGEST_JSON = 100_000_000
_NUMBERED = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")
OTHER_WEIGHTS = (".bin", ".pth", ".pt", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data", ".ot")


@dataclass
class Checkpoint(Mapping[str, Tensor]):
    """A mapping of names to tensors, which are read from disk on each access and not cached."""

    path: Path
    entries: dict[str, Entry]
    files: list[Path]
    """Sorted by name."""
    config: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, dict[str, str]] = field(default_factory=dict)
    """Metadata of each file, by file name."""
    faults: list[str] = field(default_factory=list)
    """Faults of files, index and configuration. For values see `checks`."""

    @classmethod
    def open(cls, path: Path | str) -> Checkpoint:
        """Opens a .safetensors file or a folder. Raises CheckpointError for the first fault."""
        found = cls.examine(path)
        if found.faults:
            raise CheckpointError(found.faults[0])
        return found

    @classmethod
    def examine(cls, path: Path | str) -> Checkpoint:
        """As `open`, but collects faults in `faults` and opens the readable files."""
        path = Path(path)
        if not path.exists():
            raise CheckpointError(f"{path}: expected a folder or a .safetensors file, got nothing there")
        found = cls(path, {}, [path])
        index = None
        if path.is_dir():
            found.config = (
                with_own_quantization(found._json(path / CONFIG)) if (path / CONFIG).exists() else {}
            )
            index = found._index(path / INDEX) if (path / INDEX).exists() else None
            found.files = _shards(path) if index is None else sorted({path / file for file in index.values()})
            found.faults += [] if index is not None else _missing_shards(found.files)
        for file in found.files:
            found._add(file)
        if index is not None:
            found._compare(index)
        return found

    def __getitem__(self, name: str) -> Tensor:
        return self.entries[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def of_file(self, file: Path) -> dict[str, Entry]:
        return {name: entry for name, entry in self.entries.items() if entry.path == file}

    def _json(self, path: Path) -> dict[str, Any]:
        try:
            found = read_json(path, _LARGEST_JSON)
        except CheckpointError as error:
            self.faults.append(str(error))
            return {}
        if not isinstance(found, dict):
            self.faults.append(f"{path.name}: expected a JSON object, got something else")
            return {}
        return found

    def _index(self, path: Path) -> dict[str, str]:
        found = self._json(path).get("weight_map", {})
        if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
            self.faults.append(f"{path.name}: expected file names in weight_map, got {shown(found)}")
            return {}
        for name, file in found.items():
            # A bare file name: an index must not lead out of its folder.
            if Path(file).name != file or not file.endswith(".safetensors") or not file.isprintable():
                self.faults.append(
                    f"{path.name}: {shown(name)}: expected the name of a .safetensors file, got {shown(file)}"
                )
                return {}
        if not found:
            self.faults.append(f"{path.name}: expected a weight_map, got none")
        return found

    def _add(self, file: Path) -> None:
        if not file.is_file():
            self.faults.append(f"{file.name}: expected this file, which the index names, got none")
            return
        try:
            entries, self.metadata[file.name] = read_header(file)
        except CheckpointError as error:
            self.faults.append(str(error))
            return
        for name, entry in entries.items():
            if name in self.entries:
                first = self.entries[name].path.name
                self.faults.append(f"{shown(name)}: it is in {first} and in {file.name}")
            self.entries.setdefault(name, entry)

    def _compare(self, index: dict[str, str]) -> None:
        readable = {file.name for file in self.files if file.name in self.metadata}
        for name, file in index.items():
            if file in readable and (name not in self.entries or self.entries[name].path.name != file):
                self.faults.append(f"{shown(name)}: the index says that it is in {file}, where it is not")
        for name, entry in self.entries.items():
            if name not in index:
                self.faults.append(f"{shown(name)}: it is in {entry.path.name}, and not in the index")


def _missing_shards(files: list[Path]) -> Iterator[str]:
    """Shards that are missing according to the names of others, `model-00001-of-00003.safetensors`."""
    there: dict[tuple[str, str], set[int]] = {}
    for file in files:
        match = _NUMBERED.fullmatch(file.name)
        if match is not None:
            there.setdefault((match[1], match[3]), set()).add(int(match[2]))
    for (start, count), numbers in there.items():
        for number in sorted(set(range(1, int(count) + 1)) - numbers):
            beside = f"{start}-{min(numbers):05}-of-{count}.safetensors"
            yield f"{start}-{number:05}-of-{count}.safetensors: expected this file next to {beside}, got none"


def _shards(folder: Path) -> list[Path]:
    """The files of a folder without an index: model.safetensors, or all .safetensors files."""
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        others = [path.name for path in sorted(folder.glob("*")) if path.suffix in OTHER_WEIGHTS]
        hint = f" ({others[0]} is another format: save the model as safetensors first)" if others else ""
        raise CheckpointError(f"{folder}: expected .safetensors files, got none{hint}")
    return found


def with_own_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with the text model's `quantization_config` as the model's, if that has none."""
    text = config.get("text_config")
    if config.get(_QUANTIZATION) or not isinstance(text, dict) or not text.get(_QUANTIZATION):
        return config
    rest = {key: value for key, value in text.items() if key != _QUANTIZATION}
    return config | {"text_config": rest, _QUANTIZATION: text[_QUANTIZATION]}

"""Reads headers of safetensors files, which are treated as untrusted.

The format: eight little-endian bytes with the length of the header; the header, a JSON object of `{"dtype",
"shape", "data_offsets"}` by name, padded with spaces; then the data, without holes. Every number is checked
against the file's size before anything is allocated or read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LONGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library."""
LONGEST_NAME = 1000

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class CheckpointError(ValueError):
    """A fault of a checkpoint. The message names the file or tensor."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    """Offset in the file, in bytes."""
    nbytes: int
    path: Path

    def read(self) -> Tensor:
        """The tensor, in new memory. Raises CheckpointError if the file was truncated since."""
        data = torch.empty(self.nbytes, dtype=torch.uint8)
        buffer: Any = data.numpy()
        try:
            with self.path.open("rb") as file:
                file.seek(self.begin)
                got = file.readinto(buffer) if self.nbytes else 0
        except OSError as error:
            raise self._unreadable(error) from error
        if got != self.nbytes:
            raise self._shorter(got)
        return data.view(self.dtype).view(self.shape)

    def pieces(self, nbytes: int) -> Iterator[bytes]:
        """Yields the bytes, at most `nbytes` at a time. Errors as `read`."""
        left = self.nbytes
        try:
            with self.path.open("rb") as file:
                file.seek(self.begin)
                while left:
                    data = file.read(min(left, nbytes))
                    if not data:
                        raise self._shorter(self.nbytes - left)
                    left -= len(data)
                    yield data
        except OSError as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: OSError) -> CheckpointError:
        return CheckpointError(f"{self.path.name}: {shown(self.name)} cannot be read ({error.strerror})")

    def _shorter(self, got: int) -> CheckpointError:
        return CheckpointError(
            f"{self.path.name}: {shown(self.name)}: expected {self.nbytes} bytes, got {got}"
        )

    def row(self, index: int) -> Entry:
        """Row `index` along the first dimension."""
        nbytes = self.nbytes // self.shape[0]
        return replace(self, shape=self.shape[1:], begin=self.begin + index * nbytes, nbytes=nbytes)


def read_header(path: Path, longest: int = LONGEST_HEADER) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a safetensors file, without reading their data, and its metadata.

    Raises CheckpointError for a truncated file; a header that is not JSON, or longer than the file or
    `longest` bytes; a dtype or shape that does not match its bytes; offsets that overlap, leave holes or do
    not end with the file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8:
                raise CheckpointError(f"{path.name}: expected a safetensors file, got {size} bytes in all")
            if length > min(size - 8, longest):
                expected = (
                    f"within the file's {size} bytes" if length > size - 8 else f"of at most {longest} bytes"
                )
                raise CheckpointError(
                    f"{path.name}: expected a header {expected}, got one of {length}"
                    + (" (the file is no safetensors file, or truncated)" if length > LONGEST_HEADER else "")
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be read ({error.strerror})") from error
    header = _parse(path, text)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path.name}: expected texts in __metadata__, got {shown(metadata)}")
    entries = {name: _entry(path, name, value, 8 + length) for name, value in header.items()}
    _check_layout(path, entries.values(), 8 + length, size)
    return entries, metadata


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise CheckpointError(f"{path.name}: {shown(name)} stands twice in the header")
            found[name] = value
        return found

    try:
        header = json.loads(text.decode(), object_pairs_hook=once)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError
        raise CheckpointError(f"{path.name}: expected a header in JSON, got something else") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path.name}: expected a header by tensor, got {shown(header)}")
    return header


def _entry(path: Path, name: str, value: Any, data: int) -> Entry:
    where = f"{path.name}: {shown(name)}"
    if len(name) > LONGEST_NAME or not name.isprintable():
        raise CheckpointError(f"{where}: expected a printable name of at most {LONGEST_NAME} characters")
    if not isinstance(value, Mapping) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: expected dtype, shape and data_offsets, got {shown(value)}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where}: expected a dtype of safetensors, got {shown(dtype)}")
    if not _sizes(shape):
        raise CheckpointError(f"{where}: expected a shape of numbers below 2^63, got {shown(shape)}")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: expected data_offsets [begin, end], got {shown(offsets)}")
    # Python's integers do not overflow.
    nbytes = prod(shape) * DTYPES[dtype].itemsize
    if nbytes != offsets[1] - offsets[0]:
        raise CheckpointError(
            f"{where}: expected {shown(nbytes)} bytes for {dtype} of shape {shown(shape)}, "
            f"got {offsets[1] - offsets[0]}"
        )
    return Entry(name, DTYPES[dtype], tuple(shape), data + offsets[0], nbytes, path)


def _sizes(value: Any) -> bool:
    """Whether this is a list of valid dimensions, each below 2^63 even if the tensor is empty."""
    if not isinstance(value, list) or len(value) > 64:
        return False
    return all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 63 for n in value)


def _check_layout(path: Path, entries: Any, data: int, size: int) -> None:
    """Raises CheckpointError unless the data is contiguous to the end of the file."""
    end, last = data, ""
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.nbytes)):
        if entry.begin != end:
            what = "overlaps" if entry.begin < end else "leaves a hole after"
            raise CheckpointError(
                f"{path.name}: {shown(entry.name)} {what} {shown(last) if last else 'the header'}"
            )
        end, last = entry.begin + entry.nbytes, entry.name
    if end != size:
        # The first tensor with missing bytes.
        cut = next((shown(e.name) for e in entries if e.begin + e.nbytes > size), "its last tensor")
        what = f"is truncated in {cut}" if end > size else f"has {size - end} bytes after its last tensor"
        raise CheckpointError(f"{path.name}: {what} (expected {end} bytes, got {size})")


def shown(value: Any) -> str:
    """Short printable text of a name or value from a file, for messages."""
    try:
        text = value if isinstance(value, str) else json.dumps(value)
    except ValueError:  # Python refuses to print integers of more than 4300 digits
        text = "a number of thousands of digits"
    text = text if len(text) <= 120 else f"{text[:80]}...{text[-30:]}"
    return "".join(c if c.isprintable() else "?" for c in text)

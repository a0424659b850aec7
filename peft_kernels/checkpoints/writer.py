"""Writes a safetensors file tensor by tensor; it gets its name when it is complete."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .header import NAMES, CheckpointError

LONGEST_BLOB = 512
"""Bytes reserved for a text of unknown length; bitsandbytes' JSON of a weight has about 200."""

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]] | None]
"""Dtype and shape by name; None for a text (uint8 of unknown length)."""


def file_size(layout: Layout, metadata: Mapping[str, str]) -> int:
    """Maximum size of a file in bytes."""
    offsets, end = _places(layout)
    return 8 + len(_header(layout, offsets, metadata)) + end


class ShardWriter:
    """Writes to `NAME.tmp`, and renames it when the `with` block ends without an error and all is on the
    disk. After an error nothing is left. An OSError (a full disk) names the file.

    The lengths of texts are known last, but the header comes first. So space is reserved for the longest
    possible header, padded with spaces, and texts are written at the end."""

    def __init__(self, path: Path, layout: Layout, metadata: Mapping[str, str]) -> None:
        self._path, self._layout, self._metadata = path, layout, metadata
        self._offsets, self._blobs_begin = _places(layout)
        self._blobs_begin -= LONGEST_BLOB * sum(kind is None for kind in layout.values())
        self._header_bytes = len(_header(layout, self._offsets, metadata))
        self._blobs: dict[str, bytes] = {}
        self._rows: dict[str, int] = {}
        self._left = set(layout)

    def __enter__(self) -> ShardWriter:
        self._temporary = self._path.with_name(self._path.name + ".tmp")
        self._file = self._temporary.open("wb")
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes a tensor. Raises CheckpointError if it differs from the layout."""
        tensor, kind = tensor.detach().cpu().contiguous(), self._layout[name]
        data: Any = tensor.view(-1).view(torch.uint8).numpy()
        if kind is None:
            if len(data) > LONGEST_BLOB:
                raise CheckpointError(f"{name}: expected at most {LONGEST_BLOB} bytes, got {len(data)}")
            self._blobs[name] = data.tobytes()
        else:
            if kind != (tensor.dtype, tuple(tensor.shape)):
                got = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
                raise CheckpointError(f"{name}: expected {kind[0]} of shape {kind[1]}, got {got}")
            self._seek(name)
            self._file.write(data)
        self._left.remove(name)

    def write_row(self, name: str, tensor: Tensor) -> None:
        """Writes the next row along the first dimension of a tensor."""
        tensor, kind = tensor.detach().cpu().contiguous(), self._layout[name]
        assert kind is not None and kind == (tensor.dtype, (kind[1][0], *tensor.shape)), name
        data: Any = tensor.view(-1).view(torch.uint8).numpy()
        row = self._rows[name] = self._rows.get(name, 0) + 1
        self._seek(name, (row - 1) * len(data))
        self._file.write(data)
        if row == kind[1][0]:
            self._left.remove(name)

    def copy(self, name: str, pieces: Iterable[bytes]) -> None:
        """Writes the bytes of a tensor of another file."""
        self._seek(name)
        for data in pieces:
            self._file.write(data)
        self._left.remove(name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._finish()
                self._file.close()
                os.replace(self._temporary, self._path)
                sync(self._path.parent)
        except OSError as failure:
            self._name(failure)
            raise
        finally:
            self._name(error)
            with suppress(OSError):  # flushing may fail too
                self._file.close()
            self._temporary.unlink(missing_ok=True)

    def _name(self, error: BaseException | None) -> None:
        """Adds the file name to an OSError of a write."""
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(self._temporary)

    def _seek(self, name: str, offset: int = 0) -> None:
        self._file.seek(8 + self._header_bytes + self._offsets[name][0] + offset)

    def _finish(self) -> None:
        assert not self._left, f"not written: {sorted(self._left)}"
        end = self._blobs_begin
        self._file.seek(8 + self._header_bytes + end)
        for name, blob in self._blobs.items():
            self._file.write(blob)
            self._offsets[name] = (end, end + len(blob))
            end += len(blob)
        self._file.seek(0)
        self._file.write(self._header_bytes.to_bytes(8, "little"))
        self._file.write(_header(self._layout, self._offsets, self._metadata).ljust(self._header_bytes))
        self._file.flush()
        os.fsync(self._file.fileno())


def sync(path: Path) -> None:
    """fsync of a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_all(folder: Path) -> None:
    """fsync of a folder with its contents."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def _places(layout: Layout) -> tuple[dict[str, tuple[int, int]], int]:
    """Offsets of tensors in the data, large dtypes first, so that all are aligned."""

    def order(name: str) -> tuple[int, str]:
        kind = layout[name]
        return (0 if kind is None else -kind[0].itemsize), name

    offsets, end = {}, 0
    for name in sorted(layout, key=order):
        kind = layout[name]
        begin = end
        end += LONGEST_BLOB if kind is None else _nbytes(*kind)
        offsets[name] = (begin, end)
    return offsets, end


def _nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * int(torch.Size(shape).numel())


def _header(layout: Layout, offsets: Mapping[str, tuple[int, int]], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, (begin, end) in sorted(offsets.items(), key=lambda place: place[1]):
        dtype, shape = layout[name] or (torch.uint8, (end - begin,))
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    return text.ljust(-(-len(text) // 8) * 8)

"""Base of the back ends in compiled libraries, which are checked before they are loaded."""

from __future__ import annotations

import importlib.util
import json
import mmap
import os
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import registry
from ..op import OPS
from .base import unserved_tensors

_HASH = re.compile(rb"PEFT_KERNELS_SPEC_HASH=([0-9a-f]{64})")
_TORCH = re.compile(rb"PEFT_KERNELS_TORCH=([^;]{1,40});")
_CUDART = re.compile(rb"PEFT_KERNELS_CUDART=(\d{5,6});")
_PACKAGE = Path(__file__).parents[2]
_REBUILD = "rebuild it (pip install --no-deps --force-reinstall .)"
_AGAIN = "; then pip install --no-deps --force-reinstall --no-cache-dir (its cache has the one without)"
_STALE = "was built from other sources than this package: rebuild it (pip install .)"


class Library:
    """A compiled library and its functions, which are ops without tensors: it does not depend on Python."""

    def __init__(self, file: str, namespace: str) -> None:
        try:
            torch.ops.load_library(file)
        except OSError as error:  # of torch, which does not say why
            raise error.__cause__ or error from None
        self.__file__ = file
        self._functions = getattr(torch.ops, f"{namespace}_library")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._functions, name)


class CompiledBackend:
    """Kernels for fp32, bf16 and fp16 in the library `library`, for tensors on devices of one type."""

    name: str
    namespace: str
    device_type: str
    library: str
    not_built: str
    """Why the library may be missing, and what to do."""

    def __init__(self) -> None:
        self._ops: torch.library.Library | None = None
        self._extension: Any = None
        self._refusal: str | None = "not loaded yet"

    def load(self) -> None:
        if self._ops is not None:
            return
        self._ops = registry.install(self.namespace)
        try:
            self._refusal = self._refusal_to_load()
            if self._refusal is None:
                self._extension = self._open()
        except (OSError, ValueError, RuntimeError) as error:
            self._refusal = f"{self.library} does not load: {error}"
        except AttributeError:
            self._refusal = f"{self.library} {_STALE}"

    @property
    def file(self) -> Path | None:
        """The library: in a wheel the one for this minor version of torch, otherwise the one built at
        installation."""
        if (fitting := self._in_wheel().get(_minor(torch.__version__))) is not None:
            return fitting
        found = importlib.util.find_spec(self.library)
        return None if found is None or found.origin is None else Path(found.origin)

    def _in_wheel(self) -> dict[str, Path]:
        """The libraries of a wheel by minor version of torch, in ascending order."""
        pattern = re.compile(re.escape(self.library.rpartition(".")[2]) + r"\.torch(\d+)\.(\d+)\.so")
        found = [(match, file) for file in _PACKAGE.iterdir() if (match := pattern.fullmatch(file.name))]
        found.sort(key=lambda pair: (int(pair[0][1]), int(pair[0][2])))
        return {f"{match[1]}.{match[2]}": file for match, file in found}

    def _open(self) -> Library:
        """Loads the library, which registers its kernels. Raises OSError, ValueError or RuntimeError, or
        AttributeError if it lacks a function."""
        raise NotImplementedError

    def probe(self) -> str | None:
        return self._refusal

    @property
    def extension(self) -> Any:
        """The library's functions other than its kernels. Raises RuntimeError when it is not loaded."""
        if self._extension is None:
            raise RuntimeError(f"back end {self.name}: {self._refusal}")
        return self._extension

    def supports(self, op: str, args: Sequence[Any]) -> str | None:
        return unserved_tensors(op, args, (self.device_type,))

    def has_kernel(self, op: str) -> bool:
        if not OPS[op].composite:
            return True
        # Compositions are registered for no device in particular.
        key = self.device_type.upper()
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"{self.namespace}::{op}", key)

    def _refusal_to_load(self) -> str | None:
        """Why the compiled library must not be loaded, or None; read from the file without loading it.

        A library built for other schemas would abort the process when it registers its kernels, and one built
        for another torch may crash.
        """
        if self.file is None:
            if versions := ", ".join(self._in_wheel()):
                return (
                    f"this wheel has kernels for torch {versions}, this is torch {torch.__version__}: "
                    "install one of these, or build from source (pip install .)"
                )
            if any(_PACKAGE.glob("_C*.torch*.so")):
                return "this wheel has none of its kernels: install one that has, or build from source"
            return (
                self.not_built
                if (reason := _reasons().get(self.name)) is None
                else f"not built: {reason}{_AGAIN}"
            )
        for library in (self.file, self.file.with_name(f"libpeft_kernels_{self.name}.so")):
            if library.exists() and _is_cut(library):
                return f"{library} is cut off: reinstall it (pip install --force-reinstall --no-deps ...)"
        with (
            self.file.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            schemas, built_with, cudart = (
                _group(pattern.search(content)) for pattern in (_HASH, _TORCH, _CUDART)
            )
        if schemas != registry.spec_hash():
            return f"{self.file} {_STALE}"
        # torch's C++ ABI changes with every minor version.
        if built_with is None or _minor(built_with) != _minor(torch.__version__):
            return (
                f"{self.file} was built with torch {built_with}, "
                f"this is torch {torch.__version__}: {_REBUILD}"
            )
        if cudart is not None and int(cudart) // 1000 != _cuda_major():
            return (
                f"{self.file} was built with CUDA {int(cudart) // 1000}, "
                f"this is torch for CUDA {torch.version.cuda}: {_REBUILD}"
            )
        return None


def _is_cut(library: Path) -> bool:
    """Whether a library ends before its table of sections, which linkers put at its end. The process would
    die where it reads the missing pages."""
    with library.open("rb") as file:
        header = file.read(64)
        if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":
            return False  # the loader says what it is
        (start,), (size, count) = struct.unpack_from("<Q", header, 40), struct.unpack_from("<HH", header, 58)
        return bool(start + size * count > file.seek(0, os.SEEK_END))


def _reasons() -> dict[str, str]:
    """Why the installation did not build a back end, as setup.py wrote it: pip hides what a build prints."""
    try:
        found: dict[str, str] = json.loads((_PACKAGE / "not_built.json").read_text(encoding="utf-8"))
    except OSError:
        return {}
    return found


def _cuda_major() -> int | None:
    return int(torch.version.cuda.partition(".")[0]) if torch.version.cuda else None


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _group(match: re.Match[bytes] | None) -> str | None:
    return match.group(1).decode() if match else None

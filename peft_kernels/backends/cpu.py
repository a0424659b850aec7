"""Back end `cpu`: C++ kernels for CPU tensors, in the compiled library `peft_kernels._C`."""

from __future__ import annotations

import importlib
import importlib.util
import mmap
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from .. import spec

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EXTENSION = "peft_kernels._C"

_HASH = re.compile(rb"PEFT_KERNELS_SPEC_HASH=([0-9a-f]{64})")


class CpuBackend:
    name = "cpu"
    namespace = "peft_kernels_cpu"

    def __init__(self) -> None:
        self._library: torch.library.Library | None = None
        self._extension: ModuleType | None = None
        self._refusal: str | None = "not loaded yet"

    def load(self) -> None:
        if self._library is not None:
            return
        self._library = spec.install(self.namespace)
        self._refusal = _refusal_to_load()
        if self._refusal is None:
            try:
                self._extension = importlib.import_module(EXTENSION)
            except ImportError as error:
                self._refusal = f"{EXTENSION} does not load: {error}"

    def probe(self) -> str | None:
        return self._refusal

    def describe(self) -> str:
        extension = self.extension
        levels = ", ".join(extension.isa_levels())
        threads = f"{torch.get_num_threads()} threads"
        refused = extension.refused_isa_reason()
        return f"C++, instruction set {extension.isa_level()} (of {levels}), {threads}" + (
            f"; not {refused}" if refused else ""
        )

    @property
    def extension(self) -> ModuleType:
        """The compiled library. RuntimeError with the reason when there is none."""
        if self._extension is None:
            raise RuntimeError(f"back end cpu: {self._refusal}")
        return self._extension

    def supports(self, op: str, args: Sequence[Any]) -> str | None:
        for tensor in _tensors(args):
            if not tensor.is_cpu:
                return f"{op}: a tensor is on {tensor.device}, this back end takes CPU tensors"
            if tensor.dtype not in DTYPES and tensor.is_floating_point():
                return f"{op}: no kernel for {tensor.dtype}"
        if op == "dequantize_nf4" and args[6] not in DTYPES:
            return f"{op}: no kernel for {args[6]}"
        return None

    @contextmanager
    def use_isa(self, level: str) -> Iterator[None]:
        """Run with one instruction set (see `isa_levels` of the extension). ValueError when the machine lacks
        it.

        For tests and measurements: the level is a property of the process, not of the thread.
        """
        extension = self.extension
        before = extension.isa_level()
        extension.set_isa_level(level)
        try:
            yield
        finally:
            extension.set_isa_level(before)


def _tensors(args: Sequence[Any]) -> Iterator[torch.Tensor]:
    for arg in args:
        if isinstance(arg, torch.Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from _tensors(arg)


def _refusal_to_load() -> str | None:
    """Why the compiled library must not be loaded, found without loading it.

    A library built for other schemas would abort the process when it registers its kernels, so the
    fingerprint that the build wrote into the file is compared first.
    """
    found = importlib.util.find_spec(EXTENSION)
    if found is None or found.origin is None:
        return "not built (no C++ compiler at installation, or PEFT_KERNELS_CPU=0): reinstall with g++"
    with open(found.origin, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        match = _HASH.search(content)
        built_for = match.group(1).decode() if match else None
    if built_for != spec.spec_hash():
        return f"{found.origin} was built from other sources than this package: rebuild it (pip install .)"
    return None


BACKEND = CpuBackend()

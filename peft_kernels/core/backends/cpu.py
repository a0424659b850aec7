"""Back end `cpu`: C++ kernels for CPU tensors, in the compiled library `peft_kernels._C`.

Its other functions are properties of the build, and spans of keys in a mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .. import registry
from .compiled import CompiledBackend, Library


class CpuLibrary(Library):
    """Its functions and its classes (library_ops.cpp, attention_ops.cpp, decoder_layer.cpp in csrc/cpu)."""

    def __init__(self, file: str, namespace: str) -> None:
        super().__init__(file, namespace)
        classes = getattr(torch.classes, f"{namespace}_library")
        self.AdaptedLayers, self.DecoderLayer = classes.AdaptedLayers, classes.DecoderLayer


class CpuBackend(CompiledBackend):
    name = "cpu"
    namespace = f"{registry.NAMESPACE}_cpu"
    device_type = "cpu"
    # A build for the Hugging Face Hub has its own package name, which is its library's name too.
    library = f"{registry.NAMESPACE}.{'_C' if registry.NAMESPACE == 'peft_kernels' else registry.NAMESPACE}"
    not_built = "not built (no C++ compiler at installation, or PEFT_KERNELS_CPU=0): reinstall with g++"

    def _open(self) -> CpuLibrary:
        library = CpuLibrary(str(self.file), self.namespace)
        library.set_isa_from_environment()
        return library

    def describe(self) -> str:
        extension = self.extension
        levels = ", ".join(extension.isa_levels())
        threads = f"{torch.get_num_threads()} threads"
        refused = extension.refused_isa_reason()
        return f"C++, instruction set {extension.isa_level()} (of {levels}), {threads}" + (
            f"; not {refused}" if refused else ""
        )

    @contextmanager
    def use_isa(self, level: str) -> Iterator[None]:
        """Runs with one instruction set (one of the extension's `isa_levels`). Raises ValueError when the
        machine lacks it.

        For tests and measurements: it applies to the process, not to a thread.
        """
        extension = self.extension
        before = extension.isa_level()
        extension.set_isa_level(level)
        try:
            yield
        finally:
            extension.set_isa_level(before)


BACKEND = CpuBackend()

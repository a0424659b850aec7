"""Back end `cpu`: C++ kernels for CPU tensors, in the compiled library `peft_kernels._C`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .compiled import CompiledBackend


class CpuBackend(CompiledBackend):
    name = "cpu"
    namespace = "peft_kernels_cpu"
    device_type = "cpu"
    library = "peft_kernels._C"
    not_built = "not built (no C++ compiler at installation, or PEFT_KERNELS_CPU=0): reinstall with g++"

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


BACKEND = CpuBackend()

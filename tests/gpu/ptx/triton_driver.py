"""Replaces Triton's driver: kernels are compiled to PTX as for a card, and run on CPU tensors by the machine
of this folder.

With PEFT_KERNELS_TRITON_PTX=80 in the environment (or another compute capability), conftest.py installs it
for back end `triton`, whose tests then use CPU tensors: `PEFT_KERNELS_TRITON_PTX=80 pytest -k triton`. Needs
back end `ptx`, whose library has the machine.
"""

from __future__ import annotations

import dataclasses
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import ptx_backend as ptx
from peft_kernels.triton_kernels import backend

CACHE = Path(__file__).resolve().parent.parent.parent.parent / "build" / "triton_ptx"
MAX_THREADS = 1024

# Parameters of kernels, by Triton's names of their types.
FORMATS = {
    **{f"i{bits}": code for bits, code in ((1, "b"), (8, "b"), (16, "h"), (32, "i"), (64, "q"))},
    **{f"u{bits}": code for bits, code in ((1, "B"), (8, "B"), (16, "H"), (32, "I"), (64, "Q"))},
    **{"fp32": "f", "f32": "f", "fp64": "d"},
}


def wanted() -> int | None:
    """The compute capability set in the environment."""
    value = os.environ.get("PEFT_KERNELS_TRITON_PTX")
    return int(value) if value else None


def packed(signature: Sequence[Any], arguments: Sequence[Any]) -> Iterator[bytes]:
    """Yields the kernel's parameters in order, without constexprs."""
    for kind, argument in zip(signature, arguments, strict=True):
        if isinstance(kind, tuple):
            yield from packed(kind, argument)
        elif kind == "constexpr":
            continue
        elif kind.startswith("*"):
            yield struct.pack("Q", 0 if argument is None else argument.data_ptr())
        else:
            yield struct.pack(FORMATS[kind], argument)


class Launcher:
    """Has the interface of Triton's kernel launchers."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.signature = tuple(source.signature.values())
        self.threads, self.shared = 32 * metadata.num_warps, metadata.shared
        assert not metadata.global_scratch_size and not metadata.profile_scratch_size, metadata

    def __call__(self, x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
        module, name = function
        arguments = rest[4:]  # after metadata and hooks
        scratch = [struct.pack("Q", 0)] * 2
        parameters = [*packed(self.signature, arguments), *scratch]
        module.run(name, (x, y, z), self.threads, self.shared, parameters, same_writes=True)


class Utils:
    def __init__(self, machine: ModuleType, shared: int) -> None:
        self.machine, self.shared = machine, shared

    def get_device_properties(self, device: int) -> Mapping[str, int]:
        return {"max_shared_mem": self.shared, "multiprocessor_count": ptx.FEW, "warpSize": 32}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        module = self.machine.load(kernel.decode())
        return module, (module, name), 0, 0, MAX_THREADS


class Driver:
    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)
        self.utils = Utils(ptx.BACKEND.extension, ptx.SHARED[capability])
        self.launcher_cls = Launcher

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def install(capability: int) -> None:
    """Makes back end `triton` of this process run CPU tensors. Raises RuntimeError without the machine."""
    import triton
    from triton.backends.nvidia.compiler import CUDABackend

    ptx.BACKEND.load()
    driver = Driver(capability)
    ptx.BACKEND.extension.set_card(capability, ptx.FEW, ptx.SHARED[capability])
    ptx.BACKEND.extension.set_perturb_approximations(True)

    class PtxAlone(CUDABackend):
        """Stops at PTX instead of calling ptxas."""

        def __init__(self, target: Any) -> None:
            super().__init__(target)
            self.binary_ext = "ptx"

        def hash(self) -> str:
            return f"{super().hash()}-ptx"  # the disk cache has no cubins

        def add_stages(self, stages: dict[str, Any], *rest: Any) -> None:
            super().add_stages(stages, *rest)
            del stages["cubin"]

    found = triton.backends.backends
    found["nvidia"] = dataclasses.replace(found["nvidia"], compiler=PtxAlone)
    triton.knobs.cache.dir = str(CACHE)
    triton.runtime.driver.set_active(driver)
    torch.cuda.is_current_stream_capturing = lambda: False  # without a driver it raises
    backend.TritonBackend.interpreted = property(lambda self: True)  # type: ignore[assignment]

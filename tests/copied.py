"""A back end that copies arguments to a GPU, runs the op of a back end there, and copies the results back, so
that tests with CPU tensors run GPU kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from peft_kernels.core import registry
from peft_kernels.core.backends import BACKENDS, Backend
from peft_kernels.core.op import OPS, Op
from peft_kernels.triton_kernels import backend as triton


class CopiedBackend:
    def __init__(self, target: Backend, device: str) -> None:
        self.name = f"{target.name}_copied"
        self.namespace = f"{target.namespace}_copied"
        self.target, self.device = target, device
        self._library: torch.library.Library | None = None

    def load(self) -> None:
        if self._library is None:
            self._library = registry.install(self.namespace, self._kernel)

    def probe(self) -> str | None:
        return self.target.probe()

    def describe(self) -> str:
        return f"{self.target.name}, for tensors on the CPU: for tests"

    def supports(self, op: str, args: Sequence[Any]) -> str | None:
        for tensor in tree_tensors(args):
            if not tensor.is_cpu:
                return f"{op}: a tensor is on {tensor.device}, this back end takes CPU tensors"
        return self.target.supports(op, self._there(args))

    def has_kernel(self, op: str) -> bool:
        found = OPS[op]
        if not found.composite:
            return True
        return self.target.has_kernel(op) and "!" not in found.schema  # changes of copies would be lost

    def _kernel(self, op: type[Op]) -> Callable[..., Any] | None:
        if not self.has_kernel(op.name):
            return None  # composed of ops of this namespace

        def call(*args: Any) -> Any:
            result = getattr(getattr(torch.ops, self.target.namespace), op.name)(*self._there(args))
            return tree_map_only(Tensor, lambda tensor: copied(tensor, "cpu"), result)

        return call

    def _there(self, args: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(tree_map_only(Tensor, lambda tensor: copied(tensor, self.device), tuple(args)))


def tree_tensors(args: Sequence[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map_only(Tensor, found.append, tuple(args))
    return found


def copied(tensor: Tensor, device: str) -> Tensor:
    """Copies the whole storage, because some tests need strides, offsets and overlaps."""
    whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
    there = whole.to(device, copy=True).untyped_storage()
    empty = torch.empty(0, dtype=tensor.dtype, device=device)
    return empty.set_(there, tensor.storage_offset(), tensor.size(), tensor.stride())


def backend_ids() -> list[str]:
    """Registers `cuda_copied` and `triton_copied` where these can be used; returns their names. None when
    Triton is interpreted, which takes CPU tensors itself."""
    found: list[str] = []
    if triton.BACKEND.interpreted:
        return found
    for name in ("cuda", "triton"):
        if name in BACKENDS and BACKENDS[name].probe() is None:
            backend = CopiedBackend(BACKENDS[name], "cuda")
            if backend.name not in BACKENDS:
                backend.load()
                BACKENDS[backend.name] = backend
            found.append(backend.name)
    return found

"""Back end `cuda`: CUDA C++ kernels, in the compiled library `peft_kernels._C_cuda`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..ops import registry
from .base import Cards
from .compiled import CompiledBackend

MINIMUM = (8, 0)
"""Compute capability that the kernels need: tensor cores for bf16, asynchronous copies."""


class CudaBackend(CompiledBackend):
    name = "cuda"
    namespace = f"{registry.NAMESPACE}_cuda"
    device_type = "cuda"
    library = f"{registry.NAMESPACE}._C_cuda"
    not_built = (
        "not built (at installation there was no nvcc that fits torch's CUDA, or PEFT_KERNELS_CUDA=0): "
        "reinstall with it"
        if torch.version.cuda
        else "not built: this torch has no CUDA"
    )

    def __init__(self) -> None:
        super().__init__()
        self._cards = self._no_card_seen()

    def probe(self) -> str | None:
        if self._refusal is not None:
            return self._refusal
        reason = self._cards.refusal_of_all()
        built = f"built for compute capability {', '.join(self.architectures())}" if reason else ""
        return reason and f"{built}, but {reason}"

    def describe(self) -> str:
        return f"CUDA C++, built for {', '.join(self.architectures())}; {self._cards.describe()}"

    def supports(self, op: str, args: Sequence[Any]) -> str | None:
        return super().supports(op, args) or self._cards.refusal_of_tensors(op, args)

    def architectures(self) -> list[str]:
        """What the library has code for, as in TORCH_CUDA_ARCH_LIST: "8.0", "9.0+PTX"."""
        return self.extension.architectures().split(":")

    def plan(self, m: int, n: int, k: int, blocksize: int, dtype: torch.dtype) -> tuple[str, str]:
        """Which way a product with an NF4 weight goes on the current device, forward and backward.

        Parameters
        ----------
        m, n, k : int
            Rows of activations, out_features and in_features of the weight.

        Returns
        -------
        forward, backward : str
            The name of a fused kernel, or "pieces": the weight is dequantised piece by piece for torch's
            product.
        """
        return self.extension.plan(m, n, k, blocksize, str(dtype).removeprefix("torch."))

    def _no_card_seen(self) -> Cards:
        return Cards(lambda i: unserved(torch.cuda.get_device_capability(i), self.architectures()))


def unserved(capability: tuple[int, int], architectures: Sequence[str]) -> str | None:
    """Why a card of that compute capability cannot run code built for `architectures`, or None."""
    has = f"has compute capability {capability[0]}.{capability[1]}"
    if capability < MINIMUM:
        return f"{has}, the kernels need {MINIMUM[0]}.{MINIMUM[1]} or later"
    for name in architectures:
        number, _, ptx = name.partition("+")
        major, minor = (int(part) for part in number.split("."))
        if (major, minor) <= capability and (ptx or major == capability[0]):
            return None
    return f"{has}, for which there is no code: reinstall with TORCH_CUDA_ARCH_LIST={has.split()[-1]}"


BACKEND = CudaBackend()

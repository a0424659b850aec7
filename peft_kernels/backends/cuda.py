"""Back end `cuda`: CUDA C++ kernels, in the compiled library `peft_kernels._C_cuda`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .base import tensors
from .compiled import CompiledBackend

MINIMUM = (8, 0)
"""Compute capability that the kernels need: tensor cores for bf16, asynchronous copies."""


class CudaBackend(CompiledBackend):
    name = "cuda"
    namespace = "peft_kernels_cuda"
    device_type = "cuda"
    library = "peft_kernels._C_cuda"
    not_built = (
        "not built (at installation there was no nvcc that fits torch's CUDA, or PEFT_KERNELS_CUDA=0): "
        "reinstall with it"
        if torch.version.cuda
        else "not built: this torch has no CUDA"
    )

    def __init__(self) -> None:
        super().__init__()
        self._cards: dict[int, str | None] = {}

    def probe(self) -> str | None:
        if self._refusal is not None:
            return self._refusal
        if None in self._cards.values():  # quick: it is asked in every call
            return None
        built = f"built for compute capability {', '.join(self.architectures())}"
        if not torch.cuda.is_available():
            return f"{built}, but torch finds no CUDA device here"
        reasons = [self._refusal_of(i) for i in range(torch.cuda.device_count())]
        return None if None in reasons else f"{built}, but {'; '.join(filter(None, reasons))}"

    def describe(self) -> str:
        cards = []
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            reason = self._refusal_of(i)
            cards.append(
                f"cuda:{i} {torch.cuda.get_device_name(i)}, compute capability {major}.{minor}"
                if reason is None
                else reason
            )
        return f"CUDA C++, built for {', '.join(self.architectures())}; {'; '.join(cards)}"

    def supports(self, op: str, args: Sequence[Any]) -> str | None:
        reason = super().supports(op, args)
        if reason is not None:
            return reason
        for device in {tensor.device for tensor in tensors(args)}:
            reason = self._refusal_of(device.index)
            if reason is not None:
                return f"{op}: {reason}"
        return None

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

    def _refusal_of(self, device: int) -> str | None:
        if device not in self._cards:
            capability = torch.cuda.get_device_capability(device)
            reason = unserved(capability, self.architectures())
            self._cards[device] = reason and f"cuda:{device} {reason}"
        return self._cards[device]


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

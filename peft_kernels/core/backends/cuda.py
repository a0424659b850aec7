"""Back end `cuda`: CUDA C++ kernels, in the compiled library `peft_kernels._C_cuda`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import registry
from .architectures import unserved
from .base import Cards
from .compiled import CompiledBackend


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
        self._cards = self._unprobed_cards()

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
        """The architectures of the library's code, as `architectures.chosen` returns them: "8.0",
        "9.0+PTX"."""
        return self.extension.architectures().split(":")

    def plan(self, m: int, n: int, k: int, blocksize: int, dtype: torch.dtype) -> tuple[str, str]:
        """The kernels of a GEMM with an NF4 weight on the current device, forward and backward.

        Parameters
        ----------
        m, n, k : int
            Rows of activations, out_features and in_features of the weight.

        Returns
        -------
        forward, backward : str
            The name of a fused kernel, or "pieces": the weight is dequantised piece by piece for torch's
            GEMM.
        """
        return self.extension.plan(m, n, k, blocksize, str(dtype).removeprefix("torch."))

    def _unprobed_cards(self) -> Cards:
        return Cards(lambda i: unserved(torch.cuda.get_device_capability(i), self.architectures()))


BACKEND = CudaBackend()

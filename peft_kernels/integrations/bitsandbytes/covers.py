"""Which calls of bitsandbytes' ops our kernels support, by device and table of codes."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ...core.backends import BACKENDS

_verdicts: Any = WeakTensorKeyDictionary()


def is_table(code: Tensor, standard: Callable[[torch.device], Tensor]) -> bool:
    """Whether a table is the standard one. On CUDA, where the comparison synchronises, the answer is cached
    by the table's version, so writes that do not change the version are not noticed."""
    expected = standard(code.device)
    if not code.is_cuda:
        return code.dtype == expected.dtype and torch.equal(code, expected)
    key = standard, None if code.is_inference() else code._version
    known = _verdicts.get(code)
    if known is not None and known[0] == key:
        return bool(known[1])
    if torch.cuda.is_current_stream_capturing():
        return False
    verdict = code.dtype == expected.dtype and torch.equal(code, expected)
    _verdicts[code] = key, verdict
    return verdict


@lru_cache
def has_kernels(device: torch.device) -> bool:
    """Whether a back end other than plain torch supports this device."""
    probe = torch.empty(0, device=device)
    return any(
        one.device_type == device.type
        and one.probe() is None
        and one.supports("nf4_linear", (probe,)) is None
        for one in BACKENDS.values()
    )

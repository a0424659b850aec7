"""pytest plugin of bitsandbytes_tests.py: one record per test; in mode "enabled" tests run on our kernels."""

from __future__ import annotations

import os
import random
import zlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from bitsandbytes_tests import OURS, THEIRS
from upstream_tests import MODE, recorder

from peft_kernels.integrations import bitsandbytes
from peft_kernels.integrations.bitsandbytes import ops as bitsandbytes_ops

_calls: Counter[str] = Counter()


def _counted(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        result = kernel(*args)
        _calls[f"{name} {THEIRS if result is NotImplemented else OURS}"] += 1
        return result

    return call


if os.environ[MODE] == "enabled":
    for name, kernel in bitsandbytes_ops._KERNELS.items():
        bitsandbytes_ops._KERNELS[name] = _counted(name, kernel)
    bitsandbytes.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    _calls.clear()
    seed = zlib.crc32(item.nodeid.encode())  # the same values in both runs
    torch.manual_seed(seed)
    numpy.random.seed(seed)
    random.seed(seed)


pytest_runtest_makereport = recorder(lambda: {"calls": _calls})

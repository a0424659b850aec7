"""pytest plugin of bitsandbytes_tests.py: a record per test and, if asked for, our kernels under all of them.

Its settings come by the environment, so that xdist's workers see them too: BITSANDBYTES_TESTS_RECORDS, the
folder for the records, and BITSANDBYTES_TESTS_MODE, "stock" or "enabled".
"""

from __future__ import annotations

import json
import os
import random
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from bitsandbytes_tests import OURS, THEIRS

from peft_kernels.integrations import bitsandbytes
from peft_kernels.integrations.bitsandbytes import ops as bitsandbytes_ops

ENABLED = os.environ["BITSANDBYTES_TESTS_MODE"] == "enabled"
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "main")
RECORDS = Path(os.environ["BITSANDBYTES_TESTS_RECORDS"]) / f"{WORKER}.jsonl"

_calls: Counter[str] = Counter()
_records: dict[str, dict[str, Any]] = {}


def _counted(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        result = kernel(*args)
        _calls[f"{name} {THEIRS if result is NotImplemented else OURS}"] += 1
        return result

    return call


if ENABLED:
    for name, kernel in bitsandbytes_ops._KERNELS.items():
        bitsandbytes_ops._KERNELS[name] = _counted(name, kernel)
    bitsandbytes.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    _calls.clear()
    seed = zlib.crc32(item.nodeid.encode())  # the same numbers in both runs
    torch.manual_seed(seed)
    numpy.random.seed(seed)
    random.seed(seed)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Any:
    report = yield
    record = _records.setdefault(item.nodeid, {"id": item.nodeid, "outcome": "passed", "message": ""})
    if record["outcome"] == "passed" and (not report.passed or hasattr(report, "wasxfail")):
        record["outcome"] = "xfailed" if hasattr(report, "wasxfail") else report.outcome
        record["message"] = "" if report.skipped or call.excinfo is None else call.excinfo.exconly()[:2000]
    if report.when == "teardown":
        with RECORDS.open("a") as file:
            file.write(json.dumps(_records.pop(item.nodeid) | {"calls": _calls}) + "\n")
    return report

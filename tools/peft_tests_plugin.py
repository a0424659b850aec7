"""pytest plugin of peft_tests.py: one record per test and, if asked for, every LoRA layer patched when made.

It reads its settings from the environment, so that xdist's workers see them too: PEFT_TESTS_RECORDS, the
folder for the records, PEFT_TESTS_MODE, "stock", "patched" or "every-option", and PEFT_TESTS_VERSION, the
PEFT to be tested.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import peft
import peft_tests_models
import pytest
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

import peft_kernels as pk
from peft_kernels.integrations import attention
from peft_kernels.patch import fused

MODE = os.environ["PEFT_TESTS_MODE"]
PATCHED = MODE != "stock"
OPTIONS: dict[str, bool] = {"loss": True, "block": True} if MODE == "every-option" else {}
RECORDS = Path(os.environ["PEFT_TESTS_RECORDS"]) / f"{os.environ.get('PYTEST_XDIST_WORKER', 'main')}.jsonl"

if peft.__version__ != os.environ["PEFT_TESTS_VERSION"]:
    raise SystemExit(f"peft: expected {os.environ['PEFT_TESTS_VERSION']}, got {peft.__version__}")


class Account:
    """What the LoRA layers did during one test."""

    def __init__(self) -> None:
        self.layers = 0
        self.calls: Counter[str] = Counter()
        self._fallbacks: dict[int, tuple[Counter[str], Counter[str]]] = {}
        """Every counter seen, and what it held when first seen: a model may outlive a test."""

    def watch(self, fallbacks: Counter[str]) -> None:
        self._fallbacks.setdefault(id(fallbacks), (fallbacks, Counter(fallbacks)))

    def fallbacks(self) -> Counter[str]:
        total: Counter[str] = Counter()
        for now, before in self._fallbacks.values():
            total.update(now - before)
        return total


_account = Account()
_reasons: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
_records: dict[str, dict[str, str]] = {}


def _patch_where_layers_are_made() -> None:
    """Every way to add an adapter ends in one method: get_peft_model, PeftModel.from_pretrained, add_adapter,
    load_adapter, inject_adapter_in_model, transformers' and diffusers' own. Test modules bind those functions
    by name, so replacing them would come too late."""
    inject = BaseTuner.inject_adapter

    @functools.wraps(inject)
    def inject_and_patch(self: BaseTuner, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        inject(self, model, *args, **kwargs)
        _account.layers += sum(isinstance(module, LoraLayer) for module in model.modules())
        if not PATCHED:
            return
        if OPTIONS:
            with contextlib.suppress(TypeError, ValueError):  # no model of transformers, or one that refuses
                attention.use(model)
        for layer in pk.patch(model, **OPTIONS).layers:
            module = model.get_submodule(layer.name)
            if layer.fused:
                _account.watch(layer.fallbacks)
            elif isinstance(module, LoraLayer):
                _reasons[module] = layer.reason

    setattr(BaseTuner, "inject_adapter", inject_and_patch)  # noqa: B010 (mypy forbids the assignment)


def _count_call(module: nn.Module, inputs: Any) -> None:
    if torch.compiler.is_compiling() or not isinstance(module, LoraLayer):
        return
    record = fused.record_of(module)
    if record is None:
        _account.calls["never: " + _reasons.get(module, "in no report (a copy of a layer)")] += 1
        return
    _account.watch(record.fallbacks)  # that of a copy of a layer is in no report
    if module.disable_adapters or module.merged:
        _account.calls["base"] += 1
    else:
        _account.calls["patched"] += 1


_patch_where_layers_are_made()
peft_tests_models.install(RECORDS.with_suffix(""))
if PATCHED:
    nn.modules.module.register_module_forward_pre_hook(_count_call)


def pytest_report_header() -> list[str]:
    return [f"peft {peft.__version__}, {MODE}", *pk.explain().splitlines()]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    global _account
    _account = Account()
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Any:
    report = yield
    record = _records.setdefault(item.nodeid, {"outcome": "passed", "message": ""})
    if record["outcome"] == "passed" and (not report.passed or hasattr(report, "wasxfail")):
        record["outcome"] = "xfailed" if hasattr(report, "wasxfail") else report.outcome
        record["message"] = "" if report.skipped or call.excinfo is None else call.excinfo.exconly()[:2000]
    if report.when == "teardown":
        done = _records.pop(item.nodeid)
        _write(item.nodeid, done["outcome"], done["message"], _account)
    return report


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _write(report.nodeid, "not collected", str(report.longrepr)[-2000:], Account())


def _write(name: str, outcome: str, message: str, account: Account) -> None:
    line = {
        "id": name,
        "outcome": outcome,
        "message": message,
        "layers": account.layers,
        "calls": account.calls,
        "fallbacks": account.fallbacks(),
    }
    with RECORDS.open("a") as file:
        file.write(json.dumps(line) + "\n")

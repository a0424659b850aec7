"""pytest plugin of peft_tests.py: one record per test; in mode "patched" every model is patched when it gets
LoRA layers.

PEFT_TESTS_VERSION in the environment is the PEFT under test.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from typing import Any

import peft
import peft_tests_models
import pytest
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from upstream_tests import MODE as MODE_VARIABLE
from upstream_tests import recorder, records_file, write

import peft_kernels as pk
from peft_kernels.patch import fused, small_calls
from peft_kernels.patch.lora.forward import FusedLora

# The models of these tests are small.
small_calls.FEW_PRODUCTS = small_calls.FEW_LOGITS = 0

MODE = os.environ[MODE_VARIABLE]
PATCHED = MODE != "stock"

if peft.__version__ != os.environ["PEFT_TESTS_VERSION"]:
    raise SystemExit(f"peft: expected {os.environ['PEFT_TESTS_VERSION']}, got {peft.__version__}")


class Account:
    """Calls and fallbacks of LoRA layers during one test."""

    def __init__(self) -> None:
        self.layers = 0
        self.calls: Counter[str] = Counter()
        self._fallbacks: dict[int, tuple[Counter[str], Counter[str]]] = {}
        """Every counter, with its values when first seen: a model may outlive a test."""

    def watch(self, fallbacks: Counter[str]) -> None:
        self._fallbacks.setdefault(id(fallbacks), (fallbacks, Counter(fallbacks)))

    def fallbacks(self) -> Counter[str]:
        total: Counter[str] = Counter()
        for now, before in self._fallbacks.values():
            total.update(now - before)
        return total

    def details(self) -> dict[str, Any]:
        return {"layers": self.layers, "calls": self.calls, "fallbacks": self.fallbacks()}


_account = Account()


def _patch_where_layers_are_made() -> None:
    """Patches the one method through which adapters are added by get_peft_model, PeftModel.from_pretrained,
    add_adapter, load_adapter, inject_adapter_in_model, transformers and diffusers. Test modules import these
    functions by name, so replacing them would be too late."""
    inject = BaseTuner.inject_adapter

    @functools.wraps(inject)
    def inject_and_patch(self: BaseTuner, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        inject(self, model, *args, **kwargs)
        _account.layers += sum(isinstance(module, LoraLayer) for module in model.modules())
        if not PATCHED:
            return
        for layer in pk.patch(model).layers:
            module = model.get_submodule(layer.name)
            if layer.fused:
                _account.watch(layer.fallbacks)
            elif isinstance(module, LoraLayer):
                _account.calls["never: " + layer.reason] += 1

    setattr(BaseTuner, "inject_adapter", inject_and_patch)  # noqa: B010 (mypy forbids the assignment)


def _count_calls() -> None:
    """Counts calls of fused layers, in their class: with a hook on all modules no layer would be fused."""
    forward = FusedLora.forward

    @functools.wraps(forward)
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        record = fused.record_of(self)
        if record is not None and not torch.compiler.is_compiling():
            _account.watch(record.fallbacks)  # a copied layer is in no report
            _account.calls["base" if self.disable_adapters or self.merged else "patched"] += 1
        return forward(self, *args, **kwargs)

    FusedLora.forward = counted  # type: ignore[method-assign]


_patch_where_layers_are_made()
peft_tests_models.install(records_file().with_suffix(""))
if PATCHED:
    _count_calls()


def pytest_report_header() -> list[str]:
    return [f"peft {peft.__version__}, {MODE}", *pk.explain().splitlines()]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    global _account
    _account = Account()
    torch.manual_seed(0)


pytest_runtest_makereport = recorder(lambda: _account.details())


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        write(report.nodeid, "not collected", str(report.longrepr)[-2000:], Account().details())

"""Modules of tools/, and what their tests need."""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).resolve().parent.parent.parent / "tools"
needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or not (shutil.which("c++") and shutil.which("readelf")), reason="no C++ compiler"
)


def tool_module(name: str) -> ModuleType:
    if str(TOOLS) not in sys.path:
        sys.path.append(str(TOOLS))
    return importlib.import_module(name)

"""Modules of `examples/`, whose demo model and task some cases train."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent.parent / "examples"
MODELS = FOLDER.parent / "build" / "methods"
"""Where the demo model is kept."""


def module(name: str) -> Any:
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    return importlib.import_module(name)

"""How pip builds the package: setuptools, with the torch that the kernels are for.

Compiled kernels run with the torch that they were built with. pip builds in an environment of its own, into
which it would put the newest torch, whatever the user has. So the torch beside which the package will be
installed serves the build where there is one; else the newest is asked for, which pip then installs beside
the package too.
"""

from __future__ import annotations

import site
import sys
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

TORCH = "torch>=2.9"


def torch_beside() -> str | None:
    """The folder with the torch of the environment that this Python belongs to, which pip's own hides."""
    folders = [*site.getsitepackages(), site.getusersitepackages()]
    return next((folder for folder in folders if Path(folder, "torch", "version.py").exists()), None)


_beside = torch_beside()
if _beside is not None and _beside not in sys.path:
    sys.path.append(_beside)  # last: all else is as pip's environment has it


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *([] if _beside else [TORCH])]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *([] if _beside else [TORCH])]

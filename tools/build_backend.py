"""pip's build back end: setuptools, with the torch of the user's environment.

Compiled kernels run only with the torch that they were built with. pip builds in an isolated environment,
where it would install the newest torch. So the build uses the torch that is installed in the target
environment; if there is none, it requires the newest, which pip then installs with the package too.
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


def torch_folder() -> str | None:
    """The folder with torch of this Python's environment, which pip's isolated one hides."""
    folders = [*site.getsitepackages(), site.getusersitepackages()]
    return next((folder for folder in folders if Path(folder, "torch", "version.py").exists()), None)


_torch = torch_folder()
if _torch is not None and _torch not in sys.path:
    sys.path.append(_torch)  # last: everything else comes from pip's environment


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *([] if _torch else [TORCH])]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *([] if _torch else [TORCH])]

"""PTX for a ptxas that is older than the nvcc that wrote it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path


def newest_version(ptxas: str, cache: Path) -> str:
    """The last .version of PTX that a ptxas takes."""
    probe = cache / "probe.ptx"
    probe.write_text(".version 99.9\n", encoding="utf-8")
    told = subprocess.run([ptxas, str(probe)], capture_output=True, text=True, check=False).stderr
    if not (found := re.search(r"Unsupported \.version 99\.9; current version is '([\d.]+)'", told)):
        raise RuntimeError(f"{ptxas}: {told.strip()}")
    return found[1]


def lowered(ptx: str, newest: str) -> str:
    """PTX whose .version is at most `newest`. Instructions that are newer stay, and ptxas refuses them."""
    own = re.findall(r"^\.version (\S+)", ptx, re.MULTILINE)
    version = min([*own, newest], key=lambda version: [int(part) for part in version.split(".")])
    return re.sub(r"^\.version .*", f".version {version}", ptx, flags=re.MULTILINE)

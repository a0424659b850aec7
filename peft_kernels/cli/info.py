"""Versions, and which back ends are built and usable."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform

import torch

from .. import __version__
from ..core import dispatch
from ..core.backends import BACKENDS
from .output import Output

LIBRARIES = ("transformers", "peft", "accelerate", "safetensors", "bitsandbytes", "triton", "trl", "rich")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(arguments: argparse.Namespace, out: Output) -> bool:
    backends = {}
    for name, backend in BACKENDS.items():
        reason = backend.probe()
        backends[name] = {
            "usable": reason is None,
            "description": backend.describe() if reason is None else None,
            "reason": reason,
        }
    forced = dispatch.forced()
    found = versions()
    out.say(
        f"peft_kernels {__version__}, torch {torch.__version__}, Python {platform.python_version()}", "bold"
    )
    out.say(dispatch.explain())
    out.say(", ".join(f"{name} {version}" for name, version in found.items() if version))
    out.result(
        {
            "peft_kernels": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "libraries": found,
            "backends": backends,
            "forced": forced,
        }
    )
    return True


def versions() -> dict[str, str | None]:
    """Versions of related libraries; None if not installed."""
    found: dict[str, str | None] = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found

"""The machine: processor, instruction set, threads, versions."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from peft_kernels.core.backends import BACKENDS, cpu

from .harness import MIB, last_level_cache

PACKAGES = ("peft_kernels", "torch", "bitsandbytes", "peft", "kernels")


def describe() -> dict[str, Any]:
    """Facts for every JSON line."""
    refusal = cpu.BACKEND.probe()
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "last_level_cache_mib": last_level_cache() // MIB,
        "threads": torch.get_num_threads(),
        "backend": "reference" if refusal else "cpu",
        "isa": None if refusal else cpu.BACKEND.extension.isa_level(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "versions": {package: version(package) for package in PACKAGES},
    }


def header(facts: dict[str, Any]) -> str:
    versions = facts["versions"]
    isa = f"back end cpu, instruction set {facts['isa']}"
    if facts["backend"] != "cpu":
        isa = f"back end REFERENCE, no compiled kernels: {BACKENDS['cpu'].probe()}"
    lines = [
        f"{facts['cpu']}, {facts['cores']} cores, last-level cache {facts['last_level_cache_mib']} MiB",
        f"peft_kernels {versions['peft_kernels']}: {isa}; threads: {facts['threads']}",
        ", ".join(f"{name} {versions[name] or '-'}" for name in ("torch", "bitsandbytes", "peft"))
        + f"; torch's instruction set {facts['torch_isa']}",
    ]
    if facts.get("memory_kept"):
        lines.append("the process keeps freed memory (pk.keep_freed_memory)")
    if versions["bitsandbytes"] and not versions["kernels"]:
        lines.append("bitsandbytes' evaluation mode uses its built-in CPU kernel: `kernels` is not installed")
    return "\n".join(lines)


def version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def status_bytes(field: str, pid: int | str = "self") -> int:
    """A field of /proc/PID/status in bytes; 0 if the process is gone."""
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/status").read_text()
        if match := re.search(rf"^{field}:\s+(\d+) kB$", text, re.MULTILINE):
            return int(match[1]) * 1024
    return 0


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: *(.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()

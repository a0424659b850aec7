"""Tiny checkpoints of every owner, for tests of what must hold for all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fp8_experts import make_moe
from owned_folders import NVFP4, gpt_oss, nvfp4
from packed_models import KINDS, make


class Made(NamedTuple):
    """How to write a folder, with options of the model's configuration, and the key of its owner."""

    write: Callable[..., Any]
    owner: str


def _nvfp4(owner: str) -> Made:
    return Made(lambda folder, **options: nvfp4(folder, owner, True, **options), owner)


def _packed(kind: str) -> Made:
    return Made(lambda folder, **options: make(folder, kind, **options), KINDS[kind].owner)


def _experts(folder: Path, **options: Any) -> Any:
    sizes = {"moe_intermediate_size": options["intermediate_size"]} if "intermediate_size" in options else {}
    return make_moe(folder, "qwen", **options | sizes)


FOLDERS: dict[str, Made] = {"mxfp4": Made(gpt_oss, "mxfp4")}
FOLDERS |= {f"nvfp4 of {owner}": _nvfp4(owner) for owner in NVFP4}
FOLDERS |= {kind: _packed(kind) for kind in KINDS}
FOLDERS["experts in fp8"] = Made(_experts, "fp8")

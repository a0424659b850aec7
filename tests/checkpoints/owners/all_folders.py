"""Tiny checkpoints of every owner, for tests of what must hold for all."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from experts_folders import FORMS, make_moe
from owned_folders import NVFP4, gpt_oss, nvfp4
from packed_models import KINDS, make


class Made(NamedTuple):
    """How to write a folder, with options of the model's configuration, and the key of its owner."""

    write: Callable[..., Any]
    owner: str


def _nvfp4(owner: str) -> Made:
    return Made(lambda folder, **options: nvfp4(folder, owner, True, **options), owner)


def packed(kind: str) -> Made:
    return Made(lambda folder, **options: make(folder, kind, **options), KINDS[kind].owner)


def _experts(folder: Path, form: str = "", **options: Any) -> Any:
    sizes = {"moe_intermediate_size": options["intermediate_size"]} if "intermediate_size" in options else {}
    return make_moe(folder, "qwen", form, **options | sizes)


def _owner(form: str) -> str:
    return KINDS[form].owner if form in KINDS else form.removeprefix("nvfp4 of ")


FOLDERS: dict[str, Made] = {"mxfp4": Made(gpt_oss, "mxfp4")}
FOLDERS |= {f"nvfp4 of {owner}": _nvfp4(owner) for owner in NVFP4}
AS_OTHERS = {"gptq last", "fp8 whole", "fp8 modelopt rows"}
"""Kinds that are as others once they are read."""
FOLDERS |= {kind: packed(kind) for kind in KINDS if kind not in AS_OTHERS}
EXPERTS = {f"experts in {form}": form for form in ("fp8", "int8", "int8 groups", "gptq int8", *FORMS)}
"""The formats of mixtures whose experts are layers in the file."""
FOLDERS |= {
    name: Made(functools.partial(_experts, form="" if form == "fp8" else form), _owner(form))
    for name, form in EXPERTS.items()
}

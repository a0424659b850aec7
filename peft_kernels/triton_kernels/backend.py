"""Back end `triton`: kernels that Triton compiles on first use, for CUDA tensors.

It serves where back end `cuda` was not built, without nvcc or for another vendor's card, and the ops that
`cuda` composes of others. With TRITON_INTERPRET=1 in the environment Triton interprets the kernels in numpy;
the back end then takes CPU tensors too, when it is forced. Triton is imported by the first call or probe, not
with this file.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..core import registry
from ..core.backends.base import Cards, tensors, unserved_tensors
from ..core.backends.self_test import verdicts
from ..core.backends.self_test.verdicts import SelfTest
from ..core.op import OPS, Op

MINIMUM = (8, 0)
"""Compute capability that Triton's code for NVIDIA cards needs."""

COMPILES_SECONDS = 600.0
"""A self-test compiles all kernels of an op."""

COMPOSITES_WITH_KERNELS = frozenset(
    (
        "adamw",
        "add_rms_norm",
        "bottleneck",
        "bottleneck_backward",
        "clip_factor",
        "experts_linear",
        "experts_linear_dx",
        "experts_lora_linear",
        "experts_lora_linear_backward",
        "linear_cross_entropy",
        "linear_cross_entropy_backward",
        "linear_cross_entropy_trained",
        "multi_bottleneck",
        "multi_bottleneck_backward",
        "rms_norm",
        "rms_norm_backward",
        "rotary",
    )
)
"""Composite ops that have a kernel of their own."""


class TritonBackend:
    name = "triton"
    namespace = f"{registry.NAMESPACE}_triton"
    device_type = "cuda"

    def __init__(self) -> None:
        self._library: torch.library.Library | None = None
        self._refusal: str | None = "not asked yet"
        self._asked = False
        self.cards = Cards(_unserved)
        self.self_test = SelfTest(self.namespace, verdicts.cuda_device, _build, COMPILES_SECONDS)

    def load(self) -> None:
        if self._library is None:
            self._library = registry.install(self.namespace, self._implement)

    def probe(self) -> str | None:
        if not self._asked:
            self._refusal = self._find_refusal()
            self._asked = True
        return self._refusal

    @property
    def interpreted(self) -> bool:
        """Whether Triton runs kernels in numpy, on the CPU."""
        return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")

    def describe(self) -> str:
        version = importlib.import_module("triton").__version__
        if self.interpreted:
            return f"Triton {version}, interpreted on the CPU (TRITON_INTERPRET is set): for tests"
        return f"Triton {version}, compiled on first use; {self.cards.describe()}"

    def supports(self, op: str, args: Sequence[Any]) -> str | None:
        if self.interpreted:
            return unserved_tensors(op, args, ("cuda", "cpu"))
        reason = unserved_tensors(op, args, ("cuda",)) or self.cards.refusal_of_tensors(op, args)
        return reason or self.self_test.refusal(op, args)

    def has_kernel(self, op: str) -> bool:
        return not OPS[op].composite or op in COMPOSITES_WITH_KERNELS

    def _implement(self, op: type[Op]) -> Callable[..., Any] | None:
        if not self.has_kernel(op.name):
            return None

        def call(*args: Any) -> Any:
            # Triton launches on the current device.
            with torch.cuda.device_of(next(tensors(args))):
                return getattr(_kernels(), op.name)(op.named(args))

        return call

    def _find_refusal(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed (pip install triton)"
        if not self.interpreted and (reason := self.cards.refusal_of_all() or _compiler_problem()):
            return reason
        try:
            _kernels().check_usable()
        except Exception as error:  # an unknown card, a broken installation
            return f"Triton does not work here: {error}"
        return None


def _unserved(index: int) -> str | None:
    """Why a card cannot run what Triton makes, or None."""
    major, minor = torch.cuda.get_device_capability(index)
    if torch.version.hip is not None or (major, minor) >= MINIMUM:
        return None
    needed = f"{MINIMUM[0]}.{MINIMUM[1]}"
    return f"has compute capability {major}.{minor}, Triton needs {needed} or later"


def _compiler_problem() -> str | None:
    """What Triton lacks to compile what launches its kernels; it does so for every new kind of arguments, and
    its cache does not help with those that are new. It looks in the same places (triton/runtime/build.py)."""
    if importlib.import_module("triton").knobs.build.impl is not None:
        return None
    wanted = os.environ.get("CC")
    if any(map(shutil.which, ["gcc", "clang"] if wanted is None else [wanted])):
        return None
    lacks = "there is neither gcc nor clang" if wanted is None else f"CC={wanted} is not there"
    return f"Triton needs a C compiler at run time, and {lacks}: install one, or set CC to one"


@functools.cache
def _build() -> str:
    """Tells one set of kernels from another: what they are compiled from, and by which Triton."""
    sources = sorted(Path(__file__).parent.rglob("*.py"))
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()[:16]
    return f"Triton {importlib.import_module('triton').__version__}, {digest}"


@functools.cache
def _kernels() -> ModuleType:
    return importlib.import_module(".table", __package__)


BACKEND = TritonBackend()

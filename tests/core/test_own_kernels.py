"""Of several back ends for a device, the one with a kernel of its own serves an op that others compose."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from skips import require
from torch import Tensor

import peft_kernels as pk
import testing
from peft_kernels.core import dispatch, registry
from peft_kernels.core.backends import BACKENDS
from peft_kernels.triton_kernels import backend as triton

REFERENCE = BACKENDS["reference"]


class Elsewhere(Tensor):
    """A CPU tensor that claims to be on a device of the fake back ends."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("xpu", 0)


class FakeBackend:
    """Records its calls. Of the composite ops it has kernels for some."""

    device_type = "xpu"

    def __init__(self, name: str, *kernels: str) -> None:
        self.name, self.namespace, self.kernels = name, f"peft_kernels_fake_{name}", kernels
        self.calls: list[str] = []
        self.unusable: str | None = None
        self.unsupported: str | None = None
        self.probed = False

    def load(self) -> None:
        self.library = registry.install(self.namespace, self._implement)

    def probe(self) -> str | None:
        self.probed = True
        return self.unusable

    def describe(self) -> str:
        return "for tests"

    def supports(self, op: str, args: Sequence[Any]) -> str | None:
        return self.unsupported

    def has_kernel(self, op: str) -> bool:
        return not registry.OPS[op].composite or op in self.kernels

    def _implement(self, op: type[registry.Op]) -> Callable[..., Any] | None:
        def kernel(*args: Any) -> Any:
            self.calls.append(op.name)
            return op.plain(*args)

        return kernel if self.has_kernel(op.name) else None


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[FakeBackend, FakeBackend]]:
    """Two back ends of one device; only the second has kernels of the norm, forward and backward."""
    first, second = FakeBackend("first"), FakeBackend("second", "rms_norm", "rms_norm_backward")
    before = dict(BACKENDS)
    BACKENDS.clear()
    BACKENDS.update({"first": first, "second": second, "reference": REFERENCE})
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(dispatch, "_chosen", {})
    first.load()
    second.load()
    yield first, second
    for one in (first, second):
        one.library._destroy()
    BACKENDS.clear()
    BACKENDS.update(before)


def served_by(op: str) -> str:
    return dispatch.select(op, (torch.empty(0).as_subclass(Elsewhere),)).name


def test_a_kernel_is_preferred_to_a_composition(two: tuple[FakeBackend, FakeBackend]) -> None:
    second = two[1]
    assert served_by("dropout") == "first"  # both have a kernel
    assert served_by("column_sums") == "first"  # neither has one
    assert not second.probed  # Triton would be imported for it
    assert served_by("rms_norm") == "second"
    with pk.use_backend("first"):
        assert served_by("rms_norm") == "first"


def test_a_composition_serves_where_the_kernel_cannot(two: tuple[FakeBackend, FakeBackend]) -> None:
    first, second = two
    second.unsupported = "no kernel for this dtype"
    assert served_by("rms_norm") == "first"
    second.unusable, second.unsupported = "no compiler", None
    assert served_by("rms_norm") == "first"
    first.unusable = "not built"
    assert served_by("rms_norm") == "reference"
    second.unusable = None
    assert served_by("rms_norm") == served_by("column_sums") == "second"


def test_backward_runs_where_forward_ran(two: tuple[FakeBackend, FakeBackend]) -> None:
    first, second = two
    x, weight = testing.tensor(3, 64).requires_grad_(), testing.tensor(64)
    like = x.detach().as_subclass(Elsewhere)
    for _ in range(2):  # the second call takes the cached choice
        y, _ = dispatch.call("rms_norm", x, weight, 1e-6, 0.0, True, x.dtype, like=like)
        y.sum().backward()
    assert second.calls == ["rms_norm", "rms_norm_backward"] * 2 and not first.calls
    assert x.grad is not None


@pytest.mark.parametrize("name,composed", [("cpu", "linear_cross_entropy_trained"), ("ptx", "column_sums")])
def test_kernels_of_a_compiled_library(name: str, composed: str) -> None:
    testing.register_ptx()
    require(name)
    backend = BACKENDS[name]
    assert backend.has_kernel("nf4_linear") and backend.has_kernel("bottleneck")
    assert backend.has_kernel("linear_cross_entropy")
    assert not backend.has_kernel(composed)


def test_kernels_of_triton() -> None:
    assert triton.BACKEND.has_kernel("nf4_linear") and triton.BACKEND.has_kernel("linear_cross_entropy")
    assert triton.BACKEND.has_kernel("linear_cross_entropy_trained")
    assert not triton.BACKEND.has_kernel("attention")


def test_plain_torch_is_no_kernel() -> None:
    assert not any(map(REFERENCE.has_kernel, registry.OPS))

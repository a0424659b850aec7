"""Expected results: the reference in fp64, and how far each contender may be from it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

import testing

PEER_BOUND = 0.05
"""Relative error above which a peer computes something else, and its time is meaningless."""

Tensors = Mapping[str, Tensor]


class Expected:
    """Outputs and gradients by name: in fp64 (`truth`), and by plain torch at the kernel's precision."""

    def __init__(self, plain: Tensors, truth: Tensors) -> None:
        self.plain, self.truth = plain, truth

    def strict(self, got: Tensors) -> float:
        """For ours: the largest relative error. AssertionError beyond the tolerances of the tests."""
        self._same_names(got)
        for name, tensor in got.items():
            testing.assert_close(tensor, self.plain[name], self.truth[name], name)
        return self._error(got)

    def sane(self, got: Tensors) -> float:
        """For peers: the largest relative error. AssertionError beyond PEER_BOUND."""
        self._same_names(got)
        error = self._error(got)
        if not error <= PEER_BOUND:
            raise AssertionError(f"relative error {error:.3g}, allowed for a peer {PEER_BOUND}")
        return error

    def _same_names(self, got: Tensors) -> None:
        if got.keys() != self.truth.keys():
            raise AssertionError(f"expected {', '.join(self.truth)}, got {', '.join(got)}")

    def _error(self, got: Tensors) -> float:
        return max(testing.relative_error(tensor, self.truth[name]) for name, tensor in got.items())


class OfModel(Expected):
    """Results of a deep model, which can turn one rounding into an error of any size in an element: the RMS
    error of all of them is judged."""

    def strict(self, got: Tensors) -> float:
        self._same_names(got)
        testing.assert_close_together(got, self.plain, self.truth)
        return self._error(got)


def linear(x: Tensor, weight: Tensor) -> Expected:
    """`y = x W^T`. `weight` is in fp32: code * scale."""
    return Expected({"y": F.linear(x, weight.to(x.dtype))}, {"y": F.linear(x.double(), weight.double())})


def linear_with_dx(x: Tensor, dy: Tensor, weight: Tensor, wide: torch.dtype = torch.float64) -> Expected:
    """`y` and `dx` of a frozen layer. `wide`: of the truth, fp32 where only peers are judged."""

    def results(dtype: torch.dtype) -> Tensors:
        w = weight.to(dtype)
        return {"y": F.linear(x.to(dtype), w), "dx": dy.to(dtype) @ w}

    return Expected(results(x.dtype), results(wide))


def lora(x: Tensor, dy: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Expected:
    """`y`, `dx`, `da` and `db` of a LoRA layer."""
    plain = _lora(x, dy, weight.to(x.dtype), lora_a, lora_b, scaling)
    return Expected(plain, _lora(*map(testing.widen, (x, dy, weight, lora_a, lora_b, scaling))))


def lora_forward(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Expected:
    whole = lora(x, x.new_zeros(x.shape[0], weight.shape[0]), weight, lora_a, lora_b, scaling)
    return Expected({"y": whole.plain["y"]}, {"y": whole.truth["y"]})


def _lora(x: Tensor, dy: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensors:
    base = (weight, None, None, None, 0)
    y, h = testing.reference_op("lora_linear")(x, *base, None, lora_a, lora_b, scaling, 0.0, None, None)
    backward = testing.reference_op("lora_linear_backward")
    dx, da, db = backward(dy, x, h, *base, lora_a, lora_b, scaling, 0.0, None, None, True, True, True)
    return {"y": y, "dx": dx, "da": da, "db": db}


class Dropout(Expected):
    """Expected results under dropout with a fixed seed of torch's generator."""

    def __init__(self, plain: Tensors, truth: Tensors, no_dropout: Tensors, usual: dict[str, float]) -> None:
        super().__init__(plain, truth)
        self.no_dropout, self.usual = no_dropout, usual
        """The truth without dropout, and the relative change of each tensor by PEFT's dropout."""

    def strict(self, got: Tensors) -> float:
        """Also checks that something is dropped: if nothing is, ours agrees with a truth that drops
        nothing."""
        error = super().strict(got)
        for name, usual in self.usual.items():
            moved = testing.relative_error(got[name], self.no_dropout[name])
            if not usual / 2 <= moved <= 2 * usual:
                raise AssertionError(f"{name}: dropout moves it by {moved:.3g}, PEFT's by {usual:.3g}")
        return error


class Bits:
    """Expected bit patterns: packing, codes, unpacking and double quantisation are exact."""

    def __init__(self, expected: Tensors) -> None:
        self.expected = expected

    def strict(self, got: Tensors) -> float:
        """Returns 0. AssertionError at the first tensor that differs in a bit."""
        for name, tensor in self.expected.items():
            if got[name].dtype != tensor.dtype or _differing(got[name], tensor):
                raise AssertionError(f"{name}: {_differing(got[name], tensor):.3%} of the elements differ")
        return 0.0

    def sane(self, got: Tensors) -> float:
        """The largest relative error (of codes: the fraction that differs). AssertionError beyond
        PEER_BOUND."""
        worst = max(_distance(got[name], tensor) for name, tensor in self.expected.items())
        if not worst <= PEER_BOUND:
            raise AssertionError(f"error {worst:.3g}, allowed for a peer {PEER_BOUND}")
        return worst


def _distance(got: Tensor, expected: Tensor) -> float:
    if expected.is_floating_point() and got.numel() == expected.numel():
        return testing.relative_error(got.reshape(-1), expected.reshape(-1))
    return _differing(got, expected)


def _differing(got: Tensor, expected: Tensor) -> float:
    if got.numel() != expected.numel():
        return 1.0
    return (got.reshape(-1) != expected.reshape(-1)).double().mean().item()

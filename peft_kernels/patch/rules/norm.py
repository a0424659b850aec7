"""Root mean square norms of transformers' models: which of the known forms a class computes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...core.backends.base import DTYPES
from ...core.module_calls import class_forward
from ...core.wrong_types import an
from ...ops.block.rms_norm import CASTING
from ..fused import plain_class
from .calls import ORDINARY, device_reason
from .stand_in import StandIn, plain_mode
from .verdict import Verdict, cached, recognise

_DTYPES = ((torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.bfloat16, torch.float32))
"""Dtypes of x and of the weight in a trial."""
_SCALES = (1e-3, 0.1, 1.0, 1e4)
"""Of the rows: eps counts in the first, a clamp of x shows in the last."""


_UNKNOWN = "its forward is none of the norms known here; nothing to do"


class Norm(NamedTuple):
    """The arguments of `rms_norm` that compute a norm's forward."""

    eps: str
    """The name of the module's attribute."""
    offset: float
    casting: str


def is_norm(module: nn.Module) -> bool:
    """Whether a module looks like a root mean square norm of transformers."""
    named = any(cls.__name__.endswith("RMSNorm") for cls in plain_class(module).__mro__)
    return named and not module._modules and module._parameters.get("weight") is not None


def norm(module: nn.Module) -> Verdict:
    """What the class of a norm computes: a Norm."""
    cls: Any = plain_class(module)
    forward = class_forward(cls)
    key = "norm", cls, forward, getattr(cls, "_norm", None)
    return cached(key) or recognise(key, lambda: _trial(module, forward), _UNKNOWN)


def _trial(module: nn.Module, forward: Any) -> Norm | None:
    for eps in (name for name, value in vars(module).items() if type(value) is float):
        for offset in (0.0, 1.0):
            for casting in CASTING:
                kind = Norm(eps, offset, casting)
                if all(_agrees(module, forward, kind, *dtypes) for dtypes in _DTYPES):
                    return kind
    return None


def _agrees(module: nn.Module, forward: Any, kind: Norm, dtype: torch.dtype, of_weight: torch.dtype) -> bool:
    """Whether `rms_norm` gives what the forward does for x and a weight of these dtypes."""
    eps, features = 0.03, 64
    for training in (True, False):
        with plain_mode(has_gradient=training):
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(4, 4, 2, features, generator=generator, device="cpu")
            x = (x * torch.tensor(_SCALES, device="cpu").view(4, 1, 1, 1)).to(dtype)
            weight = torch.randn(features, generator=generator, device="cpu")
            weight[::4] *= 1e3  # so that a clamp of the result shows
            weight = weight.to(of_weight)
            x, weight = x.requires_grad_(training), weight.requires_grad_(training)
            stand_in = StandIn(module, {"weight": weight, kind.eps: eps}, training)
            try:
                theirs = forward(stand_in, x)
            except Exception:  # an unknown forward may raise anything
                return False
            ours = _normed(x, weight, eps, kind)
            if stand_in.reads or not isinstance(theirs, Tensor) or not _equal(theirs, ours):
                return False
            if training and dtype is torch.float32:
                pairs = zip(
                    *(
                        torch.autograd.grad(y.sum(), (x, weight), materialize_grads=True)
                        for y in (theirs, ours)
                    ),
                    strict=True,
                )
                if not all(torch.allclose(a, b, 1e-3, 1e-4) for a, b in pairs):
                    return False
    return True


def _normed(x: Tensor, weight: Tensor, eps: float, kind: Norm) -> Tensor:
    """What `rms_norm` computes."""
    y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    if CASTING[kind.casting]:
        return (kind.offset + weight) * y.to(x.dtype)
    return ((kind.offset + weight.float()) * y).to(x.dtype)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two norms are equal but for their last bit. Where one rounds in between, a third of all values
    of 16 bits differ."""
    if (a.dtype, a.shape, a.requires_grad) != (b.dtype, b.shape, b.requires_grad):
        return False
    a, b = a.detach(), b.detach()
    eps = torch.finfo(a.dtype).eps
    rare = a.dtype is torch.float32 or int((a != b).sum()) <= a.numel() / 20
    return rare and torch.allclose(a.float(), b.float(), 8 * eps, 1e-6)


def weight_reason(weight: Any, device: torch.device | None = None) -> str:
    """Why the weight of a norm cannot be used on an x on `device` (None: the device of the weight)."""
    if type(weight) not in ORDINARY:
        return f"the weight is {an(weight)}; use a plain parameter"
    if weight.dtype not in DTYPES or weight.dim() != 1:
        got = f"{weight.dtype} and shape {tuple(weight.shape)}"
        return f"the weight is of {got}; use a vector in fp32, bf16 or fp16"
    if device is not None and device != weight.device:
        return f"x is on {device}; move the weight there"
    return device_reason(weight, "rms_norm")

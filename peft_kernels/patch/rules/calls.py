"""What calling a module does in addition to its forward, which a fused forward of a larger part would skip.

Used when a model is patched, and again when a layer is called after something about it changed, so the checks
are cheap. Functions that return only a reason return "" if there is none, here and in all rules.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor  # parameters while torch.export traces

from ...core import dispatch
from ...core.module_calls import is_compiled_by_jit, more_than_forward
from ...core.wrong_types import an
from ...nf4.sharded.checks import is_tensor_parallel
from .. import fused

NO_KERNEL = "has no kernel for it here; see pk.explain()"
PARALLEL = (
    "tensor parallelism: its forward runs between collectives, which a fused one would skip; nothing to do"
)
ORDINARY = (nn.Parameter, Tensor, FakeTensor)
"""Types of dense weights. Other subclasses of Tensor may define their own matmul."""


def device_reason(like: Tensor, op: str) -> str:
    """Why `op` would be composed of torch's functions on the device of a tensor, or ""."""
    kind = like.device.type
    if kind in ("cpu", "meta") or dispatch.has_kernel(op, like):
        return ""
    return f"{kind} {NO_KERNEL}"


def hook_reason(module: nn.Module, device: torch.device | None = None) -> str:
    """Why calling `module` with an x on `device` (None: the device of the module) does more than the forward
    of its class."""
    return more_than_forward(module) or (
        _replaced_reason(module, device) if "forward" in module.__dict__ else ""
    )


def _replaced_reason(module: nn.Module, device: torch.device | None) -> str:
    """Why a forward set on the instance matters. A hook of accelerate that moves x to the device of the
    weight does nothing to an x that is already there."""
    d = module.__dict__
    if fused.is_own(module, d["forward"]):
        return ""
    if is_compiled_by_jit(module):
        return f"{type(module).__name__} is compiled by torch.jit; nothing to do"
    hook = d.get("_hf_hook")
    if hook is None or not fused.is_own(module, d.get("_old_forward")):
        if is_tensor_parallel(d["_parameters"].get("weight")):
            return PARALLEL
        return f"the forward of {an(module)} was replaced on the instance; restore it to fuse it"
    for one in getattr(hook, "hooks", (hook,)):
        if type(one).__name__ != "AlignDevicesHook" or one.no_grad:
            return f"an accelerate hook inside ({type(one).__name__}); remove it to fuse it"
        if one.offload or one.io_same_device:
            return "an accelerate hook inside that offloads weights; keep the weights on the device"
        target = one.execution_device
        if device is not None and target is not None:
            target = torch.device("cuda", target) if isinstance(target, int) else torch.device(target)
            if target != device:
                return f"x is on {device}, an accelerate hook moves it to {target}; keep both on one device"
    return ""

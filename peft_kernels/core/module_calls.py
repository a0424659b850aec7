"""What the call of a module does besides its forward. Code that computes what a module would, without calling
it, must ask."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

HOOKED = "hooks on the base layer or an adapter, which a fused forward would skip"
HOOKED_ALL = "hooks on all modules (register_module_forward_hook), which a fused forward would skip"

GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)
"""Names of torch's dictionaries of hooks on all modules, in the file of nn.Module."""

_call, _call_impl = nn.Module.__call__, nn.Module._call_impl


def hooks_on_all() -> str:
    """HOOKED_ALL if there are any, or ""."""
    if (
        _global_forward_hooks
        or _global_forward_pre_hooks
        or _global_backward_hooks
        or _global_backward_pre_hooks
    ):
        return HOOKED_ALL
    return ""


def more_than_forward(module: nn.Module) -> str:
    """What calling a module is besides its forward, or "". Tracers replace the call itself, of all modules
    or of a class; torch.export does so only to know whose forward runs."""
    d = module.__dict__
    if d["_forward_hooks"] or d["_forward_pre_hooks"] or d["_backward_hooks"] or d["_backward_pre_hooks"]:
        return HOOKED
    cls = type(module)
    replaced = cls.__call__ is not _call or cls._call_impl is not _call_impl
    if replaced and not torch.compiler.is_compiling():
        return f"the call of a {cls.__name__} is its own, which a fused forward would skip"
    return hooks_on_all()

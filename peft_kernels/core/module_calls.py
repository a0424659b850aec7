"""Finds what the call of a module does in addition to its forward, for code that computes a module's result
without calling it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from .wrong_types import an

HOOKED_ALL = (
    "hooks on all modules (register_module_forward_hook), which a fused forward would skip; remove them"
)

GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)
"""Names of torch's dictionaries of global module hooks."""

_call, _call_impl = nn.Module.__call__, nn.Module._call_impl


def hooks_on_all() -> str:
    """HOOKED_ALL if there are global hooks, else ""."""
    if (
        _global_forward_hooks
        or _global_forward_pre_hooks
        or _global_backward_hooks
        or _global_backward_pre_hooks
    ):
        return HOOKED_ALL
    return ""


def class_forward(cls: type[Any]) -> Any:
    """The forward of a class of modules. None if torch.jit compiled it: each instance has its own."""
    return getattr(cls, "forward", None)


def is_compiled_by_jit(module: nn.Module) -> bool:
    """Whether torch.jit scripted or traced a module: it has no forward in Python, and no dictionaries of
    parameters and children."""
    return isinstance(module, torch.jit.ScriptModule)


def more_than_forward(module: nn.Module) -> str:
    """Why calling a module does more than its forward (hooks, a replaced __call__), or "". Tracers replace
    the call of all modules or of a class; torch.export does so only to know which module runs."""
    d = module.__dict__
    if d["_forward_hooks"] or d["_forward_pre_hooks"] or d["_backward_hooks"] or d["_backward_pre_hooks"]:
        return f"hooks on {an(module)}, which a fused forward would skip; remove them to fuse it"
    cls = type(module)
    replaced = cls.__call__ is not _call or cls._call_impl is not _call_impl
    if replaced and not torch.compiler.is_compiling():
        return f"{cls.__name__} replaces __call__, which a fused forward would skip; nothing to do"
    return hooks_on_all()

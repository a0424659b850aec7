"""Logits that are there for whoever reads them, and are not computed where nobody does.

What a model does to its logits before the loss is little: a scale, a cap, a type, a shape. A tensor of the
class below follows that without any numbers, and gives its loss by `linear_cross_entropy`; whatever else is
asked of it, is asked of the numbers, which are computed then, once, from what the head had been given.

Autograd sees an ordinary tensor: the gradient of what was read comes back through its node, which computes
the logits again to differentiate them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from ..ops.token_loss import linear_cross_entropy
from .recipe import Head, Recipe, Step, of_head


@dataclass
class _State:
    recipe: Recipe
    reads: Counter[str]
    """By what, where they were read."""
    base: LazyLogits | None = None
    """What these are a view of, by `recipe.steps[-1]`."""
    value: Tensor | None = None
    node: Any = None
    """Of autograd, as it was made: another one, and something has been done to the gradient."""


class LazyLogits(Tensor):
    """(..., vocabulary)."""

    _state: _State

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _HOOKED and isinstance(args[0], LazyLogits):
            if func is Tensor.register_hook and _is_torchs(args[1]):
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args)
            raise RuntimeError(
                f"logits: expected no {_name(func)}, for their gradient is not computed where the loss is "
                "made without them; patch without loss=True"
            )
        follow = _FOLLOWED.get(func)
        if follow is not None and args and isinstance(args[0], LazyLogits) and _is_known(args[0]):
            found = follow(func, *args, **kwargs)
            if found is not NotImplemented:
                return found
        args, kwargs = tree_map(lambda t: _read(t, func), (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """From C++, below autograd."""

        def plain(t: Any) -> Any:
            return _read(t, func).detach() if isinstance(t, LazyLogits) else t

        args, kwargs = tree_map(plain, (args, kwargs or {}))
        return func(*args, **kwargs)


def lazy_logits(head: Head, dtype: torch.dtype, reads: Counter[str]) -> Tensor:
    """Logits of the head, (*hidden.shape[:-1], vocabulary). `reads` counts by whom they are read."""
    shape = (*head.hidden.shape[:-1], head.weight.shape[0])
    like = torch.empty(shape, dtype=dtype, device="meta")
    steps: tuple[Step, ...] = () if dtype == head.hidden.dtype else (lambda t: t.to(dtype),)
    return _new(like, Recipe(head, head.versions, head.hidden, steps), reads)


def _new(like: Tensor, recipe: Recipe, reads: Counter[str], base: LazyLogits | None = None) -> LazyLogits:
    if not torch.is_grad_enabled():
        recipe = replace(recipe, head=recipe.head.detached(leaves=False), rows=recipe.rows.detach())
    logits: LazyLogits = _Deferred.apply(recipe, like, *recipe.head.tensors)
    logits._state = _State(recipe, reads, base)
    with torch._C.DisableTorchFunctionSubclass():
        logits._state.node = logits.grad_fn
    return logits


class _Deferred(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recipe: Recipe, like: Tensor, *tensors: Tensor) -> LazyLogits:
        ctx.recipe = recipe  # inputs alone: nothing here refers to the result
        logits: LazyLogits = torch.Tensor._make_wrapper_subclass(
            LazyLogits, like.shape, strides=like.stride(), dtype=like.dtype, device=recipe.rows.device
        )
        return logits

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        recipe: Recipe = ctx.recipe
        recipe.check()
        head = recipe.head.detached(leaves=True)
        wanted = [t for t in head.tensors if t.requires_grad]
        with torch.enable_grad():
            found = iter(torch.autograd.grad(recipe.compute(head), wanted, dy, allow_unused=True))
        return None, None, *(next(found) if t.requires_grad else None for t in head.tensors)


class _Value(torch.autograd.Function):
    """The numbers, in place of what stands for them."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, value: list[Tensor]) -> Tensor:
        return value.pop()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return dy, None


def _is_torchs(hook: Any) -> bool:
    """Hooks of FSDP and of counters of FLOPs only want to know when the backward of a module begins."""
    return str(getattr(getattr(hook, "func", hook), "__module__", "")).startswith("torch.")


def _read(logits: Any, func: Any) -> Any:
    """The numbers, as they would be now had they been computed in the forward."""
    if not isinstance(logits, LazyLogits):
        return logits
    state = logits._state
    if state.value is None:
        step = state.recipe.steps[-1] if state.recipe.steps else None
        if state.base is not None and step is not None and _is_own(logits):
            return step(_read(state.base, func))
        state.recipe.check()
        state.reads[_name(func)] += 1
        with torch.no_grad():
            value = state.recipe.compute(state.recipe.head)
        with torch.enable_grad():
            state.value = _Value.apply(logits, [value]) if _requires_grad(logits) else value
    return state.value


def _is_known(logits: LazyLogits) -> bool:
    """Whether they are what the recipe tells: once read, they or what they are a view of may have been
    changed."""
    base: LazyLogits | None = logits
    while base is not None:
        if base._state.value is not None:
            return False
        base = base._state.base
    return _is_own(logits)


def _is_own(logits: LazyLogits) -> bool:
    """Whether gradients go the way that the recipe tells."""
    with torch._C.DisableTorchFunctionSubclass():
        return logits.grad_fn is logits._state.node


def _requires_grad(logits: LazyLogits) -> bool:
    with torch._C.DisableTorchFunctionSubclass():
        return logits.requires_grad


def _like(logits: LazyLogits) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device="meta")


def _name(func: Any) -> str:
    own = getattr(func, "__self__", None)  # of an attribute: its getter
    return str(getattr(own, "__name__", None) or getattr(func, "__name__", func))


# What is followed without the numbers. Each gets the function and its arguments, and may answer
# NotImplemented.


def _then(
    logits: LazyLogits, func: Any, args: Any, kwargs: Any, rows: Tensor | None = None, **changes: Any
) -> Any:
    """The logits that a function gives, as it gives them: they may be the same, or a view."""
    state, like = logits._state, _like(logits)
    out = func(like, *args, **kwargs)
    if out is like:
        return logits
    if rows is None:
        rows = state.recipe.rows
    steps = (*state.recipe.steps, lambda t: func(t, *args, **kwargs))
    recipe = replace(state.recipe, rows=rows, steps=steps, **changes)
    shares = out.untyped_storage()._cdata == like.untyped_storage()._cdata
    return _new(out, recipe, state.reads, logits if shares else None)


def _same(func: Any, logits: LazyLogits, *args: Any, **kwargs: Any) -> Any:
    if any(isinstance(a, torch.memory_format) for a in (*args, *kwargs.values())):
        return NotImplemented
    return _then(logits, func, args, kwargs)


def _to(func: Any, logits: LazyLogits, *args: Any, **kwargs: Any) -> Any:
    try:
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    except (TypeError, RuntimeError):
        return NotImplemented
    here = logits.device
    elsewhere = device is not None and (device.type != here.type or device.index not in (None, here.index))
    if elsewhere or memory_format is not None or "copy" in kwargs:
        return NotImplemented
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        return NotImplemented
    return logits if dtype is None else _then(logits, Tensor.to, (dtype,), {})


def _reshape(func: Any, logits: LazyLogits, *args: Any, **kwargs: Any) -> Any:
    if any(isinstance(a, torch.dtype) for a in (*args, *kwargs.values())):
        return NotImplemented  # a view of other numbers
    out = func(_like(logits), *args, **kwargs)
    if out.dim() == 0 or out.shape[-1] != logits.shape[-1]:
        return NotImplemented
    rows = logits._state.recipe.rows
    return _then(logits, func, args, kwargs, rows.reshape(*out.shape[:-1], rows.shape[-1]))


def _index(func: Any, logits: LazyLogits, index: Any) -> Any:
    parts = index if isinstance(index, tuple) else (index,)
    known = (slice, int, type(None), type(Ellipsis), Tensor)
    if not all(isinstance(part, known) and not isinstance(part, (bool, LazyLogits)) for part in parts):
        return NotImplemented
    masks = [part for part in parts if isinstance(part, Tensor)]
    if len(masks) > 1 or any(mask.dtype != torch.bool for mask in masks):
        return NotImplemented
    taken = sum(
        part.dim() if isinstance(part, Tensor) else part is not None and part is not Ellipsis
        for part in parts
    )
    whole = isinstance(parts[-1], slice) and parts[-1] == slice(None)
    if not whole and (Ellipsis in [p for p in parts if not isinstance(p, Tensor)] or taken >= logits.dim()):
        return NotImplemented
    rows = logits._state.recipe.rows[index]
    if not masks:
        return _then(logits, func, (index,), {}, rows)
    recipe, vocabulary = logits._state.recipe, logits.shape[-1]
    like = torch.empty((*rows.shape[:-1], vocabulary), dtype=logits.dtype, device="meta")
    steps = (*recipe.steps, lambda t: t[index])
    return _new(like, replace(recipe, rows=rows, steps=steps), logits._state.reads)


def _times(func: Any, logits: LazyLogits, other: Any, **kwargs: Any) -> Any:
    return _scaled(func, logits, other, other, kwargs)


def _over(func: Any, logits: LazyLogits, other: Any, **kwargs: Any) -> Any:
    return _scaled(func, logits, other, 1 / other if isinstance(other, (int, float)) and other else 0, kwargs)


def _scaled(func: Any, logits: LazyLogits, other: Any, factor: Any, kwargs: Any) -> Any:
    if not isinstance(factor, (int, float)) or not factor > 0 or kwargs:
        return NotImplemented
    recipe = logits._state.recipe
    if recipe.outer is None:
        return _then(logits, func, (other,), {}, inner=recipe.inner * factor)
    return _then(logits, func, (other,), {}, outer=recipe.outer * factor)


def _tanh(func: Any, logits: LazyLogits, **kwargs: Any) -> Any:
    if logits._state.recipe.outer is not None or kwargs:
        return NotImplemented
    return _then(logits, func, (), {}, outer=1.0)


def _cross_entropy(
    func: Any,
    logits: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    if weight is not None or size_average is not None or reduce is not None:
        return NotImplemented
    shape, dtype = logits.shape, logits.dtype
    if type(target) is not Tensor or target.dtype != torch.int64 or target.device != logits.device:
        return NotImplemented
    if len(shape) != 2 or target.shape != shape[:-1]:
        return NotImplemented
    recipe: Recipe = logits._state.recipe
    recipe.check()
    head, cap = recipe.head, recipe.outer
    with of_head(head):
        loss = linear_cross_entropy(
            recipe.rows, head.weight, target, head.bias,
            lora_a=head.lora_a, lora_b=head.lora_b, scaling=head.scaling, ignore_index=ignore_index,
            reduction=reduction, logit_scale=recipe.inner * (cap or 1.0), softcap=cap,
            label_smoothing=label_smoothing,
        )  # fmt: skip
    return loss.to(dtype)


_FOLLOWED: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((Tensor.float, Tensor.contiguous, Tensor.clone, torch.clone), _same),
    Tensor.to: _to,
    **dict.fromkeys(
        (Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten, Tensor.unsqueeze),
        _reshape,
    ),
    Tensor.__getitem__: _index,
    **dict.fromkeys((Tensor.mul, torch.mul, Tensor.__mul__, Tensor.__rmul__), _times),
    **dict.fromkeys((Tensor.div, torch.div, Tensor.__truediv__), _over),
    **dict.fromkeys((Tensor.tanh, torch.tanh), _tanh),
    F.cross_entropy: _cross_entropy,
}

_ATTRIBUTES = (
    "shape dtype device layout ndim requires_grad grad_fn is_leaf itemsize nbytes output_nr is_cpu is_cuda "
    "is_meta is_mps is_xla is_xpu is_sparse is_quantized is_nested"
)
_METADATA = frozenset(getattr(Tensor, name).__get__ for name in _ATTRIBUTES.split()) | {
    Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, torch.numel, Tensor.nelement, Tensor.stride,
    Tensor.element_size, Tensor.__len__, Tensor.is_contiguous, Tensor.get_device, Tensor.is_floating_point,
    torch.is_floating_point, Tensor.is_complex, torch.is_complex, Tensor.is_inference, torch.is_inference,
}  # fmt: skip
"""What is known without the numbers."""
_HOOKED = (Tensor.register_hook, Tensor.retain_grad)

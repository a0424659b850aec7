"""Logits that are there for whoever reads them, and are not computed where nobody does.

What a model does to its logits before the loss is little: a scale, a cap, a type, a shape. A tensor of the
class below follows that without any numbers (`lazy_ops`), and gives its loss by `linear_cross_entropy`. All
else reads the numbers, which are computed then, once, from what the head had been given.

To autograd it is an ordinary tensor: views, writes into them and functions of others are recorded as of any.
So only `__torch_dispatch__`, which lies below autograd, knows numbers from their absence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ...ops.loss.token_loss import linear_cross_entropy
from . import lazy_ops
from .recipe import Head, Recipe, Seal, Step, of_head


@dataclass
class State:
    """What logits hold until their values are computed."""

    recipe: Recipe
    reads: Counter[str]
    """How often logits were read, by the function that did."""
    base: LazyLogits | None = None
    """What these are a view of, by `recipe.steps[-1]`."""
    value: Tensor | None = None
    node: Any = None
    """Of autograd, if gradients go the way that the recipe tells."""


class LazyLogits(Tensor):
    """(..., vocabulary)."""

    _state: State

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _OF_ITSELF or (func is Tensor.register_hook and _is_torchs(args[1])):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _GRADIENT and _asks_gradient(func, args, kwargs):
            raise RuntimeError(
                f"logits: expected no {_GRADIENT[func]}, for the loss is made without them and has no "
                "gradient by them; patch without loss=True"
            )
        logits = args[0] if args else None
        if isinstance(logits, LazyLogits) and is_unread(logits):
            if func in _FOLLOWED:
                return _follow(func, logits, args, kwargs)
            if func is F.cross_entropy and is_known(logits):
                loss = _cross_entropy(*args, **kwargs)
                if loss is not NotImplemented:
                    return loss
        return _read(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        followed = _followed(func, args, kwargs)
        if followed is not None:
            return followed
        own: dict[int, LazyLogits] = {}

        def plain(t: Any) -> Any:
            if not isinstance(t, LazyLogits):
                return t
            value = numbers(t, _name(func))
            own[id(value)] = t
            return value

        args, kwargs = tree_map(plain, (args, kwargs))
        out = func(*args, **kwargs)
        return tree_map(lambda t: own.get(id(t), t), out)  # what is written into comes back


def lazy_logits(head: Head, dtype: torch.dtype, seal: Seal, reads: Counter[str]) -> Tensor:
    """Logits of the head, (*hidden.shape[:-1], vocabulary)."""
    shape = (*head.hidden.shape[:-1], head.weight.shape[0])
    like = torch.empty(shape, dtype=dtype, device="meta")
    steps: tuple[Step, ...] = () if dtype == head.hidden.dtype else (lambda t: t.to(dtype),)
    logits: LazyLogits = _Deferred.apply(Recipe(head, seal, steps), like, reads, *head.tensors)
    _know(logits)
    return logits


def wrapped(like: Tensor, state: State) -> LazyLogits:
    """Logits without numbers, of the shape, strides and dtype of `like`."""
    logits: LazyLogits = torch.Tensor._make_wrapper_subclass(
        LazyLogits,
        like.shape,
        strides=like.stride(),
        dtype=like.dtype,
        device=state.recipe.head.hidden.device,
    )
    logits._state = state
    return logits


class _Deferred(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recipe: Recipe, like: Tensor, reads: Counter[str], *tensors: Tensor) -> LazyLogits:
        ctx.recipe = recipe  # inputs alone: nothing here refers to the result
        return wrapped(like, State(recipe, reads))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        recipe: Recipe = ctx.recipe
        recipe.seal.check()
        head = recipe.head.detached(leaves=True)
        wanted = [t for t in head.tensors if t.requires_grad]
        with torch.enable_grad():
            found = iter(torch.autograd.grad(recipe.compute(head), wanted, dy, allow_unused=True))
        return None, None, None, *(next(found) if t.requires_grad else None for t in head.tensors)


class _Tanh(torch.autograd.Function):
    """As torch's, which would keep its result: those who look at what is kept for backward would read it."""

    @staticmethod
    def forward(ctx: Any, logits: LazyLogits) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            y: Any = torch.ops.aten.tanh.default(logits)
        ctx.recipe = y._state.recipe
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        recipe: Recipe = ctx.recipe
        recipe.seal.check()
        return torch.ops.aten.tanh_backward.default(dy, recipe.compute(recipe.head))


# Reading.


def numbers(logits: LazyLogits, by: str) -> Tensor:
    """Those of logits, as they would be now had they been computed in the forward, without autograd. Views
    share memory."""
    state = logits._state
    if state.value is None:
        with torch.no_grad():
            if state.base is not None:
                state.value = state.recipe.steps[-1](numbers(state.base, by))
            else:
                state.recipe.seal.check()
                state.reads[by] += 1
                state.value = state.recipe.compute(state.recipe.head)
    return state.value


def _read(func: Any, args: Any, kwargs: Any) -> Any:
    """A function of the numbers, in ordinary tensors that are views of the logits: what it writes is
    written to these, and autograd sees it."""
    views: dict[int, tuple[Tensor, LazyLogits, Any]] = {}

    def view(t: Any) -> Any:
        if not isinstance(t, LazyLogits):
            return t
        numbers(t, _name(func))
        with torch._C.DisableTorchFunctionSubclass():
            plain = torch.ops.aten.alias.default(t)
        views[id(plain)] = plain, t, _place(plain)
        return plain

    out = func(*tree_map(view, args), **tree_map(view, kwargs))
    for plain, _, before in views.values():
        if _place(plain) != before:
            raise RuntimeError(
                f"logits: expected no {_name(func)}, which would change their shape or memory in place; "
                "patch without loss=True"
            )
    return views[id(out)][1] if id(out) in views else out


def _place(t: Tensor) -> Any:
    return t.shape, t.stride(), t.dtype, t.data_ptr()


def is_unread(logits: LazyLogits) -> bool:
    """Whether nobody has numbers of these, or of what they are a view of, which may then have changed."""
    at: LazyLogits | None = logits
    while at is not None:
        if at._state.value is not None:
            return False
        at = at._state.base
    return True


def is_known(logits: LazyLogits) -> bool:
    """Whether gradients go the way that the recipe tells."""
    with torch._C.DisableTorchFunctionSubclass():
        return logits.grad_fn is logits._state.node


def _know(logits: LazyLogits) -> None:
    with torch._C.DisableTorchFunctionSubclass():
        logits._state.node = logits.grad_fn


def _name(func: Any) -> str:
    own = getattr(func, "__self__", None)  # of an attribute: its getter
    if isinstance(func, torch._ops.OpOverload):
        func = func.overloadpacket
    return str(getattr(own, "__name__", None) or getattr(func, "__name__", func))


# Following.


def _followed(op: Any, args: Any, kwargs: Any) -> LazyLogits | None:
    """What an op makes of logits, without their numbers; None: these are needed."""
    follow = lazy_ops.FOLLOWED.get(op)
    if follow is None or not isinstance(args[0], LazyLogits) or not is_unread(args[0]):
        return None
    logits, *others = args
    if any(isinstance(t, LazyLogits) for t in tree_leaves((others, kwargs))):
        return None
    before = torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device="meta")
    found = follow(op, before, logits._state.recipe, *others, **kwargs)
    if found is None:
        return None
    shares = found.like.untyped_storage()._cdata == before.untyped_storage()._cdata
    return wrapped(found.like, State(found.recipe, logits._state.reads, logits if shares else None))


def _follow(func: Any, logits: LazyLogits, args: Any, kwargs: Any) -> Any:
    known = is_known(logits)
    if (
        func in (Tensor.tanh, torch.tanh)
        and len(args) == 1
        and not kwargs
        and logits._state.recipe.outer is None
    ):
        out: Any = _Tanh.apply(logits)
    else:
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
    if known and isinstance(out, LazyLogits) and out is not logits:
        _know(out)
    return out


def _cross_entropy(
    logits: LazyLogits,
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
    recipe.seal.check()
    head, cap = recipe.head, recipe.outer
    if not logits.requires_grad:
        head = head.detached(leaves=False)
    with of_head(head):
        loss = linear_cross_entropy(
            recipe.rows(head.hidden), head.weight, target, head.bias,
            lora_a=head.lora_a, lora_b=head.lora_b, scaling=head.scaling, ignore_index=ignore_index,
            reduction=reduction, logit_scale=recipe.inner * (cap or 1.0), softcap=cap,
            label_smoothing=label_smoothing,
        )  # fmt: skip
    return loss.to(dtype)


_FOLLOWED: frozenset[Callable[..., Any]] = frozenset(
    (
        Tensor.float, Tensor.contiguous, Tensor.clone, torch.clone, Tensor.to, Tensor.view, Tensor.reshape,
        torch.reshape, Tensor.flatten, torch.flatten, Tensor.unsqueeze, Tensor.__getitem__, Tensor.mul,
        torch.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.div, torch.div, Tensor.__truediv__, Tensor.tanh,
        torch.tanh,
    )
)  # fmt: skip
"""Functions whose results may be logits without numbers. `lazy_ops` has what torch makes of them."""

_ATTRIBUTES = (
    "shape dtype device layout ndim requires_grad grad grad_fn is_leaf itemsize nbytes output_nr is_cpu "
    "is_cuda is_meta is_mps is_xla is_xpu is_sparse is_quantized is_nested retains_grad _version "
    "_backward_hooks"
)
_WRITTEN = ("requires_grad", "grad", "_backward_hooks")  # autograd itself writes the last
_OF_ITSELF = {
    *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES.split()),
    *(getattr(Tensor, name).__set__ for name in _WRITTEN),
    Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, torch.numel, Tensor.nelement, Tensor.stride,
    Tensor.element_size, Tensor.__len__, Tensor.is_contiguous, Tensor.get_device, Tensor.is_floating_point,
    torch.is_floating_point, Tensor.is_complex, torch.is_complex, Tensor.is_inference, torch.is_inference,
    Tensor.requires_grad_,
}  # fmt: skip
"""What is asked of the tensor, and not of its numbers."""


# Gradients by the logits.

_GRADIENT: dict[Any, str] = {
    Tensor.register_hook: "register_hook",
    Tensor.retain_grad: "retain_grad",
    torch.autograd.grad: "torch.autograd.grad by them",
    torch.autograd.backward: "torch.autograd.backward with them as inputs",
}


def _asks_gradient(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether one by logits."""
    if func is torch.autograd.grad:
        asked = args[1] if len(args) > 1 else kwargs["inputs"]
    else:
        asked = kwargs.get("inputs") if func is torch.autograd.backward else args[0]
    return any(isinstance(t, LazyLogits) for t in tree_leaves(asked))


def _is_torchs(hook: Any) -> bool:
    """Hooks of FSDP and of counters of FLOPs only want to know when the backward of a module begins."""
    return str(getattr(getattr(hook, "func", hook), "__module__", "")).startswith("torch.")

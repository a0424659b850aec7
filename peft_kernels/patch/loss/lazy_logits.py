"""Logits that are computed when something reads their values.

Models do little to logits before the loss: scale, softcap, cast, reshape. LazyLogits records these steps
without values (`lazy_ops`) and computes the loss by `linear_cross_entropy`. Any other function materialises
the values, once, from the input of the head.

To autograd they are an ordinary tensor: views, in-place writes and functions of other tensors are recorded as
usual. Only `__torch_dispatch__`, below autograd, distinguishes logits with values from those without.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo  # the public one imports Dynamo at once
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves, tree_map

from ...core.gradient import AutogradFunction
from ...ops.arguments import autocast_dtype
from ...ops.loss.token_loss import linear_cross_entropy
from . import lazy_ops
from .recipe import HeadCall, Recipe, Step, of_head


@dataclass
class State:
    """How to compute logits, and their values once they are computed."""

    recipe: Recipe
    reads: Counter[str]
    """How often the logits were materialised, by the function that did it."""
    base: LazyLogits | None = None
    """The logits these are a view of, by `recipe.steps[-1]`."""
    value: Tensor | None = None
    node: Any = None
    """The autograd node, if the recipe describes all of the gradient's path."""


class LazyLogits(Tensor):
    """(..., vocabulary)."""

    _state: State

    @classmethod
    @_disable_dynamo  # in a compiled function it runs as it is, between graphs
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        wanted = _wanted_gradients(func, args, kwargs) if func in _GRADIENTS else []
        for one in wanted:
            call = one._state.recipe.call
            if call.is_scored:
                raise RuntimeError(
                    f"logits: expected no {_GRADIENTS[func]}, for a loss was computed without them and has "
                    'no gradient with respect to them; do it before the loss, or patch with without="loss"'
                )
            call.is_plain = True
        if wanted or func in _METADATA or (func is Tensor.register_hook and _is_torch_hook(args[1])):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        logits = args[0] if args else None
        if isinstance(logits, LazyLogits) and is_lazy(logits):
            if func in _LAZY_FUNCTIONS:
                return _call_lazily(func, logits, args, kwargs)
            if func is F.cross_entropy and follows_recipe(logits):
                loss = _cross_entropy(*args, **kwargs)
                if loss is not NotImplemented:
                    return loss
        return _call_materialized(func, args, kwargs)

    @classmethod
    @_disable_dynamo
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        lazy = _lazy_result(func, args, kwargs)
        if lazy is not None:
            return lazy
        own: dict[int, LazyLogits] = {}

        def plain(t: Any) -> Any:
            if not isinstance(t, LazyLogits):
                return t
            value = materialize(t, _name(func))
            own[id(value)] = t
            return value

        args, kwargs = tree_map(plain, (args, kwargs))
        out = func(*args, **kwargs)
        return tree_map(lambda t: own.get(id(t), t), out)  # in-place ops return their argument


def lazy_logits(call: HeadCall, dtype: torch.dtype, reads: Counter[str]) -> Tensor:
    """Lazy logits of a head, (*hidden.shape[:-1], vocabulary)."""
    head = call.head
    shape = (*head.hidden.shape[:-1], head.weight.shape[0])
    like = torch.empty(shape, dtype=dtype, device="meta")
    steps: tuple[Step, ...] = () if dtype == head.hidden.dtype else (lambda t: t.to(dtype),)
    logits: LazyLogits = _Deferred.apply(Recipe(call, steps), like, reads, *head.tensors)
    _set_node(logits)
    return logits


def without_values(like: Tensor, state: State) -> LazyLogits:
    """Logits without values, with the shape, strides and dtype of `like`."""
    logits: LazyLogits = torch.Tensor._make_wrapper_subclass(
        LazyLogits,
        like.shape,
        strides=like.stride(),
        dtype=like.dtype,
        device=state.recipe.call.head.hidden.device,
    )
    logits._state = state
    return logits


class _Deferred(AutogradFunction):
    @staticmethod
    def forward(ctx: Any, recipe: Recipe, like: Tensor, reads: Counter[str], *tensors: Tensor) -> LazyLogits:
        ctx.recipe = recipe  # only inputs: saving the result would be a reference cycle
        return without_values(like, State(recipe, reads))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        call: HeadCall = ctx.recipe.call
        return None, None, None, *call.gradients(dy.to(call.head.hidden.dtype))


class _Tanh(AutogradFunction):
    """tanh that does not save its result, which saved-tensor hooks would materialise."""

    @staticmethod
    def forward(ctx: Any, logits: LazyLogits) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            y: Any = torch.ops.aten.tanh.default(logits)
        ctx.recipe = y._state.recipe
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        recipe: Recipe = ctx.recipe
        return torch.ops.aten.tanh_backward.default(dy, recipe.compute())


# Materialising.


def materialize(logits: LazyLogits, by: str) -> Tensor:
    """The values of logits, without autograd: the same as if computed in the forward. Views share memory.
    `by`: the function that reads them."""
    state = logits._state
    if state.value is None:
        with torch.no_grad():
            if state.base is not None:
                state.value = state.recipe.steps[-1](materialize(state.base, by))
            else:
                state.recipe.call.check()
                state.reads[by] += 1
                state.value = state.recipe.compute()
    return state.value


def _call_materialized(func: Any, args: Any, kwargs: Any) -> Any:
    """Calls a function on ordinary tensors that are views of the logits, so that autograd records what it
    writes."""
    views: dict[int, tuple[Tensor, LazyLogits, Any]] = {}

    def view(t: Any) -> Any:
        if not isinstance(t, LazyLogits):
            return t
        materialize(t, _name(func))
        with torch._C.DisableTorchFunctionSubclass():
            plain = torch.ops.aten.alias.default(t)
        views[id(plain)] = plain, t, _layout(plain)
        return plain

    out = func(*tree_map(view, args), **tree_map(view, kwargs))
    for plain, _, before in views.values():
        if _layout(plain) != before:
            raise RuntimeError(
                f"logits: expected no {_name(func)}, which would change their shape or memory in place; "
                'patch with without="loss"'
            )
    return views[id(out)][1] if id(out) in views else out


def _layout(t: Tensor) -> Any:
    return t.shape, t.stride(), t.dtype, t.data_ptr()


def is_lazy(logits: LazyLogits) -> bool:
    """Whether neither these nor the logits they are a view of have values, which may have been written to."""
    if logits._state.recipe.call.is_plain:
        return False
    at: LazyLogits | None = logits
    while at is not None:
        if at._state.value is not None:
            return False
        at = at._state.base
    return True


def follows_recipe(logits: LazyLogits) -> bool:
    """Whether the recipe describes all of the gradient's path."""
    with torch._C.DisableTorchFunctionSubclass():
        return logits.grad_fn is logits._state.node


def _set_node(logits: LazyLogits) -> None:
    with torch._C.DisableTorchFunctionSubclass():
        logits._state.node = logits.grad_fn


def _name(func: Any) -> str:
    own = getattr(func, "__self__", None)  # for the getter of an attribute
    if isinstance(func, torch._ops.OpOverload):
        func = func.overloadpacket
    return str(getattr(own, "__name__", None) or getattr(func, "__name__", func))


# Steps without values.


def _lazy_result(op: Any, args: Any, kwargs: Any) -> LazyLogits | None:
    """The result of an op on logits without values, or None if it needs them."""
    follow = lazy_ops.LAZY_OPS.get(op)
    if follow is None or not isinstance(args[0], LazyLogits) or not is_lazy(args[0]):
        return None
    logits, *others = args
    if any(isinstance(t, LazyLogits) for t in tree_leaves((others, kwargs))):
        return None
    before = torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device="meta")
    found = follow(op, before, logits._state.recipe, *others, **kwargs)
    if found is None:
        return None
    shares = found.like.untyped_storage()._cdata == before.untyped_storage()._cdata
    return without_values(found.like, State(found.recipe, logits._state.reads, logits if shares else None))


def _call_lazily(func: Any, logits: LazyLogits, args: Any, kwargs: Any) -> Any:
    known = follows_recipe(logits)
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
        _set_node(out)
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
    recipe.call.check()
    head, cap = recipe.call.head, recipe.outer
    if not logits.requires_grad:
        head = head.detached(leaves=False)
    with of_head(head):
        loss = linear_cross_entropy(
            recipe.rows(head.hidden), head.weight, target, head.bias,
            lora_a=head.lora_a, lora_b=head.lora_b, scaling=head.scaling, ignore_index=ignore_index,
            reduction=reduction, logit_scale=recipe.inner * (cap or 1.0), softcap=cap,
            label_smoothing=label_smoothing,
        )  # fmt: skip
    recipe.call.is_scored = True
    return loss.to(_loss_dtype(dtype, logits.device.type))


def _loss_dtype(logits: torch.dtype, device: str) -> torch.dtype:
    """Of F.cross_entropy here: autocast runs it in fp32."""
    return torch.float32 if autocast_dtype(device) is not None and logits.itemsize < 4 else logits


_LAZY_FUNCTIONS: frozenset[Callable[..., Any]] = frozenset(
    (
        Tensor.float, Tensor.contiguous, Tensor.clone, torch.clone, Tensor.to, Tensor.view, Tensor.reshape,
        torch.reshape, Tensor.flatten, torch.flatten, Tensor.unsqueeze, Tensor.__getitem__, Tensor.mul,
        torch.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.div, torch.div, Tensor.__truediv__, Tensor.tanh,
        torch.tanh,
    )
)  # fmt: skip
"""Functions whose result may be lazy. `lazy_ops` has the ops that torch turns them into."""

_ATTRIBUTES = (
    "shape dtype device layout ndim requires_grad grad grad_fn is_leaf itemsize nbytes output_nr is_cpu "
    "is_cuda is_meta is_mps is_xla is_xpu is_sparse is_quantized is_nested retains_grad _version "
    "_backward_hooks"
)
_WRITTEN = ("requires_grad", "grad", "_backward_hooks")  # autograd writes the last one
_METADATA = {
    *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES.split()),
    *(getattr(Tensor, name).__set__ for name in _WRITTEN),
    Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, torch.numel, Tensor.nelement, Tensor.stride,
    Tensor.element_size, Tensor.__len__, Tensor.is_contiguous, Tensor.get_device, Tensor.is_floating_point,
    torch.is_floating_point, Tensor.is_complex, torch.is_complex, Tensor.is_inference, torch.is_inference,
    Tensor.requires_grad_,
}  # fmt: skip
"""Functions of the tensor's metadata."""


# Gradients with respect to the logits.

_GRADIENTS: dict[Any, str] = {
    Tensor.register_hook: "register_hook",
    Tensor.retain_grad: "retain_grad",
    torch.autograd.grad: "torch.autograd.grad with respect to them",
    torch.autograd.backward: "torch.autograd.backward with them as inputs",
}


def _wanted_gradients(func: Any, args: Any, kwargs: Any) -> list[LazyLogits]:
    """The logits of which the call wants the gradient."""
    if func is Tensor.register_hook and _is_torch_hook(args[1]):
        return []
    if func is torch.autograd.grad:
        inputs = args[1] if len(args) > 1 else kwargs["inputs"]
    else:
        inputs = kwargs.get("inputs") if func is torch.autograd.backward else args[0]
    return [t for t in tree_leaves(inputs) if isinstance(t, LazyLogits)]


def _is_torch_hook(hook: Any) -> bool:
    """Whether this is a hook of FSDP or a FLOP counter, which only run when a module's backward begins."""
    return str(getattr(getattr(hook, "func", hook), "__module__", "")).startswith("torch.")

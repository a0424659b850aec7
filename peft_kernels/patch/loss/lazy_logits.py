"""Logits that are computed when something reads their values.

Models do little to logits before the loss: scale, softcap, cast, reshape. LazyLogits records these steps
without values (`lazy_ops`) and computes the loss by `linear_cross_entropy`. Any other function materialises
the values, once, from the input of the head.

To autograd they are an ordinary tensor: views, in-place writes and functions of other tensors are recorded as
usual. Only `__torch_dispatch__`, below autograd, distinguishes logits with values from those without.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo  # the public one imports Dynamo at once
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves, tree_map

from ...core.gradient import AutogradFunction
from ...ops.arguments import autocast_dtype
from . import lazy_ops, lazy_scores
from .lazy_state import State, follows_recipe, is_lazy
from .recipe import HeadCall, Recipe, Step


class LazyLogits(Tensor):
    """(..., vocabulary)."""

    _state: State

    def read(self) -> None:
        materialize(self, "detach")

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
            score = lazy_scores.FUNCTIONS.get(func)
            if score is not None and follows_recipe(logits):
                found = score(logits._state.recipe, *args, **kwargs)
                if found is not NotImplemented:
                    return found
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
    logits: LazyLogits = _Deferred.apply(Recipe(call, steps), like, reads, *head.tensors.values())
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


class _Saving(AutogradFunction):
    """A function of logits that does not save its result, which saved-tensor hooks would materialise, but
    how to compute it, or its values once something reads them. `backward_of` takes the gradient, the values
    and the function's other arguments."""

    @staticmethod
    def forward(ctx: Any, logits: LazyLogits, function: Any, backward_of: Any, *others: Any) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            y: Any = function(logits, *others)
        ctx.recipe, ctx.backward_of, ctx.others = y._state.recipe, backward_of, others
        ctx.saved = y._state.saved = []  # not the state, which has the node: a reference cycle
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        unchanged = [value for value, version in ctx.saved if value._version == version]
        dx = ctx.backward_of(dy, unchanged[0] if unchanged else ctx.recipe.compute(), *ctx.others)
        return dx, *(None,) * (2 + len(ctx.others))


def _tanh(logits: LazyLogits, **others: Any) -> Any:
    if others or logits._state.recipe.outer is not None or logits._state.recipe.is_normalized:
        return NotImplemented
    return _Saving.apply(logits, torch.ops.aten.tanh.default, torch.ops.aten.tanh_backward.default)


def _detach(logits: LazyLogits) -> Any:
    """They stay lazy, as for a metric that needs no values, and are computed before the next step."""
    call = logits._state.recipe.call
    call.check()
    with torch._C.DisableTorchFunctionSubclass():
        out: Any = Tensor.detach(logits)
    call.detached.append(weakref.ref(out))
    return out


def _log_softmax(logits: LazyLogits, dim: Any = None, *others: Any, **more: Any) -> Any:
    casts = autocast_dtype(logits.device.type) is not None and logits.itemsize < 4
    if casts or others or more or dim not in (-1, logits.dim() - 1):
        return NotImplemented

    def backward(dy: Tensor, y: Tensor, *_: Any) -> Tensor:
        return torch.ops.aten._log_softmax_backward_data.default(dy, y, -1, y.dtype)

    return _Saving.apply(logits, torch.ops.aten._log_softmax.default, backward, -1, False)


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
        if state.saved is not None and not state.value.is_inference():
            state.saved.append((state.value, state.value._version))
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


def _set_node(logits: LazyLogits) -> None:
    with torch._C.DisableTorchFunctionSubclass():
        logits._state.node = logits.grad_fn


def _name(func: Any) -> str:
    own = getattr(func, "__self__", None)  # for the getter of an attribute
    if isinstance(func, torch._ops.OpOverload):
        func = func.overloadpacket
    return str(getattr(own, "__name__", None) or getattr(func, "__name__", func))


# Steps without values.


def _lazy_result(op: Any, args: Any, kwargs: Any) -> LazyLogits | list[LazyLogits] | None:
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

    def result(one: lazy_ops.LazyResult) -> LazyLogits:
        shares = one.like.untyped_storage()._cdata == before.untyped_storage()._cdata
        return without_values(one.like, State(one.recipe, logits._state.reads, logits if shares else None))

    return [result(one) for one in found] if isinstance(found, list) else result(found)


def _call_lazily(func: Any, logits: LazyLogits, args: Any, kwargs: Any) -> Any:
    known, own = follows_recipe(logits), _OWN_FUNCTIONS.get(func)
    out: Any = NotImplemented if own is None else own(*args, **kwargs)
    if out is NotImplemented:
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
    for one in out if isinstance(out, tuple) else (out,):
        if known and isinstance(one, LazyLogits) and one is not logits:
            _set_node(one)
    return out


_OWN_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    Tensor.detach: _detach,
    **dict.fromkeys((Tensor.tanh, torch.tanh), _tanh),
    **dict.fromkeys((F.log_softmax, Tensor.log_softmax, torch.log_softmax), _log_softmax),
}
"""Functions with a gradient of our own, which may return NotImplemented."""
_LAZY_FUNCTIONS: frozenset[Callable[..., Any]] = frozenset(
    (
        Tensor.float, Tensor.contiguous, Tensor.clone, torch.clone, Tensor.to, Tensor.view, Tensor.reshape,
        torch.reshape, Tensor.flatten, torch.flatten, Tensor.unsqueeze, Tensor.__getitem__, Tensor.mul,
        torch.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.div, torch.div, Tensor.__truediv__,
        Tensor.unbind, torch.unbind, *_OWN_FUNCTIONS,
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

"""Calls of ops: with their gradients, outside autocast, and under torch.func's transforms.

An op's gradient is a torch.autograd.Function. torch.library.register_autograd would do for any schema, but
costs 20 to 40 us per forward call for defaults and pytrees. Our schemas have no defaults and declare their
lists, and only differentiable arguments are passed through the autograd function.
"""

from __future__ import annotations

import sys
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch._ops import OpOverload
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map

from . import flops
from .op import Op

Call = Callable[..., Any]
Rounding = Callable[[Sequence[Any], torch.dtype], Sequence[Any]]

_in_transform = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_any_requires_grad = torch._C._any_requires_grad
_is_grad_enabled = torch.is_grad_enabled
_Without = torch._C._ExcludeDispatchKeyGuard

_AUTOCAST_KEYS = [name for name in vars(DispatchKey) if name.startswith("Autocast")]


def _keyset(*names: str) -> DispatchKeySet:
    keys = DispatchKeySet(getattr(DispatchKey, names[0]))
    for name in names[1:]:
        keys |= DispatchKeySet(getattr(DispatchKey, name))
    return keys


# An op defines its own compute dtypes: torch functions that a kernel calls must not see autocast.
_AUTOCAST = _keyset(*_AUTOCAST_KEYS)
_VERSIONS = _keyset("ADInplaceOrView")
_ABOVE_KERNELS = _AUTOCAST | _keyset("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor")


def is_plain_call() -> bool:
    """Whether nothing but autograd sees the ops of a call: no transform of torch.func, forward-mode
    differentiation or dispatch mode."""
    return not (_in_transform() or forward_ad._current_level >= 0 or _dispatch_modes())


class Like(NamedTuple):
    """Shape and dtype of a tensor that is not saved."""

    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, value: Any) -> Any:
        """Of a tensor, or of each tensor in a list; None for None."""
        if isinstance(value, Tensor):
            return cls(value.shape, value.dtype)
        return value and [cls.of(t) for t in value]


def register(op: type[Op], overload: OpOverload, library: torch.library.Library, ops: Any) -> Call:
    """Registers an op's autograd and autocast kernels; returns the function for eager calls.

    Under torch.func's transforms and in forward-mode differentiation, for which kernels have no rules, the
    reference runs, which torch differentiates and batches. Backward unpacks saved tensors once: a second time
    is an error under hooks such as those of activation checkpointing.
    """
    rounded = _rounding(op, ops)
    apply = _differentiable(op, overload, ops, rounded) if op.differentiable else None
    trained = _items(op, overload)

    # One function: each further Python call would show in the time of a small op.
    def call(*args: Any, rounds: torch.dtype | None = None) -> Any:
        if _in_transform() or forward_ad._current_level >= 0:
            with _Without(_AUTOCAST):
                return op.plain(*(args if rounds is None else op.rounded(args, rounds)))
        if _dispatch_modes():
            flops.update_counters()
        if apply is not None and _is_grad_enabled() and _any_requires_grad(*(tensors := trained(args))):
            return apply(args, tensors, rounds)
        with _Without(_ABOVE_KERNELS):
            return overload(*(args if rounds is None else rounded(args, rounds)))

    def without_autocast(_keys: DispatchKeySet, *args: Any) -> Any:
        with _Without(_AUTOCAST):
            return overload(*args)

    for key in _AUTOCAST_KEYS:
        library.impl(overload, without_autocast, key, with_keyset=True)
    if overload._schema.is_mutable:
        library.impl(overload, _counting_versions(overload), "ADInplaceOrView", with_keyset=True)
    if apply is not None:

        def above_kernels(_keys: DispatchKeySet, *args: Any) -> Any:
            tensors = trained(args)
            if _is_grad_enabled() and _any_requires_grad(*tensors):
                return apply(args, tensors)
            with _Without(_ABOVE_KERNELS):
                return overload(*args)

        library.impl(overload, above_kernels, "Autograd", with_keyset=True)
    return call


def _counting_versions(overload: OpOverload) -> Call:
    """Increments the versions of tensors changed in place, so that a backward that saved one of them
    raises."""
    arguments = overload._schema.arguments
    changed = [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]

    def call(_keys: DispatchKeySet, *args: Any) -> Any:
        for i in changed:
            torch.autograd.graph.increment_version(args[i])
        with _Without(_ABOVE_KERNELS | _VERSIONS):
            return overload(*args)

    return call


def _items(op: type[Op], overload: OpOverload) -> Callable[[Sequence[Any]], list[Any]]:
    """Returns a function that picks the differentiable tensors from a call's arguments, lists flattened."""
    places = [op.arguments.index(name) for name in op.differentiable]
    if not any(_is_list(overload._schema.arguments[i].type) for i in places):
        return lambda args: [args[i] for i in places]

    def items(args: Sequence[Any]) -> list[Any]:
        found: list[Any] = []
        for i in places:
            found += args[i] if isinstance(args[i], (list, tuple)) else [args[i]]
        return found

    return items


def _rounding(op: type[Op], ops: Any) -> Rounding:
    """Returns `Op.rounded` with a single call of `cast`."""
    places = [op.arguments.index(name) for name in op.rounding]

    def rounded(args: Sequence[Any], dtype: torch.dtype) -> Sequence[Any]:
        given: list[Any] = []
        for i in places:
            given += args[i] if isinstance(args[i], (list, tuple)) else [args[i]]
        new, found = iter(ops.cast(given, dtype)), list(args)
        for i in places:
            many = isinstance(args[i], (list, tuple))
            found[i] = [next(new) for _ in args[i]] if many else next(new)
        return found

    return rounded


def _differentiable(op: type[Op], overload: OpOverload, ops: Any, rounded: Rounding) -> Call:
    """Returns the differentiable call of an op, given its arguments and the differentiable ones among
    them."""
    returns = overload._schema.returns
    several, first_is_list = len(returns) > 1, _is_list(returns[0].type)
    saving = _Saving(op, overload)
    of_lists = {a.name for a in overload._schema.arguments if _is_list(a.type)}
    trained = [(op.arguments.index(name), name in of_lists) for name in op.differentiable]
    Need: Any = namedtuple("Need", op.differentiable)  # type: ignore[misc]

    # `args` are all arguments of the op. Autograd sees the differentiable ones at the end, before rounding.
    def forward(ctx: Any, args: Sequence[Any], rounds: torch.dtype | None, *_: Tensor | None) -> Any:
        ctx.rounds = rounds
        if rounds is not None:
            args = rounded(args, rounds)
        with _Without(_ABOVE_KERNELS):
            output = overload(*args)
        results = output if several else (output,)
        saving.save(ctx, args, results)
        return (*results[0], *results[1:]) if first_is_list else output

    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        args, results = saving.restore(ctx)
        flags: Iterator[bool] = iter(ctx.needs_input_grad[2:])
        need = Need(*([next(flags) for _ in args[i]] if many else next(flags) for i, many in trained))
        dy: Any = grads[0]
        if first_is_list or op.num_outputs > 1:
            dy = grads[: len(results[0]) if first_is_list else op.num_outputs]
        if all(d is None for d in (dy if isinstance(dy, tuple) else [dy])):  # no loss depends on it
            return (None,) * len(ctx.needs_input_grad)
        with _Without(_AUTOCAST):
            if op.twice_differentiable or not torch.is_grad_enabled():
                found = op.backward(ops, op.named(args), results, need, dy)
            else:
                found = first_order_only(op.name, op.backward, ops, op.named(args), results, need, dy)
        gradients, narrow = _as_passed(op, of_lists, found, need)
        # One cast for all; torch would cast one by one. With grad enabled it does, so that the graph keeps
        # the node that raises.
        if ctx.rounds is not None and narrow and not torch.is_grad_enabled():
            wide = ops.cast([gradients[i] for i in narrow], torch.float32)
            for i, one in zip(narrow, wide, strict=True):
                gradients[i] = one
        return None, None, *gradients

    # The class name is shown by a tensor's grad_fn.
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(f"{overload._namespace}_{op.name}_", (torch.autograd.Function,), methods)
    function._backward_cls.register_prehook = _register_prehook

    # Not Function.apply itself, which only adds support of torch.func's transforms.
    apply = super(torch.autograd.Function, function).apply

    def call(args: Sequence[Any], tensors: list[Any], rounds: torch.dtype | None = None) -> Any:
        output = apply(args, rounds, *tensors)
        if not first_is_list:
            return output
        split = len(output) - len(returns) + 1
        return (list(output[:split]), *output[split:]) if several else list(output)

    return call


def _as_passed(op: type[Op], of_lists: set[str], found: Any, need: Any) -> tuple[list[Any], list[int]]:
    """Gradients in the order of the tensors passed through autograd, and which of them are narrow: of
    arguments that were rounded."""
    gradients: list[Any] = []
    narrow: list[int] = []
    for name in op.differentiable:
        wanted, start = getattr(need, name), len(gradients)
        if name in of_lists:
            gradients += [one if w else None for one, w in zip(found[name], wanted, strict=True)]
        else:
            gradients.append(found[name] if wanted else None)
        if name in op.rounding:
            narrow += [i for i in range(start, len(gradients)) if gradients[i] is not None]
    return gradients, narrow


def _register_prehook(node: Any, hook: Call) -> Any:
    """Of an autograd node. Refuses torch's split of a backward into one for inputs and one for weights: the
    second starts from nodes that it keeps weakly if they are in Python, and sums the gradients of all their
    outputs."""
    if sys._getframe(1).f_code.co_name == "stage_backward_input":
        raise RuntimeError(
            f"{type(node)._forward_cls.__name__}: expected a schedule with whole backwards (ScheduleGPipe, "
            "Schedule1F1B, ScheduleInterleaved1F1B), got one that computes the gradients of weights later "
            "(zero bubble), which fails with autograd functions in Python"
        )
    return torch._C._FunctionBase.register_prehook(node, hook)


class _Saving:
    """Saves a call's arguments and results for backward; tensors by save_for_backward, so that saved-tensor
    hooks see them."""

    def __init__(self, op: type[Op], overload: OpOverload) -> None:
        arguments = overload._schema.arguments
        tensors = [(i, _is_list(a.type)) for i, a in enumerate(arguments) if "Tensor" in str(a.type)]
        self._all = tensors
        self._some = [(i, many) for i, many in tensors if op.arguments[i] not in op.saved_meta]
        self._flag = op.arguments.index(op.saves_all_with) if op.saves_all_with else None
        self._meta_args = [i for i, name in enumerate(op.arguments) if name in op.saved_meta]
        results = op.returns or ["y"]
        self._num_outputs = op.num_outputs
        self._saved_outputs = [i for i, name in enumerate(results) if name in op.saved_outputs]
        self._meta_outputs = [i for i, name in enumerate(results) if name in op.saved_meta]
        self._none: list[Any] = [None] * len(results)
        self._named: Any = namedtuple("Results", results)  # type: ignore[misc]

    def _saved(self, args: Sequence[Any]) -> list[tuple[int, bool]]:
        return self._some if self._flag is None or not args[self._flag] else self._all

    def save(self, ctx: Any, args: Sequence[Any], results: Sequence[Any]) -> None:
        rest, tensors = list(args), []
        for i in self._meta_args:
            rest[i] = Like.of(args[i])
        for i, many in self._saved(args):
            if many:
                tensors.extend(args[i])
                rest[i] = len(args[i])
            else:
                tensors.append(args[i])
                rest[i] = None
        meta = self._none.copy()
        for i in self._meta_outputs:
            meta[i] = Like.of(results[i])
        if self._saved_outputs:
            tensors += [results[i] for i in self._saved_outputs]
            ctx.mark_non_differentiable(*(results[i] for i in self._saved_outputs if i >= self._num_outputs))
        # Zeros for missing gradients would take as much memory as the results, and be passed on.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.rest, ctx.meta = rest, meta

    def restore(self, ctx: Any) -> tuple[list[Any], Any]:
        """The flat arguments, and results by name."""
        tensors: Iterator[Any] = iter(ctx.saved_tensors)
        args, results = list(ctx.rest), list(ctx.meta)
        for i, many in self._saved(args):
            args[i] = [next(tensors) for _ in range(args[i])] if many else next(tensors)
        for i in self._saved_outputs:
            results[i] = next(tensors)
        return args, self._named(*results)


def _is_list(kind: Any) -> bool:
    """Whether a schema's type is a list of tensors."""
    kinds = (torch.ListType.ofTensors(), torch.ListType(torch.OptionalType.ofTensor()))
    return any(kind.isSubtypeOf(one) for one in kinds)


class AutogradFunction(torch.autograd.Function):
    """A Function whose inputs get no gradient if none of its outputs has one: backward is not called. Torch
    would give them zeros, and weight decay and momentum would move parameters that no loss depends on."""

    def __init_subclass__(cls) -> None:
        name = "setup_context" if "setup_context" in vars(cls) else "forward"
        prepare, differentiate = getattr(cls, name), cls.backward

        def prepared(ctx: Any, *args: Any) -> Any:
            if not torch.compiler.is_compiling():  # compilers refuse the call, and pass no zeros on
                ctx.set_materialize_grads(False)
            return prepare(ctx, *args)

        def backward(ctx: Any, *grads: Any) -> Any:
            if all(grad is None for grad in grads):
                return (None,) * len(ctx.needs_input_grad)
            return differentiate(ctx, *grads)

        for wrapped, function in ((name, prepared), ("backward", backward)):
            setattr(cls, wrapped, staticmethod(function))


class RaiseInBackward(torch.autograd.Function):
    """Returns the first `count` tensors; their backward, with respect to any of the tensors, raises."""

    @staticmethod
    def forward(ctx: Any, sentence: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.sentence = sentence
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(ctx.sentence)


def first_order_only(name: str, differentiate: Callable[..., Any], *inputs: Any) -> Any:
    """The gradients of the function `name`, whose own gradient raises, where torch would only warn or treat
    them as constants."""
    with torch.no_grad():
        found = differentiate(*inputs)
    sentence = f"{name}: a gradient of its gradients was asked for, expected first order only"
    tensors = [t for t in tree_leaves(found) if isinstance(t, Tensor)]
    sources = [t for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.requires_grad]
    # Without a differentiable source the result would be a constant.
    sources = sources or [torch.empty(0, requires_grad=True)]
    raising = iter(RaiseInBackward.apply(sentence, len(tensors), *tensors, *sources))
    return tree_map(lambda value: next(raising) if isinstance(value, Tensor) else value, found)

"""How ops are called: with their gradients, past autocast, and under torch.func's transforms.

The gradient of an op is its formula behind a torch.autograd.Function.
torch.library.register_autograd does as much for any schema, and costs 20 to 40 us a forward call: it fills in
defaults, and takes lists apart by pytrees. Our schemas have no defaults, and say where the lists are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._C import DispatchKey, DispatchKeySet
from torch._ops import OpOverload
from torch.autograd import forward_ad

from . import flops

Call = Callable[..., Any]

_calls: dict[OpOverload, Call] = {}

_in_transform = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_Without = torch._C._ExcludeDispatchKeyGuard

_AUTOCAST_KEYS = [name for name in vars(DispatchKey) if name.startswith("Autocast")]


def _keyset(*names: str) -> DispatchKeySet:
    keys = DispatchKeySet(getattr(DispatchKey, names[0]))
    for name in names[1:]:
        keys |= DispatchKeySet(getattr(DispatchKey, name))
    return keys


# An op says itself in which dtypes it computes: torch functions that a kernel calls must not see autocast.
_AUTOCAST = _keyset(*_AUTOCAST_KEYS)
_ABOVE_KERNELS = _AUTOCAST | _keyset("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor")


def eager(op: OpOverload) -> Call:
    """`op` for eager calls: with the gradient that `register` gave it, and less on the way than through the
    dispatcher's keys."""
    return _calls[op]


def _without_autocast() -> Any:
    """A context in which torch functions compute in the dtype of their arguments."""
    return _Without(_AUTOCAST)


def register(
    op: OpOverload,
    library: torch.library.Library,
    meaning: Call,
    backward: Call | None = None,
    setup_context: Call | None = None,
) -> None:
    """Say how `op` is called, in eager calls and through the dispatcher.

    `meaning` is the op in plain torch, which torch itself differentiates and batches: it is what runs under
    torch.func's transforms and in forward-mode differentiation, for which kernels have no rules.

    `setup_context(ctx, inputs, output)` returns the tensors to save, lists of them among them.
    `backward(ctx, saved, needed, *grads)` gets these back, and whether each input needs its gradient; it
    returns one gradient an input, a list of them (or None) for a list of tensors. Saved tensors are unpacked
    here, once: a second time is an error under hooks such as those of activation checkpointing.
    """
    call = _below_autograd(op)
    if backward is not None:
        assert setup_context is not None
        call = differentiable = _differentiable(op, backward, setup_context)
        library.impl(op, lambda _keys, *args: differentiable(*args), "Autograd", with_keyset=True)

    def past_autocast(_keys: DispatchKeySet, *args: Any) -> Any:
        with _without_autocast():
            return op(*args)

    for key in _AUTOCAST_KEYS:
        library.impl(op, past_autocast, key, with_keyset=True)

    def eager_call(*args: Any) -> Any:
        if _in_transform() or forward_ad._current_level >= 0:
            with _without_autocast():
                return meaning(*args)
        if _dispatch_modes():
            flops.tell()
        return call(*args)

    _calls[op] = eager_call


def _below_autograd(op: OpOverload) -> Call:
    def call(*args: Any) -> Any:
        with _Without(_ABOVE_KERNELS):
            return op(*args)

    return call


def _differentiable(op: OpOverload, backward: Call, setup_context: Call) -> Call:
    below = _below_autograd(op)
    returns_tuple = len(op._schema.returns) > 1
    in_lists, out_lists = _lists(op._schema.arguments), _lists(op._schema.returns)

    # torch sees tensors that need a gradient only among the arguments themselves, not in lists.
    def flat_forward(ctx: Any, sizes: list[int], *flat: Any) -> Any:
        args = _nested(flat, in_lists, sizes)
        output = below(*args)
        saved = setup_context(ctx, args, output)
        ctx.saved_lists = [i for i, value in enumerate(saved) if isinstance(value, (list, tuple))]
        tensors, ctx.saved_sizes = _flat(saved, ctx.saved_lists)
        ctx.save_for_backward(*tensors)
        ctx.in_sizes = sizes
        if not out_lists:
            return output
        outputs, ctx.out_sizes = _flat(output if returns_tuple else (output,), out_lists)
        return (*outputs, ctx.out_sizes)

    def flat_backward(ctx: Any, *grads: Any) -> Any:
        if out_lists:
            grads = _nested(grads[:-1], out_lists, ctx.out_sizes)
        saved = _nested(ctx.saved_tensors, ctx.saved_lists, ctx.saved_sizes)
        needed = _nested(ctx.needs_input_grad[1:], in_lists, ctx.in_sizes)
        with _without_autocast():
            result = list(backward(ctx, saved, needed, *grads))
        for position, size in zip(in_lists, ctx.in_sizes, strict=True):
            if result[position] is None:
                result[position] = [None] * size
        return (None, *_flat(result, in_lists)[0])

    # The name is what a tensor's grad_fn shows, and it is taken when the class is made.
    methods = {"forward": staticmethod(flat_forward), "backward": staticmethod(flat_backward)}
    function: Any = type(f"{op._namespace}_{op._opname}_", (torch.autograd.Function,), methods)

    def call(*args: Any) -> Any:
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return below(*args)
        flat, sizes = _flat(args, in_lists)
        output = function.apply(sizes, *flat)
        if not out_lists:
            return output
        outputs = _nested(output[:-1], out_lists, output[-1])
        return outputs if returns_tuple else outputs[0]

    return call


def _lists(declared: Sequence[Any]) -> list[int]:
    """Positions of lists of tensors among the arguments or the returns of a schema."""
    kinds = (torch.ListType.ofTensors(), torch.ListType(torch.OptionalType.ofTensor()))
    return [i for i, item in enumerate(declared) if any(item.type.isSubtypeOf(kind) for kind in kinds)]


def _flat(values: Sequence[Any], lists: list[int]) -> tuple[Sequence[Any], list[int]]:
    """`values` with the items of the lists at those positions in their place, and the lists' lengths."""
    if not lists:
        return values, []
    flat: list[Any] = []
    for i, value in enumerate(values):
        if i in lists:
            flat.extend(value)
        else:
            flat.append(value)
    return flat, [len(values[i]) for i in lists]


def _nested(flat: Sequence[Any], lists: list[int], sizes: list[int]) -> tuple[Any, ...]:
    """What `_flat` took apart."""
    if not lists:
        return tuple(flat)
    nested = list(flat)
    for position, size in zip(lists, sizes, strict=True):
        nested[position : position + size] = [nested[position : position + size]]
    return tuple(nested)

"""The gradient of an op: its formula behind a torch.autograd.Function.

torch.library.register_autograd does as much for any schema, and costs 20 to 40 us a forward call: it fills in
defaults, and takes lists apart by pytrees. Our schemas have no defaults, and say where the lists are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._ops import OpOverload

Call = Callable[..., Any]

_calls: dict[OpOverload, Call] = {}


def eager(op: OpOverload) -> Call:
    """`op` for eager calls: with the gradient that `register` gave it, and less on the way than through the
    dispatcher's autograd key."""
    call = _calls.get(op)
    return _below_autograd(op) if call is None else call


def register(op: OpOverload, backward: Call, setup_context: Call, library: torch.library.Library) -> None:
    """Give `op` a gradient.

    `setup_context(ctx, inputs, output)` returns the tensors to save, lists of them among them.
    `backward(ctx, saved, needed, *grads)` gets these back, and whether each input needs its gradient; it
    returns one gradient an input, a list of them (or None) for a list of tensors. Saved tensors are unpacked
    here, once: a second time is an error under hooks such as those of activation checkpointing.
    """
    call = _calls[op] = _differentiable(op, backward, setup_context)
    library.impl(op, lambda _keyset, *args: call(*args), "Autograd", with_keyset=True)


def _below_autograd(op: OpOverload) -> Call:
    def call(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
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

"""Every op, once: schema, reference, fake kernel, backward. The sole home of the op schemas.

`install(namespace)` turns the table into a torch operator namespace: the public one, and one for each back
end, so that two back ends can be compared in one process and none replaces another without a word. Autograd
formulas call the ops of their own namespace, so a back end's backward is its own too.

The base weight of every linear op is the group `(packed, absmax, absmax2, offset, blocksize)`:
packed uint8, (n + 1) // 2 bytes, flat or (out, in / 2); absmax fp32 (nblocks,), or uint8 with the second
level absmax2 fp32 (ceil(nblocks / 256),) and offset fp32 () when double-quantised. lora_linear also takes a
dense weight (out, in) there, with absmax None.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import reference
from .code_tables import NESTED_BLOCKSIZE


@dataclass(frozen=True)
class Op:
    """One op. `backward(ops, ctx, *grads)` gets the namespace whose ops it is to call."""

    name: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    setup_context: Callable[..., None] | None = None
    backward: Callable[..., Any] | None = None


# Fake kernels: shapes and dtypes only.


def _quantize_nf4_fake(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    n = weight.numel()
    packed = weight.new_empty((n + 1) // 2, dtype=torch.uint8)
    return packed, weight.new_empty((n + blocksize - 1) // blocksize, dtype=torch.float32)


def _quantize_absmax_fake(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n = absmax.numel()
    absmax2 = absmax.new_empty((n + NESTED_BLOCKSIZE - 1) // NESTED_BLOCKSIZE)
    return absmax.new_empty(n, dtype=torch.uint8), absmax2, absmax.new_empty(())


def _unpack_absmax_fake(q8: Tensor, absmax2: Tensor, offset: Tensor) -> Tensor:
    return absmax2.new_empty(q8.numel())


def _dequantize_nf4_fake(packed, absmax, absmax2, offset, blocksize, shape, dtype):  # type: ignore[no-untyped-def]
    return packed.new_empty(shape, dtype=dtype)


def _nf4_linear_fake(x, packed, absmax, absmax2, offset, blocksize, out_features, bias):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], out_features))


def _nf4_linear_dx_fake(dy, packed, absmax, absmax2, offset, blocksize, in_features):  # type: ignore[no-untyped-def]
    return dy.new_empty((*dy.shape[:-1], in_features))


def _lora_linear_fake(x, weight, absmax, absmax2, offset, blocksize, bias, lora_a, lora_b, *_):  # type: ignore[no-untyped-def]
    h = x.new_empty((*x.shape[:-1], lora_a.shape[0]), dtype=reference.accumulator_dtype(x.dtype))
    return x.new_empty((*x.shape[:-1], lora_b.shape[0])), h


def _lora_linear_backward_fake(  # type: ignore[no-untyped-def]
    dy, x, h, weight, absmax, absmax2, offset, blocksize, lora_a, lora_b, scaling, dropout_p, seed, *needed
):
    return tuple(
        t.new_empty(t.shape if need else (0,)) for t, need in zip((x, lora_a, lora_b), needed, strict=True)
    )


# Autograd.


def _bias_grad(dy: Tensor, bias_dtype: torch.dtype) -> Tensor:
    return reference.rows(dy).sum(0, dtype=reference.accumulator_dtype(dy.dtype)).to(bias_dtype)


def _nf4_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, absmax, absmax2, offset, blocksize, _, bias = inputs
    ctx.save_for_backward(packed, absmax, absmax2, offset)
    ctx.blocksize, ctx.in_features = blocksize, x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _nf4_linear_backward(ops: Any, ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    need_x, *_, need_bias = ctx.needs_input_grad
    dx = ops.nf4_linear_dx(dy, *ctx.saved_tensors, ctx.blocksize, ctx.in_features) if need_x else None
    return dx, None, None, None, None, None, None, _bias_grad(dy, ctx.bias_dtype) if need_bias else None


def _nf4_linear_dx_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, packed, absmax, absmax2, offset, blocksize, _ = inputs
    ctx.save_for_backward(packed, absmax, absmax2, offset)
    ctx.blocksize, ctx.out_features = blocksize, dy.shape[-1]


def _nf4_linear_dx_backward(ops: Any, ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    # dx is linear in dy, with the transposed weight: its own gradient is the forward product.
    d_dy = ops.nf4_linear(g, *ctx.saved_tensors, ctx.blocksize, ctx.out_features, None)
    return d_dy, None, None, None, None, None, None


def _lora_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, absmax, absmax2, offset, blocksize, bias, lora_a, lora_b, scaling, dropout_p, seed = inputs
    ctx.save_for_backward(x, output[1], weight, absmax, absmax2, offset, lora_a, lora_b, seed)
    ctx.blocksize, ctx.scaling, ctx.dropout_p = blocksize, scaling, dropout_p
    ctx.bias_dtype = None if bias is None else bias.dtype
    # h leaves the op only to be saved; a gradient through it has no formula.
    ctx.mark_non_differentiable(output[1])


def _lora_linear_backward(ops: Any, ctx: Any, dy: Tensor, _dh: Tensor | None) -> tuple[Tensor | None, ...]:
    return _lora_linear_gradients(ctx, ops, dy)


@once_differentiable
def _lora_linear_gradients(ctx: Any, ops: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    # Of the gradients' own gradient there is no formula: asking for it raises, where torch would only warn.
    x, h, weight, absmax, absmax2, offset, lora_a, lora_b, seed = ctx.saved_tensors
    need = ctx.needs_input_grad
    need_x, need_w, need_bias, need_a, need_b = need[0], need[1], need[6], need[7], need[8]
    dx, da, db = ops.lora_linear_backward(
        dy, x, h, weight, absmax, absmax2, offset, ctx.blocksize, lora_a, lora_b,
        ctx.scaling, ctx.dropout_p, seed, need_x, need_a, need_b,
    )  # fmt: skip
    dw = reference.rows(dy).t() @ reference.rows(x) if need_w else None
    dbias = _bias_grad(dy, ctx.bias_dtype) if need_bias else None
    return (
        dx if need_x else None, dw, None, None, None, None, dbias,
        da if need_a else None, db if need_b else None, None, None, None,
    )  # fmt: skip


OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op(
            "quantize_nf4",
            schema="(Tensor weight, int blocksize) -> (Tensor packed, Tensor absmax)",
            reference=reference.quantize_nf4,
            fake=_quantize_nf4_fake,
        ),
        Op(
            "quantize_absmax",
            schema="(Tensor absmax) -> (Tensor q8, Tensor absmax2, Tensor offset)",
            reference=reference.quantize_absmax,
            fake=_quantize_absmax_fake,
        ),
        Op(
            "unpack_absmax",
            schema="(Tensor q8, Tensor absmax2, Tensor offset) -> Tensor",
            reference=reference.unpack_absmax,
            fake=_unpack_absmax_fake,
        ),
        Op(
            "dequantize_nf4",
            schema="(Tensor packed, Tensor absmax, Tensor? absmax2, Tensor? offset, int blocksize, "
            "SymInt[] shape, ScalarType dtype) -> Tensor",
            reference=reference.dequantize_nf4,
            fake=_dequantize_nf4_fake,
        ),
        Op(
            "nf4_linear",
            schema="(Tensor x, Tensor packed, Tensor absmax, Tensor? absmax2, Tensor? offset, int blocksize, "
            "SymInt out_features, Tensor? bias) -> Tensor",
            reference=reference.nf4_linear,
            fake=_nf4_linear_fake,
            setup_context=_nf4_linear_setup,
            backward=_nf4_linear_backward,
        ),
        Op(
            "nf4_linear_dx",
            schema="(Tensor dy, Tensor packed, Tensor absmax, Tensor? absmax2, Tensor? offset, "
            "int blocksize, SymInt in_features) -> Tensor",
            reference=reference.nf4_linear_dx,
            fake=_nf4_linear_dx_fake,
            setup_context=_nf4_linear_dx_setup,
            backward=_nf4_linear_dx_backward,
        ),
        Op(
            "lora_linear",
            schema="(Tensor x, Tensor weight, Tensor? absmax, Tensor? absmax2, Tensor? offset, "
            "int blocksize, Tensor? bias, Tensor lora_a, Tensor lora_b, float scaling, float dropout_p, "
            "Tensor? seed) -> (Tensor y, Tensor h)",
            reference=reference.lora_linear,
            fake=_lora_linear_fake,
            setup_context=_lora_linear_setup,
            backward=_lora_linear_backward,
        ),
        Op(
            "lora_linear_backward",
            schema="(Tensor dy, Tensor x, Tensor h, Tensor weight, Tensor? absmax, Tensor? absmax2, "
            "Tensor? offset, int blocksize, Tensor lora_a, Tensor lora_b, float scaling, float dropout_p, "
            "Tensor? seed, bool need_dx, bool need_da, bool need_db) -> (Tensor dx, Tensor da, Tensor db)",
            reference=reference.lora_linear_backward,
            fake=_lora_linear_backward_fake,
        ),
    )
}


def spec_hash() -> str:
    """Fingerprint of all schemas. setup.py computes the same from this file's text and compiles it in."""
    return hashlib.sha256("\n".join(op.schema for op in OPS.values()).encode()).hexdigest()


def install(
    namespace: str, implement: Callable[[Op], Callable[..., Any]] | None = None
) -> torch.library.Library:
    """Define every op in `namespace`, with its fake kernel and autograd formula.

    `implement(op)` gives the Python kernel, for any device; None leaves kernels to a compiled library.
    The caller keeps the returned library alive: the ops vanish with it.
    """
    library = torch.library.Library(namespace, "DEF")
    for op in OPS.values():
        name = f"{namespace}::{op.name}"
        library.define(op.name + op.schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(name, op.fake, lib=library)
        if implement is not None:
            library.impl(op.name, implement(op), "CompositeExplicitAutograd")
        if op.backward is not None:
            torch.library.register_autograd(
                name, _bind_backward(op.backward, namespace), setup_context=op.setup_context, lib=library
            )
    return library


def _bind_backward(backward: Callable[..., Any], namespace: str) -> Callable[..., Any]:
    def bound(ctx: Any, *grads: Any) -> Any:
        return backward(getattr(torch.ops, namespace), ctx, *grads)

    return bound

"""Every op, once: schema, reference, fake kernel, backward. The sole home of the op schemas.

`install(namespace)` turns the table into a torch operator namespace: the public one, and one for each back
end, so that two back ends can be compared in one process and none replaces another without a word. Autograd
formulas call the ops of their own namespace, so a back end's backward is its own too.

The base weight of every linear op is the group `(packed, absmax, absmax2, offset, blocksize)`:
packed uint8, (n + 1) // 2 bytes, flat or (out, in / 2); absmax fp32 (nblocks,), or uint8 with the second
level absmax2 fp32 (ceil(nblocks / 256),) and offset fp32 () when double-quantised. Ops with adapters also
take a dense weight (out, in) there, with absmax None.

multi_lora_linear: several linear layers on one x, each with any number of adapters. Adapter i belongs to
layer[i], draws its dropout mask from stream i of the seed and, when row_group (rows,) is given, serves the
rows whose group is group[i]. A layer without bias has a tensor without elements there. h holds x A^T of all
adapters side by side, zero in the rows that an adapter does not serve.
compute_dtype: in which the base product is computed. x, in backward dy, is rounded to it for that product
alone, and a dense weight is of it; sums, deltas and results are as without it. None means x's dtype.
dora_scale: the output z of a layer, bias included, with all but the bias scaled by column.
gated_mlp: down(activation(gate(x)) * up(x)); its three layers are given in the order gate, up, down.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from . import autograd, fake, flops, formulas, reference


@dataclass(frozen=True)
class Op:
    """One op. What it means is `reference`, or `composite(ops, *args)` in terms of other ops.

    `composite` and `backward(ops, ...)` get the ops that they are to call; the rest of `backward`, and
    `setup_context`, are as `autograd.register` has them.
    """

    name: str
    schema: str
    fake: Callable[..., Any]
    reference: Callable[..., Any] | None = None
    composite: Callable[..., Any] | None = None
    setup_context: Callable[..., Any] | None = None
    backward: Callable[..., Any] | None = None


OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op(
            "quantize_nf4",
            schema="(Tensor weight, int blocksize) -> (Tensor packed, Tensor absmax)",
            reference=reference.quantize_nf4,
            fake=fake.quantize_nf4,
        ),
        Op(
            "quantize_absmax",
            schema="(Tensor absmax) -> (Tensor q8, Tensor absmax2, Tensor offset)",
            reference=reference.quantize_absmax,
            fake=fake.quantize_absmax,
        ),
        Op(
            "unpack_absmax",
            schema="(Tensor q8, Tensor absmax2, Tensor offset) -> Tensor",
            reference=reference.unpack_absmax,
            fake=fake.unpack_absmax,
        ),
        Op(
            "dequantize_nf4",
            schema="(Tensor packed, Tensor absmax, Tensor? absmax2, Tensor? offset, int blocksize, "
            "SymInt[] shape, ScalarType dtype) -> Tensor",
            reference=reference.dequantize_nf4,
            fake=fake.dequantize_nf4,
        ),
        Op(
            "nf4_linear",
            schema="(Tensor x, Tensor packed, Tensor absmax, Tensor? absmax2, Tensor? offset, int blocksize, "
            "SymInt out_features, Tensor? bias) -> Tensor",
            reference=reference.nf4_linear,
            fake=fake.nf4_linear,
            setup_context=formulas.nf4_linear_setup,
            backward=formulas.nf4_linear_backward,
        ),
        Op(
            "nf4_linear_dx",
            schema="(Tensor dy, Tensor packed, Tensor absmax, Tensor? absmax2, Tensor? offset, "
            "int blocksize, SymInt in_features) -> Tensor",
            reference=reference.nf4_linear_dx,
            fake=fake.nf4_linear_dx,
            setup_context=formulas.nf4_linear_dx_setup,
            backward=formulas.nf4_linear_dx_backward,
        ),
        Op(
            "lora_linear",
            schema="(Tensor x, Tensor weight, Tensor? absmax, Tensor? absmax2, Tensor? offset, "
            "int blocksize, Tensor? bias, Tensor lora_a, Tensor lora_b, float scaling, float dropout_p, "
            "Tensor? seed, ScalarType? compute_dtype) -> (Tensor y, Tensor h)",
            reference=reference.lora_linear,
            fake=fake.lora_linear,
            setup_context=formulas.lora_linear_setup,
            backward=formulas.lora_linear_backward,
        ),
        Op(
            "lora_linear_backward",
            schema="(Tensor dy, Tensor x, Tensor h, Tensor weight, Tensor? absmax, Tensor? absmax2, "
            "Tensor? offset, int blocksize, Tensor lora_a, Tensor lora_b, float scaling, float dropout_p, "
            "Tensor? seed, ScalarType? compute_dtype, bool need_dx, bool need_da, bool need_db) "
            "-> (Tensor dx, Tensor da, Tensor db)",
            reference=reference.lora_linear_backward,
            fake=fake.lora_linear_backward,
        ),
        Op(
            "multi_lora_linear",
            schema="(Tensor x, Tensor[] weight, Tensor?[] absmax, Tensor?[] absmax2, Tensor?[] offset, "
            "int[] blocksize, SymInt[] out_features, Tensor[] bias, Tensor[] lora_a, Tensor[] lora_b, "
            "int[] layer, float[] scaling, float[] dropout_p, Tensor? seed, int[] group, Tensor? row_group, "
            "ScalarType? compute_dtype) -> (Tensor[] y, Tensor h)",
            reference=reference.multi_lora_linear,
            fake=fake.multi_lora_linear,
            setup_context=formulas.multi_lora_linear_setup,
            backward=formulas.multi_lora_linear_backward,
        ),
        Op(
            "multi_lora_linear_backward",
            schema="(Tensor[] dy, Tensor x, Tensor h, Tensor[] weight, Tensor?[] absmax, "
            "Tensor?[] absmax2, Tensor?[] offset, int[] blocksize, Tensor[] lora_a, Tensor[] lora_b, "
            "int[] layer, float[] scaling, float[] dropout_p, Tensor? seed, int[] group, Tensor? row_group, "
            "ScalarType? compute_dtype, bool need_dx, bool[] need_da, bool[] need_db) "
            "-> (Tensor dx, Tensor[] da, Tensor[] db)",
            reference=reference.multi_lora_linear_backward,
            fake=fake.multi_lora_linear_backward,
        ),
        Op(
            "gated_mlp",
            schema="(Tensor x, Tensor[] weight, Tensor?[] absmax, Tensor?[] absmax2, Tensor?[] offset, "
            "int[] blocksize, SymInt[] out_features, Tensor[] bias, Tensor[] lora_a, Tensor[] lora_b, "
            "int[] layer, float[] scaling, float[] dropout_p, Tensor? seed, str activation) "
            "-> (Tensor y, Tensor gate, Tensor up, Tensor h, Tensor h_down)",
            composite=formulas.gated_mlp,
            fake=fake.gated_mlp,
            setup_context=formulas.gated_mlp_setup,
            backward=formulas.gated_mlp_backward,
        ),
        Op(
            "gated_activation",
            schema="(Tensor gate, Tensor up, str activation) -> Tensor",
            reference=reference.gated_activation,
            fake=fake.gated_activation,
            setup_context=formulas.gated_activation_setup,
            backward=formulas.gated_activation_backward,
        ),
        Op(
            "gated_activation_backward",
            schema="(Tensor dy, Tensor gate, Tensor up, str activation) -> (Tensor dgate, Tensor dup)",
            reference=reference.gated_activation_backward,
            fake=fake.gated_activation_backward,
        ),
        Op(
            "dropout",
            schema="(Tensor x, float p, Tensor seed) -> Tensor",
            reference=reference.dropout,
            fake=fake.dropout,
            setup_context=formulas.dropout_setup,
            backward=formulas.dropout_backward,
        ),
        Op(
            "dora_norm",
            schema="(Tensor weight, Tensor? absmax, Tensor? absmax2, Tensor? offset, int blocksize, "
            "Tensor lora_a, Tensor lora_b, float scaling) -> Tensor",
            reference=reference.dora_norm,
            fake=fake.dora_norm,
        ),
        Op(
            "dora_scale",
            schema="(Tensor z, Tensor scale, Tensor? bias) -> Tensor",
            reference=reference.dora_scale,
            fake=fake.dora_scale,
            setup_context=formulas.dora_scale_setup,
            backward=formulas.dora_scale_backward,
        ),
        Op(
            "dora_scale_backward",
            schema="(Tensor dy, Tensor z, Tensor scale, Tensor? bias) -> (Tensor dz, Tensor dscale)",
            reference=reference.dora_scale_backward,
            fake=fake.dora_scale_backward,
        ),
    )
}


_REFERENCES = SimpleNamespace(**{op.name: op.reference for op in OPS.values()})


def meaning(op: Op) -> Callable[..., Any]:
    """The op in plain torch."""
    if op.reference is not None:
        return op.reference
    assert op.composite is not None
    return partial(op.composite, _REFERENCES)


def spec_hash() -> str:
    """Fingerprint of all schemas. setup.py computes the same from this file's text and compiles it in."""
    return hashlib.sha256("\n".join(op.schema for op in OPS.values()).encode()).hexdigest()


def install(
    namespace: str, implement: Callable[[Op], Callable[..., Any] | None] | None = None
) -> torch.library.Library:
    """Define every op in `namespace`, with its fake kernel and autograd formula.

    `implement(op)` gives the Python kernel, for any device; None leaves the kernel to a compiled library, or
    to the op's `composite`.
    The caller keeps the returned library alive: the ops vanish with it.
    """
    library = torch.library.Library(namespace, "DEF")
    calls = SimpleNamespace()
    for op in OPS.values():
        name = f"{namespace}::{op.name}"
        library.define(op.name + op.schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(name, op.fake, lib=library)
        kernel = None if implement is None else implement(op)
        if kernel is None and op.composite is not None:
            kernel = partial(op.composite, calls)
        if kernel is not None:
            library.impl(op.name, kernel, "CompositeExplicitAutograd")
        overload = getattr(getattr(torch.ops, namespace), op.name).default
        backward = None if op.backward is None else partial(op.backward, calls)
        autograd.register(overload, library, meaning(op), backward, op.setup_context)
        setattr(calls, op.name, autograd.eager(overload))
    flops.know(namespace)
    return library

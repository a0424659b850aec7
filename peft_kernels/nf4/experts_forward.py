"""The forward of mixtures of experts of transformers 5, with all experts' weights in one parameter.

Tokens are sorted by expert, and each expert's group of tokens is one GEMM. The gate, norms and hooks are the
module's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.gradient import AutogradFunction
from ..core.module_calls import more_than_forward
from ..ops.arguments import autocast_dtype
from ..ops.experts import experts_linear, experts_lora_linear, runs
from ..ops.gated import gated_activation
from .grouped_linear import grouped_linear, has_kernel
from .weight import PackedWeight

__all__ = ["experts_forward"]

Lora = tuple[Tensor, Tensor, float]
"""A (experts, r, in), B (experts, out, r), scaling."""


def experts_forward(
    module: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    lora: Mapping[str, Lora] = {},
) -> Tensor:
    """The outputs of each token's experts, summed by routing weight. Deterministic, gradients included.

    Parameters
    ----------
    module : nn.Module
        Experts of transformers with NF4 or dense weights (experts, out, in). Dense ones are transposed if
        `is_transposed`.
    hidden_states : Tensor, (tokens, hidden)
        fp32 is rounded to the module's `compute_dtype`, or to the dtype of the weights.
    top_k_index : Tensor, (tokens, k)
        Experts of each token. Indices >= `num_experts` (other ranks under expert parallelism) give zeros.
    top_k_weights : Tensor, (tokens, k)
    lora
        Adapters of weights, by parameter name. Differentiable.

    Returns
    -------
    Tensor, (tokens, hidden), of hidden_states' dtype. Differentiable in hidden_states and top_k_weights.
    """
    up_name, down_name = weight_names(module)
    up, down = getattr(module, up_name), getattr(module, down_name)
    experts, k = up.shape[0], top_k_index.shape[-1]
    chosen, order = torch.sort(top_k_index.reshape(-1), stable=True)
    of_each = torch.arange(experts, device=chosen.device, dtype=chosen.dtype)
    ends = torch.searchsorted(chosen, of_each, right=True, out_int32=True)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))

    x = _Sorted.apply(hidden_states.to(_compute_dtype(module, hidden_states, up)), order, back, k)
    x = _linear(module, up_name, up, x, ends, chosen, lora)
    x = _activated(module, x)
    x = _linear(module, down_name, down, x, ends, chosen, lora)
    if getattr(module, "has_post_expert_norm", False):  # some versions lack it
        x = module.post_expert_norm(x)
    y: Tensor = _Combined.apply(x, top_k_weights, order, back)
    return y.to(hidden_states.dtype)


def has_gate(module: Any) -> bool:
    """Whether the first weight holds a gate too, as all do in transformers before 5.3, which sets no
    attribute."""
    return getattr(module, "has_gate", True)


def weight_names(module: Any) -> tuple[str, str]:
    """Names of the parameters of experts."""
    return "gate_up_proj" if has_gate(module) else "up_proj", "down_proj"


def _compute_dtype(module: Any, x: Tensor, weight: Tensor) -> torch.dtype:
    autocast = autocast_dtype(x.device.type)
    if autocast is not None:
        return autocast
    if x.dtype != torch.float32 and isinstance(weight, PackedWeight):
        return x.dtype
    return getattr(module, "compute_dtype", None) or weight.dtype


def _linear(
    module: Any, name: str, weight: Tensor, x: Tensor, ends: Tensor, chosen: Tensor, lora: Mapping[str, Lora]
) -> Tensor:
    if module.is_transposed and not isinstance(weight, PackedWeight):
        weight = weight.mT
    bias: Tensor | None = getattr(module, f"{name}_bias") if module.has_bias else None
    if bias is not None:
        bias = bias.to(x.dtype)
    if bias is not None and bias.requires_grad:
        # The op has no gradient for its bias. Each row has one expert, so this adds it exactly, with a
        # deterministic gradient.
        one_hot = chosen[:, None] == torch.arange(bias.shape[0], device=chosen.device)
        return _matmul(x, ends, weight, None, lora.get(name)) + one_hot.to(x.dtype) @ bias
    return _matmul(x, ends, weight, bias, lora.get(name))


def _matmul(x: Tensor, ends: Tensor, weight: Tensor, bias: Tensor | None, adapter: Lora | None) -> Tensor:
    packed = isinstance(weight, PackedWeight)
    dense: Any = weight.dense if isinstance(weight, PackedWeight) else weight
    if adapter is not None:
        a, b, scaling = adapter
        # Autocast rounds weights, so PEFT's A and B too. For few rows (decoding), casting the adapters of all
        # experts would cost more than the GEMMs.
        rounds = autocast_dtype(x.device.type) == x.dtype and x.shape[0] >= a.shape[0]
        a, b = (t if t.dtype == torch.float32 and not rounds else t.to(x.dtype) for t in (a, b))
        return experts_lora_linear(x, ends, weight if packed else weight.to(x.dtype), a, b, scaling, bias)
    if dense is None:
        return experts_linear(x, ends, weight, bias)  # type: ignore[arg-type]
    if not dense.requires_grad and has_kernel(x, dense):
        return grouped_linear(x, ends, dense, bias)
    parts = [
        F.linear(x[begin:end], dense[e].to(x.dtype), None if bias is None else bias[e])
        for e, begin, end in runs(ends)
    ]
    rest = x.shape[0] - sum(part.shape[0] for part in parts)
    return torch.cat([*parts, x.new_zeros((rest, dense.shape[1]))])


def _activated(module: Any, x: Tensor) -> Tensor:
    y: Tensor
    if not has_gate(module):
        y = module.act_fn(x)
    elif _is_swiglu(module):
        gate, up = x.chunk(2, dim=-1)
        y = gated_activation(gate, up)
    else:
        y = module._apply_gate(x)
    return y


def _is_swiglu(module: Any) -> bool:
    """Whether the gate computes silu(first half) * second half."""
    gate = getattr(type(module)._apply_gate, "__qualname__", "")
    act = getattr(module, "act_fn", None)
    known = gate == "_default_apply_gate" and type(act).__name__ in ("SiLU", "SiLUActivation")
    return known and not more_than_forward(act)  # type: ignore[arg-type]


class _Sorted(AutogradFunction):
    """Gathers rows by expert: row i is that of token order[i] // k."""

    @staticmethod
    def forward(x: Tensor, order: Tensor, back: Tensor, k: int) -> Tensor:
        return x[order // k]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, _, back, k = inputs
        ctx.save_for_backward(back)
        ctx.k = k

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (back,), (rows,) = ctx.saved_tensors, grads
        # The gradient of indexing is not deterministic on the CPU.
        of_token = back.unflatten(0, (-1, ctx.k))
        return _by_parts(of_token.shape[0], rows, lambda part: rows[of_token[part]].sum(1)), None, None, None


class _Combined(AutogradFunction):
    """Sums each token's rows by routing weight, in fp32. Saves the rows in their own dtype."""

    @staticmethod
    def forward(rows: Tensor, weights: Tensor, order: Tensor, back: Tensor) -> Tensor:
        of_token, wide = back.unflatten(0, weights.shape), _wide(weights)[..., None]
        return _by_parts(wide.shape[0], rows, lambda part: (rows[of_token[part]] * wide[part]).sum(1))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        rows, weights, order, back = ctx.saved_tensors
        (dy,) = grads
        d_rows = d_weights = None
        if ctx.needs_input_grad[0]:
            token, by_row = order // weights.shape[1], _wide(weights).reshape(-1)[order, None]
            d_rows = _by_parts(
                rows.shape[0], rows, lambda part: (dy[token[part]] * by_row[part]).to(rows.dtype)
            )
        if ctx.needs_input_grad[1]:
            of_token = back.unflatten(0, weights.shape)
            d_weights = _by_parts(
                weights.shape[0], rows, lambda part: (rows[of_token[part]] * dy[part, None]).sum(-1)
            ).to(weights.dtype)
        return d_rows, d_weights, None, None


_PART = 2**17
"""Elements of rows processed at a time on the CPU."""


def _by_parts(count: int, rows: Tensor, compute: Callable[[slice], Tensor]) -> Tensor:
    """compute(slice) over `count` tokens or rows. On the CPU it is called part by part: intermediate results
    then stay in cache, which is five times as fast as fresh memory. The size of parts changes no bit."""
    part = count
    if rows.device.type == "cpu" and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        part = max(_PART * count // max(rows.numel(), 1), 1)
    if part >= count:
        return compute(slice(0, count))
    out: Tensor | None = None
    for begin in range(0, count, part):
        found = compute(slice(begin, begin + part))
        if out is None:
            out = found.new_empty((count, *found.shape[1:]))
        out[begin : begin + part] = found
    assert out is not None
    return out


def _wide(weights: Tensor) -> Tensor:
    return weights.to(torch.promote_types(weights.dtype, torch.float32))

"""Memory of fine-tuning in bytes, term by term, with sources.

"Saved" means saved by autograd for backward; t is the number of tokens of a batch, e the element size of the
model's dtype. tests/checkpoints/test_cli_plan.py compares everything with measured models.

Assumes a model patched by `pk.patch`, attention by a fused kernel (sdpa, flash), no padding mask, adapters in
fp32, everything else in one dtype, no cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import torch

from ..nf4.weight import PackedWeight
from .sizes import Block, Experts, Linear, Mixture, Model, Run

_FP32, _INT64 = 4, 8
LOGIT_BYTES = 256 << 20
"""The most logits that the loss computes at a time on a GPU: kLogitBytes of csrc/cuda/loss."""


@lru_cache(maxsize=4096)
def packed_bytes(
    out_features: int, in_features: int, format: str, blocksize: int | None, double_quant: bool, name: str
) -> int:
    """A packed weight, with its scales. Raises ValueError if the format cannot have one of this shape."""
    meta = torch.empty(out_features, in_features, dtype=torch.bfloat16, device="meta")
    return PackedWeight.quantize(meta, blocksize, double_quant, name=name, format=format).nbytes


def weights(model: Model, run: Run) -> int:
    """All parameters of the base model. QLoRA: packed linear layers except the head, experts if selected; or
    as the files have them."""
    itemsize = _itemsize(model, run)
    total = sum(_numel(shape) for shape in model.parameters) * itemsize
    if run.method == "qlora":
        for linear in model.linears:
            if linear.quantised:
                total += _packed(linear, run) - linear.numel * itemsize
        for each in model.experts if run.experts else ():
            if each.quantised:
                total += _packed(each, run) - each.count * each.numel * itemsize
    return total


def _packed(weight: Linear | Experts, run: Run) -> int:
    if weight.packed is not None:
        return weight.packed
    count = weight.count if isinstance(weight, Experts) else 1
    form = run.format, run.blocksize, run.double_quant
    return count * packed_bytes(weight.out_features, weight.in_features, *form, weight.name)


def trained(model: Model, run: Run) -> list[tuple[int, ...]]:
    """Shapes of the parameters that the method trains."""
    adapted = [linear for linear in model.linears if linear.adapted]
    if run.method == "full":
        return list(model.parameters)
    if run.method in ("lora", "qlora", "dora"):
        # Hu et al. 2021: A (r, in) and B (out, r). Liu et al. 2024: also a magnitude per row.
        shapes = [s for x in adapted for s in ((run.rank, x.in_features), (x.out_features, run.rank))]
        for each in model.experts:  # PEFT's ParamWrapper: r ranks for each expert
            if each.adapted:
                ranks = run.rank * each.count
                shapes += [(ranks, each.in_features), (each.out_features, ranks)]
        return shapes + ([(x.out_features,) for x in adapted] if run.method == "dora" else [])
    block = _block(model)
    if run.method == "adapter":
        # Houlsby et al. 2019: down and up projection with biases, after attention and after the MLP.
        width = _width(block, run)
        return 2 * model.layers * [(width, block.hidden), (width,), (block.hidden, width), (block.hidden,)]
    # Li and Liang 2021, without the projection MLP: a key and a value for each layer and virtual token.
    return [(run.virtual_tokens, model.layers * 2 * block.kv)]


def adapters(model: Model, run: Run) -> int:
    """Parameters that the method adds, in fp32 (PEFT's autocast_adapter_dtype)."""
    return 0 if run.method == "full" else _FP32 * sum(map(_numel, trained(model, run)))


def gradients(model: Model, run: Run) -> int:
    """Gradients of trained parameters, in their dtype."""
    return _trained_itemsize(model, run) * sum(map(_numel, trained(model, run)))


def optimiser(model: Model, run: Run) -> int:
    """State of the optimiser after a step."""
    shapes, itemsize = trained(model, run), _trained_itemsize(model, run)
    if run.optim == "sgd":
        return 0
    if run.optim == "adamw":  # two moments in the parameter's dtype, and a step counter in fp32
        return sum(2 * itemsize * _numel(shape) + _FP32 for shape in shapes)
    if run.optim == "paged_adamw":  # in fp32, perhaps in host memory
        return sum(2 * _FP32 * _numel(shape) for shape in shapes)
    if run.optim == "adafactor":  # Shazeer and Stern 2018: of a matrix, a row and a column of second moments
        return sum(_FP32 * (sum(shape[-2:]) if len(shape) > 1 else shape[0]) for shape in shapes)
    # bitsandbytes: one byte per moment, with an fp32 scale per 256; fp32 below 4096 elements. A table of 256
    # values for each of the signed and the unsigned moment (Lion: only signed). Paged: perhaps in host
    # memory.
    moments = 1 if run.optim == "lion8bit" else 2
    small = sum(moments * _FP32 * _numel(shape) for shape in shapes if _numel(shape) < 4096)
    large = sum(moments * (_numel(s) + -(-_numel(s) // 256) * _FP32) for s in shapes if _numel(s) >= 4096)
    return small + large + (moments * 256 * _FP32 if large else 0)


def activations(model: Model, run: Run) -> int:
    """Saved by the forward without checkpointing, excluding the loss."""
    return model.layers * layer(model, run) - _first_layer(model, run) + _around(model, run)


def checkpointed(model: Model, run: Run) -> int:
    """With checkpointing: each layer's input, and in backward one layer's activations, which include it."""
    return checkpoints(model, run) + layer(model, run) - _hidden(model, run)


def checkpoints(model: Model, run: Run) -> int:
    """Saved by the forward with checkpointing, excluding the loss. Includes the embedding's output."""
    return model.layers * _hidden(model, run) + _around(model, run)


def layer(model: Model, run: Run) -> int:
    """Saved by one decoder layer."""
    block, e = _block(model), _itemsize(model, run)
    norms = 2 * _norm(block.hidden, model, run) + (_head_norms(block, model, run) if block.qk_norm else 0)
    return norms + _attention(block, run, e) + _mlp(block, model, run) + _inserted(block, run, e)


def loss(model: Model, run: Run) -> int:
    """Saved by the loss without logits: a log-sum-exp per token, and the gradient of its input if the head is
    frozen."""
    return run.tokens * _FP32 + (0 if run.method == "full" else _hidden(model, run))


def loss_work(model: Model, run: Run) -> int:
    """Additional while the loss runs: the logits of some tokens, and the gradient of its input."""
    logits = run.tokens * model.vocabulary * _itemsize(model, run)
    return min(logits, LOGIT_BYTES) + _hidden(model, run)


def layer_backward(model: Model, run: Run) -> int:
    """Largest gradients in a layer's backward: of gate, up and their product; with experts for all rows, and
    of the rows that are summed."""
    block = _block(model)
    if block.mixture is None:
        return 3 * run.tokens * block.intermediate * model.itemsize
    return run.tokens * block.mixture.top_k * (3 * block.intermediate + block.hidden) * model.itemsize


def total(model: Model, run: Run, checkpointing: bool) -> int:
    """Peak memory from the second step on, with gradients accumulated: in the loss, or in the backward of the
    last layer (recomputed with checkpointing), when the model's output still holds the head's input."""
    fixed = weights(model, run) + adapters(model, run) + gradients(model, run) + optimiser(model, run)
    in_loss = loss(model, run) + loss_work(model, run)
    last = _hidden(model, run) + layer_backward(model, run)
    if checkpointing:
        recomputed = checkpointed(model, run) - checkpoints(model, run)
        return fixed + checkpoints(model, run) + max(in_loss, last + recomputed)
    return fixed + activations(model, run) + max(in_loss, last)


def largest_batch(fits: Callable[[int], bool], limit: int = 1 << 16) -> int:
    """The largest batch for which the monotonic `fits` is true, or 0."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= limit and fits(high):
        low, high = high, 2 * high
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _block(model: Model) -> Block:
    assert model.block is not None, "the architecture's layers are not known"
    return model.block


def _width(block: Block, run: Run) -> int:
    return max(1, block.hidden // run.reduction)


def _itemsize(model: Model, run: Run) -> int:
    """Element size of unquantised weights and of activations between layers."""
    return _FP32 if run.prepared and run.method == "qlora" else model.itemsize


def _trained_itemsize(model: Model, run: Run) -> int:
    return model.itemsize if run.method == "full" else _FP32


def _hidden(model: Model, run: Run) -> int:
    """A tensor of activations between layers."""
    return run.tokens * _block(model).hidden * _itemsize(model, run)


def _norm(size: int, model: Model, run: Run) -> int:
    """A fused RMSNorm saves x and 1 / rms per token."""
    return run.tokens * (size * _itemsize(model, run) + _FP32)


def _head_norms(block: Block, model: Model, run: Run) -> int:
    """Qwen3's per-head norms of q and k."""
    per_head = run.tokens * _FP32 * (block.heads + block.kv_heads - 2)
    return _norm(block.q, model, run) + _norm(block.kv, model, run) + per_head


def _attention(block: Block, run: Run, e: int) -> int:
    """Fused attention saves rotated q and k, v, its output (o_proj's input) and a log-sum-exp per head and
    token. Adapted or trained q, k and v projections save their common input once."""
    t = run.tokens
    saved = t * e * 2 * block.q + t * _FP32 * block.heads
    if run.method == "prefix":
        # A prefix needs a mask (seq, virtual tokens + seq) in the model's dtype, and with a mask transformers
        # repeats keys and values for all heads.
        keys = run.batch * (run.seq + run.virtual_tokens)
        return saved + 2 * keys * block.q * e + keys * run.seq * e
    saved += 2 * t * e * block.kv
    if run.method in ("lora", "qlora", "dora"):
        on = block.adapted & {"q_proj", "k_proj", "v_proj", "o_proj"}
        saved += t * e * block.hidden if on - {"o_proj"} else 0
        saved += len(on) * t * run.rank * _FP32  # h = x A^T, in fp32
        if run.method == "dora":  # a tensor of the output's size before its magnitudes
            sizes = {"q_proj": block.q, "k_proj": block.kv, "v_proj": block.kv, "o_proj": block.hidden}
            saved += sum(t * e * sizes[name] + 2 * _FP32 * sizes[name] for name in on)
    elif run.method == "full":
        saved += t * e * block.hidden
    return saved


def _mlp(block: Block, model: Model, run: Run) -> int:
    """down(act(gate) * up). Unfused, without LoRA: act saves gate, the multiplication saves act(gate) and up,
    a trained down its input. Fused with LoRA: the input, gate, up and h of each adapter, in the dtype of
    the GEMMs."""
    if block.mixture is not None:
        return _mixture(block, block.mixture, model, run)
    on = block.adapted & {"gate_proj", "up_proj", "down_proj"}
    e = model.itemsize if on else _itemsize(model, run)
    t, wide = run.tokens, run.tokens * e * block.intermediate
    if run.method not in ("lora", "qlora", "dora") or not on:
        return 3 * wide + ((wide + t * e * block.hidden) if run.method == "full" else 0)
    saved = len(on) * t * run.rank * _FP32
    if run.method != "dora":
        return saved + 2 * wide + t * e * block.hidden
    saved += 3 * wide + (t * e * block.hidden if on - {"down_proj"} else 0)
    saved += wide if "down_proj" in on else 0
    sizes = {"gate_proj": block.intermediate, "up_proj": block.intermediate, "down_proj": block.hidden}
    return saved + sum(t * e * sizes[name] + 2 * _FP32 * sizes[name] for name in on)


def _mixture(block: Block, mixture: Mixture, model: Model, run: Run) -> int:
    """Packed experts save gate, up and the result of every row (top_k rows per token), two permutations, and
    the router's softmax, indices and normaliser; with an adapter also the input and h."""
    rows, e = run.tokens * mixture.top_k, model.itemsize
    saved = rows * e * (2 * block.intermediate + block.hidden) + 2 * rows * _INT64
    saved += run.tokens * mixture.count * _FP32 + rows * (_INT64 + 2 * _FP32) + run.tokens * _FP32
    inputs = {"gate_up_proj": block.hidden, "down_proj": block.intermediate}
    saved += sum(rows * (e * inputs[name] + run.rank * _FP32) for name in mixture.adapted)
    return saved + mixture.count * 4  # end of each expert's rows


def _inserted(block: Block, run: Run, e: int) -> int:
    """Two bottleneck adapters: input of the down projection, of the activation and of the up projection."""
    if run.method != "adapter":
        return 0
    return 2 * run.tokens * e * (block.hidden + 2 * _width(block, run))


def _first_layer(model: Model, run: Run) -> int:
    """What the first layer does not save, because frozen embeddings need no gradient: its first norm, and
    everything before the first trained parameter."""
    block = _block(model)
    if run.method == "full":
        return 0
    missing = _norm(block.hidden, model, run)
    attention = block.adapted & {"q_proj", "k_proj", "v_proj", "o_proj"}
    if run.method == "adapter":
        missing += _attention(block, run, _itemsize(model, run))
    elif run.method in ("lora", "qlora", "dora") and attention <= {"o_proj"}:
        output = run.tokens * block.q * _itemsize(model, run)
        plain = replace(block, adapted=block.adapted - attention)
        missing += _attention(plain, run, _itemsize(model, run)) - (output if attention else 0)
        missing += 0 if attention else _norm(block.hidden, model, run)
    if block.qk_norm:
        missing += _first_head_norms(block, model, run)
    return missing


def _first_head_norms(block: Block, model: Model, run: Run) -> int:
    on = block.adapted if run.method in ("lora", "qlora", "dora") else frozenset()
    if run.method != "dora" and on & {"q_proj", "k_proj", "v_proj"}:  # one op for all three
        return 0
    sizes = {"q_proj": (block.q, block.heads), "k_proj": (block.kv, block.kv_heads)}
    left = [sizes[name] for name in sizes if name not in on]
    return sum(_norm(size, model, run) + run.tokens * _FP32 * (heads - 1) for size, heads in left)


def _around(model: Model, run: Run) -> int:
    """The last norm; cos and sin of positions; in full fine-tuning the head's input and the embedding's
    indices."""
    block, e = _block(model), _itemsize(model, run)
    rotary = 2 * run.seq * (block.q // block.heads) * e
    saved = _norm(block.hidden, model, run) + rotary
    if run.method == "full":
        saved += run.tokens * (block.hidden * e + _INT64)
    return saved + run.tokens * _INT64  # the loss's labels

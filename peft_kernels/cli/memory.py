"""How many bytes a fine-tuning takes: every term, and where it comes from.

What "is saved" is what autograd keeps from the forward for the backward; t are the tokens of a batch, e the
bytes of a number in the model's dtype. tests/checkpoints/test_cli_plan.py holds all of it to measured models.

Assumed: attention by a fused kernel (sdpa, flash), no padding mask, LoRA layers and gated MLPs fused by
`pk.patch`, adapters in fp32, everything else in one dtype, no cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..core.code_tables import NESTED_BLOCKSIZE
from .sizes import Block, Mixture, Model, Run

_FP32, _INT64 = 4, 8


def nf4_bytes(numel: int, run: Run) -> int:
    """nf4-format: half a byte a weight; a scale a block, one byte if quantised again, with a scale of its own
    for 256 and one offset. Each expert has its own."""
    blocks = -(-numel // run.blocksize)
    scales = blocks * _FP32
    if run.double_quant:
        scales = blocks + -(-blocks // NESTED_BLOCKSIZE) * _FP32 + _FP32
    return (numel + 1) // 2 + scales


def weights(model: Model, run: Run) -> int:
    """All parameters of the base model. QLoRA: linear layers but the head in NF4, experts where that is asked
    for, the rest as it is."""
    itemsize = _itemsize(model, run)
    total = sum(_numel(shape) for shape in model.parameters) * itemsize
    if run.method == "qlora":
        for linear in model.linears:
            if linear.quantised:
                total += nf4_bytes(linear.numel, run) - linear.numel * itemsize
        for each in model.experts if run.experts else ():
            total += each.count * (nf4_bytes(each.numel, run) - each.numel * itemsize)
    return total


def trained(model: Model, run: Run) -> list[tuple[int, ...]]:
    """Shapes of the parameters that the method trains."""
    adapted = [linear for linear in model.linears if linear.adapted]
    if run.method == "full":
        return list(model.parameters)
    if run.method in ("lora", "qlora", "dora"):
        # Hu et al. 2021: A (r, in) and B (out, r). Liu et al. 2024: beside them a magnitude for each row.
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
    """What the method adds to the model, in fp32 (PEFT's autocast_adapter_dtype)."""
    return 0 if run.method == "full" else _FP32 * sum(map(_numel, trained(model, run)))


def gradients(model: Model, run: Run) -> int:
    """One number for each trained one, in its dtype."""
    return _trained_itemsize(model, run) * sum(map(_numel, trained(model, run)))


def optimiser(model: Model, run: Run) -> int:
    """State of the optimiser, once it has made a step."""
    shapes, itemsize = trained(model, run), _trained_itemsize(model, run)
    if run.optim == "sgd":
        return 0
    if run.optim == "adamw":  # two moments in the parameter's dtype, and a step counter in fp32
        return sum(2 * itemsize * _numel(shape) + _FP32 for shape in shapes)
    if run.optim == "paged_adamw":  # in fp32, and may lie in host memory
        return sum(2 * _FP32 * _numel(shape) for shape in shapes)
    if run.optim == "adafactor":  # Shazeer and Stern 2018: of a matrix, a row and a column of second moments
        return sum(_FP32 * (sum(shape[-2:]) if len(shape) > 1 else shape[0]) for shape in shapes)
    # bitsandbytes: moments of a byte, with an fp32 scale for 256; in fp32 below 4096 numbers. One table each
    # of 256 values, for the signed and the unsigned moment. (paged: the same, which may lie in host memory)
    # Lion has the signed one alone.
    moments = 1 if run.optim == "lion8bit" else 2
    small = sum(moments * _FP32 * _numel(shape) for shape in shapes if _numel(shape) < 4096)
    large = sum(moments * (_numel(s) + -(-_numel(s) // 256) * _FP32) for s in shapes if _numel(s) >= 4096)
    return small + large + (moments * 256 * _FP32 if large else 0)


def activations(model: Model, run: Run) -> int:
    """Saved by the forward without checkpointing, the loss left out."""
    return model.layers * layer(model, run) - _first_layer(model, run) + _around(model, run)


def checkpointed(model: Model, run: Run) -> int:
    """With checkpointing of every layer: each layer's input, and in the backward one layer's activations."""
    return checkpoints(model, run) + layer(model, run)


def checkpoints(model: Model, run: Run) -> int:
    """Saved by the forward with checkpointing, the loss left out. The first layer's input is the embedding's
    output, which is saved too."""
    return model.layers * run.tokens * _block(model).hidden * _itemsize(model, run) + _around(model, run)


def layer(model: Model, run: Run) -> int:
    """Saved in one decoder layer."""
    block, e = _block(model), _itemsize(model, run)
    norms = 2 * _norm(block.hidden, model, run) + (_head_norms(block, model, run) if block.qk_norm else 0)
    return norms + _attention(block, run, e) + _mlp(block, model, run) + _inserted(block, run, e)


def logits(model: Model, run: Run) -> int:
    """Held from the forward until the loss's backward: the logits, which the model's output holds, and their
    log-softmax in fp32, which cross-entropy saves."""
    return run.tokens * model.vocabulary * (_itemsize(model, run) + _FP32)


def loss_backward(model: Model, run: Run) -> int:
    """On top of that in the loss's backward: the gradients of the log-softmax and of the logits in fp32."""
    return 2 * run.tokens * model.vocabulary * _FP32


def layer_backward(model: Model, run: Run) -> int:
    """Gradients under way in a layer's backward: of gate, up and their product, the widest that there are;
    of experts for all rows, and those of what they are summed from."""
    block = _block(model)
    if block.mixture is None:
        return 3 * run.tokens * block.intermediate * model.itemsize
    return run.tokens * block.mixture.top_k * (3 * block.intermediate + block.hidden) * model.itemsize


def total(model: Model, run: Run, checkpointing: bool) -> int:
    """The largest sum at any time, from the second step on, gradients accumulated: at the loss's backward, or
    at that of the last layer (which checkpointing computes again), when of the loss the logits are left."""
    fixed = weights(model, run) + adapters(model, run) + gradients(model, run) + optimiser(model, run)
    loss = logits(model, run) + loss_backward(model, run)
    last = run.tokens * model.vocabulary * _itemsize(model, run) + layer_backward(model, run)
    if checkpointing:
        return fixed + checkpoints(model, run) + max(loss, last + layer(model, run))
    return fixed + activations(model, run) + max(loss, last)


def largest_batch(fits: Callable[[int], bool], limit: int = 1 << 16) -> int:
    """The largest batch that fits, 0 if none does; `fits` is true up to some number and false beyond."""
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
    """Of what is not quantised, and of activations between layers."""
    return _FP32 if run.prepared and run.method == "qlora" else model.itemsize


def _trained_itemsize(model: Model, run: Run) -> int:
    return model.itemsize if run.method == "full" else _FP32


def _norm(size: int, model: Model, run: Run) -> int:
    """RMSNorm of transformers: x in fp32 and 1 / rms by token. When its weight is trained, the normalised x
    in the model's dtype too."""
    return run.tokens * (size * _FP32 + _FP32 + (size * model.itemsize if run.method == "full" else 0))


def _head_norms(block: Block, model: Model, run: Run) -> int:
    """Qwen3's norms of q and k, by head."""
    per_head = run.tokens * _FP32 * (block.heads + block.kv_heads - 2)
    return _norm(block.q, model, run) + _norm(block.kv, model, run) + per_head


def _attention(block: Block, run: Run, e: int) -> int:
    """A fused attention saves rotated q and k, v, its output (which is o_proj's input) and a log-sum-exp by
    head and token. Projections that have adapters, or are trained, save their input, once for all three."""
    t = run.tokens
    saved = t * e * 2 * block.q + t * _FP32 * block.heads
    if run.method == "prefix":
        # transformers repeats keys and values for all heads when there is a mask, as a prefix makes one, of
        # (seq, virtual tokens + seq) in the model's dtype.
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
    """down(act(gate) * up). As separate modules: act saves gate, the product saves act(gate) and up, and a
    down that is trained the product. Fused with its adapters: its input, gate, up and h of each adapter, in
    the dtype of the weights' products."""
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
    """Packed experts: gate, up and the result of every row, which there are top_k of for each token; two
    orders of rows; the router's softmax, its choice and what divides it. With an adapter the input and h."""
    rows, e = run.tokens * mixture.top_k, model.itemsize
    saved = rows * e * (2 * block.intermediate + block.hidden) + 2 * rows * _INT64
    saved += run.tokens * mixture.count * _FP32 + rows * (_INT64 + 2 * _FP32) + run.tokens * _FP32
    inputs = {"gate_up_proj": block.hidden, "down_proj": block.intermediate}
    saved += sum(rows * (e * inputs[name] + run.rank * _FP32) for name in mixture.adapted)
    return saved + mixture.count * 4  # where the rows of each end


def _inserted(block: Block, run: Run, e: int) -> int:
    """Two bottleneck adapters: input of the down projection, of the activation and of the up projection."""
    if run.method != "adapter":
        return 0
    return 2 * run.tokens * e * (block.hidden + 2 * _width(block, run))


def _first_layer(model: Model, run: Run) -> int:
    """What the first layer does not save, since no gradient goes to frozen embeddings: for its first norm,
    and for what comes before the first thing that is trained."""
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
    on = block.adapted & {"q_proj", "k_proj"} if run.method in ("lora", "qlora", "dora") else frozenset()
    sizes = {"q_proj": (block.q, block.heads), "k_proj": (block.kv, block.kv_heads)}
    left = [sizes[name] for name in sizes if name not in on]
    return sum(_norm(size, model, run) + run.tokens * _FP32 * (heads - 1) for size, heads in left)


def _around(model: Model, run: Run) -> int:
    """The last norm; cos and sin of the positions, one for all; in full fine-tuning the head's input and the
    embedding's indices."""
    block, e = _block(model), _itemsize(model, run)
    rotary = 2 * run.seq * (block.q // block.heads) * e
    saved = _norm(block.hidden, model, run) + rotary
    if run.method == "full":
        saved += run.tokens * (block.hidden * e + _INT64)
    return saved + run.tokens * _INT64  # the loss's labels

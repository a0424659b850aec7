"""Memory of fine-tuning in bytes, term by term, with sources.

"Saved" means saved by autograd for backward; t is the number of tokens of a batch, e the element size of
activations. tests/checkpoints/test_cli_plan.py compares everything with measured models.

Assumes a model patched by `pk.patch`, attention by a fused kernel (sdpa, flash), no padding mask, adapters in
fp32, everything else in one dtype, no cache.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import dropwhile

import torch

from ..nf4.weight import PackedWeight
from .sizes import Block, Model, Run, Weight

_FP32, _INT64 = 4, 8
LOGIT_BYTES = 256 << 20
"""The most logits that the loss computes at a time on a GPU: kLogitBytes of csrc/cuda/loss."""
_QKV, _MLP = {"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj", "down_proj"}


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
    total = model.numel * itemsize
    if run.method == "qlora":
        for weight in model.linears + (model.experts if run.experts else ()):
            if weight.quantised:
                total += _packed(weight, run) - weight.numel * itemsize
    return total


def _packed(weight: Weight, run: Run) -> int:
    if weight.packed is not None:
        return weight.packed
    form = run.format, run.blocksize, run.double_quant
    return weight.experts * packed_bytes(weight.out_features, weight.in_features, *form, weight.name)


def trained(model: Model, run: Run) -> list[tuple[int, ...]]:
    """Shapes of the parameters that the method trains."""
    if run.method == "full":
        return list(model.parameters)
    if run.is_lora:
        shapes: list[tuple[int, ...]] = []
        for weight in model.linears + model.experts:
            if weight.adapted:
                # Hu et al. 2021: A (r, in) and B (out, r). PEFT's ParamWrapper: r ranks for each expert.
                ranks = run.rank * weight.experts
                shapes += [(ranks, weight.in_features), (weight.out_features, ranks)]
                if run.method == "dora":  # Liu et al. 2024: a magnitude per row
                    shapes.append((weight.out_features,))
        return shapes
    block = _block(model)
    if run.method == "adapter":
        # Houlsby et al. 2019: down and up projection with biases, after attention and after the MLP.
        width = _width(block, run)
        return 2 * model.layers * [(width, block.hidden), (width,), (block.hidden, width), (block.hidden,)]
    # Li and Liang 2021, without the projection MLP: a key and a value for each layer and virtual token.
    return [(run.virtual_tokens, model.layers * 2 * block.kv)]


def adapters(model: Model, run: Run) -> int:
    """Parameters that the method adds, in fp32 (PEFT's autocast_adapter_dtype), as their gradients are."""
    return 0 if run.method == "full" else gradients(model, run)


def gradients(model: Model, run: Run) -> int:
    """Gradients of trained parameters, in their dtype."""
    return _trained_itemsize(model, run) * sum(map(math.prod, trained(model, run)))


def optimiser(model: Model, run: Run) -> int:
    """State of the optimiser after a step."""
    shapes = trained(model, run)
    counts = list(map(math.prod, shapes))
    if run.optim == "sgd":
        return 0
    if run.optim == "adamw":  # two moments in the parameter's dtype
        return 2 * _trained_itemsize(model, run) * sum(counts)
    if run.optim == "paged_adamw":  # in fp32, perhaps in host memory
        return 2 * _FP32 * sum(counts)
    if run.optim == "adafactor":  # Shazeer and Stern 2018: of a matrix, a row and a column of second moments
        return _FP32 * sum(sum(shape[-2:]) for shape in shapes)
    # bitsandbytes: one byte per moment, with an fp32 scale per 256; fp32 below 4096 elements. Paged: perhaps
    # in host memory.
    moments = 1 if run.optim == "lion8bit" else 2
    return moments * sum(n + _FP32 * -(-n // 256) if n >= 4096 else _FP32 * n for n in counts)


def activations(model: Model, run: Run) -> int:
    """Saved by the forward without checkpointing, excluding the loss.

    In the first layer nothing before the first trained parameter needs a gradient, so nothing is saved there.
    """
    first = dropwhile(lambda part: not part[1], _parts(model, run))
    return (model.layers - 1) * layer(model, run) + sum(saved for saved, _ in first) + _around(model, run)


def checkpointed(model: Model, run: Run) -> int:
    """With checkpointing: each layer's input, and in backward one layer's activations, which include it."""
    return checkpoints(model, run) + layer(model, run) - _hidden(model, run)


def checkpoints(model: Model, run: Run) -> int:
    """Saved by the forward with checkpointing, excluding the loss. Includes the embedding's output."""
    return model.layers * _hidden(model, run) + _around(model, run)


def layer(model: Model, run: Run) -> int:
    """Saved by one decoder layer."""
    return sum(saved for saved, _ in _parts(model, run))


def loss(model: Model, run: Run) -> int:
    """Saved by the loss without logits: a log-sum-exp per token, and the gradient of its input if the head is
    frozen."""
    return run.tokens * _FP32 + (0 if run.method == "full" else _hidden(model, run))


def loss_work(model: Model, run: Run) -> int:
    """Additional while the loss runs: the logits of some tokens, and the gradient of its input."""
    logits = run.tokens * model.vocabulary * _itemsize(model, run)
    return min(logits, LOGIT_BYTES) + _hidden(model, run)


def total(model: Model, run: Run, checkpointing: bool) -> int:
    """Peak memory from the second step on, with gradients accumulated: in the loss, or in the backward of the
    last layer (recomputed with checkpointing), when the model's output still holds the head's input."""
    fixed = weights(model, run) + adapters(model, run) + gradients(model, run) + optimiser(model, run)
    in_loss = loss(model, run) + loss_work(model, run)
    last = _hidden(model, run) + _layer_backward(model, run)
    if not checkpointing:
        return fixed + activations(model, run) + max(in_loss, last)
    return fixed + max(checkpoints(model, run) + in_loss, checkpointed(model, run) + last)


def _layer_backward(model: Model, run: Run) -> int:
    """Largest gradients in a layer's backward: of gate, up and their product; with experts for all rows, and
    of the rows that are summed."""
    block = _block(model)
    if not block.experts:
        return 3 * run.tokens * block.intermediate * model.itemsize
    return run.tokens * block.top_k * (3 * block.intermediate + block.hidden) * model.itemsize


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


def _parts(model: Model, run: Run) -> list[tuple[int, bool]]:
    """What the parts of a decoder layer save, in their order, and whether each trains something."""
    block, t, e = _block(model), run.tokens, _itemsize(model, run)
    hidden, full = _hidden(model, run), run.method == "full"
    qkv, output = _trains(block, run, _QKV), _trains(block, run, {"o_proj"})
    norm = hidden + t * _FP32  # a fused RMSNorm saves x, and 1 / rms per row
    head_norms = t * (e * (block.q + block.kv) + _FP32 * (block.heads + block.kv_heads))
    # Bottleneck adapters: input of the down projection, of the activation and of the up projection.
    inserted = t * e * (block.hidden + 2 * _width(block, run)) if run.method == "adapter" else 0
    return [
        (norm, full),
        ((hidden if qkv else 0) + _lora(block, run, qkv, e), bool(qkv)),  # one input for all three
        (head_norms if block.qk_norm else 0, False),
        (_attention(block, run, e), run.method == "prefix"),
        (t * e * block.q + _lora(block, run, output, e), bool(output)),  # attention saves o_proj's input
        (inserted, run.method == "adapter"),
        (norm, False),
        (_experts(model, run) if block.experts else _mlp(model, run), True),
        (inserted, run.method == "adapter"),
    ]


def _trains(block: Block, run: Run, names: set[str]) -> set[str]:
    """Those of some projections that are trained or have an adapter."""
    if run.method == "full":
        return names
    return names & block.adapted.keys() if run.is_lora else set()


def _lora(block: Block, run: Run, names: set[str], e: int) -> int:
    """h = x A^T in fp32; DoRA: also each output before its magnitudes."""
    if not run.is_lora:
        return 0
    dora = sum(block.adapted[name] for name in names) if run.method == "dora" else 0
    return len(names) * run.tokens * run.rank * _FP32 + dora * (run.tokens * e + 2 * _FP32)


def _attention(block: Block, run: Run, e: int) -> int:
    """Fused attention saves rotated q and k, v, and a log-sum-exp per head and token, besides its output."""
    saved = run.tokens * (e * block.q + _FP32 * block.heads)
    if run.method != "prefix":
        return saved + 2 * run.tokens * e * block.kv
    # A prefix needs a mask (seq, virtual tokens + seq) in the model's dtype, and with a mask transformers
    # repeats keys and values for all heads.
    keys = run.batch * (run.seq + run.virtual_tokens)
    return saved + 2 * keys * block.q * e + keys * run.seq * e


def _mlp(model: Model, run: Run) -> int:
    """down(act(gate) * up). Fused with LoRA: the input, gate, up and h of each adapter, in the dtype of the
    GEMMs. Unfused: act saves gate, the multiplication saves act(gate) and up, trained projections their
    inputs."""
    block = _block(model)
    on = _trains(block, run, _MLP)
    e = model.itemsize if on else _itemsize(model, run)
    hidden, wide = run.tokens * e * block.hidden, run.tokens * e * block.intermediate
    saved = _lora(block, run, on, e)
    if on and run.method in ("lora", "qlora"):
        return saved + hidden + 2 * wide
    inputs = (hidden if on - {"down_proj"} else 0) + (wide if "down_proj" in on else 0)
    return saved + inputs + 3 * wide


def _experts(model: Model, run: Run) -> int:
    """Packed experts save gate, up and the result of every row (top_k rows per token), two permutations, and
    the router's softmax, indices and normaliser; with an adapter also the input and h."""
    block, e = _block(model), model.itemsize
    rows = run.tokens * block.top_k
    saved = rows * e * (2 * block.intermediate + block.hidden) + 2 * rows * _INT64
    saved += run.tokens * block.experts * _FP32 + rows * (_INT64 + 2 * _FP32) + run.tokens * _FP32
    for name, inputs in (("gate_up_proj", block.hidden), ("down_proj", block.intermediate)):
        saved += rows * (e * inputs + run.rank * _FP32) if name in block.adapted else 0
    return saved


def _around(model: Model, run: Run) -> int:
    """The last norm; cos and sin of positions; the loss's labels; in full fine-tuning the head's input and
    the embedding's indices."""
    block, hidden = _block(model), _hidden(model, run)
    rotary = 2 * run.seq * (block.q // block.heads) * _itemsize(model, run)
    saved = hidden + run.tokens * (_FP32 + _INT64) + rotary
    return saved + (hidden + run.tokens * _INT64 if run.method == "full" else 0)

"""NF4 models sharded by FSDP2: four processes over gloo, of which two, three or four shard."""

from __future__ import annotations

import copy
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from fsdp_models import (
    ADAMW,
    MOVED,
    RANKS,
    Case,
    adapters,
    assert_same_bits,
    batches,
    gathers,
    line,
    llama,
    on,
    shard,
    square,
    train,
    weight,
)
from ranks import rank_tests
from rounding import ONE_MODEL
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import peft_kernels as pk
import testing
from peft_kernels.nf4.sharded.fsdp_tensor import NF4Shard

pytest.importorskip("transformers", reason="models are transformers', and it is not installed")
pytest.importorskip("peft", reason="adapters are PEFT's, and it is not installed")

pytestmark = pytest.mark.slow

# Rows that divide evenly or not, blocks that cross shard boundaries, rows shorter than a block, processes
# without rows, groups of 256 scales that straddle shards, odd element counts, experts.
SHAPES = [(64, 128), (7, 33), (5, 10), (64, 63), (1, 40), (3, 1), (300, 577), (4, 4, 96), (5, 3, 33)]

# Each case runs in every process.


class MatMul(nn.Module):
    def __init__(self, weight: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Any) -> Any:
        return nn.functional.linear(x, self.weight)


def whole_weights(folder: Path) -> None:
    """Gathered twice, each weight and its shards' rows equal the original bit for bit, for all boundaries; so
    do the result and gradient of a matmul. No process sends more than its shard."""
    for ranks in (1, 2, 3, 4):
        mesh = line(ranks)
        if mesh is None:
            continue
        for shape in SHAPES:
            for blocksize, nested in ((32, True), (64, True), (64, False)):
                want = weight(shape, blocksize, nested)
                layer = MatMul(want.clone())
                fully_shard(layer, mesh=mesh)
                assert isinstance(layer.weight.to_local(), NF4Shard)
                for _ in range(2):
                    with gathers() as sent:
                        layer.unshard()
                    assert_same_bits(layer.weight, want)
                    held = layer.weight._state.packed, layer.weight._state.absmax
                    layer.reshard()
                    assert not any(t.untyped_storage().size() for t in held), "not freed"
                    cells = want.packed.numel() // want.absmax.numel() + 64  # two blocks more than a shard
                    most = (want.packed.nbytes + want.absmax.nbytes) / ranks + 3 * cells + 40
                    if len(shape) == 2 and shape[0] % ranks == 0:
                        assert len(sent) == (ranks > 1) and all(n <= most for n, _ in sent), (sent, most)
                if ranks > 1:
                    assert_same_bits(layer.weight.full_tensor(), want)
                part = layer.weight.to_local()
                rows = -(-shape[0] // ranks)
                start = rows * mesh.get_local_rank()
                assert torch.equal(part.dequantize(), want.dequantize()[start : start + rows])
                if len(shape) == 3:
                    continue
                results = []
                for module in (layer, MatMul(want)):
                    x = testing.tensor(5, shape[1], dtype=torch.bfloat16).requires_grad_()
                    y = module(x)
                    y.sum().backward()
                    results.append((y.detach(), x.grad))
                assert torch.equal(results[0][0], results[1][0]), shape
                assert torch.equal(results[0][1], results[1][1]), shape


FORMATS = [
    ("fp4", (5, 33), 32),
    ("mxfp4", (7, 96), 32),
    ("nvfp4", (5, 48), 16),
    ("nvfp4", (5, 3, 48), 16),
    ("int4", (5, 96), 32),
    ("int4", (5, 3, 96), 32),
    ("fp8", (300, 200), 128),
    ("fp8", (5, 130, 40), 128),
    ("fp8", (5, 48), 0),
    ("int8", (5, 200), 64),
    ("int8", (5, 3, 200), 128),
    ("int8", (5, 48), 0),
]
"""Formats, shapes and blocksizes: shards with more and fewer rows, processes without any, experts."""


def other_formats(folder: Path) -> None:
    """As `whole_weights`; every process has the values of the scale codes, also one without rows."""
    for ranks in (2, 4):
        mesh = line(ranks)
        if mesh is None:
            continue
        for format, shape, blocksize in FORMATS:
            values = testing.uneven(testing.tensor(*shape))
            want = pk.NF4Weight.quantize(values, blocksize, format=format)
            layer = MatMul(want.clone())
            fully_shard(layer, mesh=mesh)
            layer.unshard()
            assert_same_bits(layer.weight, want)
            assert layer.weight._state.format == format
            layer.reshard()
            part = layer.weight.to_local()
            rows = -(-shape[0] // ranks)
            start = rows * mesh.get_local_rank()
            assert torch.equal(part.dequantize(), want.dequantize()[start : start + rows])
            whole = layer.weight.full_tensor()
            assert_same_bits(whole, want)
            if len(shape) == 2:
                x = testing.tensor(3, shape[1])
                assert torch.equal(layer(x), nn.functional.linear(x, want))


@on(2)
def bytes_of_a_model(folder: Path, mesh: Any) -> None:
    """Of SmolLM2's layer, each of two processes holds and sends half of the packed bytes."""
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9}
    model = llama(1, num_key_value_heads=3, **sizes)
    layer = model.base_model.model.model.layers[0]
    packed = [p for p in layer.parameters() if isinstance(p, pk.NF4Weight)]
    whole = sum(p.nbytes for p in packed)
    travels = sum(p.packed.nbytes + p.absmax.nbytes for p in packed)
    dense = sum(p.nbytes for p in layer.parameters() if not isinstance(p, pk.NF4Weight))
    assert len(packed) == 7
    shard(model, mesh)
    shards = [p.to_local() for p in layer.parameters() if isinstance(p.to_local(), NF4Shard)]
    held = sum(t.nbytes for s in shards for t in s._rows.tensors().values())
    assert len(shards) == 7 and held <= 0.52 * whole
    with gathers() as sent:
        layer.unshard()
    assert sent == [((travels + dense) // 2, torch.uint8)]
    layer.reshard()


def training(folder: Path) -> None:
    """Equals one process on the same global batch: patched before and after sharding, checkpointed, not
    resharded, offloaded, and with replicas."""
    cases: dict[str, tuple[int, dict[str, Any]]] = {
        "stock": (2, {}),
        "before": (2, {}),
        "after": (3, {}),
        "reentrant": (2, {}),
        "checkpointed": (3, {}),
        "kept": (2, {"reshard_after_forward": False}),
        "offloaded": (2, {"offload_policy": CPUOffloadPolicy(pin_memory=False)}),
        "replicas": (4, {}),
        "8 bits": (2, {}),
    }
    meshes = {ranks: line(ranks) for ranks in (2, 3)} | {4: square()}
    want: dict[Any, Any] = {}
    for name, (ranks, options) in cases.items():
        make = pk.optim.AdamW8bit if name == "8 bits" else torch.optim.AdamW
        if meshes[ranks] is None:
            continue
        if (ranks, make) not in want:
            single = llama(patch=True)
            losses = train(single, make(single.parameters(), **ADAMW), batches(ranks))
            want[ranks, make] = losses, adapters(single)
        model = llama(patch=name == "before")
        if name in ("reentrant", "checkpointed"):
            model.gradient_checkpointing_enable({"use_reentrant": name == "reentrant"})
            model.enable_input_require_grads()
        shard(model, meshes[ranks], **options)
        report = pk.patch(model) if name not in ("stock", "before") else None
        trained = [p for p in model.parameters() if p.requires_grad]
        losses = train(model, make(trained, **ADAMW), batches(ranks), meshes[ranks], ranks)
        assert report is None or not report.original, report
        assert report is None or not any(e.fallbacks for e in (*report.layers, *report.blocks)), report
        torch.testing.assert_close(losses, want[ranks, make][0], rtol=ONE_MODEL, atol=ONE_MODEL, msg=name)
        for key, value in adapters(model).items():
            torch.testing.assert_close(
                value, want[ranks, make][1][key], rtol=0, atol=MOVED, msg=f"{name} {key}"
            )


@on(2)
def mixed_precision(folder: Path, mesh: Any) -> None:
    """The nominal dtype follows the policy; the packed bits stay."""
    want = weight((64, 128), 64, True, torch.float32)
    layer = MatMul(want.clone())
    fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    assert layer(testing.tensor(3, 128)).dtype == torch.bfloat16
    layer.unshard()
    assert layer.weight.dtype == torch.bfloat16
    assert_same_bits(layer.weight, want)


@on(2)
def packed_layers(folder: Path, mesh: Any) -> None:
    """Layers without adapters, patched once sharded, are recognised and fused."""
    model = fully_shard(nn.Sequential(pk.nn.NF4Linear(weight((64, 64), 64, True))), mesh=mesh)
    report = pk.patch(model)
    assert [entry.kind for entry in report.fused] == ["NF4Linear"], report
    assert "DTensor" not in str(report)


@on(2)
def shard_operations(folder: Path, mesh: Any) -> None:
    """A shard that is copied, cast, saved and loaded keeps its rows."""
    whole = weight((7, 33), 32, True)
    layer = fully_shard(MatMul(whole.clone()), mesh=mesh)
    p = layer.weight
    rows = whole.dequantize().chunk(2)[mesh.get_local_rank()]
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    copies = [p.clone(), copy.deepcopy(p.detach()), torch.load(file, weights_only=True)["weight"]]
    for got in (*copies, p.detach().cpu(), p.to(torch.float16)):
        assert isinstance(got.to_local(), NF4Shard)
        assert torch.equal(got.to_local().dequantize(rows.dtype), rows)
    assert not {t.to_local().packed.data_ptr() for t in copies} & {p.to_local().packed.data_ptr()}
    assert p.to(torch.float16).dtype == torch.float16 and torch.equal(p.double().to_local(), rows.double())
    assert torch.equal(p.detach().abs().to_local(), rows.abs())
    layer.half()
    assert layer(testing.tensor(3, 33, dtype=torch.float16)).dtype == torch.float16
    layer.unshard()
    assert_same_bits(layer.weight, whole)


@on(2)
def ignored(folder: Path, mesh: Any) -> None:
    """An ignored weight stays whole while another is sharded."""
    model = nn.Sequential(*(MatMul(weight((64, 64), 64, True, torch.float32)) for _ in range(2)))
    x = testing.tensor(3, 64)
    want = model(x)
    fully_shard(model, mesh=mesh, ignored_params={model[0].weight})
    assert isinstance(model[0].weight, pk.NF4Weight) and isinstance(model[1].weight.to_local(), NF4Shard)
    assert torch.equal(model(x), want)


@on(2)
def inner_hooks(folder: Path, mesh: Any) -> None:
    """Hooks of layers that were passed to fully_shard run, and fused forwards around them fall back."""
    model, single = llama(1), llama(1, patch=True)
    layer = model.base_model.model.model.layers[0]
    fully_shard(layer.self_attn.q_proj, mesh=mesh)
    fully_shard(layer.self_attn.k_proj.base_layer, mesh=mesh)
    fully_shard(layer.mlp.up_proj, mesh=mesh)
    shard(model, mesh)
    report = pk.patch(model)
    ids = batches(1, 1)[0]
    torch.testing.assert_close(model(ids).logits, single(ids).logits, rtol=ONE_MODEL, atol=ONE_MODEL)
    reasons = {entry.name.rpartition(".")[2]: entry.reason for entry in (*report.layers, *report.blocks)}
    assert not reasons["q_proj"] and not reasons["up_proj"]
    assert "hooks on a" in reasons["k_proj"]
    (block,) = (entry for entry in report.blocks if entry.kind.startswith("gated MLP"))
    assert any("up_proj: hooks" in why for why in block.fallbacks), block


@on(2)
def patched_modules(folder: Path, mesh: Any) -> None:
    """A patched module that is passed to fully_shard stays fused, and can be unpatched."""
    model = llama(1)
    report = pk.patch(model)
    layer = model.base_model.model.model.layers[0]
    for module in (layer.mlp, layer.self_attn.q_proj):
        fully_shard(module, mesh=mesh)
    shard(model, mesh)
    ids = batches(1, 1)[0]
    got = model(ids).logits
    attention = next(entry for entry in report.blocks if entry.kind.startswith("attention"))
    entries = [entry for entry in (*report.layers, *report.blocks) if entry is not attention]
    assert not any(entry.reason or entry.fallbacks for entry in entries), report
    assert all("q_proj: hooks" in why for why in attention.fallbacks)  # fully_shard's
    pk.unpatch(model)
    torch.testing.assert_close(model(ids).logits, got, rtol=ONE_MODEL, atol=ONE_MODEL)


@on(2)
def refusals(folder: Path, mesh: Any) -> None:
    """Errors are raised in every process; nothing is lost, and no process waits."""
    want = weight((64, 128), 64, True)

    def layer() -> Any:
        return nn.Sequential(pk.nn.NF4Linear(want.clone()))

    sharded = fully_shard(layer(), mesh=mesh)
    p, delta = sharded[0].weight, torch.ones(32, 128, dtype=torch.bfloat16)
    start = 32 * mesh.get_local_rank()
    sentence = f"weight: aten.add_.* would write to rows {start} to {start + 32} of an NF4 weight"
    with pytest.raises(RuntimeError, match=sentence), torch.no_grad():
        p.to_local().add_(delta)
    with pytest.raises(RuntimeError, match=r"aten.copy_.* would write to rows"), torch.no_grad():
        p.to_local().copy_(delta)
    with pytest.raises(RuntimeError, match=r"this process has some rows of it, .* call the module that"):
        sharded[0].forward(testing.tensor(3, 128))
    sharded.unshard()
    with pytest.raises(RuntimeError, match=r"gathered by FSDP2 .* this one would be lost"), torch.no_grad():
        sharded[0].weight.add_(1.0)
    with pytest.raises(RuntimeError, match=r"gathered by FSDP2 .* this one would be lost"):
        sharded[0].weight.data = torch.ones(64, 128)
    assert_same_bits(sharded[0].weight, want)
    sharded.reshard()

    for write in (lambda w: w.add_(0.5), lambda w: w.mul_(2.0)):  # as a merge, and as a lasting write
        dense = layer()
        write(dense[0].weight)
        with pytest.raises(ValueError, match="expected packed NF4 to shard, got a weight that a write made"):
            fully_shard(dense, mesh=mesh)
    columns = {"shard_placement_fn": lambda p: Shard(1)}
    with pytest.raises(
        ValueError, match=re.escape("weight: expected an NF4 weight sharded by rows (Shard(0))")
    ):
        fully_shard(layer(), mesh=mesh, **columns)
    for style in (ColwiseParallel, RowwiseParallel):
        sentence = r"weight: expected a plan of transformers \(.* as parallelize_module makes it"
        with pytest.raises(ValueError, match=sentence):
            parallelize_module(layer(), mesh, {"0": style()})
    trained = fully_shard(layer(), mesh=mesh)
    trained[0].weight.requires_grad_()
    with pytest.raises(ValueError, match="NF4 weights are frozen"):
        trained(testing.tensor(3, 128))


@on(2)
def compiled(folder: Path, mesh: Any) -> None:
    """Blocks that are compiled to one graph each and then sharded train as in one process."""
    curves = []
    for ranks in (1, 2):
        model = llama(1, patch=True)
        if ranks == 2:
            for layer in model.base_model.model.model.layers:
                layer.compile(backend="aot_eager", fullgraph=True)
            shard(model, mesh)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        curves.append(train(model, optimizer, batches(2, 2), mesh if ranks == 2 else None, ranks))
    assert curves[1] == pytest.approx(curves[0], rel=ONE_MODEL)


CASES: list[Case] = [
    whole_weights, other_formats, bytes_of_a_model, training, mixed_precision, packed_layers,
    shard_operations, ignored, inner_hooks, patched_modules, compiled, refusals,
]  # fmt: skip


errors, test_on_four_processes = rank_tests(RANKS, CASES)

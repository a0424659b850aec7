"""Checkpoints of NF4 models that FSDP2 shards: four processes over gloo, of which some shard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fsdp_models import (
    ADAMW,
    MOVED,
    RANKS,
    Case,
    adapters,
    assert_same_bits,
    batches,
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
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

import peft_kernels as pk
import testing
from peft_kernels.checkpoints.header import CheckpointError, Entry
from peft_kernels.integrations import fsdp
from peft_kernels.nf4 import packed_format

pytest.importorskip("transformers", reason="models are transformers', and it is not installed")
pytest.importorskip("peft", reason="adapters are PEFT's, and it is not installed")

pytestmark = pytest.mark.slow

UNEVEN = {"hidden_size": 40, "intermediate_size": 90, "num_key_value_heads": 2, "num_attention_heads": 4}
"""Rows that three processes do not divide evenly, and blocks that cross every shard boundary."""
SMALL = ("nested", "quant_map", "quant_state")
"""Items of NF4 weights that every process reads: tables, JSON and nested scales."""

# Each case runs in every process.


def gathered(model: nn.Module) -> dict[str, Any]:
    return {name: fsdp._whole(p.detach()) for name, p in model.named_parameters()}


def assert_same_model(model: nn.Module, want: dict[str, Any], names: Any = None) -> None:
    for name, got in gathered(model).items():
        if isinstance(want[name], pk.NF4Weight):
            assert_same_bits(got, want[name])
        else:
            assert torch.equal(got, want[name]), name


def wiped(model: Any) -> Any:
    """The same model with all its values replaced."""
    with torch.no_grad():
        for p in model.parameters():
            mine: Any = getattr(p, "_local_tensor", p)
            state = getattr(mine, "_rows", None) or getattr(mine, "_state", None)
            for t in [mine] if state is None else state.tensors().values():
                t.zero_()
    return model


def other_world_sizes(folder: Path) -> None:
    """Base, adapters and optimizer saved by two processes resume in three, in one, and without FSDP2: the
    base bit for bit, and training as if uninterrupted."""
    meshes = {ranks: line(ranks) for ranks in (1, 2, 3)}
    data = batches(6, steps=4)  # the same global batch for two and three processes
    if meshes[2] is not None:
        model = shard(llama(**UNEVEN), meshes[2])
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **ADAMW)
        train(model, optimizer, data[:2], meshes[2], 2)
        state = {"model": get_model_state_dict(model)}
        assert state["model"].keys() == fsdp.checkpoint_state(model).keys()
        state["optimizer"] = get_optimizer_state_dict(model, optimizer)
        dcp.save(state, checkpoint_id=folder, process_group=meshes[2].get_group())
    dist.barrier()
    single = llama(**UNEVEN)
    alone = torch.optim.AdamW([p for p in single.parameters() if p.requires_grad], **ADAMW)
    train(single, alone, data[:2])
    base = {name: p.detach() for name, p in single.named_parameters()}
    losses = train(single, alone, data[2:])
    want = adapters(single)
    for ranks, mesh in ((1, meshes[1]), (3, meshes[3]), (0, meshes[1])):
        if mesh is None:
            continue
        model = wiped(llama(**UNEVEN))
        if ranks:
            shard(model, mesh)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.5, eps=1e-4)
        state = {"model": fsdp.checkpoint_state(model)}
        if ranks:  # torch does not know the keys of an unsharded model
            state["optimizer"] = get_optimizer_state_dict(model, optimizer)
        dcp.load(state, checkpoint_id=folder, process_group=mesh.get_group())
        if ranks:
            assert set_model_state_dict(model, state["model"]).missing_keys == []
            set_optimizer_state_dict(model, optimizer, state["optimizer"])
        for name, got in gathered(model).items():
            if isinstance(base[name], pk.NF4Weight):
                assert_same_bits(got, base[name])
        if ranks:
            more = train(model, optimizer, data[2:], mesh, ranks)
            torch.testing.assert_close(more, losses, rtol=ONE_MODEL, atol=ONE_MODEL)
            for name, value in adapters(model).items():
                torch.testing.assert_close(value, want[name], rtol=0, atol=MOVED, msg=name)


@on(2)
def packed_bytes(folder: Path, mesh: Any) -> None:
    layer = nn.Sequential(pk.nn.NF4Linear(weight((512, 640), 64, True)))
    nbytes = layer[0].weight.nbytes
    fully_shard(layer, mesh=mesh)
    dcp.save(fsdp.checkpoint_state(layer), checkpoint_id=folder, process_group=mesh.get_group())
    dist.barrier(group=mesh.get_group())
    assert sum(file.stat().st_size for file in folder.glob("*.distcp")) < nbytes + 10_000


@on(2)
def saved_later(folder: Path, mesh: Any) -> None:
    """`async_save` saves what `save` would have at that time: shards, and weights of one process."""
    group, want = mesh.get_group(), weight((512, 640), 64, True)
    for name, stager in (("default", None), ("blocking", BlockingAsyncStager()), ("whole", None)):
        layer, other = (nn.Sequential(pk.nn.NF4Linear(want.clone())) for _ in range(2))
        if name != "whole":
            for each in (layer, other):
                fully_shard(each, mesh=mesh)
        state = fsdp.checkpoint_state(layer)
        saving = dcp.async_save(state, checkpoint_id=folder / name, process_group=group, async_stager=stager)
        wiped(layer), saving.result()
        dist.barrier(group=group)
        assert sum(file.stat().st_size for file in (folder / name).glob("*.distcp")) < want.nbytes + 10_000
        dcp.load(fsdp.checkpoint_state(wiped(other)), checkpoint_id=folder / name, process_group=group)
        assert_same_bits(fsdp._whole(other[0].weight.detach()), want)
    layer = nn.Sequential(pk.nn.NF4Linear(want.clone()))
    alone = {"weight": layer[0].weight.detach()}
    file = folder / f"alone-{dist.get_rank()}"
    dcp.async_save(alone, checkpoint_id=file, no_dist=True).result()
    wiped(layer)
    dcp.load(alone, checkpoint_id=file, no_dist=True)
    assert_same_bits(alone["weight"], want)


@on(2)
def other_formats(folder: Path, mesh: Any) -> None:
    """In DCP's checkpoints, and rows read from a safetensors file."""
    for format, blocksize in (
        ("mxfp4", 32),
        ("nvfp4", 16),
        ("int4", 64),
        ("fp8", 128),
        ("fp8", 0),
        ("int8", 64),
    ):
        path = folder / f"{format}-{blocksize}"
        dense = testing.uneven(testing.tensor(301, 320))
        want = pk.NF4Weight.quantize(dense, blocksize, format=format)
        layers = [nn.Sequential(pk.nn.NF4Linear(w)) for w in (want.clone(), want.clone())]
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        dcp.save(fsdp.checkpoint_state(layers[0]), checkpoint_id=path, process_group=mesh.get_group())
        dcp.load(fsdp.checkpoint_state(wiped(layers[1])), checkpoint_id=path, process_group=mesh.get_group())
        assert_same_bits(fsdp._whole(layers[1][0].weight.detach()), want)
        file = path / "layer.safetensors"
        if mesh.get_local_rank() == 0:
            save_file(packed_format.to_state_dict(want._state, want.dtype, "0.weight"), file)
        dist.barrier(group=mesh.get_group())
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(320, 301, bias=False))
        model = fully_shard(fsdp.empty_layers(model, file), mesh=mesh)
        fsdp.load_checkpoint(model, file)
        assert_same_bits(fsdp._whole(model[0].weight.detach()), want)


def empty_parts(folder: Path) -> None:
    """A process without rows gets the scales of the weights that the others load."""
    mesh = line(4)
    want, other = weight((5, 640), 32, True), weight((5, 640), 32, True)
    other._state.absmax2.mul_(0.5)  # type: ignore[union-attr]
    layers = [nn.Sequential(pk.nn.NF4Linear(w.clone())) for w in (want, other)]
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    dcp.save(fsdp.checkpoint_state(layers[0]), checkpoint_id=folder)
    dcp.load(fsdp.checkpoint_state(layers[1]), checkpoint_id=folder)
    layers[1].unshard()
    assert_same_bits(layers[1][0].weight, want)


def whole(folder: Path) -> None:
    """The full state dict has the keys of one process, and loads into shards."""
    for mesh in (line(3), square()):
        if mesh is None:
            continue
        want = llama(**UNEVEN)
        names = dict(want.named_parameters())
        model = shard(llama(**UNEVEN), mesh)
        state = fsdp.full_state_dict(model)
        if dist.get_rank() == 0:
            other = wiped(llama(**UNEVEN))
            other.load_state_dict(state)
            assert_same_model(other, names)
        else:
            assert not state
        full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        assert all(type(t) is pk.NF4Weight for n, t in full.items() if n.endswith("base_layer.weight"))
        layer = shard(wiped(llama(**UNEVEN)), mesh).base_model.model.model.layers[0].mlp.up_proj.base_layer
        single = want.base_model.model.model.layers[0].mlp.up_proj.base_layer
        layer.load_state_dict(single.state_dict())
        assert_same_bits(fsdp._whole(layer.weight), single.weight)


def adapter(folder: Path) -> None:
    """An ordinary PEFT folder, bit for bit that of one process; an error is raised in every process."""
    import peft
    from safetensors.torch import load_file

    mesh = line(3)
    if mesh is None:
        return
    model = shard(llama(**UNEVEN), mesh)
    fsdp.save_adapter(model, folder / "ours")
    (folder / "file").write_text("in the way") if dist.get_rank() == 0 else None
    with pytest.raises(RuntimeError, match=r"file: the adapter could not be saved \("):
        fsdp.save_adapter(model, folder / "file")
    if dist.get_rank() == 0:
        llama(**UNEVEN).save_pretrained(folder / "stock")
        got, want = (load_file(folder / n / "adapter_model.safetensors") for n in ("ours", "stock"))
        assert got.keys() == want.keys() and len(got) == 28
        assert all(torch.equal(got[name], want[name]) for name in got)
        again = peft.PeftModel.from_pretrained(llama(**UNEVEN).unload(), folder / "ours")
        assert_same_model(again, dict(llama(**UNEVEN).named_parameters()))


def from_meta(folder: Path) -> None:
    """A checkpoint into a model on the meta device: each process reads its rows, and the model and its new
    adapters equal those of one process."""
    import accelerate
    import peft
    from transformers import LlamaForCausalLM

    mesh = line(3)
    if mesh is None:
        return
    single = llama(**UNEVEN).unload()
    want = dict(single.named_parameters())
    if dist.get_rank() == 0:
        folder.mkdir(exist_ok=True)
        tensors = {n: t.contiguous() for n, t in single.state_dict().items() if n != "lm_head.weight"}
        save_file(tensors, folder / "model.safetensors")
        broken = {n: t for n, t in tensors.items() if "layers.1" not in n}
        save_file(broken, folder / "broken.safetensors")
    dist.barrier(group=mesh.get_group())
    path = folder / "model.safetensors"

    def empty() -> Any:
        with accelerate.init_empty_weights(include_buffers=False):
            model = LlamaForCausalLM(single.config)
        model.tie_weights()
        fsdp.empty_layers(model, path)
        model = peft.get_peft_model(model, llama(**UNEVEN).peft_config["default"])
        return shard(model, mesh)

    model = empty()
    read = 0
    original = Entry.read

    def counted(self: Entry) -> Any:
        nonlocal read
        read += self.nbytes * (not any(small in self.name for small in SMALL))
        return original(self)

    Entry.read = counted  # type: ignore[method-assign]
    try:
        fsdp.load_checkpoint(model, path)
    finally:
        Entry.read = original  # type: ignore[method-assign]
    large = sum(t.nbytes for name, t in single.state_dict().items() if not any(s in name for s in SMALL))
    assert read < 0.4 * large, (read, large)
    report = fsdp.report(model)
    assert len(report.sharded) == 14 and not report.replicated and 0 < len(report.joined) <= 14
    assert report.bytes_here < 0.5 * report.bytes_whole
    assert str(report).startswith("peft_kernels: 14 packed weights sharded, 0 replicated")
    for name, got in gathered(model).items():
        if ".lora_A." in name:
            assert got.std() > 0.01 and len(torch.unique(got)) == got.numel(), name
        elif ".lora_B." in name:
            assert not got.any()
        else:
            of = want[name.removeprefix("base_model.model.").replace(".base_layer.", ".")]
            (assert_same_bits if isinstance(of, pk.NF4Weight) else torch.testing.assert_close)(got, of)
    ids = batches(1, 1)[0]
    torch.testing.assert_close(model(ids).logits, single(ids).logits, rtol=ONE_MODEL, atol=ONE_MODEL)

    model = empty()
    with pytest.raises(CheckpointError, match=r"model.layers.1.*: the checkpoint has no tensor of this name"):
        fsdp.load_checkpoint(model, folder / "broken.safetensors")
    with pytest.raises(CheckpointError, match="cut short"):  # raised in one process only
        if dist.get_rank() == 1:
            Entry.read = cut_short  # type: ignore[method-assign]
        try:
            fsdp.load_checkpoint(model, path)
        finally:
            Entry.read = original  # type: ignore[method-assign]
    assert all(p.is_meta for p in model.parameters())


def cut_short(self: Entry) -> Any:
    raise CheckpointError(f"{self.name}: cut short")


CASES: list[Case] = [other_world_sizes, packed_bytes, saved_later, other_formats, empty_parts, whole]
CASES += [adapter, from_meta]


errors, test_on_four_processes = rank_tests(RANKS, CASES)

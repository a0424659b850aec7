"""Optimizers on DTensor parameters and in DDP: four processes over gloo."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import Case, rank_tests
from sharded_models import (
    CUT_ALIKE,
    RANKS,
    SHAPES,
    Model,
    assert_same,
    assert_same_tree,
    distributed,
    line,
    square,
    train,
)
from simulated_streams import BUDGET, REUSE, simulated
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import peft_kernels as pk
import testing
from peft_kernels.core import code_tables
from peft_kernels.optim.paging import CURRENT, IN, OUT
from peft_kernels.optim.sharded import Layout, is_sharded, part_of, whole_of

pytestmark = pytest.mark.slow

# Each case runs in every process.


def steps(folder: Path) -> None:
    """A step equals the whole's bit for bit if shards end at block boundaries, else that of each shard."""
    model, single = Model(mesh=line()), Model()
    optimizer, other = pk.optim.AdamW8bit(model.parameters()), pk.optim.AdamW8bit(single.parameters())
    parts = {n: nn.Parameter(p.detach().to_local().clone()) for n, p in model.named_parameters()}
    by_parts = pk.optim.AdamW8bit(parts.values(), min_8bit_size=0)
    by_parts.override_config(parts["small"], "optim_bits", 32)
    for step in range(4):
        train(model, optimizer, range(step, step + 1))
        train(single, other, range(step, step + 1))
        for name, p in model.named_parameters():
            parts[name].grad = p.grad.to_local()
        by_parts.step()
    assert_same(model, single, names=CUT_ALIKE)
    for name, p in model.named_parameters():
        assert torch.equal(p.to_local(), parts[name]), name
        bits = 32 if name == "small" else 8
        assert optimizer.state[p]["state1"].itemsize * 8 == bits, name
    assert model.few.to_local().numel() == (2500 if dist.get_rank() < 2 else 0)


def norm(folder: Path) -> None:
    """Over all shards, each counted once whatever its replicas; plain parameters count once too."""
    for scale in (None, 8.0):
        model, single = Model(mesh=square(), placements=(Replicate(), Shard(0))), Model()
        for each in (model, single):
            each.plain = nn.Parameter(testing.tensor(300))
        SHAPES["plain"] = (300,)
        pair = [pk.optim.PagedAdamW(m.parameters(), max_grad_norm=0.01, eps=1e-3) for m in (model, single)]
        for m, optimizer in zip((model, single), pair, strict=True):
            if scale is not None:
                optimizer.grad_scale = torch.tensor(scale)
            train(m, optimizer, range(3))
        assert_same(model, single, moved=3 * 1e-3)
        assert (single.rows - Model().rows).abs().max() > 1e-4


def fully_sharded(folder: Path) -> None:
    """FSDP2 layers with and without replicas equal one process bit for bit; so does their checkpoint."""

    def run(mesh: Any) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(256, 64), nn.Linear(64, 512), nn.Linear(512, 3, bias=False))
        if mesh is not None:
            for layer in model:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        optimizer = pk.optim.AdamW8bit(model.parameters())
        for step in range(3):
            optimizer.zero_grad()
            model(testing.tensor(5, 256, seed=step)).square().sum().backward()
            optimizer.step()
        return model

    single = run(None)
    for mesh in (line(), square()):
        assert_same(run(mesh), single)


def saved(model: Model, optimizer: Any, options: Any = None) -> dict[str, Any]:
    return {"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}


def checkpoint_of(folder: Path, names: Any = tuple(SHAPES), options: Any = None) -> tuple[Model, Any]:
    model = Model(names, mesh=line())
    optimizer = pk.optim.AdamW8bit(model.parameters(), lr=3e-3, rounding="kahan")
    train(model, optimizer, range(3))
    dcp.save(saved(model, optimizer, options), checkpoint_id=folder)
    return model, optimizer


def assert_equal_training(model: Model, optimizer: Any, other: Model, resumed: Any) -> None:
    """Trains both from the same weights and compares them."""
    with torch.no_grad():
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            full = whole_of(p)
            q.copy_(distributed(full, q.device_mesh, q.placements) if isinstance(q, DTensor) else full)
    for m, o in ((model, optimizer), (other, resumed)):
        train(m, o, range(3, 6))
    assert resumed.param_groups[0]["lr"] == 3e-3
    assert resumed.state_dict()["state"][0]["step"] == 6
    assert_same(other, model)


def checkpoint(folder: Path) -> None:
    """torch.distributed.checkpoint, nested and flat, resumes bit for bit."""
    for flat in (False, True):
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        model, optimizer = checkpoint_of(folder / str(flat), options=options)
        other = Model(mesh=line())
        resumed = pk.optim.AdamW8bit(other.parameters(), lr=0.5)
        found = saved(other, resumed, options)
        dcp.load(found, checkpoint_id=folder / str(flat))
        set_optimizer_state_dict(other, resumed, found["optimizer"], options=options)
        assert_equal_training(model, optimizer, other, resumed)


def other_world_size(folder: Path) -> None:
    """Resumes on two processes; where shards ended inside blocks, in blocks of the new shards."""
    model, optimizer = checkpoint_of(folder / "alike", CUT_ALIKE)
    half = square()["parts"]
    other = Model(CUT_ALIKE, mesh=half)
    resumed = pk.optim.AdamW8bit(other.parameters(), lr=0.5)
    found = saved(other, resumed)
    dcp.load(found, checkpoint_id=folder / "alike", process_group=half.get_group())
    set_optimizer_state_dict(other, resumed, found["optimizer"])
    assert_equal_training(model, optimizer, other, resumed)

    model, optimizer = checkpoint_of(folder / "all")
    other = Model(mesh=half)
    resumed = pk.optim.AdamW8bit(other.parameters(), rounding="kahan")
    found = saved(other, resumed)
    dcp.load(found, checkpoint_id=folder / "all", process_group=half.get_group())
    set_optimizer_state_dict(other, resumed, found["optimizer"])
    assert_near_moments(resumed, optimizer)


def moments(optimizer: Any) -> dict[str, Any]:
    """Whole moments of 8 bits in fp32, by parameter and number."""
    found = {}
    for at, (p, state) in enumerate(optimizer.state.items()):
        for i in (1, 2):
            if state[f"state{i}"].dtype != torch.uint8:
                continue
            codes, scales = state[f"state{i}"].reshape(-1), state[f"absmax{i}"].repeat_interleave(256)
            values = code_tables.moment_values(codes.device, i == 1)[codes.long()] * scales[: codes.numel()]
            values = values.view(part_of(p).shape)
            whole = Layout(p, "p")._dtensor(values, tuple(p.shape)) if is_sharded(p) else values
            found[f"{at}.{i}"] = whole_of(whole)
    return found


def assert_near_moments(got: Any, want: Any) -> None:
    """Up to half of the widest step of a map, 0.9 / 64, by which a second rounding to codes is off."""
    got, want = moments(got), moments(want)
    assert got.keys() == want.keys() and got
    for name, value in want.items():
        assert (got[name] - value).abs().max() <= 0.0071 * value.abs().max(), name


def gathered(folder: Path) -> None:
    """Full state dicts: from shards to one process, and from one process to shards."""
    options = StateDictOptions(full_state_dict=True)
    model, optimizer = checkpoint_of(folder, CUT_ALIKE)
    full = saved(model, optimizer, options)["optimizer"]
    single = Model(CUT_ALIKE)
    alone = pk.optim.AdamW8bit(single.parameters())
    set_optimizer_state_dict(single, alone, copy.deepcopy(full))
    other = Model(CUT_ALIKE, mesh=square()["parts"])
    resumed = pk.optim.AdamW8bit(other.parameters())
    resumed.load_state_dict(copy.deepcopy(alone.state_dict()))  # in its own layout, that of bitsandbytes
    third = Model(CUT_ALIKE, mesh=line())
    spread = pk.optim.AdamW8bit(third.parameters())
    set_optimizer_state_dict(third, spread, saved(single, alone)["optimizer"], options=options)
    start = copy.deepcopy((model, optimizer))
    for m, o in ((single, alone), (other, resumed), (third, spread)):
        assert_equal_training(*copy.deepcopy(start), m, o)

    odd, parts = Model(("odd",)), Model(("odd",), mesh=line())
    alone, spread = (pk.optim.AdamW8bit(m.parameters()) for m in (odd, parts))
    for m, o in ((odd, alone), (parts, spread)):
        train(m, o, range(2))
    same, before = copy.deepcopy((parts, spread))
    spread.load_state_dict(alone.state_dict())
    assert_near_moments(spread, alone)
    full = saved(same, before, options)["optimizer"]
    set_optimizer_state_dict(odd, alone, full)
    assert_near_moments(alone, before)
    damaged = copy.deepcopy(before.state_dict())
    damaged["state"][0]["absmax1"].to_local()[:, 0] = 256
    kept = copy.deepcopy(before.state_dict())
    with pytest.raises(
        ValueError, match=r"parameter 0 .*: absmax1: expected positions in blocks in the first"
    ):
        before.load_state_dict(damaged)
    assert_same_tree(before.state_dict(), kept)


def rounding(folder: Path) -> None:
    """Shards have random bits of their own, replicas the same ones."""
    start = torch.full((64, 512), 100.0, dtype=torch.bfloat16)
    p = nn.Parameter(distributed(start, square(), (Replicate(), Shard(0))))
    optimizer = pk.optim.AdamW8bit([p], lr=0.2, rounding="stochastic")
    p.grad = torch.ones_like(p)
    optimizer.step()
    everyone = [torch.empty_like(p.to_local()) for _ in range(RANKS)]
    dist.all_gather(everyone, p.detach().to_local())
    assert torch.equal(everyone[0], everyone[2]) and torch.equal(everyone[1], everyone[3])
    assert 0.2 < (everyone[0] != everyone[1]).float().mean() < 0.6


def scaler(folder: Path) -> None:
    """An inf in one shard skips the step in every process."""
    for bad in (False, True):
        model, single = Model(CUT_ALIKE, mesh=line()), Model(CUT_ALIKE)
        optimizer, other = pk.optim.AdamW8bit(model.parameters()), pk.optim.AdamW8bit(single.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.zeros(()))
        for m in (model, single):
            m.give_gradients(1)
        for p in single.parameters():
            p.grad /= 4
        if bad and dist.get_rank() == 2:
            model.rows.grad.to_local()[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        if not bad:
            other.step()
        assert_same(model, single)
        assert scaler.get_scale() == (2.0 if bad else 4.0)


def refusals(folder: Path) -> None:
    """A gradient placed differently from its parameter raises: nothing changes, no process waits."""
    model = Model(("rows", "narrow"), mesh=line())
    optimizer = pk.optim.AdamW8bit(model.parameters(), max_grad_norm=1.0)
    for _ in range(2):  # before the first step, and after it
        before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
        model.give_gradients(1)
        model.narrow.grad = DTensor.from_local(torch.ones(512, 16), line(), (Partial(),))
        with pytest.raises(
            ValueError, match=r"parameter 1 .*: gradient: expected placements \(Shard\(dim=0\),\)"
        ):
            optimizer.step()
        assert_same_tree((model.state_dict(), optimizer.state_dict()["state"]), before)
        train(model, optimizer, range(1))
    partial = nn.Parameter(DTensor.from_local(torch.ones(512, 16), line(), (Partial(),)))
    partial.grad = torch.ones_like(partial)
    with pytest.raises(ValueError, match="expected a DTensor that is sharded or replicated"):
        pk.optim.AdamW8bit([partial]).step()


def ddp(folder: Path) -> None:
    torch.manual_seed(0)
    single = nn.Linear(128, 64)
    model = nn.parallel.DistributedDataParallel(copy.deepcopy(single))
    batch = testing.tensor(RANKS, 128)
    for m, x in ((model, batch[dist.get_rank()]), (single, batch)):
        optimizer = pk.optim.AdamW8bit(m.parameters(), max_grad_norm=1.0)
        for _ in range(3):
            optimizer.zero_grad()
            (m(x).square().sum() * (1 if x.dim() == 1 else 1 / RANKS)).backward()
            optimizer.step()
    assert_same(model.module, single, moved=3 * 1e-3)
    everyone = [torch.empty_like(single.weight) for _ in range(RANKS)]
    dist.all_gather(everyone, model.module.weight.detach())
    assert all(torch.equal(each, everyone[0]) for each in everyone)


def zero_redundancy(folder: Path) -> None:
    """Each process steps its own parameters: clipping by their norm alone is refused, torch's clipping of
    the whole model gives the bits of one process."""
    start = nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 96), nn.Linear(96, 3))
    for p in start.parameters():
        p.data = testing.tensor(*p.shape)
    with pytest.raises(ValueError, match=r"max_grad_norm: .* ZeroRedundancyOptimizer .*clip_grad_norm_"):
        ZeroRedundancyOptimizer(start.parameters(), pk.optim.AdamW8bit, max_grad_norm=1.0)
    models = [copy.deepcopy(start) for _ in range(2)]
    options: Any = {"lr": 1e-3, "min_8bit_size": 800}
    pair = [
        ZeroRedundancyOptimizer(models[0].parameters(), pk.optim.AdamW8bit, **options),
        pk.optim.AdamW8bit(models[1].parameters(), **options),
    ]
    for step in range(3):
        for m, optimizer in zip(models, pair, strict=True):
            optimizer.zero_grad()
            m(testing.tensor(5, 128, seed=step)).square().sum().backward()
            nn.utils.clip_grad_norm_(m.parameters(), 0.5)
            optimizer.step()
    assert_same(*models)
    assert not torch.equal(models[0][0].weight, start[0].weight)


def paged(folder: Path) -> None:
    """Shards in host memory, and a plain parameter that steps in the same ring: bit for bit as unpaged, with
    checkpoints both ways, and no step when buffers cannot be allocated."""

    def made(paging: Any) -> tuple[Model, Any]:
        model = Model(mesh=line())
        model.plain = nn.Parameter(testing.tensor(*SHAPES["plain"]))
        model.short = nn.Parameter(distributed(testing.tensor(*SHAPES["short"]), line(), (Shard(0),)))
        model.bfloat16()
        return model, optimizer_of(model, paging)

    def optimizer_of(model: Model, paging: Any) -> Any:
        plain_first = sorted(model.parameters(), key=is_sharded)
        options = {"rounding": "stochastic", "max_grad_norm": 0.5, "min_8bit_size": 800}
        return pk.optim.AdamW8bit(plain_first, **options, **paging)

    SHAPES.update(plain=(1500,), short=(1000,))  # shards of `short` are not paged
    paging = {"is_paged": True, "page_budget": BUDGET}
    with simulated((CURRENT, IN, REUSE, OUT)) as streams:
        pairs = [made({}), made(paging)]
        for pair in pairs:
            train(*pair, range(2))
        states = [optimizer.state_dict()["state"] for _, optimizer in pairs]
        streams.drain()
        assert_same(pairs[1][0], pairs[0][0])
        assert_same_tree(states[1], states[0])
        assert 0 < streams.most <= BUDGET and len(pairs[1][1]._plans) == 2
        for p, state in pairs[1][1].state.items():
            assert streams.is_host(state["state1"]) is (part_of(p).numel() >= 300)
        assert all(streams.is_host(t) for plan in pairs[1][1]._plans for there in plan.host for t in there)

        model, optimizer = pairs[1]
        smaller, larger = sorted(plan.page_bytes for plan in optimizer._plans)
        with pytest.MonkeyPatch.context() as patch:
            empty = streams.empty
            patch.setattr(
                streams, "empty", lambda n, nbytes: empty(n, nbytes if n * nbytes <= smaller < larger else -1)
            )
            before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
            with pytest.raises(RuntimeError, match="negative dimension"):
                train(model, optimizer, range(2, 3))
            streams.drain()
            assert_same_tree((model.state_dict(), optimizer.state_dict()["state"]), before)

        saved_ones = [copy.deepcopy(saved(*pair)["optimizer"]) for pair in pairs]
        streams.drain()
        resumed = [copy.deepcopy(pairs[0][0]), copy.deepcopy(pairs[0][0])]
        for other, found, options in zip(resumed, saved_ones, (paging, {}), strict=True):
            again = optimizer_of(other, options)
            set_optimizer_state_dict(other, again, found)
            train(other, again, range(2, 4))
        train(*pairs[0], range(2, 4))
        streams.drain()
        for other in resumed:
            assert_same(other, pairs[0][0])


CASES: list[Case] = [
    steps, norm, fully_sharded, checkpoint, other_world_size, gathered, rounding, scaler, refusals,
    ddp, zero_redundancy, paged,
]  # fmt: skip


errors, test_on_four_processes = rank_tests(RANKS, CASES)

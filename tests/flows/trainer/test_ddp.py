"""Patched models under DistributedDataParallel with common options: two or three gloo processes must give the
gradients of one process on the whole batch."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from flow_checks import assert_fused, assert_near, language_loss
from flow_models import adapted, config, ids, llama
from peft_models import gradients
from ranks import MARKS, assert_no_errors, errors_by_rank, rank_tests
from rounding import ONE_MODEL, ONE_STEP
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import peft_kernels as pk

pytestmark = MARKS

STEPS = 3
Loss = Callable[[Any, Tensor], Tensor]


def small(base: str = "nf4", layers: int = 2) -> Any:
    return adapted(llama(base, num_hidden_layers=layers), r=4)


def share(seed: int) -> Tensor:
    """This process's rows of a batch."""
    return ids(seed, rows=2 * dist.get_world_size()).chunk(dist.get_world_size())[dist.get_rank()]


def all_adapters_train(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def trained(model: Any, call: Any, rows: Callable[[int], list[Tensor]], loss: Loss) -> dict[str, Tensor]:
    """Adapters, and gradients of the last step, after some steps. `rows(i)`: the parts of batch i that this
    process trains on, all of them in a single process."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.03)
    for step in range(STEPS):
        optimizer.zero_grad()
        parts = rows(step)
        for part in parts:
            (loss(call, part) / len(parts)).backward()
        optimizer.step()
    adapters = {f"{n} itself": p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return {**adapters, **gradients(model)}


def compare(
    stock: Any, ddp: Callable[[Any], Any], loss: Loss = language_loss, patch: bool = True, bound: float = 1e-4
) -> Any:
    """Compares a patched copy in DDP with a copy of `stock` in one process."""
    model, alone = copy.deepcopy(stock), copy.deepcopy(stock)
    report = pk.patch(model) if patch else None
    wrapped = ddp(model)
    got = trained(model, wrapped, lambda step: [share(step)], loss)
    everyone = dist.get_world_size()
    want = trained(alone, alone, lambda step: list(ids(step, rows=2 * everyone).chunk(everyone)), loss)
    assert_near(got, want, bound)
    start = {f"{n} itself": p for n, p in stock.named_parameters()}
    assert any((want[n] - p).norm() > 1e-3 * p.norm() for n, p in start.items() if n in want), "nothing moved"
    return report


# Cases: each runs in every process.


def when_patched(folder: Path) -> None:
    """NF4 unpatched, patched before and after wrapping, and other bases; DDP broadcasts rank 0's adapters."""
    others = ["dense", "bnb"] if importlib.util.find_spec("bitsandbytes") else ["dense"]
    cases = [
        *(("nf4", when) for when in ("never", "before", "after")),
        *((base, "before") for base in others),
    ]
    for base, when in cases:
        stock = small(base, layers=1)
        reports = []

        def ddp(model: Any, when: str = when, reports: list[Any] = reports) -> Any:
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(dist.get_rank())
            wrapped = DistributedDataParallel(model)
            if when == "after":
                reports.append(pk.patch(wrapped))
                assert_fused(wrapped, reports[0], blocks=1)
            return wrapped

        report = compare(stock, ddp, patch=when == "before")
        if report is not None:
            assert not any(layer.fallbacks for layer in report.layers) and "fused" in str(report)


def options(folder: Path) -> None:
    """DDP's options, and both kinds of activation checkpointing where DDP supports it."""
    every: list[dict[str, Any]] = [
        {},
        {"find_unused_parameters": True},
        {"static_graph": True},
        {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.02},
    ]
    for checkpointing in (None, False, True):
        stock = small()
        if checkpointing is not None:
            reentrant = {"use_reentrant": checkpointing}
            stock.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs=reentrant)
            stock.enable_input_require_grads()
        for given in every:
            if checkpointing and "find_unused_parameters" in given:
                continue  # torch raises: each reentrant block marks all parameters as used
            report = compare(stock, lambda model, given=given: DistributedDataParallel(model, **given))
            assert not any(layer.fallbacks for layer in report.layers), str(report)


def unused(folder: Path) -> None:
    """An adapter that is active in one process only, and one in none."""
    stock = small()
    for name in ("second", "third"):
        stock.add_adapter(name, config(r=2))
    parts = ids(rows=4).chunk(2)

    def loss(model: Any, lora: Any, rank: int) -> Tensor:
        lora.set_adapter(["default", "second"] if rank == 1 else "default")
        all_adapters_train(lora)
        return language_loss(model, parts[rank])

    model = copy.deepcopy(stock)
    pk.patch(model)
    all_adapters_train(model)
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    for _ in range(2):  # an unused parameter would raise in the second step
        ddp.zero_grad()
        loss(ddp, model.base_model, dist.get_rank()).backward()
    for rank in range(2):
        (loss(stock, stock.base_model, rank) / 2).backward()
    got, want = gradients(model), gradients(stock)
    assert any(".second." in name for name in want) and not any(".third." in name for name in want)
    assert_near({name: got[name] for name in want}, want, ONE_STEP)


def rows_of_their_own(folder: Path) -> None:
    """A mixed batch, which PEFT supports in evaluation, with rows without an adapter."""
    stock = small()
    stock.add_adapter("second", config(r=2))
    all_adapters_train(stock.eval())
    names = {0: ["second", "default"], 1: ["__base__", "second"]}
    parts = ids(rows=4).chunk(2)

    def loss(model: Any, rank: int) -> Tensor:
        return model(input_ids=parts[rank], labels=parts[rank], adapter_names=names[rank]).loss

    model = copy.deepcopy(stock)
    pk.patch(model)
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    for _ in range(2):
        ddp.zero_grad()
        loss(ddp, dist.get_rank()).backward()
    for rank in names:
        (loss(stock, rank) / 2).backward()
    assert_near(gradients(model), gradients(stock), ONE_STEP)


def accumulation(folder: Path) -> None:
    """Gradient accumulation: two parts of a batch, the first without communication."""
    stock = small()
    for given in ({}, {"gradient_as_bucket_view": True}):
        model, alone = copy.deepcopy(stock), copy.deepcopy(stock)
        pk.patch(model)
        ddp = DistributedDataParallel(model, **given)
        for step in range(2):
            model.zero_grad(set_to_none=not given)
            alone.zero_grad()
            parts = share(step).chunk(2)
            for i, part in enumerate(parts):
                with ddp.no_sync() if i == 0 else contextlib.nullcontext():
                    (language_loss(ddp, part) / 2).backward()
            everything = ids(step, rows=2 * dist.get_world_size()).split(1)
            for part in everything:
                (language_loss(alone, part) / len(everything)).backward()
            assert_near(gradients(model), gradients(alone), ONE_STEP)


def events_of_a_step(model: Any) -> list[str]:
    """Events in order: the layer index of each gradient that is ready, and "sent" for a bucket."""
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.004)  # a quarter of a layer
    events: list[str] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layer = next(part for part in name.split(".") if part.isdecimal())
            parameter.register_post_accumulate_grad_hook(lambda _, at=layer: events.append(at))

    def send(bucket: Any) -> Any:
        events.append("sent")
        work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    ddp.register_comm_hook(None, lambda state, bucket: send(bucket))
    for step in range(2):  # buckets are rebuilt after the first step
        events.clear()
        ddp.zero_grad()
        language_loss(ddp, share(step)).backward()
    return events


def overlap(folder: Path) -> None:
    """Buckets are sent while backward continues with earlier layers, as early as in stock."""
    stock = small(layers=4)
    model = copy.deepcopy(stock)
    pk.patch(model)
    early = {}
    for each in (stock, model):
        events = events_of_a_step(each)
        layers = [event for event in events if event != "sent"]
        assert layers == sorted(layers, reverse=True) and len(layers) == 56
        remaining = [len(layers) - i + events[:i].count("sent") for i, e in enumerate(events) if e == "sent"]
        assert len(remaining) > 8
        for layer in (2, 1, 0):  # most buckets of a layer are sent when the next layer begins
            assert min(n for n in remaining if n >= 14 * (layer + 1)) <= 14 * (layer + 1) + 7
        early[each is model] = sum(remaining) / len(remaining)
    assert early[True] > early[False] - 3.5, early  # gradients of half a block are ready at once


def dropped(folder: Path) -> None:
    """lora_dropout in a reentrant block: the recomputation drops the same elements."""
    stock = adapted(llama("nf4"), r=4, lora_dropout=0.3)
    stock.get_base_model().gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": True}
    )
    stock.enable_input_require_grads()
    model, plain = copy.deepcopy(stock), copy.deepcopy(stock)
    plain.get_base_model().gradient_checkpointing_disable()
    for each in (model, plain):
        pk.patch(each)
        ddp = DistributedDataParallel(each)
        torch.manual_seed(dist.get_rank())
        language_loss(ddp, share(0)).backward()
    assert_near(gradients(model), gradients(plain), ONE_MODEL)


def mixed_precision(folder: Path) -> None:
    """accelerate's bf16 is autocast around DDP: as close to fp32 as stock."""
    if importlib.util.find_spec("accelerate") is None:
        return
    import accelerate

    stock = small()
    exact = gradients_of_a_step(stock, lambda model: DistributedDataParallel(model))
    errors = []
    for patched in (False, True):
        accelerate.state.AcceleratorState._reset_state(True)
        prepare = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare
        got = gradients_of_a_step(stock, prepare, patched)
        errors.append(sum(float((got[n] - t).norm() / t.norm()) for n, t in exact.items()) / len(exact))
    accelerate.state.AcceleratorState._reset_state(True)
    assert 0 < errors[1] <= 1.5 * errors[0], errors


def gradients_of_a_step(stock: Any, wrap: Callable[[Any], Any], patched: bool = False) -> dict[str, Tensor]:
    model = copy.deepcopy(stock)
    report = pk.patch(model) if patched else None
    language_loss(wrap(model), share(0)).backward()
    if report is not None:
        assert_fused(model, report)
    return gradients(model)


CASES = [when_patched, options, unused, rows_of_their_own, accumulation, overlap, dropped, mixed_precision]

errors, test_on_two_processes = rank_tests(2, CASES)


def test_on_three_processes() -> None:
    cases = [accumulation]
    errors = errors_by_rank(3, cases)
    for case in cases:
        assert_no_errors(errors, case.__name__)

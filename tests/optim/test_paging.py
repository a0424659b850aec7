"""Paged optimizers equal unpaged ones bit for bit, in any order a device may choose, within a budget."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from simulated_streams import BUDGET, GUARDS, REUSE, SimulatedStreams, simulated
from torch import Tensor, nn

import peft_kernels as pk
import testing
from peft_kernels.optim import pager, paging, plan
from peft_kernels.optim.paging import CURRENT, IN, OUT, Chunk, Piece

ORDERS = [*itertools.permutations((CURRENT, IN, OUT, REUSE)), *range(6)]
SIZES = ((70, 100), (30,), (2500,), (40, 64), (1000,), (5, 100), (1,))
DTYPES = (torch.float32, torch.bfloat16, torch.bfloat16, torch.float16, torch.bfloat16, torch.float32)


def parameters() -> list[nn.Parameter]:
    found = [
        testing.tensor(*s, dtype=d, seed=i) for i, (s, d) in enumerate(zip(SIZES, itertools.cycle(DTYPES)))
    ]
    return [nn.Parameter(p) for p in found]


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    for i, p in enumerate(params):
        if (i, step) != (2, 1):  # one has no gradient in a step, so offsets change
            p.grad = testing.tensor(*p.shape, dtype=p.dtype, seed=100 * step + i)
        else:
            p.grad = None


def trained(
    make: Callable[[Any], Any], steps: range = range(4), found_inf: int = -1
) -> tuple[list[Any], Any]:
    params = parameters()
    optimizer = make(params)
    resume(params, optimizer, steps, found_inf)
    return params, optimizer


def resume(params: list[nn.Parameter], optimizer: Any, steps: range, found_inf: int = -1) -> None:
    for step in steps:
        give_gradients(params, step)
        if found_inf >= 0:
            optimizer.grad_scale = torch.tensor(4.0)
            optimizer.found_inf = torch.tensor([float(step == found_inf)])
        optimizer.step()


def assert_same(got: tuple[list[Any], Any], want: tuple[list[Any], Any]) -> None:
    states = [optimizer.state_dict()["state"] for _, optimizer in (got, want)]
    for i, (p, q) in enumerate(zip(got[0], want[0], strict=True)):
        assert torch.equal(p, q), f"parameter {i}"
        for name, value in states[1][i].items():
            assert torch.equal(torch.as_tensor(states[0][i][name]), torch.as_tensor(value)), (i, name)


def maker(name: str, **options: Any) -> Callable[[Any], Any]:
    return lambda params: getattr(pk.optim, name)(params, min_8bit_size=800, weight_decay=0.1, **options)


def paged(make: Callable[..., Any], streams: SimulatedStreams, **options: Any) -> tuple[list[Any], Any]:
    result = trained(lambda params: with_paging(make(params)), **options)
    streams.drain()
    return result


def with_paging(optimizer: Any, budget: int = BUDGET) -> Any:
    optimizer._pager = pager.Pager(True, budget)
    return optimizer


OPTIONS: dict[str, tuple[str, dict[str, Any], int]] = {
    "8 bits": ("AdamW8bit", {}, -1),
    "lion": ("Lion8bit", {}, -1),
    "coupled": ("Adam8bit", {"decoupled_weight_decay": False}, -1),
    "scaled, an inf": ("AdamW8bit", {}, 1),
    "clipped": ("AdamW8bit", {"max_grad_norm": 0.5}, -1),
    "clipped, scaled, an inf": ("Lion8bit", {"max_grad_norm": 3.0}, 2),
    "stochastic": ("AdamW8bit", {"rounding": "stochastic", "seed": 3}, -1),
    "stochastic, clipped": ("Adam8bit", {"rounding": "stochastic", "max_grad_norm": 0.5}, -1),
    "compensated": ("AdamW8bit", {"rounding": "kahan"}, -1),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_paged_equals_unpaged_bit_for_bit(backend: str, option: str) -> None:
    name, options, found_inf = OPTIONS[option]
    with simulated() as streams:
        want = trained(maker(name, **options), found_inf=found_inf)
        got = paged(maker(name, **options), streams, found_inf=found_inf)
        host = {name for state in got[1].state.values() for name, t in state.items()
                if isinstance(t, Tensor) and streams.is_host(t)}  # fmt: skip
    assert_same(got, want)
    assert len(got[1]._plans[0].chunks) > 4
    assert 0 < streams.most <= BUDGET
    assert host == {"state1", "state2", "compensation"} & set(got[1].state[got[0][2]])


@pytest.fixture
def quick() -> Iterator[None]:
    """A back end whose results are equal in plain torch and in C++."""
    with pk.use_backend("cpu" if testing.unavailable("cpu-scalar") is None else "reference"):
        yield


MIXED = maker("AdamW8bit", rounding="stochastic", max_grad_norm=0.5)


@pytest.mark.usefixtures("quick")
def test_every_order_gives_the_same_bits() -> None:
    with simulated():
        want = trained(MIXED)
    for order in ORDERS:
        with simulated(order) as streams:
            assert_same(paged(MIXED, streams), want)
        assert streams.most <= BUDGET, order
        assert set(streams.guarded) == set(GUARDS)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("dropped", GUARDS)
def test_every_wait_is_needed(dropped: str) -> None:
    with simulated():
        want = trained(MIXED)

    def is_wrong(order: Any) -> bool:
        with simulated(order, dropped) as streams:
            got = paged(MIXED, streams)
        try:
            assert_same(got, want)
        except AssertionError:
            return True
        return streams.most > BUDGET

    assert any(map(is_wrong, ORDERS))


@pytest.mark.parametrize("budget", [3 * 1024, 3 * 2048, 3 * 5000, 1 << 20])
def test_chunks_cover_all_elements_and_fit(budget: int) -> None:
    pieces = [
        Piece(700, (1, 1)), Piece(5000, (4, 4)), Piece(10), Piece(500, (1, 1), True), Piece(0),
        Piece(3000, (1,)), Piece(300, (1, 1, 2)),
    ]  # fmt: skip
    if budget < 3 * 2048:
        pieces[1] = Piece(5000, (1, 1))
    chunks = paging.split_to_chunks(pieces, budget)
    reached = [0] * len(pieces)
    for chunk in chunks:
        used = 0
        for at, (start, stop) in enumerate(chunk.parts, chunk.first):
            assert (
                start == reached[at] and start % 256 == 0 and reached[:at] == [p.numel for p in pieces[:at]]
            )
            assert not pieces[at].whole or stop - start == pieces[at].numel
            reached[at] = stop
            used += paging.nbytes_of(pieces[at], stop - start)
        assert chunk.nbytes == used <= budget // 3
    assert reached == [p.numel for p in pieces]
    if budget == 1 << 20:
        assert chunks == [Chunk(0, [(0, p.numel) for p in pieces], chunks[0].nbytes)]


def test_too_small_budgets() -> None:
    with pytest.raises(ValueError, match="page_budget: expected a whole number of bytes, at least 9216"):
        pk.optim.PagedAdamW8bit(parameters(), page_budget=0)
    params = [nn.Parameter(torch.zeros(5000, dtype=torch.bfloat16))]
    with simulated(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "STREAM", 4096)
        optimizer = pk.optim.PagedAdamW(params, rounding="stochastic", page_budget=9216)
        params[0].grad = torch.ones_like(params[0])
        sentence = "page_budget: expected at least 98304 bytes for parameter 0 of group 0, got 9216"
        with pytest.raises(ValueError, match=sentence):
            optimizer.step()
        assert not params[0].any() and not optimizer.state
        # A refused step does not affect steps before or after it.
        params = [nn.Parameter(torch.zeros(size, dtype=torch.bfloat16)) for size in (100, 5000)]
        optimizer = pk.optim.PagedAdamW(params, rounding="stochastic", page_budget=9216)
        for with_large in (False, True, False):
            params[0].grad = torch.ones_like(params[0])
            params[1].grad = torch.ones_like(params[1]) if with_large else None
            with pytest.raises(ValueError, match="for parameter 1 of") if with_large else nullcontext():
                optimizer.step()
        assert optimizer.state_dict()["state"].keys() == {0}
        assert optimizer.state_dict()["state"][0]["step"] == 2


@pytest.mark.usefixtures("quick")
def test_small_parameters_stay_and_large_states_are_on_the_host() -> None:
    with simulated() as streams:
        params, optimizer = trained(lambda p: pk.optim.PagedAdamW8bit(p, page_budget=BUDGET))
        for p in params:
            state = optimizer.state[p]
            assert streams.is_host(state["state1"]) is streams.is_host(state["state2"]) is (p.numel() >= 300)
            assert not streams.is_host(state["step"])
        streams.drain()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("first, second", [(True, True), (True, False), (False, True)])
def test_checkpoints_between_paged_and_unpaged(first: bool, second: bool) -> None:
    """The first optimizer's steps are still queued: saving waits for them."""
    make = maker("AdamW8bit", rounding="kahan")
    with simulated((IN, CURRENT, OUT, REUSE)) as streams:
        want = trained(make)
        params, optimizer = trained(lambda p: with_paging(make(p)) if first else make(p), range(2))
        saved = copy.deepcopy(optimizer.state_dict())
        streams.drain()
        resumed = [nn.Parameter(p.detach().clone()) for p in params]
        other = with_paging(make(resumed)) if second else make(resumed)
        other.load_state_dict(saved)
        assert all(streams.is_host(other.state[p]["state1"]) is second for p in resumed if p.numel() >= 300)
        resume(resumed, other, range(2, 4))
        streams.drain()
    assert_same((resumed, other), want)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("way", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_and_pickles_resume(way: Callable[[Any], Any]) -> None:
    with simulated((CURRENT, IN, OUT, REUSE)) as streams:
        want = trained(MIXED)
        make = maker("PagedAdamW8bit", rounding="stochastic", max_grad_norm=0.5, page_budget=BUDGET)
        params, optimizer = trained(make, range(2))
        optimizer._pager.synchronize()  # pickling parameters does not go through the optimizer
        streams.drain()
        copied, other = way((params, optimizer))
        assert other.is_paged and other._pager.budget == BUDGET
        resume(copied, other, range(2, 4))
        streams.drain()
        assert all(streams.is_host(other.state[p]["state1"]) for p in copied if p.numel() >= 300)
    assert_same((copied, other), want)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("read", ["state_dict", "__getstate__", "load_state_dict"])
def test_reading_states_waits(read: str) -> None:
    """With copies to the host as late as possible."""
    with simulated((CURRENT, IN, REUSE, OUT)) as streams:
        params, want = trained(MIXED, range(3))
        moments = [want.state[p]["state1"] for p in params]
        params, optimizer = trained(lambda p: with_paging(MIXED(p)), range(2))
        saved = () if read != "load_state_dict" else (optimizer.state_dict(),)  # the next step changes it
        resume(params, optimizer, range(2, 3))
        assert streams._queues[OUT]
        getattr(optimizer, read)(*saved)
        assert not streams._queues[OUT]
        assert all(map(torch.equal, (optimizer.state[p]["state1"] for p in params), moments))


def out_of_memory(*_: Any) -> Any:
    raise torch.OutOfMemoryError("none left")


@pytest.mark.usefixtures("quick")
def test_captured_or_failed_step_changes_nothing() -> None:
    with simulated() as streams:
        params, optimizer = trained(lambda p: with_paging(MIXED(p)), range(1))
        streams.drain()
        before = [p.detach().clone() for p in params]
        streams.capturing = True
        with pytest.raises(RuntimeError, match="step: captured"):
            resume(params, optimizer, range(1, 2))
        streams.capturing = False
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(streams, "empty", out_of_memory)
            with pytest.raises(torch.OutOfMemoryError):
                resume(params, optimizer, range(1, 2))
        streams.drain()
        assert all(map(torch.equal, params, before))
        assert optimizer.state_dict()["state"][0]["step"] == 1


def test_devices_without_paging() -> None:
    assert pager.streams_of(torch.device("cpu")) is None
    with pytest.raises(RuntimeError, match="is_paged: expected a CUDA device, got xpu"):
        pager.streams_of(torch.device("xpu", 0))


@pytest.mark.usefixtures("quick")
def test_transposed_parameters() -> None:
    with simulated() as streams:
        base = testing.tensor(60, 70)
        turned, plain = nn.Parameter(base.clone().t()), nn.Parameter(base.t().contiguous())
        optimizer = pk.optim.PagedAdamW([turned, plain], page_budget=BUDGET)
        for step in range(2):
            grad = testing.tensor(60, 70, seed=step)
            turned.grad, plain.grad = grad.t(), grad.t().contiguous()
            optimizer.step()
            streams.drain()
    assert torch.equal(turned, plain) and not torch.equal(plain, base.t())

"""Tests that need a card: captured graphs, streams, two cards, reduce-overhead, bitwise reproducibility.

Each test body also runs on the CPU, with small sizes and without the parts that need a card, so that it is
known to be correct beforehand.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from peft_models import in_fp64, lora
from simulated_streams import BUDGET, simulated
from skips import require
from torch import Tensor, nn

import peft_kernels as pk
import testing
from peft_kernels.triton_kernels import backend as triton

DTYPE = torch.bfloat16
ROWS = pytest.mark.parametrize("rows", [1, 5, 130], ids=lambda rows: f"m{rows}")

Results = dict[str, Tensor]


class Place:
    """A back end and the device of its tensors."""

    def __init__(self, backend: str) -> None:
        self.is_card = backend == "cuda" or (backend == "triton" and not triton.BACKEND.interpreted)
        self.device = torch.device("cuda", 0) if self.is_card else torch.device("cpu")
        # Few tiles for a card: sums are split over multiprocessors and combined with counters.
        self.sizes = (512, 1024, 256) if self.is_card else (64, 128, 64)

    def times(self, count: int) -> range:
        return range(count if self.is_card else 3)

    def wait(self) -> None:
        if self.is_card:
            torch.cuda.synchronize()

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream) if self.is_card else nullcontext()

    def stream(self) -> Any:
        """Returns a new stream, ordered after the current one."""
        if not self.is_card:
            return None
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        return stream

    def recorded(self, run: Callable[[], Results]) -> tuple[Results, Callable[[], Any]]:
        """Returns the results of `run`, and a function that recomputes them in place: on a card, by
        replaying a graph."""
        if not self.is_card:
            results = run()
            return results, lambda: [results[name].copy_(value) for name, value in run().items()]
        warm_up = self.stream()
        with torch.cuda.stream(warm_up):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(warm_up)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = run()
        return results, graph.replay


ON_CPU = [name for name in testing.backend_ids() if name != "reference" and not name.startswith("cpu-")]
"""Back ends that run the kernels of a card on the CPU."""


@pytest.fixture(params=sorted({"cpu", *ON_CPU, "cuda", "triton"}))
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    if Place(request.param).is_card and not torch.cuda.is_available():
        pytest.skip(f"{request.param}: torch.cuda.is_available() is False")
    require(request.param)
    with pk.use_backend(request.param):
        yield Place(request.param)


class Step:
    """Forward and backward of two patched NF4 layers with LoRA, with inputs that can be changed in place."""

    def __init__(self, sizes: tuple[int, int, int], device: torch.device, rows: int) -> None:
        into, hidden, out = sizes
        with pk.use_backend("reference"):
            torch.manual_seed(0)
            layers = {
                "q": nn.Linear(into, hidden),
                "silu": nn.SiLU(),
                "o": nn.Linear(hidden, out, bias=False),
            }
            model = nn.Sequential(OrderedDict(layers)).to(DTYPE)
            pk.quantize_model(model)
            # On the CPU, unpatched: the reference.
            self.stock = lora(model, r=16).base_model.model
            self.x = torch.zeros(rows, into, dtype=DTYPE, device=device, requires_grad=True)
            self.dy = torch.zeros(rows, out, dtype=DTYPE, device=device)
        self.model = copy.deepcopy(self.stock).to(device)
        self.report = pk.patch(self.model)
        assert len(self.report.fused) == 2, str(self.report)

    def data(self, seed: int) -> tuple[Tensor, Tensor]:
        x = testing.tensor(*self.x.shape, dtype=DTYPE, seed=seed)
        return x, testing.tensor(*self.dy.shape, dtype=DTYPE, seed=seed + 1)

    def set(self, seed: int) -> None:
        x, dy = self.data(seed)
        with torch.no_grad():
            self.x.copy_(x)
            self.dy.copy_(dy)

    def __call__(self, model: Callable[[Tensor], Tensor] | None = None) -> Results:
        return differentiated(self.model, self.x, self.dy, model)

    def check(self, got: Results, seed: int) -> None:
        """Checks by the numbers policy, against stock PEFT on the CPU and in fp64."""
        assert not any(layer.fallbacks for layer in self.report.layers), str(self.report)
        x, dy = self.data(seed)
        with pk.use_backend("reference"):
            plain = differentiated(self.stock, x.requires_grad_(), dy)
            exact = in_fp64(self.stock)
            truth = differentiated(exact, x.detach().double().requires_grad_(), dy.double())
        assert got.keys() == plain.keys() == truth.keys()
        for name, value in got.items():
            assert testing.relative_error(plain[name], truth[name]) < 0.05, name
            testing.assert_close(value.cpu(), plain[name], truth[name], name)


def differentiated(
    model: nn.Module, x: Tensor, dy: Tensor, call: Callable[[Tensor], Tensor] | None = None
) -> Results:
    """Returns the output, and the gradients of x and all adapters."""
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    y = (call or model)(x)
    gradients = torch.autograd.grad(y, [x, *adapters.values()], dy)
    return {"y": y.detach(), "dx": gradients[0], **dict(zip(adapters, gradients[1:], strict=True))}


def assert_same_bits(got: Results, expected: Results, what: str) -> None:
    for name, value in got.items():
        assert torch.equal(value, expected[name]), f"{what}: {name}"


@ROWS
def test_a_graph_uses_the_data_of_each_replay(place: Place, rows: int) -> None:
    step = Step(place.sizes, place.device, rows)
    step.set(1)
    results, replay = place.recorded(step)
    seen = []
    for seed in (10, 20):
        step.set(seed)
        replay()
        place.wait()
        seen.append({name: value.clone() for name, value in results.items()})
        step.check(seen[-1], seed)
    assert not torch.equal(seen[0]["y"], seen[1]["y"])
    assert_same_bits(step(), seen[1], "eagerly, after a graph")
    step.set(10)
    replay()
    place.wait()
    assert_same_bits(results, seen[0], "replayed after a call without a graph")


def test_a_graph_contains_an_optimizer_step(place: Place) -> None:
    """With the gradients and learning rate of each replay, and an advancing step count."""
    shapes = [(64, 1024), (5000,), (30,)]
    with pk.use_backend("reference"):
        parameters = [nn.Parameter(testing.tensor(*s, dtype=DTYPE).to(place.device)) for s in shapes]
        gradients = [torch.ones_like(p) for p in parameters]
    lr = torch.tensor(1e-3, device=place.device)

    def stepped(optimizer: Any, parameters: list[nn.Parameter]) -> Results:
        for p, grad in zip(parameters, gradients, strict=True):
            p.grad = grad
        optimizer.step()
        names = ("state1", "absmax2", "step")
        states = {f"{n}{i}": optimizer.state[p][n] for n in names for i, p in enumerate(parameters[:2])}
        return {**{f"p{i}": p.detach() for i, p in enumerate(parameters)}, **states}

    optimizer = pk.optim.AdamW8bit(parameters, lr=lr, max_grad_norm=1.0)
    results, replay = place.recorded(lambda: stepped(optimizer, parameters))
    for seed in range(3):
        twins, other = copy.deepcopy((parameters, optimizer))
        lr.fill_(1e-3 * (seed + 1))
        other.param_groups[0]["lr"] = 1e-3 * (seed + 1)
        for grad in gradients:
            grad.copy_(testing.tensor(*grad.shape, dtype=DTYPE, seed=seed))
        replay()
        place.wait()
        assert_same_bits(results, stepped(other, twins), f"replay {seed}")


@ROWS
def test_two_streams_do_not_interfere(place: Place, rows: int) -> None:
    """One model on two streams at once: each stream has its own scratch memory."""
    steps = [Step(place.sizes, place.device, rows) for _ in range(2)]
    steps[1].model = steps[0].model
    for step, seed in zip(steps, (1, 7), strict=True):
        step.set(seed)
    alone = [step() for step in steps]
    place.wait()
    streams = [place.stream() for _ in steps]
    together: list[list[Results]] = [[], []]
    for _ in place.times(20):
        for step, stream, results in zip(steps, streams, together, strict=True):
            with place.on(stream):
                results.append(step())
    place.wait()
    for results, expected, step, seed in zip(together, alone, steps, (1, 7), strict=True):
        step.check(expected, seed)
        for result in results:
            assert_same_bits(result, expected, "on its own stream")


@ROWS
def test_a_hundred_runs_give_the_same_bits(place: Place, rows: int) -> None:
    """Also under load: every other run, GEMMs of torch occupy part of the card."""
    step = Step(place.sizes, place.device, rows)
    step.set(3)
    expected = step()
    step.check(expected, 3)
    noise, size = place.stream(), 2048 if place.is_card else 16
    load = torch.randn(size, size, device=place.device)
    place.wait()
    for i in place.times(100):
        if i % 2:
            with place.on(noise):
                load @ load
        assert_same_bits(step(), expected, f"run {i}")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rows", [5, 130], ids=lambda rows: f"m{rows}")
def test_compiled_to_reduce_overhead(place: Place, rows: int) -> None:
    """Inductor records its graphs in the second call and replays them from the third on."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    options = {"mode": "reduce-overhead"} if place.is_card else {"backend": "aot_eager"}
    step = Step(place.sizes, place.device, rows)
    compiled = torch.compile(step.model, fullgraph=True, **options)
    for seed in (1, 11, 21, 31):
        torch.compiler.cudagraph_mark_step_begin()
        step.set(seed)
        got = {name: value.clone() for name, value in step(compiled).items()}
        place.wait()
        step.check(got, seed)
    assert counters["inductor"]["cudagraph_skips"] == 0
    torch.compiler.reset()


@ROWS
def test_tensors_on_a_card_other_than_the_current_one(place: Place, rows: int) -> None:
    if place.is_card and torch.cuda.device_count() < 2:
        pytest.skip("one card is here, two are needed")
    devices = [place.device, torch.device("cuda", 1) if place.is_card else place.device]
    for device in (devices[1], devices[0], devices[1]):
        step = Step(place.sizes, device, rows)
        step.set(5)
        results = step()
        assert all(value.device == device for value in results.values())
        step.check(results, 5)
    if place.is_card:
        assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("rounding, most", [("nearest", 0.0), ("stochastic", 0.5), ("kahan", 0.0)])
def test_paged_states_give_the_same_bits_within_a_budget(place: Place, rounding: str, most: float) -> None:
    """While another stream is busy. On a card states are pinned, and a step stays within its memory budget,
    up to torch's rounding."""
    budget = 64 << 20 if place.is_card else BUDGET
    sizes = [(4096, 4097), (300,), (8192, 2048)] if place.is_card else [(40, 97), (7,), (1500,)]
    noise, load = place.stream(), torch.randn(2048 if place.is_card else 16, 64, device=place.device)
    with nullcontext() if place.is_card else simulated() as streams:
        runs = []
        for name, paging in (("AdamW8bit", {}), ("PagedAdamW8bit", {"page_budget": budget})):
            params = [nn.Parameter(testing.tensor(*s, dtype=DTYPE).to(place.device)) for s in sizes]
            options = {"rounding": rounding, "max_grad_norm": most or None, "min_8bit_size": 256}
            optimizer = getattr(pk.optim, name)(params, **options, **paging)
            for step in place.times(5):
                for i, p in enumerate(params):
                    p.grad = testing.tensor(*p.shape, dtype=DTYPE, seed=10 * step + i).to(place.device)
                with place.on(noise):
                    load @ load.t()
                if place.is_card and step == 1:
                    place.wait()
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                optimizer.step()
                if place.is_card and step == 1 and paging:
                    assert torch.cuda.max_memory_allocated() - before <= budget + (4 << 20)
            runs.append((params, optimizer))
        (want, stock), (got, paged) = runs
        states, others = paged.state_dict()["state"], stock.state_dict()["state"]
        place.wait()
        if streams is not None:
            streams.drain()
        for i, (p, q) in enumerate(zip(got, want, strict=True)):
            assert torch.equal(p, q), sizes[i]
            for key, value in others[i].items():
                there = torch.as_tensor(states[i][key])
                assert torch.equal(there.cpu(), torch.as_tensor(value).cpu()), (sizes[i], key)
        if place.is_card:
            assert states[2]["state1"].is_pinned() and states[1]["state1"].is_cuda
            with (
                pytest.raises(RuntimeError, match="cannot be captured"),
                torch.cuda.graph(torch.cuda.CUDAGraph()),
            ):
                paged.step()

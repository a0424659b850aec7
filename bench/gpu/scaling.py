"""QLoRA on 8 to 64 cards under FSDP2, reckoned and simulated, not measured: `python -m bench.gpu.scaling`.

For each model, number of cards and network: the bytes that a card receives in a step, the memory that it
takes, how much of the communication hides behind computation, and what a step takes beside computation
alone. Three ways to keep the base: our NF4 shards, bitsandbytes' (FSDP1 with `quant_storage`), and bf16.

What is assumed stands in `Card`, `Network` and `WAYS`, and is printed. tests/bench/test_scaling.py holds the
bytes to those that processes really exchange.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from peft_kernels.cli import memory
from peft_kernels.cli.sizes import Block, Linear, Model, Run

FP32, BF16 = 4, 2


@dataclass(frozen=True)
class Card:
    """What computes. `utilisation`: the share of the peak that training reaches, dequantising included."""

    name: str
    flops: float
    utilisation: float
    bytes: float


@dataclass(frozen=True)
class Network:
    """What one card receives in a collective, bytes a second, inside a node and across nodes.

    Across: rings that group the cards of a node cross its network cards once, so that all of these serve
    every card. `latency`: seconds for each step of the ring.
    """

    name: str
    card: Card
    node: int
    inside: float
    across: float
    latency: float

    def seconds(self, size: float, world: int) -> float:
        """An all-gather or a reduce-scatter of `size` bytes in all, by a ring."""
        speed = self.inside if world <= self.node else min(self.inside, self.across)
        return received(size, world) / speed + (world - 1) * self.latency


# 80% of what the data sheets name: NVLink 4 450 GB/s each way, 8 adapters of 400 Gb/s a node; PCIe 4 x16 by
# way of the host, one adapter of 100 Gb/s a node.
H100 = Card("H100", 989e12, 0.45, 80e9)
L40S = Card("L40S", 362e12, 0.45, 48e9)
NETWORKS = (
    Network("NVLink, 8 x 400 Gb/s", H100, 8, 0.8 * 450e9, 0.8 * 400e9, 5e-6),
    Network("PCIe 4, 100 Gb/s", L40S, 8, 0.8 * 25e9, 0.8 * 12.5e9, 10e-6),
)


@dataclass(frozen=True)
class Way:
    """How the base is kept."""

    name: str
    packed: bool
    scales_travel: bool = True
    adapter_itemsize: int = FP32

    def base_bytes(self, linear: Linear, run: Run) -> tuple[int, int]:
        """Of a linear layer: sharded and gathered; kept whole by each card."""
        if not self.packed or not linear.quantised:
            return linear.numel * BF16, 0
        every, codes = memory.nf4_bytes(linear.numel, run), (linear.numel + 1) // 2
        # Ours keeps the scales of the scales whole: a number for 16,384 weights.
        blocks = -(-linear.numel // run.blocksize)
        return (codes + blocks, every - codes - blocks) if self.scales_travel else (codes, every - codes)


OURS, BITSANDBYTES, DENSE = "ours, NF4", "bitsandbytes, NF4", "bf16"
WAYS = (
    Way(OURS, packed=True),
    Way(BITSANDBYTES, packed=True, scales_travel=False, adapter_itemsize=BF16),
    Way(DENSE, packed=False),
)


def received(size: float, world: int) -> float:
    """What a card gets from the others when all come to hold `size` bytes."""
    return size * (world - 1) / world


def llama(name: str, hidden: int, intermediate: int, kv: int, layers: int, vocabulary: int) -> Model:
    """By its published sizes; heads of 128. Linear layers of one decoder layer, and the head."""
    shapes = {
        "q_proj": (hidden, hidden),
        "k_proj": (kv, hidden),
        "v_proj": (kv, hidden),
        "o_proj": (hidden, hidden),
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
    }
    one = [Linear(name, *shape, quantised=True, adapted=True) for name, shape in shapes.items()]
    parameters = [(vocabulary, hidden), (vocabulary, hidden), (hidden,)]
    parameters += layers * [*shapes.values(), (hidden,), (hidden,)]
    block = Block(hidden, intermediate, hidden, kv, hidden // 128, kv // 128, False, frozenset(shapes))
    linears = (*(layers * one), Linear("lm_head", vocabulary, hidden))
    return Model(linears, tuple(parameters), BF16, vocabulary, layers, block)


MODELS = {
    "8B": llama("8B", 4096, 14336, 1024, 32, 128256),
    "70B": llama("70B", 8192, 28672, 1024, 80, 128256),
}


class Unit(NamedTuple):
    """What FSDP gathers at once: a decoder layer, or the root."""

    gathered: int
    """Bytes, of all cards together."""
    whole: int
    """Bytes that each card keeps."""
    reduced: int
    """Of gradients."""


def layer_unit(model: Model, way: Way, run: Run) -> Unit:
    assert model.block is not None
    linears = [one for one in model.linears if one.quantised][: len(model.block.adapted)]
    base = [way.base_bytes(linear, run) for linear in linears]
    numbers = sum(run.rank * (one.in_features + one.out_features) for one in linears)
    norms = 2 * model.block.hidden * BF16
    gathered = sum(sharded for sharded, _ in base) + norms + numbers * way.adapter_itemsize
    return Unit(gathered, sum(whole for _, whole in base), numbers * way.adapter_itemsize)


def root_unit(model: Model) -> Unit:
    """Embedding, head and last norm: gathered at the start of a step, kept until its end."""
    assert model.block is not None
    return Unit((2 * model.vocabulary * model.block.hidden + model.block.hidden) * BF16, 0, 0)


def layer_flops(model: Model, run: Run) -> float:
    """Of a forward: the products of the base and of adapters, and causal attention."""
    assert model.block is not None
    linears = [one for one in model.linears if one.quantised][: len(model.block.adapted)]
    products = sum(2 * one.numel + 2 * run.rank * (one.in_features + one.out_features) for one in linears)
    return run.tokens * (products + 2 * run.seq * model.block.q)


def head_flops(model: Model, run: Run) -> float:
    assert model.block is not None
    return 2.0 * run.tokens * model.vocabulary * model.block.hidden


@dataclass(frozen=True)
class Outcome:
    """Of one step on one card."""

    model: str
    network: str
    way: str
    cards: int
    shards: int
    """Less than the cards: HSDP, whose replicas average gradients."""
    received: float
    memory: float
    seconds: float
    compute: float

    @property
    def fits(self) -> bool:
        return self.memory <= card_of(self.network).bytes

    @property
    def slowdown(self) -> float:
        return self.seconds / self.compute


def card_of(network: str) -> Card:
    return next(one.card for one in NETWORKS if one.name == network)


def step(name: str, network: Network, way: Way, cards: int, run: Run, shards: int = 0) -> Outcome:
    """With checkpointing of every layer, gathered again for its backward, one layer ahead."""
    model, shards = MODELS[name], shards or cards
    layer, root = layer_unit(model, way, run), root_unit(model)
    speed = network.card.flops * network.card.utilisation
    forward = layer_flops(model, run) / speed
    backward = 2 * forward + _weight_gradients(model, run) / speed  # computed again, and dX
    head = 2 * head_flops(model, run) / speed  # frozen: forward and dX
    gather = network.seconds(layer.gathered, shards)
    reduce = network.seconds(layer.reduced, shards)
    replicas = cards // shards
    averaged = layer.reduced / shards  # of one shard, by all its replicas: a reduce-scatter and an all-gather
    if replicas > 1:
        reduce += 2 * (received(averaged, replicas) / network.across + (replicas - 1) * network.latency)
    work = model.layers * [(gather, forward, 0.0)]
    end = pipeline(network.seconds(root.gathered, shards), work) + head
    end += pipeline(0.0, model.layers * [(gather, backward, reduce)])
    compute = model.layers * (forward + backward) + head
    exchanged = 2 * model.layers * layer.gathered + root.gathered + model.layers * layer.reduced
    exchanged_by_replicas = 2 * model.layers * received(averaged, replicas)
    return Outcome(
        name,
        network.name,
        way.name,
        cards,
        shards,
        received(exchanged, shards) + exchanged_by_replicas,
        card_memory(model, way, run, shards),
        end,
        compute,
    )


def pipeline(start: float, work: Sequence[tuple[float, float, float]]) -> float:
    """When the last of (gather, compute, reduce) ends. One layer is gathered while another computes, which is
    all that FSDP2 holds at a time; reductions go in turn with the gathers."""
    network = compute = begun = start
    last = start
    for gather, seconds, reduce in work:
        network = max(network, begun) + gather  # not before the layer before it has begun
        begun = max(network, compute)
        compute = begun + seconds
        if reduce:
            last = max(network, compute) + reduce  # its gradients are there when it has ended
            network += reduce
    return max(compute, last)


def card_memory(model: Model, way: Way, run: Run, shards: int) -> float:
    """Shards of all; the root and two layers gathered; what is kept whole; activations and logits."""
    layer, root = layer_unit(model, way, run), root_unit(model)
    numbers = sum(math.prod(shape) for shape in memory.trained(model, run))
    state = numbers * (way.adapter_itemsize + 2 * FP32)  # gradient, and AdamW's moments
    sharded = model.layers * layer.gathered + root.gathered + state
    loss = memory.logits(model, run) + memory.loss_backward(model, run)
    saved = memory.checkpoints(model, run) + max(loss, memory.layer(model, run))
    gathered = root.gathered + 2 * layer.gathered if shards > 1 else 0
    return sharded / shards + model.layers * layer.whole + gathered + saved


def _weight_gradients(model: Model, run: Run) -> float:
    """Of the adapters, beside dX."""
    assert model.block is not None
    linears = [one for one in model.linears if one.quantised][: len(model.block.adapted)]
    return float(run.tokens * sum(2 * run.rank * (one.in_features + one.out_features) for one in linears))


def outcomes(run: Run) -> Iterator[Outcome]:
    for network in NETWORKS:
        for name in MODELS:
            for cards in (8, 16, 32, 64):
                for way in WAYS:
                    yield step(name, network, way, cards, run)
                    if cards > network.node and way.name == OURS:
                        yield step(name, network, way, cards, run, network.node)


HEADINGS = ["cards", *(f"{what}: {way.name}" for what in ("GB a step", "GB", "time") for way in WAYS)]
HEADINGS.append(f"time: {OURS}, replicas")


def tables(found: Sequence[Outcome]) -> Iterator[tuple[str, list[list[str]]]]:
    """For each model and network: a row for each number of cards. What does not fit is in brackets."""
    for name in MODELS:
        for network in NETWORKS:
            here = [one for one in found if (one.model, one.network) == (name, network.name)]
            rows = []
            for cards in sorted({one.cards for one in here}):
                whole = {one.way: one for one in here if one.cards == cards == one.shards}
                replicas = [one for one in here if one.cards == cards > one.shards]
                forms = (
                    lambda one: f"{one.received / 1e9:.1f}",
                    lambda one: f"{one.memory / 1e9:.1f}" if one.fits else f"({one.memory / 1e9:.1f})",
                    lambda one: f"{one.slowdown:.2f}",
                )
                row = [str(cards), *(form(whole[way.name]) for form in forms for way in WAYS)]
                rows.append([*row, f"{replicas[0].slowdown:.2f}" if replicas else "-"])
            yield f"{name} on {network.card.name}, {network.name}", rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="of the one sequence of a card (2048)")
    parser.add_argument("--rank", type=int, default=16, help="of LoRA on all linear layers (16)")
    parser.add_argument("--json", action="store_true", help="one object a line")
    options = parser.parse_args(arguments)
    if options.tokens < 1 or options.rank < 1:
        parser.error("--tokens and --rank take positive numbers")
    found = list(outcomes(Run("qlora", 1, options.tokens, options.rank)))
    if options.json:
        for one in found:
            print(json.dumps(_plain(one)))
        return 0
    for network in NETWORKS:
        card = network.card
        print(
            f"assumed: {card.name} at {card.utilisation:.0%} of {card.flops / 1e12:.0f} TFLOP/s, nodes of "
            f"{network.node}, {network.inside / 1e9:.0f} GB/s inside and {network.across / 1e9:.0f} across"
        )
    for title, table in tables(found):
        print(f"\n{title}\n")
        for row in (HEADINGS, ["---"] * len(HEADINGS), *table):
            print(f"| {' | '.join(row)} |")
    return 0


def _plain(one: Outcome) -> dict[str, Any]:
    return asdict(one) | {"fits": one.fits, "slowdown": one.slowdown}


if __name__ == "__main__":
    sys.exit(main())

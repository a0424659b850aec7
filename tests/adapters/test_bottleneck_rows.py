"""pk.adapters.rows: a separate adapter for each row of a batch."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from bottleneck_models import FAMILIES, output, stir
from rounding import ONE_MODEL, ONE_STEP
from torch import Tensor

import peft_kernels as pk
import testing
from peft_kernels.adapters import AdapterConfig

adapters = pk.adapters
CONFIGS = {
    "a": AdapterConfig.houlsby(),
    "b": AdapterConfig.beside(attention=True, reduction=8),
    "c": AdapterConfig.pfeiffer(norm=True, bias=False, activation="silu", scaling=0.5),
}
NAMES: list[Any] = ["a", "b", None, "a", ["c", "b"], ["b", "a"]]
pytestmark = pytest.mark.usefixtures("one_thread")


def make(family: str = "llama", base: str = "dense", **configs: AdapterConfig) -> Any:
    model = FAMILIES[family].make(base)
    for seed, (name, config) in enumerate((CONFIGS | configs).items()):
        adapters.add(model, name, config)
        stir(model, name, 100 * seed)
    return model


def batch(rows: int = len(NAMES), length: int = 7, seed: int = 1) -> Tensor:
    return torch.randint(3, 100, (rows, length), generator=torch.Generator().manual_seed(seed))


def each_alone(model: Any, inputs: dict[str, Tensor], names: Sequence[Any]) -> list[Tensor]:
    """Row i of the output when all rows use the adapters of row i."""
    found = []
    for i, name in enumerate(names):
        adapters.set_active(model, name)
        found.append(output(model, inputs)[i])
    adapters.set_active(model, None)
    return found


@pytest.mark.parametrize("case", ["llama-dense", "llama-nf4", "bert-dense", "t5-dense"])
def test_rows_equal_single_adapters(case: str) -> None:
    """Bit for bit, whatever the other rows are; outside the context nothing changes."""
    family, base = case.split("-")
    after_norm = {"c": AdapterConfig.pfeiffer(after_norm=True, norm=True)} if family == "bert" else {}
    model = make(family, base, **after_norm)
    inputs = {"input_ids": batch()}
    if family == "t5":
        inputs["decoder_input_ids"] = batch(length=3, seed=2)
    want = each_alone(model, inputs, NAMES)
    assert len({tuple(row.flatten().tolist()) for row in want}) == len(NAMES)
    mixed = adapters.rows(model, NAMES)
    adapters.set_active(model, "c")
    active = output(model, inputs)
    for _ in range(2):
        with mixed:
            with adapters.rows(model, [None]):
                none = output(model, inputs)
            got = output(model, inputs)
        assert all(map(torch.equal, got, want))
        assert torch.equal(output(model, inputs), active)
    adapters.set_active(model, None)
    assert torch.equal(none, output(model, inputs))
    inputs["input_ids"][0] = inputs["input_ids"][1]
    with adapters.rows(model, ["c", *NAMES[1:]]):
        changed = output(model, inputs)
    assert not torch.equal(changed[0], got[0]) and all(map(torch.equal, changed[1:], got[1:]))


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generate(family: str, beams: int) -> None:
    """Beams are adjacent rows; encoders have none."""
    model, names = make(family), ["a", None, ["c", "b"]]
    prompts = batch(len(names))
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": beams}

    def logits(prompts: Tensor) -> Tensor:
        found = model.generate(prompts, **options, return_dict_in_generate=True, output_logits=True)
        return torch.stack(found.logits).unflatten(1, (-1, beams))  # (tokens, rows, beams, vocabulary)

    with adapters.rows(model, names):
        got = logits(prompts)
    without = logits(prompts)
    for i, name in enumerate(names):
        adapters.set_active(model, name)
        want = logits(prompts[i : i + 1])[:, 0]
        assert testing.relative_error(got[:, i], want) < ONE_MODEL
        assert (testing.relative_error(without[:, i], want) < ONE_MODEL) == (name is None)


def mixed_loss(model: Any, names: Sequence[Any], ids: Tensor) -> Tensor:
    with adapters.rows(model, names):
        logits = model(input_ids=ids)[0]
    # Weighted by row, so that gradients of different rows differ.
    return (logits.square().flatten(1).mean(1) * torch.arange(1.0, 1.0 + len(ids))).sum()


def gradients(model: Any) -> dict[str, Tensor]:
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_training(family: str, checkpointing: bool | None) -> None:
    """Each adapter gets the gradient of its rows, even if backward runs while another batch is served. Two
    batches of different adapters await their backward at once."""
    model = make(family, **({"c": AdapterConfig.pfeiffer(after_norm=True)} if family == "bert" else {}))
    adapters.train(model, list(CONFIGS))
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    first, second = (NAMES, batch()), (["c", "a"], batch(4, 5, seed=3))
    total: dict[str, Tensor] = {}
    for names, ids in (first, second):
        for i in range(len(ids)):
            alone = names[i * len(names) // len(ids)]
            adapters.set_active(model, alone)
            loss = model(input_ids=ids[i : i + 1])[0].square().mean() * (i + 1.0)
            if not loss.requires_grad:
                assert alone is None
                continue
            loss.backward()
            for name, value in gradients(model).items():
                total[name] = total.get(name, 0) + value
    adapters.set_active(model, None)
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    losses = [mixed_loss(model, *first), mixed_loss(model, *second)]
    with adapters.rows(model, ["b"]):
        sum(losses).backward()
    got = gradients(model)
    assert got.keys() == total.keys() and {n.split(".adapters.")[1][0] for n in got if "adapters" in n} == {
        *"abc"
    }
    for name, value in got.items():
        assert testing.relative_error(value, total[name]) < ONE_STEP, name


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_more_and_less_than_a_layer(reentrant: bool) -> None:
    """Also if `rows` is entered in the recomputed part, and if another batch without rows awaits backward."""
    from torch.utils.checkpoint import checkpoint

    model, ids = make(), batch()
    adapters.train(model, list(CONFIGS))
    adapters.set_active(model, "c")
    embedded = model.get_input_embeddings()(ids).requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return model(inputs_embeds=x)[0].square().mean()

    def with_rows(x: Tensor) -> Tensor:
        with adapters.rows(model, NAMES):
            return loss(x)

    (with_rows(embedded) + 2 * loss(embedded)).backward()
    want = gradients(model)

    def checkpointed(function: Any) -> Any:
        return lambda x: checkpoint(function, x, use_reentrant=reentrant)

    inside = [layer.mlp for layer in model.model.layers]
    for case in ("outside", "within", "parts"):
        if case == "outside":
            with adapters.rows(model, NAMES):
                first = checkpointed(loss)(embedded)
        elif case == "within":
            first = checkpointed(with_rows)(embedded)
        else:
            for module in inside:
                module.forward = functools.partial(checkpoint, module.forward, use_reentrant=reentrant)
            first = with_rows(embedded)
        (first + 2 * checkpointed(loss)(embedded)).backward()
        got = gradients(model)
        assert got.keys() == want.keys()
        for name, value in got.items():
            assert testing.relative_error(value, want[name]) < ONE_MODEL, (case, name)


def test_changes_in_place_are_seen() -> None:
    model = make()
    adapters.train(model, list(CONFIGS))
    parameter = adapters.manage.sites(model)[0].adapters["a"].up
    loss = mixed_loss(model, NAMES, batch())
    with torch.no_grad():
        parameter.add_(1)
    with pytest.raises(RuntimeError, match=r"shape \(64, 4\) that backward needs was changed in place"):
        loss.backward()


def test_threads() -> None:
    """Each thread has its own rows, or none, with parallel adapters that keep a sublayer's input."""
    model, inputs = make(), {"input_ids": batch()}
    orders = [NAMES, NAMES[::-1], None, ["b"], ["a", "c"]]
    want = []
    for names in orders:
        with adapters.rows(model, names or [None]):
            want.append(output(model, inputs))
    start, wrong = threading.Barrier(len(orders)), []

    def serve(i: int) -> None:
        start.wait()
        for _ in range(6):
            if orders[i] is None:
                got = output(model, inputs)
            else:
                with adapters.rows(model, orders[i]):
                    got = output(model, inputs)
            if not torch.equal(got, want[i]):
                wrong.append(i)

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(len(orders))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not any(site.entered or site._links.inputs for site in adapters.manage.sites(model))


def test_compiled() -> None:
    """Never the rows of another call; torch reports what cannot be one graph."""
    model, inputs = make(), {"input_ids": batch()}
    del model.model.layers[1]  # one layer is enough to compile
    want = each_alone(model, inputs, NAMES)
    adapters.set_active(model, "b")
    active = output(model, inputs)
    whole = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(output(whole, inputs), active)
    with adapters.rows(model, NAMES), pytest.raises(Exception, match="should not be traced"):
        output(whole, inputs)
    compiled = torch.compile(model, backend="eager")
    with adapters.rows(model, NAMES):
        assert all(map(torch.equal, output(compiled, inputs), want))
    assert torch.equal(output(compiled, inputs), active)


def test_adding_and_deleting_adapters() -> None:
    """A kept context follows replaced adapters; copies are outside it."""
    model, inputs = make(), {"input_ids": batch(2)}
    mixed = adapters.rows(model, ["a", None])
    with mixed:
        before = output(model, inputs)
        copied = copy.deepcopy(model)
        with pytest.raises(ValueError, match="name: expected an adapter that no `rows` serves now, got 'a'"):
            adapters.delete(model, "a")
        adapters.delete(copied, "a")
        adapters.delete(model, "c")
        adapters.add(model, "new")
        assert torch.equal(output(model, inputs), before)
    adapters.delete(model, "a")
    with pytest.raises(ValueError, match="name: expected one of b, new, got 'a'"), mixed:
        pass
    adapters.add(model, "a")
    stir(model, "a", 900)
    with mixed:
        after = output(model, inputs)
    assert torch.equal(after[1], before[1]) and not torch.equal(after[0], before[0])


def test_refused() -> None:
    model = make()
    for names, message in (
        ("a", "names: expected a sequence, an entry for each row of the batch, got 'a'"),
        ([], r"names: expected a sequence, .* got \[\]"),
        (["a", "d"], "name: expected one of a, b, c, got 'd'"),
        ([["a", "a"]], "name: expected different adapters, got a, a"),
        ([3], "name: expected an adapter or several, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            adapters.rows(model, names)
    with (
        adapters.rows(model, ["a", None, "b"]),
        pytest.raises(
            ValueError, match=r"for as many rows each, got 3 for 2 rows at layers\.0\.self_attn\.o_proj"
        ),
    ):
        output(model, {"input_ids": batch(2)})
    assert torch.isfinite(output(model, {"input_ids": batch(2)})).all()

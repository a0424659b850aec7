"""Patched layers under torch.compile, without graph breaks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from flow_checks import assert_near
from models import inputs
from peft_models import run
from training_models import BASES, assert_no_fallback, llama, net, patched_copy

import testing

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def check_compiled_layer(base: str, backend: str) -> None:
    stock = net(base).base_model.model.q
    layer, report = patched_copy(stock)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    got = run(layer, inputs(5), compiled)
    assert_near(got, run(layer, inputs(5)))
    assert_near(got, run(stock, inputs(5)))
    assert_no_fallback(report)


@pytest.mark.usefixtures("_fresh_compiler")
@BASES
def test_compiled_layer(base: str) -> None:
    check_compiled_layer(base, "aot_eager")


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_layer_with_inductor() -> None:
    check_compiled_layer("nf4", "inductor")


@pytest.mark.usefixtures("_fresh_compiler")
@BASES
def test_compiled_decoder_block(base: str) -> None:
    stock = llama(base)
    model, report = patched_copy(stock)
    hidden = testing.tensor(2, 5, 64)
    position_embeddings = model.base_model.model.model.rotary_emb(hidden, torch.arange(5).view(1, 5))

    block, plain = (each.base_model.model.model.layers[0] for each in (model, stock))
    options = {"position_embeddings": position_embeddings}
    got = run(block, hidden, torch.compile(block, fullgraph=True, backend="aot_eager"), **options)
    assert len(got) == 2 + 14
    assert_near(got, run(block, hidden, **options))
    assert_near(got, run(plain, hidden, **options))
    assert_no_fallback(report)

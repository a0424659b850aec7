"""Gradients of every differentiable op under both kinds of activation checkpointing, saved-tensor hooks,
repeated backward, and backward in two threads."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from op_samples import CASES, NAMESPACES, samples
from skips import require
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

import testing
from peft_kernels.core import registry
from peft_kernels.triton_kernels import backend as triton

DIFFERENTIABLE = [(op, sample) for op, sample in CASES if registry.OPS[op].differentiable]


def test_every_differentiable_op_is_covered() -> None:
    assert {op for op, _ in DIFFERENTIABLE} == {
        name for name, op in registry.OPS.items() if op.differentiable
    }


@pytest.fixture(params=[name for name in NAMESPACES if name != "public"])
def namespace(request: pytest.FixtureRequest) -> str:
    require(request.param)
    return NAMESPACES[request.param]


each_case = pytest.mark.parametrize("op,sample", DIFFERENTIABLE, ids=["-".join(c) for c in DIFFERENTIABLE])


class Case:
    """A call of an op as a function of its leaf tensors."""

    def __init__(self, op: str, sample: str, namespace: str = "peft_kernels") -> None:
        self._call = registry.eager(getattr(getattr(torch.ops, namespace), op).default)
        self._args, self._tree = tree_flatten(samples(op)[sample])
        self._trained = [i for i, t in enumerate(self._args) if isinstance(t, Tensor) and t.requires_grad]
        self.leaves = [self._args[i].detach().requires_grad_() for i in self._trained]

    def __call__(self, *leaves: Tensor) -> tuple[Tensor, ...]:
        args = list(self._args)
        for i, leaf in zip(self._trained, leaves, strict=True):
            args[i] = leaf
        outputs = tree_flatten(self._call(*tree_unflatten(args, self._tree)))[0]
        return tuple(t for t in outputs if t.requires_grad or not torch.is_grad_enabled())

    def gradients(self, outputs: Sequence[Tensor], retain_graph: bool = False) -> list[Tensor | None]:
        outputs = [t for t in outputs if t.requires_grad]
        assert outputs
        dy = [testing.tensor(*t.shape, dtype=t.dtype, seed=60 + j) for j, t in enumerate(outputs)]
        return list(
            torch.autograd.grad(outputs, self.leaves, dy, retain_graph=retain_graph, allow_unused=True)
        )


def assert_same(got: Sequence[Tensor | None], want: Sequence[Tensor | None]) -> None:
    assert any(t is not None for t in want)
    for g, w in zip(got, want, strict=True):
        assert (g is None) == (w is None)
        assert g is None or w is None or torch.equal(g, w)


class OneUnpack:
    """Saved-tensor hooks that allow one unpack per tensor."""

    def __init__(self) -> None:
        self.unpacked = 0

    def pack(self, tensor: Tensor) -> list[Tensor]:
        return [tensor.clone()]

    def unpack(self, box: list[Tensor]) -> Tensor:
        assert box, "a saved tensor was unpacked a second time"
        self.unpacked += 1
        return box.pop()


@each_case
@pytest.mark.parametrize("create_graph", [False, True], ids=["", "create_graph"])
def test_saved_tensors_are_unpacked_once(op: str, sample: str, create_graph: bool) -> None:
    case, hooks = Case(op, sample), OneUnpack()
    want = case.gradients(case(*case.leaves))
    with torch.autograd.graph.saved_tensors_hooks(hooks.pack, hooks.unpack):
        outputs = case(*case.leaves)
    outputs = tuple(t for t in outputs if t.requires_grad)
    dy = [testing.tensor(*t.shape, dtype=t.dtype, seed=60 + j) for j, t in enumerate(outputs)]
    got = torch.autograd.grad(outputs, case.leaves, dy, create_graph=create_graph, allow_unused=True)
    assert_same(got, want)
    assert hooks.unpacked or op in ("column_sums", "cast", "add_residual")  # they save nothing


@each_case
def test_saved_on_the_cpu(op: str, sample: str) -> None:
    case = Case(op, sample)
    want = case.gradients(case(*case.leaves))
    with torch.autograd.graph.save_on_cpu():
        outputs = case(*case.leaves)
    assert_same(case.gradients(outputs), want)


@each_case
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing(op: str, sample: str, use_reentrant: bool) -> None:
    case = Case(op, sample)
    first = case(*case.leaves)
    want = case.gradients(first)
    # The reentrant kind would make every output differentiable, so only the differentiable ones are returned.
    outputs = checkpoint(
        lambda *leaves: case(*leaves)[: len(first)], *case.leaves, use_reentrant=use_reentrant
    )
    dy = [testing.tensor(*t.shape, dtype=t.dtype, seed=60 + j) for j, t in enumerate(outputs)]
    torch.autograd.backward(outputs, dy)  # reentrant checkpointing refuses torch.autograd.grad
    assert_same([leaf.grad for leaf in case.leaves], want)


@each_case
def test_backward_twice(namespace: str, op: str, sample: str) -> None:
    case = Case(op, sample, namespace)
    outputs = case(*case.leaves)
    first = case.gradients(outputs, retain_graph=True)
    kept = [None if t is None else t.clone() for t in first]
    assert_same(case.gradients(outputs), kept)
    assert_same(first, kept)


def in_two_threads(run: Callable[[], Any]) -> list[Any]:
    """Results of `run` in two threads, with the shortest switch interval that Python allows."""
    if triton.BACKEND.interpreted:
        pytest.skip(
            "Triton's interpreter puts its functions into triton.language while a kernel runs: one at a time"
        )
    start, before, threads = Barrier(2), sys.getswitchinterval(), torch.get_num_threads()

    def one(_: int) -> Any:
        torch.set_num_threads(threads)  # a new thread uses all cores, which reorders torch's sums
        start.wait()
        return run()

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(one, range(2)))
    finally:
        sys.setswitchinterval(before)


@each_case
def test_two_threads_share_a_graph(namespace: str, op: str, sample: str) -> None:
    case = Case(op, sample, namespace)
    outputs = case(*case.leaves)
    want = case.gradients(outputs, retain_graph=True)
    repeats = 5
    for results in in_two_threads(
        lambda: [case.gradients(outputs, retain_graph=True) for _ in range(repeats)]
    ):
        for got in results:
            assert_same(got, want)


@each_case
def test_two_threads_with_separate_graphs(namespace: str, op: str, sample: str) -> None:
    case = Case(op, sample, namespace)
    want = case.gradients(case(*case.leaves))
    for got in in_two_threads(lambda: case.gradients(case(*case.leaves))):
        assert_same(got, want)

"""An optimizer step in Triton: tables follow the tensors, and addresses are 64 bits wide."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from skips import on_triton

pytest.importorskip("triton", reason="Triton is not installed")

from numbers_policy import at_odd_address
from op_samples import adamw_args
from test_adamw import ABSMAX1, GRADS, PARAMS, STATE1, assert_same, compare, copied, moment_args, run
from test_large import free_gib

import testing
from peft_kernels.core import dispatch
from peft_kernels.triton_kernels.core import launch, tables
from peft_kernels.triton_kernels.optim import adamw, adamw_kernels

pytestmark = on_triton
NEEDED_GIB = 2


def step(args: tuple[Any, ...]) -> None:
    with testing.running_on("triton"):
        run(args, "triton")


@pytest.mark.parametrize("kind", ["adamw", "lion"])
def test_new_tensors_are_found(kind: str) -> None:
    """New tensors of the same sizes and dtypes are stepped instead of those of the previous step."""
    kept = []
    for seed in range(2):
        got = adamw_args(kind, [(3, 100), (700,)], [torch.float32] * 2, [8, 32], seed=10 * seed)
        kept.append(got)  # keeps its memory from being reused
        compare(got, step)
        got[GRADS][:] = [g.clone() * 2 for g in got[GRADS]]
        compare(got, step)
        got[PARAMS][1] = got[PARAMS][1].clone()
        compare(got, step)


@pytest.mark.parametrize("option", ["", "clipped"])
def test_unaligned_memory(option: str) -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.float32]
    got = adamw_args("adamw", [(1300,)] * 4, dtypes, [8, 8, 32, 8], option)
    for i, which in enumerate((PARAMS, GRADS, STATE1, ABSMAX1)):
        got[which][i] = at_odd_address(got[which][i])
    compare(got, step)


def test_empty_parameters_are_skipped() -> None:
    shapes: list[tuple[int, ...]] = [(0,), (5,), (0, 3), (300,), (0,)]
    compare(adamw_args("adamw", shapes, [torch.bfloat16] * 5, [8] * 5, "stochastic"), step)
    compare(adamw_args("adamw", [(0,)], [torch.bfloat16], [8]), step)


def test_stochastic_rounding_with_compensation() -> None:
    got = adamw_args("adamw", [(700,), (5,)], [torch.bfloat16] * 2, [8, 32], "compensation")
    # Bit-equal, as the tolerance used otherwise would accept either neighbour.
    compare((*got[:-2], torch.tensor(-7), None), step, True)


def test_partial_steps_with_a_common_factor() -> None:
    """Bit-equal, although each program sums the gradients itself."""
    got = adamw_args("adamw", [(3, 700), (5,), (0,), (5000,)], [torch.float32] * 4, [8, 32, 8, 8], "clipped")
    got = (*got[:15], torch.tensor(8.0), *got[16:])
    want = copied(got)
    with testing.running_on("triton"):
        run(want, "triton")
        factor = dispatch.call("clip_factor", got[GRADS], got[15], got[17], like=got[GRADS][0])
        for some in (slice(0, 2), slice(2, 4)):
            lists = [tensors[some] for tensors in got[:7]]
            step, group, *numbers = got[7:-1]
            run((*lists, step[some], group[some], *numbers, factor), "triton")
    assert_same(got, want, True)


@pytest.mark.parametrize("most", [2.0**-127, 1e-30, 1e15, 2.0**127])
def test_absmax_of_any_size_has_an_exact_reciprocal(most: float) -> None:
    compare(moment_args(torch.linspace(-1, 1, 256) * most, "lion"), step)


def test_roots_of_the_smallest_values() -> None:
    """Without eps the divisor is the root alone."""
    got = list(moment_args(torch.logspace(-22, -19, 256)))
    got[2:6] = [torch.zeros(256)], [torch.zeros(256)], [torch.empty(0)], [torch.empty(0)]
    got[9], got[12] = torch.tensor([1.0]), [0.0]
    compare(tuple(got), step)
    assert torch.allclose(got[PARAMS][0], torch.tensor(-1.0), rtol=5e-2)


def test_tables_hold_any_address() -> None:
    words = [0, 1, 2**31, 2**47 + 12, 2**57 + 1, *range(tables.WORDS)]
    found = tables.words_on_device(words, torch.device("cpu"))
    assert found[: len(words)].tolist() == words and found.numel() == 2 * tables.WORDS


@pytest.mark.slow
def test_more_than_2_31_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps only the last two chunks, so that the other memory is never touched."""
    if free_gib() < NEEDED_GIB:
        pytest.skip(f"{free_gib():.1f} GiB of memory free, {NEEDED_GIB} needed")
    chunk, numel = adamw_kernels.CHUNK.value, 2**31 + 1500
    chunks = -(-numel // chunk)
    first = (chunks - 2) * chunk
    args = list(moment_args(torch.zeros(1)))
    halves = [torch.from_numpy(np.zeros(numel, np.int16)).view(torch.bfloat16) for _ in range(2)]
    codes = [torch.from_numpy(np.zeros(numel, np.uint8)) for _ in range(2)]
    scales = [torch.zeros(-(-numel // 256)) for _ in range(2)]
    for which, t in enumerate((*halves, *codes, *scales)):
        args[which] = [t]
    args[9] = torch.tensor([0.1])
    halves[0][: 2 * chunk] = 1.0
    for seed, half in enumerate(halves):
        half[first:] = testing.tensor(numel - first, dtype=torch.bfloat16, seed=seed)
    want = list(args)
    want[:4] = [[t[first:].clone()] for t in (*halves, *codes)]
    want[4:6] = [[t[first // 256 :].clone()] for t in scales]

    def last_chunks(kernel: Any, grid: Any, table: Any, *rest: Any, **constants: Any) -> None:
        shares = torch.tensor([0, chunks - 2, 0, chunks])
        launch.launch(kernel, (1,), table._replace(shares=shares), *rest, **constants)

    monkeypatch.setattr(adamw, "launch", last_chunks)
    step(tuple(args))
    run(tuple(want))
    tail = list(args)
    tail[:4] = [[t[first:]] for t in (*halves, *codes)]
    tail[4:6] = [[t[first // 256 :]] for t in scales]
    assert_same(tuple(tail), tuple(want), False)
    assert tail[STATE1][0].any() and (halves[0][: 2 * chunk] == 1).all()
    assert not codes[0][: 2 * chunk].any() and not scales[0][:8].any()

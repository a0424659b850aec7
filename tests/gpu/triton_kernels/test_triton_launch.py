"""Launches of Triton kernels: caching, compiling once, and errors.

A stand-in for Triton's driver records the launches; kernels are compiled for sm90.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain, repeat
from typing import Any, NamedTuple
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton is not installed")
if triton.knobs.runtime.interpret:
    pytest.skip("Triton interprets its kernels in this process", allow_module_level=True)

import triton.language as tl
from op_samples import adamw_args
from stub_card import Card, stub_card
from test_cuda_graphs import nothing_read
from triton.runtime.errors import OutOfResources, PTXASError

from peft_kernels.core.op import OPS
from peft_kernels.triton_kernels.core import launch, tables
from peft_kernels.triton_kernels.optim import adamw

CONFIG = launch.config(4, 3, BLOCK=64)


class Pair(NamedTuple):
    x: Tensor
    n: int


@triton.jit(do_not_specialize=launch.VARYING)
def add_kernel(out, pair, other, m, scale, threshold: tl.uint32, FLAG: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    values = tl.load(pair.x + at, mask=at < pair.n, other=0.0) * scale
    if other is not None:
        values += tl.load(other + at)
    if FLAG:
        values += m + threshold
    tl.store(out + at, values)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    for name in ("_fitting", "_compiled"):
        monkeypatch.setattr(launch, name, {})
    add_kernel.device_caches.clear()
    with stub_card("sm90") as stand_in:
        yield stand_in
    add_kernel.device_caches.clear()


def values(
    offset: int = 0,
    n: int = 7,
    other: bool = False,
    m: int = 7,
    dtype: torch.dtype = torch.float32,
    flag: bool = False,
    threshold: int = 5,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a launch, `offset` elements after a 16-byte aligned address."""
    memory = torch.zeros(96, dtype=dtype)
    x = memory[offset:]
    args = torch.zeros(64), Pair(x, n), torch.zeros(64) if other else None, m, 0.5, threshold
    return args, {"FLAG": flag}


def run(**given: Any) -> tuple[Any, ...]:
    args, constants = values(**given)
    launch.launch(add_kernel, (3,), *args, config=CONFIG, **constants)
    return args


def compiled(card: Card) -> int:
    caches = add_kernel.device_caches.get(card.device)
    return 0 if caches is None else len(caches[0])


DIFFERENT: dict[str, dict[str, Any]] = {
    "alignment": {"offset": 1},
    "one": {"n": 1},
    "multiple-of-16": {"n": 32},
    "long": {"n": 2**31},
    "none": {"other": True},
    "dtype": {"dtype": torch.bfloat16},
    "constant": {"flag": True},
    "long-varying": {"m": 2**31},
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_the_cache_key_is_complete(card: Card, name: str) -> None:
    """Each launch runs the kernel that Triton would choose."""
    different = DIFFERENT[name]
    for given in ({}, different, {}, different):
        run(**given)
        args, constants = values(**given)
        add_kernel[(3,)](*args, **constants, **CONFIG)
        ours, own = card.launched[-2:]
        assert ours[5] is own[5]  # the metadata of what was compiled
    assert compiled(card) == 2 and len(launch._compiled) == 2


def test_varying_values_compile_nothing_new(card: Card) -> None:
    for m in (1, 2, 16, 7):
        for threshold in (0, 1, 16, 2**32 - 1):
            run(m=m, threshold=threshold)
    assert compiled(card) == 1
    assert launch.varying(0) != 1 and all(launch.varying(n) % 16 for n in (0, 1, 16, 2**32))


def test_a_launch_passes_its_arguments(card: Card) -> None:
    run()
    card.stream = 77
    args = run(m=9)
    *head, enter, leave = card.launched[-1][:9]
    assert head[:4] == [3, 1, 1, 77] and head[4] == "add_kernel on 0" and (enter, leave) == (None, None)
    assert card.launched[-1][9:] == (*args, False, 64)
    first = card.launched[0]
    assert first[:3] == (3, 1, 1) and first[9:][3] == 7


def test_later_launches_bypass_triton(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    run()
    monkeypatch.setattr(type(add_kernel), "run", lambda *args, **kwargs: pytest.fail("by Triton's way"))
    run()
    assert len(card.launched) == 2


def test_each_device_has_its_own(card: Card) -> None:
    run()
    card.device, card.shared = 1, 1 << 20
    run()
    run()
    assert [item[4] for item in card.launched] == ["add_kernel on 0", "add_kernel on 1", "add_kernel on 1"]


def test_hooks_are_called(card: Card) -> None:
    """Profilers' hooks and those of `add_pre_run_hook`, also after the first launch."""
    run()
    seen: list[str] = []

    def entered(metadata: Any) -> None:
        seen.append(metadata.get()["name"])

    hook = triton.knobs.runtime.launch_enter_hook
    hook.add(entered)
    try:
        run()
    finally:
        hook.remove(entered)
    _, different, enter, leave = card.launched[-1][5:9]
    assert enter is hook and leave is None and different.get()["name"] == "add_kernel"
    add_kernel.add_pre_run_hook(lambda *args, **kwargs: seen.append("before"))
    try:
        run()
    finally:
        add_kernel.pre_run_hooks.clear()
    assert seen == ["before"] and len(card.launched) == 3


def test_first_compiles_are_logged(card: Card, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "peft_kernels"):
        for given in ({}, {}, {"m": 3}, {"n": 16}, {"n": 16}):
            run(**given)
    different = [record.getMessage() for record in caplog.records]
    assert len(different) == 2
    assert all(
        re.match(r"add_kernel with \{.*'num_stages': 3\}: compiled for cuda, or .* in \d+\.\d\d s$", text)
        for text in different
    )


def test_nothing_is_compiled_in_a_capture(card: Card) -> None:
    run()
    card.capturing = True
    run()
    with pytest.raises(RuntimeError, match=r"^add_kernel: the first call .* run it once before the capture$"):
        run(n=16)
    assert compiled(card) == 1 and len(card.launched) == 2


TOO_SMALL = OutOfResources(required=2, limit=1, name="shared memory")
FULL = RuntimeError("Triton Error [CUDA]: out of memory")


def refusing(error: Exception, times: int) -> Mock:
    """Raises the error that many times."""
    return Mock(side_effect=chain([error] * times, repeat(None)))


def test_a_config_that_does_not_fit_falls_back_to_fewer_stages(
    card: Card, caplog: pytest.LogCaptureFixture
) -> None:
    card.refuse = refusing(TOO_SMALL, 2)
    with caplog.at_level("WARNING", "peft_kernels"):
        run()
        run()
    assert [record.getMessage()[-len("falls back to 2 stages") :] for record in caplog.records] == [
        "falls back to 2 stages",
        "falls back to 1 stages",
    ]
    assert card.refuse.call_count == 3 and len(card.launched) == 2
    assert card.launched[0][5] is card.launched[1][5]
    assert launch._fitting[0, id(add_kernel), id(CONFIG)].fitting["num_stages"] == 1


def test_another_device_keeps_its_stages(card: Card) -> None:
    run()
    card.device, card.refuse = 1, refusing(TOO_SMALL, 1)
    run()
    stages = [launch._fitting[i, id(add_kernel), id(CONFIG)].fitting["num_stages"] for i in (0, 1)]
    assert stages == [3, 2]


def test_assembler_errors_fall_back_to_fewer_stages(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    run_of_triton, tried = type(add_kernel).run, []

    def refused(self: Any, *args: Any, **kwargs: Any) -> Any:
        tried.append(kwargs["num_stages"])
        if kwargs["num_stages"] > 1:
            raise PTXASError("uses too much shared data")
        return run_of_triton(self, *args, **kwargs)

    monkeypatch.setattr(type(add_kernel), "run", refused)
    run()
    assert tried == [3, 2, 1] and len(card.launched) == 1


@pytest.mark.parametrize("error", [OutOfResources(2, 1, "threads"), PTXASError("no such instruction")])
def test_a_kernel_that_never_fits_raises(card: Card, error: Exception) -> None:
    card.refuse = Mock(side_effect=error)
    with pytest.raises(RuntimeError, match=r"^add_kernel with .* cannot run on this card: ") as found:
        run()
    assert found.value.__cause__ is not None and not card.launched


@pytest.mark.parametrize("hooks", (True, False), ids=("hooks", "no-hooks"))
def test_a_full_card_raises_and_is_retried(card: Card, hooks: bool) -> None:
    """Without hooks, Triton would launch the unloaded kernel next time."""
    if not hooks:
        triton.knobs.runtime.launch_enter_hook = None
    card.refuse = refusing(FULL, 2)
    with pytest.raises(torch.OutOfMemoryError, match=r"^add_kernel: the card's memory is too small"):
        run()
    assert not card.launched and not launch._compiled
    run()
    assert len(card.launched) == 1 and card.loaded == ["add_kernel"]
    launch._compiled.clear()
    add_kernel.device_caches.clear()
    card.refuse = refusing(FULL, 1)  # freeing torch's unused memory was enough
    run()
    assert len(card.launched) == 2


def test_a_card_that_is_full_at_a_later_launch(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    run()
    (made,) = launch._compiled.values()
    monkeypatch.setattr(made, "_run", Mock(side_effect=FULL))
    with pytest.raises(torch.OutOfMemoryError, match=r"^add_kernel: "):
        run()


def test_other_errors_pass(card: Card) -> None:
    card.refuse = Mock(side_effect=RuntimeError("Triton Error [CUDA]: device-side assert triggered"))
    with pytest.raises(RuntimeError, match="device-side assert"):
        run()


def test_an_empty_grid_launches_nothing(card: Card) -> None:
    args, constants = values()
    launch.launch(add_kernel, (0, 4), *args, config=CONFIG, **constants)
    assert not card.launched and not compiled(card)


def test_a_step_of_an_optimizer_is_one_launch(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_prepared", "_addresses"):
        monkeypatch.setattr(adamw, name, tables.StreamCache())
    dtypes = [torch.float32, torch.bfloat16, torch.float16] * 15
    args = list(adamw_args("adamw", [(8, 64 + i % 5) for i in range(45)], dtypes, [8, 32, 8] * 15))
    grads, most = args[1], OPS["adamw"].arguments.index("max_grad_norm")

    def launched() -> Counter[str]:
        before = len(card.launched)
        adamw.adamw(OPS["adamw"].named(args))
        return Counter(item[4].split()[0] for item in card.launched[before:])

    first = launched()
    assert first == {"store_words_kernel": 3, "adamw_kernel": 1}
    with nothing_read():
        assert launched() == {"adamw_kernel": 1}
    grads[3] = grads[3].clone()
    assert launched() == {"store_words_kernel": 1, "adamw_kernel": 1}
    args[0][3] = args[0][3].clone()
    assert launched() == {"store_words_kernel": 2, "adamw_kernel": 1}
    args[most] = 0.5
    with nothing_read():
        assert launched() == {"squares_kernel": 1, "adamw_kernel": 1}
    args[most], card.capturing = 0.0, True  # each graph writes its own tables
    assert launched() == first and launched() == first
    card.capturing = False
    assert launched() == {"adamw_kernel": 1}
    card.stream = 77
    assert launched() == first

"""Experts on CUDA by torch's grouped GEMM: which cards and shapes get it, the results, and that the host does
not wait for the numbers of rows. The PTX machine's tensors are on the CPU, where torch has the same op."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from skips import require
from stub_device import A100, H100, Launch, stub_device, torch_ops
from test_cuda_graphs import nothing_read
from test_experts_cuda import ENDS, EXPERTS, HALVES, OPS, ROWS, call, check, check_needs, check_order, layer
from torch import Tensor

import ptx_backend as ptx
import testing
from bench.gpu.crossover_timing import Target, time_cells
from peft_kernels.core.backends import crossovers
from peft_kernels.core.backends.crossovers import ANY, Card, Limits, Rows, read

CARD = (100 if os.environ.get("PEFT_KERNELS_PTX_ARCH") == "100" else 90, 7, 227 << 10)
CARDS = {
    "A100": A100, "RTX-3090": (86, 82, 99 << 10), "H100": H100, "H200": (90, 132, 227 << 10),
    "B200": (100, 148, 227 << 10), "B300": (103, 148, 227 << 10), "RTX-5090": (120, 170, 99 << 10),
}  # fmt: skip
HAVE_KERNELS = {"H100", "H200", "B200"}
MANY_BYTES = 512 << 20
ESTIMATE = {table.compute_capability: table.limits.experts for table in read(crossovers.PACKAGED)}


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    yield
    if ptx.BACKEND.probe() is None:
        ptx.BACKEND.extension.set_experts_piece_bytes(MANY_BYTES)
        for capability in (80, 90, 100):
            for sms in (7, 132, 148):
                ptx.BACKEND.extension.set_limits(capability, sms, [])


@pytest.fixture
def grouped(extension: ModuleType) -> ModuleType:
    """On a card with a grouped GEMM, for any number of rows."""
    extension.set_card(*CARD)
    extension.set_limits(*CARD[:2], [], [Rows(ANY, 0, 0)])
    return extension


def ways(
    extension: ModuleType, card: Sequence[int], rows: int, n: int = 768, k: int = 2048, **other: Any
) -> tuple[str, str]:
    options = {"experts": 8, "blocksize": 64, "dtype": "bfloat16"} | other
    plan = options["experts"], n, k, options["blocksize"], options["dtype"]
    found: tuple[str, str] = extension.experts_plan_for(rows, *plan, *card)
    return found


def launched(op: str, arguments: tuple[Any, ...]) -> list[str]:
    """The kernels that a second call would launch, in order; it reads nothing from the device."""
    extension = ptx.BACKEND.extension
    extension.note_launches(True)
    try:
        call(op, arguments)
        extension.note_launches(True)
        with nothing_read():
            call(op, arguments)
        return [_short(Launch(*launch)) for launch in extension.note_launches(True)]
    finally:
        extension.note_launches(False)


def launched_on(card: tuple[int, int, int], op: str, arguments: tuple[Any, ...]) -> list[str]:
    with stub_device(card):
        return launched(op, arguments)


def _short(launch: Launch) -> str:
    return launch.kernel.split("<")[0].split("::")[-1]


# The choice.


@pytest.mark.parametrize("name", CARDS)
def test_cards_with_a_grouped_gemm_use_it_for_many_rows(extension: ModuleType, name: str) -> None:
    card = CARDS[name]
    many = "grouped" if name in HAVE_KERNELS else "fused"
    assert ways(extension, card, 8) == ways(extension, card, 8 * 64) == ("fused", "fused")
    assert ways(extension, card, 8 * 2048) == (many, many)
    assert ways(extension, card, 8 * 2048, dtype="float16") == ("fused", "fused")
    assert ways(extension, card, 8 * 2048, dtype="float32") == ("composed", "composed")


@pytest.mark.parametrize("capability", ["9.0", "10.0"])
def test_plans_follow_the_estimates(extension: ModuleType, capability: str) -> None:
    card = CARDS["H100" if capability == "9.0" else "B200"]
    for experts, (n, k) in itertools.product((1, 8, 128), ((1536, 2048), (4096, 2048), (4112, 2048))):
        row = next(row for row in ESTIMATE[capability] if n * k <= row.weights)
        assert row.forward == row.backward
        limit = experts * row.forward
        assert ways(extension, card, limit, n, k, experts=experts) == ("fused", "fused")
        assert ways(extension, card, limit + 1, n, k, experts=experts) == ("grouped", "grouped")


def test_a_table_of_a_card_has_its_own_experts(extension: ModuleType) -> None:
    extension.set_limits(90, 132, [Rows(ANY, 7, 8)], [Rows(1 << 20, 100, 70), Rows(ANY, 20, 2000)])
    for rows, size, expected in (
        (800, 1024, ("fused", "grouped")),
        (801, 1024, ("grouped", "grouped")),
        (560, 1024, ("fused", "fused")),
        (161, 1040, ("grouped", "fused")),
        (16001, 1040, ("grouped", "grouped")),
    ):
        assert ways(extension, H100, rows, size, 1024) == expected, (rows, size)
    # A table without experts, of an earlier version: the estimates.
    extension.set_limits(90, 132, [Rows(ANY, 7, 8)])
    assert ways(extension, H100, 8 * 480, 1024, 1024) == ("fused", "fused")
    assert ways(extension, H100, 8 * 480 + 1, 1024, 1024) == ("grouped", "grouped")


def test_shapes_that_no_kernel_decodes_are_grouped(extension: ModuleType) -> None:
    """Of few rows, too; and those that torch's kernel does not take are composed."""
    assert ways(extension, H100, 8, 272, 48) == ("grouped", "grouped")
    assert ways(extension, A100, 8, 272, 48) == ("composed", "composed")
    assert ways(extension, H100, 8, 264, 48) == ways(extension, H100, 8, 48, 72) == ("composed", "composed")
    assert ways(extension, H100, 1 << 20, experts=1023) == ("grouped", "grouped")
    assert ways(extension, H100, 1 << 20, experts=1024) == ("fused", "fused")
    for rows, experts in ((0, 8), (8, 0), (1 << 31, 8)):
        assert ways(extension, H100, rows, experts=experts) == ("composed", "composed"), rows
    assert ways(extension, H100, 1 << 30, 272, 48) == ("composed", "composed")


# The results.


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("n,k", [(64, 128), (272, 48)])
@pytest.mark.parametrize("op", OPS)
def test_any_number_of_rows(grouped: ModuleType, op: str, n: int, k: int, ends: str) -> None:
    arguments = layer(n, k, torch.bfloat16, ENDS[ends])[op]
    assert grouped.experts_plan(ROWS, EXPERTS, n, k, 64, "bfloat16") == ("grouped", "grouped")
    check(op, arguments)


@pytest.mark.parametrize("op", OPS)
def test_many_rows_of_no_expert(grouped: ModuleType, op: str) -> None:
    """Each thread of the kernel that zeroes them has several vectors."""
    check(op, layer(64, 128, torch.bfloat16, [0, 1, 1, 3, 3], rows=1500)[op])


@pytest.mark.parametrize("bytes_at_a_time", [1, 5 * 304 * 512], ids=["small", "two"])
@pytest.mark.parametrize("op", OPS)
def test_pieces(grouped: ModuleType, op: str, bytes_at_a_time: int) -> None:
    """Two pieces of columns, the second of 48. They change no bit."""
    arguments = layer(304, 304, torch.bfloat16, ENDS["some"], blocksize=32)[op]
    whole = call(op, arguments)
    grouped.set_experts_piece_bytes(bytes_at_a_time)
    check(op, arguments)
    found = call(op, arguments)
    assert all(torch.equal(got, want) for got, want in zip(found, whole, strict=True))
    names = launched(op, arguments)
    assert names.count("DequantizeExperts") == names.count("ExpertsExpand") == 2


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=["fp32", "same"])
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("r", [4, 16, 70])
@pytest.mark.parametrize("op", OPS[2:])
def test_adapters(grouped: ModuleType, op: str, r: int, nested: bool, adapter: torch.dtype) -> None:
    check(op, layer(48, 128, torch.bfloat16, ENDS["some"], r=r, nested=nested, adapter=adapter)[op])


@pytest.mark.parametrize("blocksize", [32, 128, 4096])
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("op", OPS[:2])
def test_scales_of_every_expert(grouped: ModuleType, op: str, nested: bool, blocksize: int) -> None:
    """Blocks that cross rows, a last one that is not whole, and second-level blocks of each expert."""
    check(op, layer(80, 208, torch.bfloat16, ENDS["some"], nested=nested, blocksize=blocksize)[op])


FORMATS: dict[str, dict[str, Any]] = {
    "fp4": {"format": "fp4", "blocksize": 64},
    "mxfp4": {"format": "mxfp4", "blocksize": None},
    "nvfp4": {"format": "nvfp4", "blocksize": None},
    "int4": {"format": "int4", "blocksize": 64},
    "int4-symmetric": {"format": "int4", "blocksize": 32, "nested": False},
    "fp8": {"format": "fp8", "blocksize": 128},
    "fp8-rows": {"format": "fp8", "blocksize": 0},
    "int8": {"format": "int8", "blocksize": 64},
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("op", OPS)
def test_formats(grouped: ModuleType, op: str, form: str) -> None:
    """Scales are codes, with a table per expert; blocks are too short for kernels that decode in a GEMM. Of
    int4 and FP8 each expert is dequantised by itself; pieces begin in the middle of their groups' scales."""
    arguments = layer(304, 320, torch.bfloat16, ENDS["some"], **FORMATS[form])[op]
    check(op, arguments)
    kernel = "DequantizeGroups" if form.startswith(("int4", "fp8", "int8")) else "DequantizeAnyExperts"
    assert kernel in launched(op, arguments)
    whole = call(op, arguments)
    grouped.set_experts_piece_bytes(1)
    assert all(torch.equal(got, want) for got, want in zip(call(op, arguments), whole, strict=True))
    grouped.set_card(80, 7, 163 << 10)
    check(op, arguments)


@pytest.mark.parametrize("op", OPS)
def test_without_a_bias(grouped: ModuleType, op: str) -> None:
    arguments = layer(48, 128, torch.bfloat16, ENDS["rest"])[op]
    bias = {"experts_linear": 8, "experts_lora_linear": 7}.get(op)
    if bias is not None:
        assert arguments[bias].shape == (EXPERTS, 48)
        arguments = (*arguments[:bias], None, *arguments[bias + 1 :])
    check(op, arguments)


DENSE = {
    "rows": lambda *shape: testing.tensor(*shape, dtype=torch.bfloat16),
    "columns": lambda e, n, k: testing.tensor(e, k, n, dtype=torch.bfloat16).mT,
    "longer": lambda e, n, k: testing.tensor(e, n, k + 8, dtype=torch.bfloat16)[..., 8:],
    "one": lambda e, n, k: testing.tensor(1, n, k, dtype=torch.bfloat16).expand(e, n, k),
}


def on_dense(op: str, weight: Tensor, ends: str = "some", dtype: torch.dtype = torch.bfloat16) -> Any:
    arguments = list(layer(weight.shape[1], weight.shape[2], dtype, ENDS[ends])[op])
    at = 2 if op == "experts_lora_linear" else 4
    arguments[at : at + 5] = weight, None, None, None, 0
    return tuple(arguments)


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("strides", DENSE)
@pytest.mark.parametrize("op", OPS[2:])
def test_dense_bases(extension: ModuleType, op: str, strides: str, ends: str) -> None:
    """Of any number of rows."""
    extension.set_card(*CARD)
    arguments = on_dense(op, DENSE[strides](EXPERTS, 48, 128), ends)
    check(op, arguments)
    names = launched(op, arguments)
    assert "ExpertsExpand" in names and "DequantizeExperts" not in names


@pytest.mark.parametrize("op", OPS[2:])
def test_dense_bases_that_are_composed(extension: ModuleType, op: str) -> None:
    """Strides that torch does not take, and dtypes and cards without a kernel."""
    odd = testing.tensor(EXPERTS, 48, 132, dtype=torch.bfloat16)[..., :128]
    shifted = testing.tensor(EXPERTS * 48 * 128 + 1, dtype=torch.bfloat16)[1:].view(EXPERTS, 48, 128)
    apart = testing.tensor(EXPERTS, 48 * 128 + 4, dtype=torch.bfloat16)[:, :-4].unflatten(1, (48, 128))
    whole = testing.tensor(EXPERTS, 48, 128, dtype=torch.bfloat16)
    on_cards = [(odd, CARD), (shifted, CARD), (apart, CARD), (whole.half(), CARD)]
    for weight, card in (*on_cards, (whole, (80, 7, 163 << 10))):
        extension.set_card(*card)
        arguments = on_dense(op, weight, dtype=weight.dtype)
        check(op, arguments)
        with pytest.raises(AssertionError, match="tolist in a token"):
            launched(op, arguments)


@pytest.mark.parametrize("op", OPS)
def test_experts_without_rows_do_not_reach_results(grouped: ModuleType, op: str) -> None:
    arguments = layer(48, 128, torch.bfloat16, ENDS["some"], nested=False)[op]
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.shape[0] == EXPERTS and argument.is_floating_point():
            argument[0], argument[2] = torch.nan, torch.nan
    for result in call(op, arguments):
        assert result.isfinite().all()


@pytest.mark.parametrize("ends", [[-5, 200, 3, 7, 90], [90, 60, 30, 20, 10], [-1] * 5, [2**31 - 1] * 5])
@pytest.mark.parametrize("op", OPS)
def test_invalid_ends_are_made_valid(grouped: ModuleType, op: str, ends: list[int]) -> None:
    """torch's kernel stops the process for them: it gets the same ends as ours, ascending and clamped."""
    valid = torch.tensor(ends).clamp(0, ROWS).cummax(0).values.tolist()
    found, want = (call(op, layer(48, 128, torch.bfloat16, each)[op]) for each in (ends, valid))
    assert all(torch.equal(one, two) for one, two in zip(found, want, strict=True))


def test_a_row_that_is_not_aligned(grouped: ModuleType) -> None:
    x, *rest = layer(48, 128, torch.bfloat16, ENDS["some"])["experts_linear"]
    shifted = torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)
    assert shifted.data_ptr() % 16
    (want,), (got,) = call("experts_linear", (x, *rest)), call("experts_linear", (shifted, *rest))
    assert torch.equal(got, want)


@pytest.mark.parametrize("seed", range(2))
def test_order_of_threads_changes_no_bit(grouped: ModuleType, seed: int) -> None:
    check_order(seed, layer(64, 144, torch.bfloat16, ENDS["some"]))


def test_gradients_do_not_depend_on_which_are_needed(grouped: ModuleType) -> None:
    check_needs(layer(64, 128, torch.bfloat16, ENDS["some"]))


def test_both_ways_agree(grouped: ModuleType) -> None:
    """Within the policy for either, on shapes that both support."""
    cases = layer(64, 128, torch.bfloat16, ENDS["some"])
    for limit in (0, ANY):
        grouped.set_limits(*CARD[:2], [], [Rows(ANY, limit, limit)])
        grouped.reset_bank_counts()
        for op, arguments in cases.items():
            check(op, arguments)
        sites = " ".join(grouped.bank_counts())
        assert ("linear_tiles.cuh" in sites) == ("linear_dx.cuh" in sites) == (limit == ANY), limit


# The host's side: launches depend on sizes alone, and nothing is read from the device. On the card torch's
# grouped GEMM reads the ends there.

LAUNCHES = {
    "experts_linear": ["ListExpertRows", "DequantizeExperts", "ExpertsExpand", "ClearRest"],
    "experts_linear_dx": ["ListExpertRows", "DequantizeExperts", "ClearRest"],
    "experts_lora_linear": [
        *("ListExpertRows", "ExpertsShrink", "DequantizeExperts", "ExpertsExpand", "ClearRest"),
    ],
    "experts_lora_linear_backward": [
        *("ListExpertRows", "ExpertsShrink", "DequantizeExperts", "ExpertsExpand", "ClearRest"),
        *("ExpertsOverRows", "ExpertsOverRows"),
    ],
}
"""Of a layer with a bias. torch's GEMM is between DequantizeExperts and what follows."""
INSIDE = {
    *("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::_grouped_mm"),
    *("aten::view", "aten::narrow", "aten::slice", "aten::transpose", "aten::as_strided"),
    *("aten::contiguous", "aten::to", "aten::resolve_conj", "aten::resolve_neg"),
}
OF_THE_CPU = {"aten::mm", "aten::select", "aten::item", "aten::_local_scalar_dense", "aten::copy_"}
"""What torch's op consists of on the CPU, in addition to the above."""


@pytest.mark.parametrize("op", OPS)
def test_nothing_synchronises(op: str) -> None:
    require("ptx")
    many = 4000
    for ends in ([0, 1000, 1000, 3000, many - 1], [0] * 5):
        arguments = layer(128, 192, torch.bfloat16, ends, rows=many)[op]
        assert launched_on(H100, op, arguments) == LAUNCHES[op], ends


@pytest.mark.parametrize("op", OPS)
def test_torch_is_asked_for_no_more(op: str) -> None:
    require("ptx")
    arguments = layer(128, 192, torch.bfloat16, [0, 1000, 1000, 3000, 3999], rows=4000)[op]
    with stub_device(H100):
        called = torch_ops(lambda: call(op, arguments))
    assert called["aten::_grouped_mm"] == 1
    assert called.keys() <= INSIDE | OF_THE_CPU, called.keys() - INSIDE - OF_THE_CPU


@HALVES
def test_few_rows_stay_fused(dtype: torch.dtype) -> None:
    require("ptx")
    arguments = layer(128, 192, dtype, [0, 1000, 1000, 1800, 1900], rows=1920)["experts_linear"]
    assert launched_on(H100, "experts_linear", arguments) == ["ListExpertRows", "ExpertsTiles"]


# What is timed.


def test_each_way_is_timed() -> None:
    """On a simulated card whose clock counts launches; on one without a choice, nothing is."""
    require("ptx")
    seen: list[set[str]] = []
    for name, card in (("9.0", H100), ("8.0", A100)):
        with stub_device(card) as launches:

            def clock(run: Any, launches: Any = launches) -> float:
                launches()
                run()
                seen.append({_short(launch) for launch in launches()})
                return 6.0

            library, ops, device = ptx.BACKEND.extension, torch.ops.peft_kernels_ptx, torch.device("cpu")
            on = Target(library, ops, Card("a card", name, card[1]), device, 0, clock)
            cells = time_cells(on, [(64, 128)], [64, 512], experts=3)
        assert [cell[:4] for cell in cells] == [
            (64, 128, rows, way) for rows in (64, 512) for way in (False, True) if name == "9.0"
        ]
        for cell, fused, other, wgmma in zip(cells, seen[::3], seen[1::3], seen[2::3], strict=True):
            assert cell[4:] == (3.0, 3.0, 3.0), "two copies of the weights take turns"
            assert ("ExpertsDx" if cell.is_backward else "ExpertsTiles") in fused
            assert "DequantizeExperts" in other
            assert ("ExpertsWgmmaDx" if cell.is_backward else "ExpertsWgmma") in wgmma
        seen.clear()
    assert ways(library, H100, 8 * 480) == ("fused", "fused"), "left as it was set"


def test_a_table_of_python_is_a_table_of_the_library(extension: ModuleType) -> None:
    card = Card("NVIDIA H100 80GB HBM3", "9.0", H100[1])
    crossovers.set_limits(extension, card, Limits((Rows(ANY, 1, 1),), (Rows(ANY, 96, 64),)))
    assert ways(extension, H100, 8 * 96) == ("fused", "grouped")
    assert ways(extension, H100, 8 * 64) == ("fused", "fused")

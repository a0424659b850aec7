"""The experts' GEMMs in Triton: how programs find their rows, and experts without rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from skips import on_triton
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton is not installed")

import triton.language as tl
from numbers_policy import DTYPES, pairs

import testing
from bench.gpu.triton_calls import BF16, Call, empty, nf4, of_experts
from peft_kernels import NF4Weight
from peft_kernels.core import dispatch
from peft_kernels.core.op import OPS, Base
from peft_kernels.triton_kernels import table
from peft_kernels.triton_kernels.core import launch
from peft_kernels.triton_kernels.experts import experts
from peft_kernels.triton_kernels.experts.experts_kernels import find_slot

ENDS = {
    "even": [4, 8, 12],
    "gaps": [0, 0, 5, 5, 40, 41, 41],
    "one": [0, 0, 41],
    "none": [0, 0],
    "single": [1],
    "many": list(range(0, 40, 3)),
    "beyond": [5, 20, 1000, 2000],
}
ROWS = 41
each_ends = pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)


@triton.jit
def slots_kernel(ends, out, rows, experts, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    expert, first, stop = find_slot(ends, rows, experts, tl.program_id(0), EXPERTS, BLOCK_M)
    at = out + 3 * tl.program_id(0)
    tl.store(at, expert)
    tl.store(at + 1, first)
    tl.store(at + 2, stop)


def group_of(ends: list[int], rows: int = ROWS) -> experts.Group:
    return experts.Group(torch.tensor(ends, dtype=torch.int32), rows)


@on_triton
@each_ends
@pytest.mark.parametrize("rows", (ROWS, 64))
@pytest.mark.parametrize("block_m", (8, 16, 64))
def test_slots_cover_every_row_once(ends: list[int], rows: int, block_m: int) -> None:
    group = group_of(ends, rows)
    slots = group.slots(block_m)
    found = torch.full((slots, 3), -1, dtype=torch.int32)
    slots_kernel[(slots,)](group.ends, found, rows, group.experts, group.constexpr_experts, block_m)
    owner = torch.full((rows,), -1)
    for expert, first, stop in found.tolist():
        assert first >= 0 and stop <= rows
        taken = owner[first : min(first + block_m, stop)] if first < stop else owner[:0]
        assert (taken == -1).all()
        taken.fill_(expert)
    begins = [0, *(min(end, rows) for end in ends), rows]
    want = [e for e in range(len(ends) + 1) for _ in range(begins[e], begins[e + 1])]
    assert owner.tolist() == want


@pytest.mark.parametrize("block_m", (8, 16, 64))
@pytest.mark.parametrize("count", (1, 3, 128))
def test_the_number_of_slots_is_tight(count: int, block_m: int) -> None:
    """Every expert, and the rows of no expert, exceed a tile by one row: all slots are used."""
    for rows in (0, 1, 2, count, count + 1, (count + 1) * (block_m + 1)):
        groups = min(count + 1, rows)
        sizes = [1] * (groups - 1) + [rows - groups + 1] if groups else []
        assert sum(launch.cdiv(size, block_m) for size in sizes) == group_of([0] * count, rows).slots(block_m)


NAMES = "experts_lora_linear", "experts_lora_linear_backward"


class Case:
    def __init__(
        self,
        ends: list[int],
        n: int,
        k: int,
        kind: str = "nested",
        dtype: torch.dtype = BF16,
        rows: int = ROWS,
        rank: int = 5,
    ) -> None:
        count = len(ends)
        self.ends, self.kind, self.dtype = torch.tensor(ends, dtype=torch.int32), kind, dtype
        self.x, self.dy = testing.tensor(rows, k, dtype=dtype), testing.tensor(rows, n, dtype=dtype, seed=2)
        self.h, self.bias = testing.tensor(rows, rank, seed=5), testing.tensor(count, n, seed=6)
        self.a = testing.tensor(count, rank, k, seed=3, scale=k**-0.5)
        self.b = testing.tensor(count, n, rank, seed=4)
        self.dense = testing.tensor(count, n, k, dtype=dtype, seed=1, scale=k**-0.5)
        self.base = Base(self.dense)
        if kind != "dense":
            with dispatch.use_backend("reference"):
                weight = NF4Weight.quantize(self.dense.float(), 32 if k % 64 else 64, kind == "nested")
                self.dense = weight.dequantize()
            self.base = weight._state.op_args

    def args(self, op: str) -> tuple[Any, ...]:
        if op == NAMES[0]:
            return (self.x, self.ends, *self.base, self.bias, self.a, self.b, 0.5)
        return (self.dy, self.x, self.h, self.ends, *self.base, self.a, self.b, 0.5, True, True, True)

    def run(self, op: str) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = getattr(torch.ops.peft_kernels, op)(*self.args(op))
        return found

    def check(self, op: str) -> tuple[Tensor, ...]:
        got, plain = self.run(op), testing.reference_op(op)(*self.args(op))
        before, self.base = self.base, Base(self.dense)
        truth = testing.reference_op(op)(*map(testing.widen, self.args(op)))
        self.base = before
        end = int(self.ends[-1])
        for name, *values in zip(OPS[op].returns, got, plain, truth, strict=True):
            if name not in ("da", "db"):
                assert not values[0][end:].any()
                values = [value[:end] for value in values]
            testing.assert_close(*values, what=f"{op}, {name}")
        return got


each_op = pytest.mark.parametrize("op", NAMES)


@on_triton
@each_op
@pytest.mark.usefixtures("nan_outputs")
@pairs(
    ends=("even", "gaps", "one", "none"),
    sizes=((64, 128), (96, 96), (33, 71), (160, 64)),
    kind=("nested", "plain", "dense"),
    dtype=DTYPES,
)
def test_gemms_of_rows_in_slots(
    backend: str, op: str, ends: str, sizes: tuple[int, int], kind: str, dtype: torch.dtype
) -> None:
    """Whole runs of weights, shorter runs, rows that begin inside a byte, and dense weights."""
    Case(ENDS[ends], *sizes, kind, dtype).check(op)


@on_triton
@each_op
@pytest.mark.parametrize("rows", (32, 48, 200))
def test_gemms_of_more_rows(backend: str, op: str, rows: int) -> None:
    """The other table entries: experts with more rows than a tile."""
    case = Case([rows - 9, rows - 3], 64, 128, rows=rows)
    assert experts.Group(case.ends, rows).average_rows > 15
    case.check(op)


@on_triton
@each_op
def test_split_k(backend: str, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single token on a large card; reproducible. The last split is shorter: two splits that finish
    together may both store the result, which the PTX machine reports as a race."""
    monkeypatch.setattr("peft_kernels.triton_kernels.core.gemm.multiprocessors", lambda device: 64)
    found: list[int] = []
    split_k = experts.split_k
    monkeypatch.setattr(experts, "split_k", lambda *sizes: record_splits(found, split_k(*sizes)))
    case = Case([0, 1, 1, 2], *((64, 1600) if op == NAMES[0] else (1600, 64)), rows=2)
    results = [case.check(op) for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert min(found) > 1


def record_splits(found: list[int], split: Any) -> Any:
    found.append(split.splits)
    return split


@on_triton
@each_op
@pytest.mark.parametrize("kind", ("nested", "plain", "dense"))
@pytest.mark.usefixtures("nan_outputs")
def test_experts_without_rows_have_no_effect(backend: str, op: str, kind: str) -> None:
    """Whatever their values. Their adapters' gradients and the rows of no expert are zero."""
    case = Case([0, 9, 9, 30, 30], 64, 128, kind)
    clean, idle, rest = case.run(op), [0, 2, 4], slice(30, None)
    floats = [t for t in (*case.base[:4], case.bias, case.a, case.b) if t is not None]
    for t in floats:
        if t.is_floating_point():
            t[idle] = float("nan")
    for t in (case.x, case.dy, case.h):
        t[rest] = float("inf")
    found = case.run(op)
    assert all(torch.equal(*pair) for pair in zip(found, clean, strict=True))
    for name, t in zip(OPS[op].returns, found, strict=True):
        assert not t[idle if name in ("da", "db") else rest].any() and t.any(), name


@on_triton
@each_op
def test_a_bad_row_stays_with_its_expert(backend: str, op: str) -> None:
    case = Case([7, 9, 30], 64, 128)
    clean = case.run(op)
    for t in (case.x, case.dy, case.h):
        t[8] = float("nan")
    for name, bad, good in zip(OPS[op].returns, case.run(op), clean, strict=True):
        hit = 1 if name in ("da", "db") else 8
        others = [i for i in range(good.shape[0]) if i != hit]
        assert torch.equal(bad[others], good[others]) and not bad[hit].isfinite().any(), name


@on_triton
@each_op
def test_ends_beyond_the_rows_read_nothing_there(backend: str, op: str) -> None:
    case = Case([5, 20, 1000], 64, 128)
    found = case.run(op)
    case.ends[2] = ROWS
    assert all(torch.equal(*pair) for pair in zip(found, case.run(op), strict=True))


@on_triton
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ends", torch.zeros(5, dtype=torch.int64), "ends: expected Int, got Long"),
        ("dy", torch.zeros(ROWS, 65), "dy: expected"),
        ("h", torch.zeros(ROWS, 6), "h: expected shape"),
        ("a", torch.zeros(5, 5, 127), "lora_a: expected shape"),
        ("b", torch.zeros(4, 64, 5), "lora_b: expected shape"),
        ("a", torch.zeros(5, 127), "lora_a: expected 3 dimensions, got 2"),
    ],
)
def test_wrong_arguments_raise(name: str, value: Tensor, message: str) -> None:
    case = Case([1, 2, 3, 4, 5], 64, 128)
    setattr(case, name, value)
    with testing.running_on("triton"), pytest.raises(RuntimeError, match=message):
        case.run(NAMES[1])


@on_triton
@pytest.mark.parametrize(
    ("part", "shape", "message"),
    [
        ("weight", (5, 63, 64), "packed: expected 20480 bytes, got 20160"),
        ("absmax", (5, 127), "absmax: expected 640 elements, got 635"),
        ("absmax2", (4, 1), "absmax2: expected 5 elements, got 4"),
        ("offset", (), "offset: expected 5 elements, got 1"),
    ],
)
def test_weight_with_mismatched_parts_is_refused(part: str, shape: tuple[int, ...], message: str) -> None:
    case = Case([1, 2, 3, 4, 5], 64, 128)
    changed: Any = {part: getattr(case.base, part).new_zeros(shape)}
    case.base = case.base._replace(**changed)
    with testing.running_on("triton"), pytest.raises(RuntimeError, match=message):
        case.run(NAMES[0])


@on_triton
def test_launches_do_not_depend_on_the_values_of_ends() -> None:
    """The host does not read `ends`."""
    noted: list[str] = []

    def launches(call: Call) -> list[str]:
        noted.clear()
        with launch.recording(lambda kernel, *rest: noted.append(kernel.__name__)):
            getattr(table, call.op)(OPS[call.op].named(call.args))
        return list(noted)

    for count, rows in ((8, 4096), (128, 8)):
        ends, x, dy = (
            empty(count, dtype=torch.int32),
            empty(rows, 128, dtype=BF16),
            empty(rows, 64, dtype=BF16),
        )
        weight = of_experts(nf4(64, 128), count)
        assert launches(Call("experts_linear", (x, ends, *weight, 64, None))) == ["experts_kernel"]
        assert launches(Call("experts_linear_dx", (dy, ends, *weight, 128))) == ["experts_kernel"]
        a, b = empty(count, 16, 128), empty(count, 64, 16)
        forward = Call(NAMES[0], (x, ends, *weight, None, a, b, 0.5))
        assert launches(forward) == ["experts_shrink_kernel", "experts_kernel"]
        backward = (dy, x, empty(rows, 16), ends, *weight, a, b, 0.5, True, True, True)
        both = ["experts_over_rows_kernel"] * 2
        assert launches(Call(NAMES[1], backward)) == ["experts_shrink_kernel", "experts_kernel", *both]

"""The CPU's GEMV kernels for a few rows of x: every number of rows, whole and ragged groups of weight rows,
and every kind of tail."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lora_cases import check_nf4_linear
from skips import needs, require

import peft_kernels as pk
import testing
from peft_kernels.core.backends import cpu

ISAS = [name for name in testing.backend_ids() if name.startswith("cpu-")]

pytestmark = [pytest.mark.usefixtures("nan_outputs"), needs("cpu")]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Any:
    require(request.param)
    name = request.param.removeprefix("cpu-")
    with pk.use_backend("cpu"), cpu.BACKEND.use_isa(name):
        yield name


@pytest.mark.parametrize("rows", range(1, 18))
@pytest.mark.parametrize(
    "n, k, blocksize, nested",
    [
        (67, 64, 64, True),
        (13, 128, 64, False),
        (70, 320, 64, True),
        (130, 192, 32, True),
        (9, 640, 128, True),
    ],
)
def test_a_few_rows_of_bf16(isa: str, rows: int, n: int, k: int, blocksize: int, nested: bool) -> None:
    check_nf4_linear(
        {"m": rows, "n": n, "k": k, "bs": blocksize, "nested": nested, "dtype": torch.bfloat16}
        | {"bias": "same", "layout": "contiguous"}
    )


@pytest.mark.parametrize("rows, together", [(3, 8), (5, 6), (7, 16), (8, 15)])
def test_a_row_does_not_depend_on_other_rows(isa: str, rows: int, together: int) -> None:
    """In every pass and group of rows: one kernel multiplies up to 16 rows."""
    weight, x = testing.nf4_weight(67, 320), testing.tensor(16, 320, dtype=torch.bfloat16)
    if together > 8 and not isa.startswith("avx512_bf16"):
        pytest.skip("more than 8 rows are packed with this ISA")
    y = pk.nf4_linear(x[:together], weight)
    assert torch.equal(pk.nf4_linear(x[:rows].contiguous(), weight), y[:rows])
    assert torch.equal(
        pk.nf4_linear(x[together - rows : together].contiguous(), weight), y[together - rows :]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", [1, 2, 5, 7, 8, 9, 16, 17])
@pytest.mark.parametrize("n, k", [(67, 96), (130, 1056), (4, 2080), (5, 100)])
def test_a_dense_weight(isa: str, dtype: torch.dtype, rows: int, n: int, k: int) -> None:
    """Without an adapter. The weight is a view whose surroundings are NaN, so reading them would show."""
    whole = testing.tensor(n + 8, k, dtype=dtype, seed=1, scale=k**-0.5)
    whole[n:] = float("nan")
    x, weight, bias = testing.tensor(rows, k, dtype=dtype), whole[:n], testing.tensor(n, dtype=dtype, seed=2)
    (y,) = pk.multi_lora_linear(x, [pk.AdaptedLinear(weight, bias)])
    truth = x.double() @ weight.double().t() + bias.double()
    testing.assert_close(y, torch.nn.functional.linear(x, weight, bias), truth)
    with torch.no_grad():
        again = x.clone()
        again[1:] = float("nan")
    (alone,) = pk.multi_lora_linear(again, [pk.AdaptedLinear(weight, bias)])
    if rows > 16 and torch.nn.functional.linear(again, weight, bias)[0].isnan().any():
        pytest.skip("more than 16 rows are torch's product, whose rows depend on each other here")
    assert torch.equal(alone[0], y[0])


def test_weight_rows_cross_groups_of_absmax(isa: str) -> None:
    """One absmax2 scales 256 blocks."""
    w = testing.tensor(70, 320)
    w[52:] *= 100  # the first group is 51 rows of five blocks
    weight, x = pk.NF4Weight.quantize(w), testing.tensor(3, 320, dtype=torch.bfloat16)
    expected = x @ weight.dequantize(torch.bfloat16).t()
    truth = x.double() @ weight.dequantize(torch.float32).double().t()
    testing.assert_close(pk.nf4_linear(x, weight), expected, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [32, 64, 96, 576])
def test_adapters_of_other_rows_do_not_change_a_dense_row(isa: str, k: int, dtype: torch.dtype) -> None:
    """Serving relies on it: a batch is one GEMM in which some rows have adapters."""
    weight, x = testing.tensor(67, k, dtype=dtype), testing.tensor(17, k, dtype=dtype, seed=1)
    bias = testing.tensor(67, dtype=dtype, seed=2)
    adapter = pk.Adapter(testing.tensor(4, k, seed=3), testing.tensor(67, 4, seed=4), 0.5, group=0)
    for rows in (2, 5, 8, 12, 16, 17):
        groups = torch.tensor([-1] + [0] * (rows - 1))
        alone = pk.multi_lora_linear(x[:rows], [pk.AdaptedLinear(weight, bias)])[0]
        among = pk.multi_lora_linear(x[:rows], [pk.AdaptedLinear(weight, bias, [adapter])], groups)[0]
        assert torch.equal(among[0], alone[0]) and not torch.equal(among, alone), rows

"""AdamW, Adam and Lion on every back end: moments and codes are bit-equal to the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_samples import adamw_args
from torch import Tensor

import testing
from peft_kernels.core import dispatch
from peft_kernels.core.code_tables import dynamic_map, dynamic_thresholds
from peft_kernels.ops.optim import round_stochastically

CPU = torch.device("cpu")
SIZES: list[tuple[int, ...]] = [(3, 100), (70, 256), (1,), (4097,), (5, 16)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PARAMS, GRADS, STATE1, STATE2, ABSMAX1, ABSMAX2, COMPENSATION, STEP = range(8)


def run(args: tuple[Any, ...], backend: str | None = None) -> None:
    if backend is None:
        torch.ops.peft_kernels_reference.adamw(*args)
    else:
        dispatch.call("adamw", *args, like=args[PARAMS][0])


def copied(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple([t.clone() for t in a] if isinstance(a, list) and a and isinstance(a[0], Tensor) else a
                 for a in args)  # fmt: skip


def assert_same(got: tuple[Any, ...], want: tuple[Any, ...], exact_params: bool) -> None:
    for which in range(STEP):
        for i, (g, w) in enumerate(zip(got[which], want[which], strict=True)):
            if which in (PARAMS, COMPENSATION) and not exact_params:
                eps = torch.finfo(g.dtype).eps
                torch.testing.assert_close(g, w, rtol=2 * eps, atol=2 * eps, equal_nan=True)
            else:
                assert torch.equal(g.nan_to_num(7), w.nan_to_num(7)), (which, i)
                assert torch.equal(g.isnan(), w.isnan()), (which, i)


def compare(
    got: tuple[Any, ...], step: Callable[[tuple[Any, ...]], None], exact_params: bool = False
) -> None:
    """Runs a step, and compares it with the reference's."""
    want = copied(got)
    step(got)
    run(want)
    assert_same(got, want, exact_params)


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("kind", ["adamw", "adam", "lion"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_hundred_steps(backend: str, dtype: torch.dtype, kind: str, bits: int) -> None:
    got = adamw_args(kind, SIZES, [dtype] * 5, [bits] * 5)
    want = copied(got)
    steps = 100 if backend.startswith("cpu") else 2 if backend == "triton" else 5
    for step in range(steps):
        grads = [testing.tensor(*p.shape, dtype=dtype, seed=step * 7 + i) for i, p in enumerate(got[PARAMS])]
        for args in (got, want):
            args[GRADS][:] = [g.clone() for g in grads]
            args[STEP].fill_(step + 1)
        run(got, backend)
        run(want)
    # Back ends for cards divide approximately, so p may differ.
    assert_same(got, want, backend.startswith(("cpu", "reference")))


@pytest.mark.parametrize("option", ["scaled", "found_inf", "stochastic", "compensation"])
@pytest.mark.parametrize("kind", ["adamw", "adam", "lion"])
def test_options(backend: str, kind: str, option: str) -> None:
    dtypes = [torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16, torch.float16]
    got = adamw_args(kind, SIZES, dtypes, [8, 8, 32, 32, 8], option)
    before = copied(got)
    compare(got, lambda args: run(args, backend), backend.startswith(("cpu", "reference")))
    assert torch.equal(got[PARAMS][1], before[PARAMS][1]) is (option == "found_inf")


def test_stochastic_rounding_with_compensation(backend: str) -> None:
    """Compensation holds the error of stochastic rounding, up to a full ulp."""
    got = adamw_args("adamw", [(700,), (5,)], [torch.bfloat16] * 2, [8, 32], "compensation")
    got = (*got[:-2], torch.tensor(-7), None)
    want = copied(got)
    run(got, backend)
    run(want)
    found, exact = (
        [p.float() + c.float() for p, c in zip(args[PARAMS], args[COMPENSATION], strict=True)]
        for args in (got, want)
    )
    for f, e, p in zip(found, exact, got[PARAMS], strict=True):
        torch.testing.assert_close(f, e, rtol=2**-14, atol=0)
        assert len(p) < 10 or (p != e.bfloat16()).any(), "nothing was drawn"


@pytest.mark.parametrize("most", [0.5, 1e9])
def test_clipping_by_global_norm(backend: str, most: float) -> None:
    args = list(adamw_args("adamw", SIZES, [torch.float32] * 5, [32] * 5))
    args[17] = most
    norm = torch.cat([g.flatten() for g in args[GRADS]]).double().norm()
    want = copied(tuple(args))
    want[GRADS][:] = [g * min(1.0, float(most / (norm + 1e-6))) for g in want[GRADS]]
    plain = list(want)
    plain[17] = 0.0
    run(tuple(args), backend)
    run(tuple(plain))
    for g, w in zip(args[STATE1], want[STATE1], strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-7)


def moment_args(m: Tensor, kind: str = "adamw") -> tuple[Any, ...]:
    """With beta1 = beta2 = 0 and gradient m, the moments become m and m^2."""
    zeros = [torch.zeros(m.numel(), dtype=torch.uint8)]
    absmax = [torch.zeros(-(-m.numel() // 256))]
    second = ([], []) if kind == "lion" else ([zeros[0].clone()], [absmax[0].clone()])
    return (
        [torch.zeros(m.numel())], [m.clone()], zeros, second[0], absmax, second[1], [],
        torch.tensor([1]), [0], torch.tensor([0.0]), [0.0], [0.0], [1e-8], [0.0], kind, None, None, 0.0,
        None, None,
    )  # fmt: skip


def around(values: Tensor) -> Tensor:
    low, high = torch.tensor(-2.0), torch.tensor(2.0)
    return torch.cat([values, values.nextafter(low), values.nextafter(high)])


def in_blocks_of_one(values: Tensor) -> Tensor:
    """Values in blocks of 256 with a 1 each, so that absmax is 1."""
    values = torch.nn.functional.pad(values, (0, -len(values) % 255)).view(-1, 255)
    return torch.cat([torch.ones(len(values), 1), values], 1).reshape(-1)


def test_codes_are_the_nearest_and_ties_take_the_lower(backend: str) -> None:
    m = in_blocks_of_one(around(torch.cat([dynamic_thresholds(CPU), dynamic_map(CPU)])).clamp(-1, 1))
    args = moment_args(m)
    run(args, backend)
    want = torch.bucketize(m, dynamic_thresholds(CPU)).to(torch.uint8)
    assert torch.equal(args[STATE1][0], want)
    nearest = (m.double()[:, None] - dynamic_map(CPU).double()).abs()
    chosen = nearest.gather(1, want.long()[:, None])[:, 0]
    assert (chosen <= nearest.amin(1) + 6e-8).all()


def test_unsigned_codes_are_the_nearest(backend: str) -> None:
    roots = around(torch.cat([dynamic_thresholds(CPU, False), dynamic_map(CPU, False)]).clamp(0, 1).sqrt())
    roots = torch.cat([roots, torch.linspace(0, 1, 20011), torch.logspace(-9, 0, 20011)]).clamp(0, 1)
    m = in_blocks_of_one(around(roots).clamp(0, 1))
    args = moment_args(m)
    run(args, backend)
    assert torch.equal(args[STATE2][0], torch.bucketize(m * m, dynamic_thresholds(CPU, False)).byte())


def test_a_second_moment_too_small_for_a_code_divides_by_more_than_eps(backend: str) -> None:
    """Read as 0, it would move the parameter by a thousand learning rates."""
    gradients = torch.tensor([1.0, 1e-4, 0.0, -1e-4]).repeat(75)
    args = list(moment_args(gradients))
    args[10], args[11], args[9] = [0.9], [0.999], torch.tensor([1e-3])
    run(tuple(args), backend)
    assert (args[STATE2][0][1::2] == 0).all() and (args[STATE1][0][1::4] != 127).all()
    args[GRADS], args[STEP] = [torch.zeros(300)], torch.tensor([2])
    before = args[PARAMS][0].clone()
    compare(tuple(args), lambda args: run(args, backend))
    moved = (args[PARAMS][0] - before).abs()
    assert (moved[1::2] > 1e-5).all() and (moved < 2e-3).all() and (moved[2::4] == 0).all()


@pytest.mark.parametrize("kind", ["adamw", "lion"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_non_finite_values_stay_in_their_parameter(backend: str, kind: str, bad: float) -> None:
    got = adamw_args(kind, [(600,)] * 2, [torch.float32] * 2, [8, 32])
    clean = copied(got)
    run(clean, backend)
    want = copied(adamw_args(kind, [(600,)] * 2, [torch.float32] * 2, [8, 32]))
    for args in (got, want):
        args[GRADS][0][300] = args[GRADS][1][300] = bad
    run(got, backend)
    run(want)
    assert_same(got, want, False)
    others = torch.arange(600) != 300
    for which in (PARAMS, STATE1):
        assert got[PARAMS][0].isfinite()[others].all() and got[ABSMAX1][0].isfinite().all()
        assert torch.equal(got[which][1][others], clean[which][1][others])
    assert torch.equal(got[PARAMS][0][others], clean[PARAMS][0][others])
    if kind == "adamw":
        assert got[PARAMS][0][300].isfinite() == (abs(bad) == 1e30)
        assert got[ABSMAX2][0].isfinite().all()
        assert dynamic_map(CPU)[got[STATE1][0][300].long()] == 0
        assert got[STATE2][0][300] == 0


def test_blocks_too_small_to_scale_are_zero(backend: str) -> None:
    args = moment_args(torch.full((256,), 1e-39))
    run(args, backend)
    assert (dynamic_map(CPU)[args[STATE1][0].long()] == 0).all()


def test_stochastic_rounding_is_unbiased_and_takes_a_neighbour() -> None:
    exact = torch.full((200_000,), 1 + 2**-7 / 4)
    rounded = round_stochastically(exact, torch.tensor(3), 0, torch.tensor(1)).float()
    assert set(rounded.unique().tolist()) == {1.0, 1 + 2**-7}
    assert abs((rounded > 1).float().mean() - 0.25) < 0.005
    again = round_stochastically(exact, torch.tensor(3), 0, torch.tensor(2)).float()
    assert not torch.equal(rounded, again)
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0])
    kept = round_stochastically(special, torch.tensor(3), 0, torch.tensor(1)).float()
    assert kept.isnan().tolist() == [True, False, False, False] and torch.equal(kept[1:], special[1:])


def test_compensation_keeps_what_rounding_drops(backend: str) -> None:
    """A thousand steps too small for bf16 still move a compensated parameter."""
    for option, moved in (("", False), ("compensation", True)):
        args = list(adamw_args("adamw", [(256,)], [torch.bfloat16], [32], option))
        args[PARAMS][0].fill_(100.0)
        args[STATE1][0].zero_()
        args[STATE2][0].zero_()
        args[GRADS][0].fill_(1.0)
        args[13] = [0.0, 0.0]
        if option:
            args[COMPENSATION][0].zero_()
        for step in range(1, 101):
            args[STEP].fill_(step)
            run(tuple(args), backend)
        # Each step is 0.01 of parameters a quarter of 0.5 apart.
        assert bool((args[PARAMS][0] < 99.5).all()) is moved, option


@pytest.mark.parametrize("change, sentence", [
    ((GRADS, lambda t: t.double()), r"grads\[1\]: expected contiguous Float"),
    ((STATE2, lambda t: t.float()), r"state2\[1\]: expected contiguous (Byte|unsigned char)"),
    ((ABSMAX1, lambda t: t[:1]), r"absmax1\[1\]: expected 3 contiguous Float"),
    ((STATE1, lambda t: t[:5]), r"state1\[1\]: expected contiguous"),
])  # fmt: skip
def test_errors_change_nothing(backend: str, change: Any, sentence: str) -> None:
    if not backend.startswith(("cpu", "triton")):
        pytest.skip("checks of the op's own")
    args = adamw_args("adamw", [(600,)] * 2, [torch.float32] * 2, [8, 8])
    which, damage = change
    args[which][1] = damage(args[which][1])
    before = copied(args)
    with pytest.raises(RuntimeError, match=sentence):
        run(args, backend)
    assert_same(args, before, True)


def test_versions_are_incremented(backend: str) -> None:
    args = adamw_args("adamw", [(300,)], [torch.float32], [8])
    x = torch.ones(300, requires_grad=True)
    args[PARAMS][0].requires_grad_()
    loss = (x * args[PARAMS][0]).sum()
    with torch.no_grad():
        run(args, backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_clip_factor_refuses(compiled_ops: Any) -> None:
    with pytest.raises(RuntimeError, match="grads: expected some elements, got none"):
        compiled_ops.clip_factor([torch.empty(0)], None, 1.0)
    with pytest.raises(RuntimeError, match="max_grad_norm: expected a positive number, got 0"):
        compiled_ops.clip_factor([torch.ones(3)], None, 0.0)
    with pytest.raises(RuntimeError, match="grads: expected contiguous tensors"):
        compiled_ops.clip_factor([torch.ones(4, 3).t()], None, 1.0)

"""Checks this installation: versions, back ends and a self-test of a few seconds, with advice on problems.

Each usable back end computes forward, input gradient and LoRA with its gradients in fp32 and bf16, and is
compared with the reference in fp64. For each card it says up to how many rows of activations NF4 GEMMs are
fused. Exit code 1 if there are problems.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import PackedWeight, lora_linear, nf4_linear
from .. import __version__ as version
from ..core import dispatch, registry
from ..core.backends import BACKENDS, Backend, crossovers, cuda
from . import info
from .output import Output

SECONDS = 5.0
_NEEDED = {"transformers": (5, 0), "peft": (0, 18)}
_SHAPES = (
    # (rows, out, in, blocksize, double_quant): one row and many, blocks that cross rows, odd sizes
    (17, 192, 256, 64, True),
    (1, 192, 256, 64, True),
    (64, 128, 96, 64, False),
    (5, 33, 35, 32, True),
)
_RANK, _SCALING = 8, 0.5


@dataclass(frozen=True)
class Check:
    """The error of one result of one back end."""

    backend: str
    what: str
    dtype: str
    error: float
    allowed: float
    failure: str | None = None

    @property
    def passed(self) -> bool:
        return self.failure is None and self.error <= self.allowed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(arguments: argparse.Namespace, out: Output) -> bool:
    found, start = info.versions(), time.monotonic()
    out.say(f"peft_kernels {version}, torch {torch.__version__}", "bold")
    out.say(", ".join(f"{name} {number or 'not installed'}" for name, number in found.items()))
    reasons = {name: backend.probe() for name, backend in BACKENDS.items()}
    checks: list[Check] = []
    for name, backend in BACKENDS.items():
        if reasons[name] is not None:
            out.say(f"{name:<10} not usable: {reasons[name]}")
            continue
        out.say(f"{name:<10} usable: {backend.describe()}")
        if backend.device_type is not None:
            checks += self_test(backend, start + SECONDS)
    rows = list(_summary(checks))
    if rows:
        out.table(("back end", "self-test", "dtype", "error / allowed>", ""), rows)
    problems = list(_problems(found, reasons, checks))
    limits: list[dict[str, Any]] = []
    if reasons["cuda"] is None:
        try:
            limits = _crossovers()
        except ValueError as error:  # a file that cannot be used
            problems.append(str(error))
        for card, fault in cuda.BACKEND.wgmma_faults().items():
            problems.append(f"LinearWgmma is not used on {card}, please report this: {fault}")
    if limits:
        out.table(
            ("card", "GEMMs", "weights up to>", "fused rows>", "backward>", "by wgmma>", "backward>", ""),
            [[_cell(value) for value in row.values()] for row in limits],
        )
    for problem in problems:
        out.say(f"problem: {problem}", "red")
    out.say("problems found" if problems else "all is well", "bold")
    out.result(
        {
            "peft_kernels": version,
            "torch": torch.__version__,
            "libraries": found,
            "backends": {name: {"usable": why is None, "reason": why} for name, why in reasons.items()},
            "crossovers": limits,
            "checks": [vars(check) | {"passed": check.passed} for check in checks],
            "seconds": round(time.monotonic() - start, 2),
            "problems": problems,
        }
    )
    return not problems


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return f"{value[0]:,} to {_cell(value[1])}" if value else "-"
    return "any" if value is None else f"{value:,}" if isinstance(value, int) else value


def _crossovers() -> list[dict[str, Any]]:
    """Up to how many rows NF4 GEMMs are fused and for which by wgmma, for each card and size of weight: of a
    layer with one weight, or of an expert on average."""
    return [
        {
            "card": card,
            "gemms": {"rows": "of one weight", "experts": "of experts"}[name],
            "weights": _any_is_none(row.weights),
            "forward": row.forward,
            "backward": row.backward,
            "forward_wgmma": [*map(_any_is_none, row.forward_wgmma)] if row.forward_wgmma.most else [],
            "backward_wgmma": [*map(_any_is_none, row.backward_wgmma)] if row.backward_wgmma.most else [],
            "source": table.source,
        }
        for card, table in cuda.BACKEND.all_crossovers().items()
        for name, rows in table.limits._asdict().items()
        for row in rows
    ]


def _any_is_none(number: int) -> int | None:
    return None if number == crossovers.ANY else number


def self_test(backend: Backend, until: float) -> list[Check]:
    """Checks of one back end. Skips all but the first shape when the time is up."""
    checks: list[Check] = []
    for dtype in (torch.float32, torch.bfloat16):
        for number, shape in enumerate(_SHAPES):
            if number and time.monotonic() > until:
                break
            checks += _compare(backend, dtype, *shape)
    return checks


def _compare(
    backend: Backend, dtype: torch.dtype, rows: int, out: int, into: int, blocksize: int, nested: bool
) -> Iterator[Check]:
    device, name = backend.device_type or "cpu", str(dtype).removeprefix("torch.")
    generator = torch.Generator().manual_seed(rows * out + into)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    dense = random(out, into) * into**-0.5
    with dispatch.use_backend("reference"):
        packed = PackedWeight.quantize(dense, blocksize, nested)
    x, dy = random(rows, into).to(dtype), random(rows, out).to(dtype)
    a, b = random(_RANK, into) * into**-0.5, random(out, _RANK)
    truth = _reference(packed, x.double(), dy.double(), a, b)
    plain = _reference(packed, x, dy, a, b)
    try:
        with dispatch.use_backend(backend.name):
            weight: Any = packed.to(device)
            found = _compute(weight, x.to(device), dy.to(device), a.to(device), b.to(device))
    except Exception as error:  # a broken installation may raise anything
        reason = " ".join(str(error).split())[:200]
        yield Check(backend.name, "all", name, float("inf"), 0.0, f"{type(error).__name__}: {reason}")
        return
    for what, got in found.items():
        allowed = 2 * _error(plain[what], truth[what]) + torch.finfo(got.dtype).eps
        yield Check(backend.name, what, name, _error(got.cpu(), truth[what]), allowed)


def _compute(weight: PackedWeight, x: Tensor, dy: Tensor, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    x1, x2 = (x.detach().requires_grad_() for _ in range(2))
    a, b = a.requires_grad_(), b.requires_grad_()
    y = nf4_linear(x1, weight)
    y.backward(dy)
    z = lora_linear(x2, weight, a, b, _SCALING)
    z.backward(dy)
    return _named(y, x1.grad, z, x2.grad, a.grad, b.grad)


def _reference(weight: PackedWeight, x: Tensor, dy: Tensor, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """The same results in plain torch, in x's dtype."""
    base, plain = weight._state.op_args, {name: op.plain for name, op in registry.OPS.items()}
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    a, b, rest = a.to(kind), b.to(kind), (_SCALING, 0.0, None, None)
    y = plain["nf4_linear"](x, *base, weight.shape[0], None)
    dx = plain["nf4_linear_dx"](dy, *base, weight.shape[1])
    z, h = plain["lora_linear"](x, *base, None, a, b, *rest)
    return _named(y, dx, z, *plain["lora_linear_backward"](dy, x, h, *base, a, b, *rest, True, True, True))


def _named(*results: Any) -> dict[str, Tensor]:
    names = ("forward", "gradient of x", "LoRA", "LoRA, gradient of x", "gradient of A", "gradient of B")
    return {name: result.detach() for name, result in zip(names, results, strict=True)}


def _error(got: Tensor, truth: Tensor) -> float:
    difference = (got.double() - truth.double()).norm()
    return float(difference / truth.double().norm()) if bool(difference.isfinite()) else float("inf")


def _summary(checks: list[Check]) -> Iterator[tuple[str, ...]]:
    """Rows of the table, with the worst error of all shapes."""
    for key in dict.fromkeys((check.backend, check.what, check.dtype) for check in checks):
        same = [c for c in checks if (c.backend, c.what, c.dtype) == key]
        worst = max(same, key=lambda c: (not c.passed, c.error / max(c.allowed, 1e-30)))
        yield (*key, f"{worst.error:.2g} / {worst.allowed:.2g}", "ok" if worst.passed else "WRONG")


def _problems(
    found: dict[str, str | None], reasons: dict[str, str | None], checks: list[Check]
) -> Iterator[str]:
    for backend in dict.fromkeys(check.backend for check in checks if not check.passed):
        bad = [check for check in checks if check.backend == backend and not check.passed]
        what = bad[0].failure or f"{bad[0].what} in {bad[0].dtype} is wrong"
        yield (
            f"back end {backend}: {len(bad)} results are wrong, the first: {what}. Reinstall it "
            f"(pip install --no-deps --force-reinstall .); until then set PEFT_KERNELS_BACKEND=reference"
        )
    if reasons["cpu"] is not None:
        yield f"back end cpu: {reasons['cpu']}. Until then CPU tensors use plain torch, slowly"
    if torch.cuda.is_available() and reasons["cuda"] is not None and reasons["triton"] is not None:
        yield f"the GPU uses plain torch: cuda: {reasons['cuda']}; triton: {reasons['triton']}"
    with suppress(ValueError):
        name = dispatch.forced()
        if name is not None and reasons[name] is not None:
            yield f"PEFT_KERNELS_BACKEND={name} selects a back end that is not usable: {reasons[name]}"
    for library, needed in _NEEDED.items():
        number = found[library]
        if number is not None and _parts(number) < needed:
            wanted = ".".join(map(str, needed))
            yield f"{library} {number}: expected {wanted} or later (pip install --upgrade {library})"


def _parts(number: str) -> tuple[int, ...]:
    parts = (part for part in number.split(".")[:2])
    return tuple(int(part) if part.isdigit() else 0 for part in parts)

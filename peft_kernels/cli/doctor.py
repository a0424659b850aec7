"""Checks this installation: versions, back ends and the self-test of every kernel, with advice on problems.

The ops of each usable back end and their gradients are compared with the reference in fp64, on every device.
For each card it says up to how many rows of activations NF4 GEMMs are fused. Exit code 1 if there are
problems.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from .. import __version__ as version
from ..core import dispatch
from ..core.backends import BACKENDS, Backend, crossovers, cuda
from ..core.backends.base import DTYPES, name_of
from ..core.backends.self_test import compare, verdicts
from ..core.backends.self_test.cases import CASES
from ..core.backends.self_test.verdicts import OnCards
from . import info
from .output import Output

_NEEDED = {"transformers": (5, 0), "peft": (0, 18)}


@dataclass(frozen=True)
class Check:
    """What is wrong with an op of a back end on a device, if anything."""

    backend: str
    device: str
    op: str
    dtype: str
    fault: str | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seconds",
        type=float,
        default=float("inf"),
        metavar="S",
        help="start no test after so many seconds (run all)",
    )


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
        if isinstance(backend, OnCards) and verdicts.is_off():
            out.say(f"{'':<10} not tested: {verdicts.ENVIRONMENT_VARIABLE}=0")
        elif backend.device_type is not None:
            checks += self_test(backend, start + arguments.seconds)
    if time.monotonic() > start + arguments.seconds:
        out.say(f"the self-tests stopped after {arguments.seconds:g} s: where there is no answer, none ran")
    rows = list(_summary(checks))
    if rows:
        out.table(("back end", "device", "self-test", "fp32", "bf16", "fp16"), rows)
    problems = list(_problems(found, reasons, checks))
    limits: list[dict[str, Any]] = []
    if reasons["cuda"] is None:
        try:
            limits = _crossovers()
        except (ValueError, RuntimeError) as error:  # a file that cannot be used, a card that is lost
            problems.append(str(error))
        problems += cuda.BACKEND.self_test.found()  # of GEMMs one by one
    if limits:
        out.table(
            ("card", "GEMMs", "weights up to>", "fused rows>", "backward>", "by wgmma>", "backward>", ""),
            [[_cell(value) for value in row.values()] for row in limits],
        )
    problems = list(dict.fromkeys(problems))
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
            "checks": [vars(check) for check in checks],
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
        for card, table in cuda.BACKEND.all_crossovers(may_test=True).items()
        for name, rows in table.limits._asdict().items()
        for row in rows
    ]


def _any_is_none(number: int) -> int | None:
    return None if number == crossovers.ANY else number


def self_test(backend: Backend, until: float) -> list[Check]:
    """The self-tests of a back end's kernels on each device, until the time is up."""
    checks = list[Check]()
    for device, dtype, op in product(_devices(backend), DTYPES, CASES):
        if time.monotonic() > until:
            break
        try:
            fault = _fault(backend, op, dtype, device)
        except Exception as error:  # a broken installation may raise anything
            fault = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        checks.append(Check(backend.name, str(device), op, name_of(dtype), fault))
    return checks


def _devices(backend: Backend) -> list[torch.device]:
    if isinstance(backend, OnCards):
        return [torch.device("cuda", index) for index in backend.cards.usable()]
    return [torch.device("cpu")]


def _fault(backend: Backend, op: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """What is wrong with an op. On a card the test is that of its first use, and is remembered: a kernel that
    stops the card does not stop this process, nor a later one."""
    if not isinstance(backend, OnCards):
        return compare.fault_of(op, backend.namespace, device, dtype)
    before = len(backend.self_test.found())
    reason = backend.self_test.verdict(op, dtype, device)
    return reason or next(iter(backend.self_test.found()[before:]), None)


def _summary(checks: list[Check]) -> Iterator[tuple[str, ...]]:
    """A row for each op of each back end on each device."""
    for place in dict.fromkeys((check.backend, check.device, check.op) for check in checks):
        same = {check.dtype: check for check in checks if (check.backend, check.device, check.op) == place}
        states = (same.get(name_of(dtype)) for dtype in DTYPES)
        yield *place, *("-" if s is None else "WRONG" if s.fault else "ok" for s in states)


def _problems(
    found: dict[str, str | None], reasons: dict[str, str | None], checks: list[Check]
) -> Iterator[str]:
    for backend in dict.fromkeys(check.backend for check in checks if check.fault):
        bad = [check for check in checks if check.backend == backend and check.fault]
        if isinstance(BACKENDS[backend], OnCards):  # which does without them
            yield from (str(check.fault) for check in bad)
            continue
        yield (
            f"back end {backend}: {len(bad)} ops are wrong, the first: {bad[0].op} in {bad[0].dtype}: "
            f"{bad[0].fault}. Reinstall it (pip install --no-deps --force-reinstall .); until then set "
            "PEFT_KERNELS_BACKEND=reference"
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

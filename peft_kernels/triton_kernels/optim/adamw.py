"""A step of AdamW, Adam or Lion for all parameters in one launch. Moments, absmax and codes are bit-equal to
ops/optim.py, parameters up to the fp64 powers of beta.

There is no host synchronisation. Tensor addresses live in device tables, rewritten when tensors change
(tables.py). With max_grad_norm a first launch sums the squares of gradients in fp64, one partial sum per
program; all programs of the step add these in the same order, and so does clip_factor.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...ops.optim import KINDS, STATE_BLOCK
from ..core.common import check, check_dtype, check_float, check_numel, dtype_name
from ..core.gemm import multiprocessors
from ..core.launch import INTERPRETED, cdiv, config, launch
from ..core.tables import StreamCache, words_on_device
from .adamw_kernels import (
    CHUNK,
    IS_ALIGNED,
    IS_BF16,
    IS_CODED,
    IS_WIDE,
    adamw_kernel,
    factor_kernel,
    squares_kernel,
)
from .dynamic_codes import codes_on

STEP = config(4, 1)
SQUARES = config(4, 1)
PROGRAMS = 5  # per multiprocessor, as registers allow


class Table(NamedTuple):
    """Addresses and sizes of parameters, for kernels; words as in adamw_kernels.py."""

    rows: Tensor  # int64 [parameters, WORDS]
    groups: Tensor  # int64 [groups, 2 GROUP_NUMBERS]
    shares: Tensor  # int64 [programs + 1, 2]: each program's first parameter and first chunk


class Prepared(NamedTuple):
    """Checked parameters."""

    table: Table | None  # None: no elements
    programs: int
    compensated: bool


class StepOptions(NamedTuple):
    """Optional inputs of a step, on the device."""

    grad_scale: Tensor | None
    found_inf: Tensor | None
    seed: Tensor | None
    sums: Tensor | None  # fp64 [programs]: squares of gradients
    factor: Tensor | None  # replaces grad_scale and sums


class Entry(NamedTuple):
    """A row of the table, without its first chunk."""

    addresses: tuple[int, ...]
    numel: int
    flags: int
    group: int


_prepared: StreamCache[Prepared] = StreamCache()
_counted: StreamCache[tuple[Table | None, int]] = StreamCache()
_addresses: StreamCache[Tensor] = StreamCache()


def adamw(args: Any) -> None:
    check(args.kind in KINDS, "kind", "adamw, adam or lion", args.kind)
    _check_counts(args)
    if not args.params:
        return
    device = args.params[0].device
    _check_can_follow(device, "params")
    _check_numbers(args, device)
    described = _prepared.find(_key(args), lambda: _prepare(args))
    _check_grads(args.grads, args.params)
    if described.table is None:
        return
    addresses = _addresses_of(args.grads)
    sums = None
    if args.max_grad_norm > 0 and args.factor is None:
        sums = _squares(described.table, described.programs, addresses, args.grad_scale)
    extras = StepOptions(args.grad_scale, args.found_inf, args.seed, sums, args.factor)
    grid, lion = (described.programs,), args.kind == "lion"
    codes = codes_on(device, True), None if lion else codes_on(device, False)
    launch(
        adamw_kernel, grid, described.table, addresses, args.step, args.lr, extras, codes,
        float(args.max_grad_norm), config=STEP, LION=lion,
        COMPENSATED=described.compensated, enable_fp_fusion=False,
    )  # fmt: skip


def clip_factor(args: Any) -> Tensor:
    check(args.max_grad_norm > 0, "max_grad_norm", "a positive number", args.max_grad_norm)
    check(any(g.numel() for g in args.grads), "grads", "some elements", "none")
    device = args.grads[0].device
    _check_can_follow(device, "grads")
    for g in args.grads:
        check_float(g, "grads")
        fits = g.is_contiguous() and g.device == device
        check(fits, "grads", "contiguous tensors on one device", f"strides {g.stride()} on {g.device}")
    _check_vector(args.grad_scale, torch.float32, 1, "grad_scale", device)
    entries = [Entry((0,) * 6, g.numel(), _flags(g.dtype), 0) for g in args.grads]
    table, programs = _counted.find((entries, device), lambda: _table(entries, [], device))
    sums = _squares(table, programs, _addresses_of(args.grads), args.grad_scale)
    factor = torch.empty((), device=device)
    extras = StepOptions(args.grad_scale, None, None, sums, None)
    launch(
        factor_kernel, (programs,), extras, float(args.max_grad_norm), factor, config=STEP,
        enable_fp_fusion=False,
    )  # fmt: skip
    return factor


def _squares(table: Table | None, programs: int, addresses: Tensor, grad_scale: Tensor | None) -> Tensor:
    sums = torch.empty(programs, dtype=torch.float64, device=addresses.device)
    launch(
        squares_kernel, (programs,), table, addresses, grad_scale, sums, config=SQUARES,
        enable_fp_fusion=False,
    )  # fmt: skip
    return sums


def _addresses_of(grads: Sequence[Tensor]) -> Tensor:
    where = [grad.data_ptr() for grad in grads]
    return _addresses.find(where, lambda: words_on_device(where, grads[0].device))


def _key(args: Any) -> Any:
    """Everything that `_prepare` reads. An address implies the device."""
    lists = args.params, args.state1, args.state2, args.absmax1, args.absmax2, args.compensation
    return [
        [[(t.data_ptr(), t.dtype, t.shape, t.is_contiguous()) for t in tensors] for tensors in lists],
        args.kind,
        [tuple(n) for n in (args.group, args.beta1, args.beta2, args.eps, args.weight_decay)],
    ]


def _prepare(args: Any) -> Prepared:
    for i in range(len(args.params)):
        _check_parameter(args, i)
    entries = []
    for i, p in enumerate(args.params):
        lists = args.params, args.state1, args.state2, args.absmax1, args.absmax2, args.compensation
        # 0 for absent tensors and those without elements.
        addresses = tuple(tensors[i].data_ptr() if tensors else 0 for tensors in lists)
        flags = (
            _flags(p.dtype)
            + IS_CODED.value * (args.state1[i].dtype == torch.uint8)
            + IS_ALIGNED.value * all(addresses[at] % 16 == 0 for at in (0, 1, 2, 5))
        )
        entries.append(Entry(addresses, p.numel(), flags, args.group[i]))
    groups = [
        half
        for beta1, beta2, eps, decay in zip(args.beta1, args.beta2, args.eps, args.weight_decay, strict=True)
        for half in struct.unpack("<10I", struct.pack("<5d", beta1, beta2, eps, *_decays(args.kind, decay)))
    ]
    table, programs = _table(entries, groups, args.params[0].device)
    return Prepared(table, programs, any(t.numel() for t in args.compensation))


def _flags(dtype: torch.dtype) -> int:
    found: int = IS_WIDE.value * (dtype == torch.float32) + IS_BF16.value * (dtype == torch.bfloat16)
    return found


def _table(entries: Sequence[Entry], groups: list[int], device: torch.device) -> tuple[Table | None, int]:
    """The table and its number of programs. None without elements."""
    firsts = [0, *accumulate(cdiv(entry.numel, CHUNK.value) for entry in entries)]
    if firsts[-1] == 0:
        return None, 0
    rows = [
        word
        for entry, first in zip(entries, firsts, strict=False)
        for word in (*entry.addresses, entry.numel, first, entry.flags, entry.group)
    ]
    programs = min(firsts[-1], PROGRAMS * multiprocessors(device))
    shares: list[int] = []
    for program in range(programs + 1):
        begin = firsts[-1] * program // programs
        shares += [bisect_right(firsts, begin) - 1, begin]
    parts = [rows, groups, shares]
    sizes = list(map(len, parts))
    table = Table(
        *words_on_device([word for words in parts for word in words], device)[: sum(sizes)].split(sizes)
    )
    return table, programs


def _decays(kind: str, decay: float) -> tuple[float, float]:
    """(decay of the parameter, decay added to the gradient)."""
    return (0.0, decay) if kind == "adam" else (decay, 0.0)


def _check_counts(args: Any) -> None:
    n = len(args.params)
    second = 0 if args.kind == "lion" else n
    expected = {"grads": n, "state1": n, "state2": second, "absmax1": n, "absmax2": second, "group": n}
    if args.compensation:
        expected["compensation"] = n
    expected |= dict.fromkeys(("beta2", "eps", "weight_decay"), len(args.beta1))
    for name, count in expected.items():
        got = len(getattr(args, name))
        check(got == count, name, f"{count} entries", got)


def _check_numbers(args: Any, device: torch.device) -> None:
    """Checks the tensors that parameters share."""
    for name, dtype, count in (
        ("step", torch.int64, len(args.params)),
        ("lr", torch.float32, len(args.beta1)),
        ("grad_scale", torch.float32, 1),
        ("found_inf", torch.float32, 1),
        ("seed", torch.int64, 1),
        ("factor", torch.float32, 1),
    ):
        _check_vector(getattr(args, name), dtype, count, name, device)


def _check_vector(t: Tensor | None, dtype: torch.dtype, count: int, name: str, device: torch.device) -> None:
    if t is None:
        return
    check_dtype(t, dtype, name)
    check_numel(t, count, name)
    check(t.device == device, name, f"a tensor on {device} like the others", t.device)
    check(t.is_contiguous(), name, "a contiguous tensor", "one that is not")


def _check_can_follow(device: torch.device, name: str) -> None:
    """Raises for tensors off the CPU in the interpreter, which copies them, so that addresses are invalid."""
    check(not INTERPRETED or device.type == "cpu", name, "tensors on the CPU, for the interpreter", device)


def _check_parameter(args: Any, i: int) -> None:
    p = args.params[i]
    check_float(p, "params")
    device = args.params[0].device
    _check_entry(p, p, p.dtype, device, f"params[{i}]")
    moments = [("1", args.state1[i], args.absmax1[i])]
    if args.kind != "lion":
        moments.append(("2", args.state2[i], args.absmax2[i]))
    dtype = torch.uint8 if args.state1[i].dtype == torch.uint8 else torch.float32
    for number, state, absmax in moments:
        _check_entry(state, p, dtype, device, f"state{number}[{i}]")
        if dtype != torch.uint8:
            continue
        blocks = cdiv(p.numel(), STATE_BLOCK)
        fits = absmax.dtype == torch.float32 and absmax.numel() == blocks and absmax.is_contiguous()
        check(
            fits and absmax.device == device, f"absmax{number}[{i}]",
            f"{blocks} contiguous Float values on {device}",
            f"{absmax.numel()} of {dtype_name(absmax.dtype)} on {absmax.device}",
        )  # fmt: skip
    if args.compensation and args.compensation[i].numel():
        name = f"compensation[{i}]"
        check(p.dtype == torch.bfloat16, name, "one for bf16 parameters", f"one of {dtype_name(p.dtype)}")
        _check_entry(args.compensation[i], p, torch.bfloat16, device, name)
    groups = len(args.beta1)
    check(0 <= args.group[i] < groups, f"group[{i}]", f"0 to {groups - 1}", args.group[i])


def _check_grads(grads: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    for i, (g, p) in enumerate(zip(grads, params, strict=True)):
        if g.dtype != p.dtype or g.shape != p.shape or g.device != p.device or not g.is_contiguous():
            _check_entry(g, p, p.dtype, p.device, f"grads[{i}]")


def _check_entry(t: Tensor, like: Tensor, dtype: torch.dtype, device: torch.device, name: str) -> None:
    fits = t.dtype == dtype and t.shape == like.shape and t.device == device
    check(
        fits and t.is_contiguous(), name,
        f"contiguous {dtype_name(dtype)} of shape {list(like.shape)} on {device} like params",
        f"{dtype_name(t.dtype)} of shape {list(t.shape)} on {t.device}"
        + ("" if t.is_contiguous() else ", not contiguous"),
    )  # fmt: skip

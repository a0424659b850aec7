"""The arguments of a step's op call, built once and reused while the same parameters have gradients.

With paged states a step is several op calls, with the same bits. The clipping factor is then computed first,
from all gradients. Random bits of stochastic rounding depend on a parameter's position in the list, so bf16
parameters are split into pieces of STREAM elements that are never split further and keep their positions
(earlier positions are empty). Other parameters may be split between any blocks of moments.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core import dispatch
from ..ops.optim import STATE_BLOCK
from .paging import CURRENT, SLOTS, Chunk, Piece, Ring, split_to_chunks
from .sharded import check_gradient, is_sharded, part_of

STREAM = 1 << 22
"""Elements of a bf16 parameter per stream of random bits."""
PARAMS, GRADS, STATE1, STATE2, ABSMAX1, ABSMAX2, COMPENSATION = range(7)
"""Positions of the op's lists."""


def check(p: Tensor, grad: Tensor, name: str, dtype: torch.dtype, shape: Sequence[int]) -> None:
    """Raises ValueError or RuntimeError for a parameter or gradient that a step cannot take. `dtype` and
    `shape` are those of the parameter, or of its local shard, when its state was created."""
    check_gradient(p, grad, name)
    p, grad = part_of(p), part_of(grad)
    if p.dtype != dtype or p.shape != shape:
        raise ValueError(
            f"{name}: was {dtype} of shape {tuple(shape)} when its state was made, is {p.dtype} of shape "
            f"{tuple(p.shape)} now: load this optimizer's state_dict into a new one"
        )
    if grad.layout != torch.strided:
        raise RuntimeError(f"{name}: its gradient is sparse, expected a dense one")
    for t, of in ((p, ""), (grad, "gradient: ")):
        if t.is_meta or (t.numel() and not t.untyped_storage().nbytes()):
            there = "is on device meta" if t.is_meta else "has been freed"
            raise ValueError(f"{name}: {of}expected a tensor with data, but its memory {there}")
    if grad.dtype != p.dtype or grad.shape != p.shape or grad.device != p.device:
        raise ValueError(
            f"{name}: gradient: expected {p.dtype} of shape {tuple(p.shape)} on {p.device}, got "
            f"{grad.dtype} of shape {tuple(grad.shape)} on {grad.device}"
        )
    if any(step == 0 and size > 1 for step, size in zip(p.stride(), p.shape, strict=True)):
        raise ValueError(f"{name}: expected elements in memory of their own, got strides {p.stride()}")


def _cut(sizes: Sequence[int], whole: Sequence[bool]) -> Iterator[tuple[int, int, int]]:
    """The pieces of parameters, (owner, start, stop). `whole`: those with streams of random bits."""
    for owner, size in enumerate(sizes):
        step = STREAM if whole[owner] else max(size, 1)
        for start in range(0, max(size, 1), step):
            yield owner, start, min(start + step, size)


class Plan:
    """Parameters on one device with the same shard number (`Layout.number`), their states as lists, and their
    steps as one tensor, of which the states' `step` are views."""

    def __init__(
        self,
        parameters: Sequence[Tensor],
        names: Sequence[str],
        states: Sequence[dict[str, Any]],
        groups: Sequence[int],
        kind: str,
        number: int,
        stochastic: bool,
        ring: Ring | None,
        paged: Sequence[bool],
    ) -> None:
        self.parameters, self.names, self.kind, self.number = list(parameters), list(names), kind, number
        self.is_sharded = any(map(is_sharded, parameters))
        mine = self.parts(parameters)
        self.dtypes, self.sizes = [p.dtype for p in mine], [p.numel() for p in mine]
        self.shapes = [state["state1"].shape for state in states]
        device = parameters[0].device
        self.device = device
        self.none = torch.empty(0, device=device)
        whole = [stochastic and dtype == torch.bfloat16 for dtype in self.dtypes]
        self.pieces = list(_cut(self.sizes, whole))
        self.groups = [groups[owner] for owner, _, _ in self.pieces]
        self.states: list[list[Tensor]] = [[], [], [], [], []]  # STATE1 to COMPENSATION
        units = {"state1": 1, "state2": 1, "absmax1": STATE_BLOCK, "absmax2": STATE_BLOCK, "compensation": 1}
        for at, (name, unit) in enumerate(units.items()):
            # A moment has a list of scales even if all are in fp32: of empty tensors.
            if any(name.replace("absmax", "state") in state for state in states):
                self.states[at] = self._in_pieces([s.get(name, self.none) for s in states], unit)
        steps = [torch.as_tensor(s["step"], dtype=torch.int64, device=device).reshape(()) for s in states]
        self.steps = torch.stack([steps[owner] for owner, _, _ in self.pieces])
        for (owner, start, _), step in zip(self.pieces, self.steps.unbind(), strict=True):
            if start == 0:
                states[owner]["step"] = step
        self.lr = torch.empty(0, dtype=torch.float32, device=device)
        self.lr_values: list[float] = []
        # The kernel is selected by one parameter; other dtypes need the reference implementation.
        known = (torch.float32, torch.bfloat16, torch.float16)
        self.like = part_of(next((p for p in parameters if p.dtype not in known), parameters[0]))
        self.paged = [paged[owner] for owner, _, _ in self.pieces]
        self.ring = ring if any(paged) else None
        self.chunks: list[Chunk] = []
        self.host: list[list[Tensor]] = []  # flat host tensors of each chunk
        self.page_bytes = 0  # of buffers during a step
        if self.ring is not None:
            self._page(self.ring, whole)

    def _page(self, ring: Ring, whole: Sequence[bool]) -> None:
        sizes = [
            Piece(stop - start, tuple(t.itemsize for t in self._host_of(i)), whole[owner], self.names[owner])
            for i, (owner, start, stop) in enumerate(self.pieces)
        ]
        self.chunks = split_to_chunks(sizes, ring.budget)
        self.page_bytes = min(SLOTS, len(self.chunks)) * max(chunk.nbytes for chunk in self.chunks)
        self.host = [
            [
                t.view(-1)[start:stop]
                for i, (start, stop) in enumerate(chunk.parts, chunk.first)
                for t in self._host_of(i)
            ]
            for chunk in self.chunks
        ]

    def _in_pieces(self, tensors: Sequence[Tensor], unit: int = 1) -> list[Tensor]:
        """Splits tensors that have one entry per `unit` elements of a parameter, or none, to pieces."""
        if len(self.pieces) == len(tensors):
            return list(tensors)
        found = []
        for owner, start, stop in self.pieces:
            t = tensors[owner]
            is_all = start == 0 and stop == self.sizes[owner]
            found.append(t if is_all else t.view(-1)[start // unit : -(-stop // unit)])
        return found

    def _host_of(self, piece: int) -> list[Tensor]:
        """The tensors of a piece that are in host memory."""
        if not self.paged[piece]:
            return []
        lists = (self.states[at - STATE1] for at in (STATE1, STATE2, COMPENSATION))
        return [tensors[piece] for tensors in lists if tensors and tensors[piece].numel() > 0]

    def is_in_place(self) -> bool:
        """Whether the parameters are still on the plan's device."""
        return all(p.device == self.device for p in self.parameters)

    def check(self, grads: Sequence[Tensor]) -> None:
        """Raises ValueError or RuntimeError for what a step cannot take."""
        if self.is_sharded:
            for p, g, name in zip(self.parameters, grads, self.names, strict=True):
                check_gradient(p, g, name)
        described = zip(self.parts(self.parameters), self.parts(grads), self.dtypes, self.shapes, strict=True)
        for i, (p, g, dtype, shape) in enumerate(described):
            if (
                not p.dtype == dtype == g.dtype
                or not p.shape == shape == g.shape
                or g.device != self.device
                or g.layout != torch.strided
                or not p.is_contiguous()
                or not p.untyped_storage().nbytes()
                or not g.untyped_storage().nbytes()
            ):
                check(p, g, self.names[i], dtype, shape)

    def parts(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The local shards of DTensors."""
        return [part_of(t) for t in tensors] if self.is_sharded else list(tensors)

    def run(
        self,
        grads: Sequence[Tensor],
        configs: Sequence[Mapping[str, Any]],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        max_grad_norm: float,
        seed: Tensor | None,
    ) -> None:
        """Runs a step on checked gradients, with the hyperparameters of each group."""
        scale = None if grad_scale is None else grad_scale.to(self.device, torch.float32)
        inf = None if found_inf is None else found_inf.to(self.device, torch.float32)
        mine = self.parts(self.parameters)
        parameters = [p if p.is_contiguous() else p.detach().contiguous() for p in mine]
        gradients = [g.contiguous() for g in self.parts(grads)]
        made: Any = 1 if inf is None else (inf.reshape(()) == 0).long()
        numbers = (
            self._lr(configs), [c["betas"][0] for c in configs], [c["betas"][1] for c in configs],
            [c.get("eps", 0.0) for c in configs], [c["weight_decay"] for c in configs], self.kind, scale, inf,
            max_grad_norm, seed,
        )  # fmt: skip
        lists = [self._in_pieces(parameters), self._in_pieces(gradients), *self.states]
        if self.ring is not None:
            self._run_paged(self.ring, lists, numbers, made)
        else:
            self.steps += made
            try:
                dispatch.call("adamw", *lists, self.steps, self.groups, *numbers, None, like=self.like)
            except BaseException:
                self.steps -= made
                raise
        for p, changed in zip(mine, parameters, strict=True):
            if p is not changed:
                copy = partial(p.copy_, changed)
                copy() if self.ring is None else self.ring.streams.enqueue(CURRENT, copy)

    def _run_paged(
        self, ring: Ring, lists: Sequence[list[Tensor]], numbers: tuple[Any, ...], made: Any
    ) -> None:
        """One op call per chunk, bit-identical to a single call."""
        *_, scale, _, max_grad_norm, seed = numbers
        factor = None
        if max_grad_norm > 0:
            factor = dispatch.call("clip_factor", lists[GRADS], scale, max_grad_norm, like=self.like)
        done = 0

        def compute(number: int, there: list[Tensor]) -> None:
            nonlocal done
            chunk = self.chunks[number]
            part = self._part(lists, chunk, there, seed is not None)
            dispatch.call("adamw", *part, *numbers, factor, like=self.like)
            done = chunk.first + len(chunk.parts)

        ring.streams.enqueue(CURRENT, lambda: self.steps.add_(made))
        try:
            ring.run(self.host, compute)
        except BaseException:
            self.steps[done:] -= made
            raise

    def _part(
        self, lists: Sequence[list[Tensor]], chunk: Chunk, there: Sequence[Tensor], keep_places: bool
    ) -> tuple[Any, ...]:
        """The op's lists, steps and groups for a chunk. `there` holds the copied host tensors."""
        before = chunk.first if keep_places else 0
        first, stop = chunk.first, chunk.first + len(chunk.parts)
        brought = iter(there)
        found: list[list[Tensor]] = [[self.none] * before if tensors else [] for tensors in lists]
        for i, (start, end) in enumerate(chunk.parts, first):
            for at, tensors in enumerate(lists):
                if not tensors:
                    continue
                t = tensors[i]
                if not self.paged[i]:
                    found[at].append(t)
                elif at in (ABSMAX1, ABSMAX2):
                    found[at].append(t[start // STATE_BLOCK : -(-end // STATE_BLOCK)])
                elif at in (PARAMS, GRADS) or t.numel() == 0:
                    found[at].append(t.view(-1)[start:end])
                else:
                    found[at].append(next(brought))
        groups = [0] * before + self.groups[first:stop]
        return *found, self.steps[first - before : stop], groups

    def _lr(self, configs: Sequence[Mapping[str, Any]]) -> Tensor:
        """Learning rates on the device, in the same memory each time, which a captured graph may read. Copied
        only when they change."""
        values = [c["lr"] for c in configs]
        if any(isinstance(value, Tensor) for value in values):
            return torch.stack(
                [torch.as_tensor(v, dtype=torch.float32, device=self.device).reshape(()) for v in values]
            )
        if values != self.lr_values:
            self.lr.resize_(len(values)).copy_(torch.tensor(values, dtype=torch.float32))
            self.lr_values = values
        return self.lr

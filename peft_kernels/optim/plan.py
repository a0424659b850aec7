"""What one step hands to the op, gathered once and used until the parameters with a gradient are others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from .sharded import check_gradient, is_sharded, part_of
from .states import moment_names


def check(p: Tensor, grad: Tensor, name: str, dtype: torch.dtype, shape: Sequence[int]) -> None:
    """ValueError or RuntimeError that names what a step cannot take. `dtype` and `shape` are those of the
    parameter, or of this process's part of it, when its state was made."""
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


class Plan:
    """Parameters on one device, of DTensors the parts of one number (`Layout.number`), their states as lists,
    and their steps as one tensor, of which the states' `step` are views."""

    def __init__(
        self,
        parameters: Sequence[Tensor],
        names: Sequence[str],
        dtypes: Sequence[torch.dtype],
        states: Sequence[dict[str, Any]],
        groups: Sequence[int],
        kind: str,
        number: int,
    ) -> None:
        self.parameters, self.names, self.groups, self.kind = list(parameters), names, list(groups), kind
        self.dtypes, self.number = list(dtypes), number
        self.is_sharded = any(map(is_sharded, parameters))
        self.shapes = [state["state1"].shape for state in states]
        device = parameters[0].device
        self.device = device
        none = torch.empty(0, device=device)
        self.moments: list[list[Tensor]] = [[], []]
        self.absmax: list[list[Tensor]] = [[], []]
        for i in moment_names(kind == "lion"):
            self.moments[i - 1] = [state[f"state{i}"] for state in states]
            self.absmax[i - 1] = [state.get(f"absmax{i}", none) for state in states]
        compensations = [state.get("compensation") for state in states]
        self.compensation = (
            [none if c is None else c for c in compensations]
            if any(c is not None for c in compensations)
            else []
        )
        steps = [torch.as_tensor(s["step"], dtype=torch.int64, device=device).reshape(()) for s in states]
        self.steps = torch.stack(steps)
        for state, step in zip(states, self.steps.unbind(), strict=True):
            state["step"] = step
        self.lr = torch.empty(0, dtype=torch.float32, device=device)
        self.lr_values: list[float] = []
        # A kernel's choice goes by one parameter: the reference alone knows other dtypes.
        known = (torch.float32, torch.bfloat16, torch.float16)
        self.like = part_of(next((p for p in parameters if p.dtype not in known), parameters[0]))

    def is_in_place(self) -> bool:
        """Whether its parameters are on the device that they were on."""
        return all(p.device == self.device for p in self.parameters)

    def check(self, grads: Sequence[Tensor]) -> None:
        """ValueError or RuntimeError that names what a step cannot take."""
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
        """What this process has of them."""
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
        """One step, of checked gradients, with the hyperparameters of each group."""
        scale = None if grad_scale is None else grad_scale.to(self.device, torch.float32)
        inf = None if found_inf is None else found_inf.to(self.device, torch.float32)
        mine = self.parts(self.parameters)
        parameters = [p if p.is_contiguous() else p.detach().contiguous() for p in mine]
        made: Any = 1 if inf is None else (inf.reshape(()) == 0).long()
        self.steps += made
        try:
            dispatch.call(
                "adamw", parameters, [g.contiguous() for g in self.parts(grads)], *self.moments, *self.absmax,
                self.compensation, self.steps, self.groups, self._lr(configs),
                [c["betas"][0] for c in configs], [c["betas"][1] for c in configs],
                [c.get("eps", 0.0) for c in configs], [c["weight_decay"] for c in configs], self.kind, scale,
                inf, max_grad_norm, seed, None, like=self.like,
            )  # fmt: skip
        except BaseException:
            self.steps -= made
            raise
        for p, changed in zip(mine, parameters, strict=True):
            if p is not changed:
                p.copy_(changed)

    def _lr(self, configs: Sequence[Mapping[str, Any]]) -> Tensor:
        """On the device; written there again only when it is another, to the same memory, which a captured
        graph may read; and never read back."""
        values = [c["lr"] for c in configs]
        if any(isinstance(value, Tensor) for value in values):
            return torch.stack(
                [torch.as_tensor(v, dtype=torch.float32, device=self.device).reshape(()) for v in values]
            )
        if values != self.lr_values:
            self.lr.resize_(len(values)).copy_(torch.tensor(values, dtype=torch.float32))
            self.lr_values = values
        return self.lr

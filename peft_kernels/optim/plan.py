"""What one step hands to the op, gathered once and used until the parameters with a gradient are others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from .states import moment_names


class Plan:
    """Parameters on one device, their states as lists, and their steps as one tensor, of which the states'
    `step` are views."""

    def __init__(
        self,
        parameters: Sequence[Tensor],
        names: Sequence[str],
        dtypes: Sequence[torch.dtype],
        states: Sequence[dict[str, Any]],
        groups: Sequence[int],
        kind: str,
    ) -> None:
        self.parameters, self.names, self.groups, self.kind = list(parameters), names, list(groups), kind
        self.dtypes = list(dtypes)
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
        self.like = next((p for p in parameters if p.dtype not in known), parameters[0])

    def serves(self, parameters: Sequence[Tensor]) -> bool:
        """Whether it is for just these, where they were."""
        mine = self.parameters
        return (
            len(parameters) == len(mine)
            and all(map(is_, parameters, mine))
            and all(p.device == self.device for p in parameters)
        )

    def check(self, grads: Sequence[Tensor]) -> None:
        """ValueError or RuntimeError that names what a step cannot take."""
        parameters = self.parameters
        if [p.dtype for p in parameters] != self.dtypes or [p.shape for p in parameters] != self.shapes:
            for p, name, dtype, shape in zip(parameters, self.names, self.dtypes, self.shapes, strict=True):
                if p.dtype != dtype or p.shape != shape:
                    raise ValueError(
                        f"{name}: was {dtype} of shape {tuple(shape)} when its state was made, is "
                        f"{p.dtype} of shape {tuple(p.shape)} now: load this "
                        "optimizer's state_dict into a new one"
                    )
        for g, p, name in zip(grads, parameters, self.names, strict=True):
            if g.dtype != p.dtype or g.shape != p.shape or g.device != p.device or g.layout != torch.strided:
                if g.layout != torch.strided:
                    raise RuntimeError(f"{name}: its gradient is sparse, expected a dense one")
                raise ValueError(
                    f"{name}: gradient: expected {p.dtype} of shape {tuple(p.shape)} on {p.device}, got "
                    f"{g.dtype} of shape {tuple(g.shape)} on {g.device}"
                )

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
        parameters = [p if p.is_contiguous() else p.detach().contiguous() for p in self.parameters]
        made: Any = 1 if inf is None else (inf.reshape(()) == 0).long()
        self.steps += made
        try:
            dispatch.call(
                "adamw", parameters, [g.contiguous() for g in grads], *self.moments, *self.absmax,
                self.compensation, self.steps, self.groups, self._lr(configs),
                [c["betas"][0] for c in configs], [c["betas"][1] for c in configs],
                [c.get("eps", 0.0) for c in configs], [c["weight_decay"] for c in configs], self.kind, scale,
                inf, max_grad_norm, seed, like=self.like,
            )  # fmt: skip
        except BaseException:
            self.steps -= made
            raise
        for p, changed in zip(self.parameters, parameters, strict=True):
            if p is not changed:
                p.copy_(changed)

    def _lr(self, configs: Sequence[Mapping[str, Any]]) -> Tensor:
        """On the device; written there again only when it is another, and never read back."""
        values = [c["lr"] for c in configs]
        if any(isinstance(value, Tensor) for value in values):
            return torch.stack(
                [torch.as_tensor(v, dtype=torch.float32, device=self.device).reshape(()) for v in values]
            )
        if values != self.lr_values:
            self.lr, self.lr_values = torch.tensor(values, dtype=torch.float32, device=self.device), values
        return self.lr

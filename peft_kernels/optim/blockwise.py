"""Behind AdamW8bit and its kin: torch's interface, bitsandbytes' states, one op call a step."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from copy import copy
from itertools import chain
from numbers import Integral
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from ..core import dispatch
from ..core.code_tables import dynamic_map
from .checkpoint import read
from .groups import UNSUPPORTED, check_number, check_numbers
from .pager import Pager
from .plan import Plan, check
from .sharded import Layout, clipped_scale, is_sharded, part_of, refuse_flat_parts
from .states import blocks_of, moment_names

ROUNDINGS = ("nearest", "stochastic", "kahan")
OVERRIDES = ("lr", "betas", "eps", "weight_decay", "optim_bits", "min_8bit_size")


class BlockwiseOptimizer(torch.optim.Optimizer):
    """See the classes made of it; `options` are those of their keyword arguments that are no group's."""

    # GradScaler hands over grad_scale and found_inf instead of reading found_inf on the host.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        kind: str,
        optim_bits: int,
        min_8bit_size: int,
        is_paged: bool,
        args: Any = None,
        max_grad_norm: float | None = None,
        rounding: str = "nearest",
        seed: int = 0,
        page_budget: int | None = None,
    ) -> None:
        if args is not None:
            min_8bit_size = args.min_8bit_size
            if getattr(args, "max_unorm", 0) > 0 or getattr(args, "skip_zeros", False):
                raise ValueError("args: max_unorm and skip_zeros are not supported, expected 0 and False")
        if optim_bits not in (8, 32):
            raise ValueError(f"optim_bits: expected 8 or 32, got {optim_bits}")
        if rounding not in ROUNDINGS:
            raise ValueError(f"rounding: expected one of {', '.join(ROUNDINGS)}, got {rounding!r}")
        if max_grad_norm is not None and not 0 < max_grad_norm < math.inf:
            raise ValueError(f"max_grad_norm: expected a positive number or None, got {max_grad_norm}")
        if not isinstance(seed, int | Integral):
            raise ValueError(f"seed: expected a whole number, got {seed}")
        check_numbers(defaults)
        self._kind, self._rounding, self._seed = kind, rounding, seed
        self._max_grad_norm = max_grad_norm or 0.0
        self._bits = {"optim_bits": optim_bits, "min_8bit_size": min_8bit_size}
        self._page_budget = page_budget
        self._pager = Pager(is_paged, page_budget)
        self._overrides: dict[Tensor, dict[str, Any]] = {}
        self._dtypes: dict[Tensor, torch.dtype] = {}
        self._seeds: dict[tuple[torch.device, int], Tensor] = {}
        self._forget()
        super().__init__(params, defaults)

    @property
    def is_paged(self) -> bool:
        return self._pager.is_paged

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        checked = (*self.defaults, *UNSUPPORTED)
        check_numbers({name: param_group[name] for name in checked if name in param_group})
        super().add_param_group(param_group)

    def override_config(
        self,
        parameters: Tensor | Iterable[Tensor],
        key: str | None = None,
        value: Any = None,
        key_value_dict: dict[str, Any] | None = None,
    ) -> None:
        """Give some parameters hyperparameters of their own, as bitsandbytes' GlobalOptimManager does.

        Parameters
        ----------
        parameters : Tensor or iterable of Tensor
            Of this optimizer.
        key : str
            "lr", "betas", "eps", "weight_decay", "optim_bits" or "min_8bit_size". The last two count when the
            state is made, in a parameter's first step.
        value : any
            In place of what its group says. A scheduler does not change it.
        key_value_dict : dict
            Several at once, in place of key and value.

        Raises
        ------
        ValueError
            No such key, a value out of range, or a parameter of which the state is there in other bits.
        """
        changes = {key: value} if key_value_dict is None else dict(key_value_dict)
        unknown = [str(name) for name in changes if name not in OVERRIDES]
        if unknown:
            raise ValueError(f"key: expected one of {', '.join(OVERRIDES)}, got {', '.join(unknown)}")
        changed = {str(name): v for name, v in changes.items()}
        check_numbers(changed)
        if changed.get("optim_bits", 8) not in (8, 32):
            raise ValueError(f"optim_bits: expected 8 or 32, got {changed['optim_bits']}")
        mine = set(self._mine())
        chosen = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        for p in chosen:
            if p not in mine:
                raise ValueError("parameters: expected parameters of this optimizer, got another")
            if self.state.get(p) and {"optim_bits", "min_8bit_size"} & set(changed):
                raise ValueError(
                    "optim_bits, min_8bit_size: expected before the first step, which has been made"
                )
        self._overrides = {p: v for p, v in self._overrides.items() if p in mine}
        for p in chosen:
            self._overrides[p] = self._overrides.get(p, {}) | changed
        self._forget()

    @_disable_dynamo  # compiled, a step runs as it is: it is one op
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for every parameter that has a gradient, all by one op call for each device; where states
        are paged, by one for each chunk of them.

        Parameters
        ----------
        closure : callable, optional
            Computes the loss again, and its gradients.

        Returns
        -------
        What the closure returns.

        Raises
        ------
        RuntimeError
            A gradient is sparse; paging is asked for where there is none, or inside a graph's capture.
        ValueError
            A parameter has another dtype or shape than when its state was made, or page_budget is too small.
            Either is raised before any parameter is changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        active = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        if not any(active):
            return loss
        self._pager.check_now(map(part_of, chain.from_iterable(active)))
        plans = self._plans_for(active)
        grads: list[list[Any]] = [[p.grad for p in plan.parameters] for plan in plans]
        for plan, mine in zip(plans, grads, strict=True):
            plan.check(mine)
            if len(plans) > 1:
                dispatch.select("adamw", (plan.like,))  # refuses, if it does, before anything is changed
        configs = [self.param_groups[at] | override for at, override in self._configs]
        for config in configs:
            for name in ("lr", "weight_decay"):  # loops and schedulers write them
                if type(config[name]) is not float:
                    check_number(name, config[name])
        scale, max_norm = getattr(self, "grad_scale", None), self._max_grad_norm
        if max_norm and any(plan.is_sharded for plan in plans):
            scale, max_norm = clipped_scale(list(chain.from_iterable(grads)), scale, max_norm), 0.0
        for plan, mine in zip(plans, grads, strict=True):
            seed = self._seed_on(plan.device, plan.number)
            plan.run(mine, configs, scale, getattr(self, "found_inf", None), max_norm, seed)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As bitsandbytes': `step` an int, `state1`, `state2`, and in 8 bits `qmap1`, `qmap2`, `absmax1`,
        `absmax2`. Of parameters that are DTensors, moments and absmax are DTensors. Paged moments are on the
        CPU, and the same tensors that the next step changes."""
        mine = list(self._mine())
        if gone := len(self.state.keys() - set(mine)):
            raise ValueError(f"state_dict: {gone} parameters with a state are in no group any more")
        self._pager.synchronize()
        found = super().state_dict()
        for key, state in found["state"].items():
            whole = Layout(mine[key], self._name(mine[key])).whole(state) if is_sharded(mine[key]) else state
            # Maps are copies, as what loads into a state_dict in place would change everybody's.
            found["state"][key] = {
                k: int(v) if k == "step" else v.clone() if k.startswith("qmap") else v
                for k, v in whole.items()
            }
        return found

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Take over a checkpoint of this class or of bitsandbytes' of the same name.

        Parameters
        ----------
        state_dict : dict
            Moments are in the bits that it has them in, not in those that this optimizer would choose.
        move_to_device : bool
            bitsandbytes' argument; states always go to their parameters' devices, paged ones to host memory.

        Raises
        ------
        ValueError
            Other groups, shapes, blocksize or maps than here, or something is missing: nothing is loaded.
        """
        state_dict = copy(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        names = {p: self._name(p) for p in self._mine()}
        lion = self._kind == "lion"
        self._pager.synchronize()
        copied = self._pager.copied
        states, groups = read(state_dict, self.param_groups, self.defaults, names, lion, copied)
        state = {p: self._with_compensation(part_of(p), mine) for p, mine in states.items()}
        self._dtypes = {p: p.dtype for p in state}
        self.__setstate__({"state": defaultdict(dict, state), "param_groups": groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        names = (
            "_kind",
            "_rounding",
            "_seed",
            "_max_grad_norm",
            "_bits",
            "_page_budget",
            "is_paged",
            "_overrides",
            "_dtypes",
        )
        self._pager.synchronize()
        return super().__getstate__() | {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        is_paged = state.pop("is_paged", None)
        super().__setstate__(state)
        if is_paged is not None:  # a copy, or from a file: what was gathered is not in it
            self._page_budget = state.get("_page_budget")
            self._pager = Pager(is_paged, self._page_budget)
        self._seeds = {}
        self._forget()

    def _forget(self) -> None:
        """What was gathered for steps: parameters, states or groups are others."""
        self._active: list[list[Tensor]] = []
        self._moments: list[Any] = []
        self._plans: list[Plan] = []
        self._configs: list[tuple[int, dict[str, Any]]] = []

    def _first_moments(self) -> list[Any]:
        """By which it shows whether somebody cleared or replaced states, to begin anew or to move them."""
        return [state.get("state1") for state in self.state.values() if isinstance(state, dict)]

    def _plans_for(self, active: list[list[Tensor]]) -> list[Plan]:
        """One for each device and number of parts, kept from the step before if they serve. `active` is by
        group."""
        before, moments = chain.from_iterable(self._active), self._first_moments()
        if (
            list(map(len, active)) == list(map(len, self._active))
            and all(map(is_, chain.from_iterable(active), before))
            and len(moments) == len(self._moments)
            and all(map(is_, moments, self._moments))
            and all(map(Plan.is_in_place, self._plans))
        ):
            return self._plans
        names = {p: self._name(p) for p in chain.from_iterable(active)}
        if stale := len(self._overrides.keys() - set(self._mine())):
            raise ValueError(
                f"override_config: {stale} parameters that it was given are in no group any more: give it "
                "those that took their places"
            )
        parts: dict[tuple[torch.device, int], list[Tensor]] = {}
        for p, name in names.items():
            number = Layout(p, name).number if is_sharded(p) else 0
            dtype, shape = p.dtype, part_of(p).shape
            if self.state.get(p):
                dtype, shape = self._dtypes.get(p, dtype), self.state[p]["state1"].shape
            check(p, p.grad, name, dtype, shape)  # type: ignore[arg-type]
            if self._max_grad_norm:
                refuse_flat_parts(p, name)
            parts.setdefault((p.device, number), []).append(p)
        devices = {device for device, _ in parts}
        if len(devices) > 1 and self._max_grad_norm:
            raise ValueError(f"max_grad_norm: expected parameters on one device, got {len(devices)} devices")
        self._pager.synchronize()
        # In dicts of their own, of which nothing is left where something is refused: no pinned memory either.
        states = {
            p: self._pager.home(part_of(p), self.state[p]) if self.state.get(p) else self._new_state(p, name)
            for p, name in names.items()
        }
        configs: list[tuple[int, dict[str, Any]]] = []
        numbers: dict[Tensor, int] = {}
        for at, group in enumerate(self.param_groups):
            for p in group["params"]:
                config = at, self._overrides.get(p, {})
                if config not in configs:
                    configs.append(config)
                numbers[p] = configs.index(config)
        plans = []
        for (device, number), part in parts.items():
            plan = Plan(
                part, [names[p] for p in part], [states[p] for p in part], [numbers[p] for p in part],
                self._kind, number, self._rounding == "stochastic", self._pager.ring(device),
                [self._pager.is_for(part_of(p), "state1") for p in part],
            )  # fmt: skip
            dispatch.select("adamw", (plan.like,))
            plans.append(plan)
        # They take buffers one after the other. Where there is no memory for the largest, none has begun.
        plans.sort(key=lambda plan: plan.page_bytes, reverse=True)
        for p, state in states.items():
            if not self.state.get(p):
                self._dtypes[p] = p.dtype
            self.state[p].update(state)
        # Of parameters that others took the places of nothing is kept.
        self._dtypes = {p: dtype for p, dtype in self._dtypes.items() if p in self.state}
        self._active, self._plans, self._configs = active, plans, configs
        self._moments = self._first_moments()
        return plans

    def _new_state(self, p: Tensor, name: str) -> dict[str, Any]:
        """A parameter's state before its first step."""
        if not p.is_floating_point():
            raise ValueError(f"{name}: expected a floating dtype, got {p.dtype}")
        bits = self._bits | self._overrides.get(p, {})
        # By all of a DTensor's elements, so that processes agree.
        in_8bit = bits["optim_bits"] == 8 and p.numel() >= bits["min_8bit_size"]
        p = part_of(p)
        state: dict[str, Any] = {"step": 0}
        for i in moment_names(self._kind == "lion"):
            dtype = torch.uint8 if in_8bit else torch.float32
            state[f"state{i}"] = self._pager.zeros(p, f"state{i}", dtype)
            if in_8bit:
                state[f"qmap{i}"] = dynamic_map(p.device, i == 1)
                state[f"absmax{i}"] = torch.zeros(blocks_of(p.shape), device=p.device)
        return self._with_compensation(p, state)

    def _with_compensation(self, p: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        there = state.pop("compensation", None)
        if self._rounding == "kahan" and p.dtype == torch.bfloat16:
            fits = there is not None and there.shape == p.shape
            state["compensation"] = (
                self._pager.copied(p, "compensation", there, p.dtype)
                if fits
                else self._pager.zeros(p, "compensation", p.dtype)
            )
        return state

    def _name(self, p: Tensor) -> str:
        """Where a parameter is, for messages."""
        for at, group in enumerate(self.param_groups):
            for i, other in enumerate(group["params"]):
                if other is p:
                    named = group.get("param_names")
                    return f"parameter {i} of group {at}" + (f" ({named[i]})" if named else "")
        return "a parameter of no group"

    def _mine(self) -> Iterable[Tensor]:
        return chain.from_iterable(group["params"] for group in self.param_groups)

    def _seed_on(self, device: torch.device, number: int) -> Tensor | None:
        """Of the parts of that number, 0 of what is whole: parts have random bits of their own."""
        if self._rounding != "stochastic":
            return None
        if (device, number) not in self._seeds:
            seed = (self._seed + number * 0x9E3779B97F4A7C15) % 2**64
            signed = seed - 2**64 if seed >= 2**63 else seed
            self._seeds[device, number] = torch.tensor(signed, device=device)
        return self._seeds[device, number]

"""Base class of AdamW8bit and the others: torch's interface, bitsandbytes' states, one op call per step."""

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
from ..core.wrong_types import refuses_wrong_types
from .checkpoint import read
from .groups import UNSUPPORTED, check_number, check_numbers
from .pager import Pager
from .plan import Plan, check
from .sharded import Layout, clipped_scale, is_sharded, part_of, refuse_flat_parts
from .states import blocks_of, moment_names

ROUNDINGS = ("nearest", "stochastic", "kahan")
OVERRIDES = ("lr", "betas", "eps", "weight_decay", "optim_bits", "min_8bit_size")


class BlockwiseOptimizer(torch.optim.Optimizer):
    """Keyword arguments as in the subclasses; `defaults` are the hyperparameters of groups."""

    # GradScaler hands over grad_scale and found_inf instead of reading found_inf on the host.
    _step_supports_amp_scaling = True

    @refuses_wrong_types
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
        self._drop_plans()
        super().__init__(params, defaults)

    @property
    def is_paged(self) -> bool:
        return self._pager.is_paged

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        checked = (*self.defaults, *UNSUPPORTED)
        check_numbers({name: param_group[name] for name in checked if name in param_group})
        if param_group.get("max_grad_norm") is not None:
            # ZeroRedundancyOptimizer copies its arguments into the groups of each process's optimizer.
            raise ValueError(
                "max_grad_norm: a group cannot have its own; with ZeroRedundancyOptimizer each process would "
                "clip by the norm of its own parameters: call torch.nn.utils.clip_grad_norm_ before the step"
            )
        super().add_param_group(param_group)

    def override_config(
        self,
        parameters: Tensor | Iterable[Tensor],
        key: str | None = None,
        value: Any = None,
        key_value_dict: dict[str, Any] | None = None,
    ) -> None:
        """Overrides hyperparameters of single parameters, like bitsandbytes' GlobalOptimManager.

        Parameters
        ----------
        parameters : Tensor or iterable of Tensor
            Parameters of this optimizer.
        key : str
            "lr", "betas", "eps", "weight_decay", "optim_bits" or "min_8bit_size". The last two take
            effect when the state is created, in a parameter's first step.
        value : any
            Replaces the group's value. Schedulers do not change it.
        key_value_dict : dict
            Several keys and values instead of `key` and `value`.

        Raises
        ------
        ValueError
            Unknown key, value out of range, or a parameter whose state already exists in other bits.
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
        self._drop_plans()

    @_disable_dynamo  # a step is one op: nothing to compile
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates all parameters that have a gradient with one op call per device, or per chunk of paged
        states.

        Parameters
        ----------
        closure : callable, optional
            Recomputes the loss and its gradients.

        Returns
        -------
        The closure's result.

        Raises
        ------
        RuntimeError
            A gradient is sparse; paging is unavailable on the device or during graph capture.
        ValueError
            A parameter's dtype or shape differs from when its state was created, or page_budget is too small.
            Both are raised before any parameter is changed.
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
                dispatch.select("adamw", (plan.like,))  # may raise, before anything is changed
        configs = [self.param_groups[at] | override for at, override in self._configs]
        for config in configs:
            for name in ("lr", "weight_decay"):  # training loops and schedulers may set them
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
        """The state in bitsandbytes' layout: `step` as an int, `state1`, `state2`, and in 8 bits `qmap1`,
        `qmap2`, `absmax1`, `absmax2`. For DTensor parameters moments and absmax are DTensors. Paged moments
        are on the CPU and share memory with the optimizer's own."""
        mine = list(self._mine())
        if gone := len(self.state.keys() - set(mine)):
            raise ValueError(f"state_dict: {gone} parameters with a state are in no group any more")
        self._pager.synchronize()
        found = super().state_dict()
        for key, state in found["state"].items():
            whole = Layout(mine[key], self._name(mine[key])).whole(state) if is_sharded(mine[key]) else state
            # Maps are copied: loading into a state_dict in place would change the shared tables.
            found["state"][key] = {
                k: int(v) if k == "step" else v.clone() if k.startswith("qmap") else v
                for k, v in whole.items()
            }
        return found

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Loads a checkpoint of this class or of bitsandbytes' class of the same name.

        Parameters
        ----------
        state_dict : dict
            Moments keep the number of bits that they have there.
        move_to_device : bool
            Ignored, for compatibility: states go to their parameters' devices, paged ones to host memory.

        Raises
        ------
        ValueError
            Groups, shapes, blocksize or maps differ, or something is missing. Nothing is loaded then.
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
        options = ("_kind", "_rounding", "_seed", "_max_grad_norm", "_bits", "_page_budget", "is_paged")
        names = (*options, "_overrides", "_dtypes")
        self._pager.synchronize()
        return super().__getstate__() | {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        is_paged = state.pop("is_paged", None)
        super().__setstate__(state)
        if is_paged is not None:  # a copy or unpickled: without cached plans
            self._page_budget = state.get("_page_budget")
            self._pager = Pager(is_paged, self._page_budget)
        self._seeds = {}
        self._drop_plans()

    def _drop_plans(self) -> None:
        """Drops cached plans after parameters, states or groups changed."""
        self._active: list[list[Tensor]] = []
        self._moments: list[Any] = []
        self._plans: list[Plan] = []
        self._configs: list[tuple[int, dict[str, Any]]] = []

    def _first_moments(self) -> list[Any]:
        """The tensors by which `_plans_for` notices that states were cleared or replaced."""
        return [state.get("state1") for state in self.state.values() if isinstance(state, dict)]

    def _plans_for(self, active: list[list[Tensor]]) -> list[Plan]:
        """A plan for each device and shard number, reused from the previous step if still valid. `active`
        lists parameters by group."""
        if self._are_current(active):
            return self._plans
        names = {p: self._name(p) for p in chain.from_iterable(active)}
        if stale := len(self._overrides.keys() - set(self._mine())):
            raise ValueError(
                f"override_config: {stale} overridden parameters are no longer in any group: override those "
                "that replaced them"
            )
        parts = self._parts(names)
        self._pager.synchronize()
        # In new dicts, so that an error leaves nothing behind, pinned memory included.
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
        # Largest buffers first: if memory does not suffice, nothing has been changed yet.
        plans.sort(key=lambda plan: plan.page_bytes, reverse=True)
        for p, state in states.items():
            if not self.state.get(p):
                self._dtypes[p] = p.dtype
            self.state[p].update(state)
        # Drops entries of parameters that were replaced.
        self._dtypes = {p: dtype for p, dtype in self._dtypes.items() if p in self.state}
        self._active, self._plans, self._configs = active, plans, configs
        self._moments = self._first_moments()
        return plans

    def _are_current(self, active: list[list[Tensor]]) -> bool:
        """Whether the cached plans are for these parameters and their states."""
        before, moments = chain.from_iterable(self._active), self._first_moments()
        return (
            list(map(len, active)) == list(map(len, self._active))
            and all(map(is_, chain.from_iterable(active), before))
            and len(moments) == len(self._moments)
            and all(map(is_, moments, self._moments))
            and all(map(Plan.is_in_place, self._plans))
        )

    def _parts(self, names: dict[Tensor, str]) -> dict[tuple[torch.device, int], list[Tensor]]:
        """The parameters by device and shard number, checked."""
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
        return parts

    def _new_state(self, p: Tensor, name: str) -> dict[str, Any]:
        """The initial state of a parameter."""
        if not p.is_floating_point():
            raise ValueError(f"{name}: expected a floating dtype, got {p.dtype}")
        bits = self._bits | self._overrides.get(p, {})
        # Counts all elements of a DTensor, so that processes agree.
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
        """A parameter's position, for messages."""
        for at, group in enumerate(self.param_groups):
            for i, other in enumerate(group["params"]):
                if other is p:
                    named = group.get("param_names")
                    return f"parameter {i} of group {at}" + (f" ({named[i]})" if named else "")
        return "a parameter of no group"

    def _mine(self) -> Iterable[Tensor]:
        return chain.from_iterable(group["params"] for group in self.param_groups)

    def _seed_on(self, device: torch.device, number: int) -> Tensor | None:
        """The seed for shards of this number (0: not sharded), so that shards have different random bits."""
        if self._rounding != "stochastic":
            return None
        if (device, number) not in self._seeds:
            seed = (self._seed + number * 0x9E3779B97F4A7C15) % 2**64
            signed = seed - 2**64 if seed >= 2**63 else seed
            self._seeds[device, number] = torch.tensor(signed, device=device)
        return self._seeds[device, number]

"""Behind AdamW8bit and its kin: torch's interface, bitsandbytes' states, one op call a step."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from copy import copy
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..code_tables import dynamic_map
from .plan import Plan
from .states import blocks_of, checked, moment_names, unwrapped

logger = logging.getLogger("peft_kernels")

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
        _check_numbers(defaults)
        self._kind, self._rounding, self._seed = kind, rounding, seed
        self._max_grad_norm = max_grad_norm or 0.0
        self._bits = {"optim_bits": optim_bits, "min_8bit_size": min_8bit_size}
        self.is_paged = is_paged
        self._overrides: dict[Tensor, dict[str, Any]] = {}
        self._dtypes: dict[Tensor, torch.dtype] = {}
        self._seeds: dict[torch.device, Tensor] = {}
        self._forget()
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _check_numbers({name: param_group[name] for name in self.defaults if name in param_group})
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
        _check_numbers(changed)
        if changed.get("optim_bits", 8) not in (8, 32):
            raise ValueError(f"optim_bits: expected 8 or 32, got {changed['optim_bits']}")
        mine = set(chain.from_iterable(group["params"] for group in self.param_groups))
        chosen = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        for p in chosen:
            if p not in mine:
                raise ValueError("parameters: expected parameters of this optimizer, got another")
            if self.state.get(p) and {"optim_bits", "min_8bit_size"} & set(changed):
                raise ValueError(
                    "optim_bits, min_8bit_size: expected before the first step, which has been made"
                )
        for p in chosen:
            self._overrides[p] = self._overrides.get(p, {}) | changed
        self._forget()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for every parameter that has a gradient, all by one op call for each device.

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
            A gradient is sparse, or paging is asked for where there is none.
        ValueError
            A parameter has another dtype or shape than when its state was made. Either is raised before any
            parameter is changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        active = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not active:
            return loss
        plans = self._plans_for(active)
        grads: list[list[Any]] = [[p.grad for p in plan.parameters] for plan in plans]
        for plan, mine in zip(plans, grads, strict=True):
            plan.check(mine)
        configs = [self.param_groups[at] | override for at, override in self._configs]
        for plan, mine in zip(plans, grads, strict=True):
            plan.run(
                mine,
                configs,
                getattr(self, "grad_scale", None),
                getattr(self, "found_inf", None),
                self._max_grad_norm,
                self._seed_on(plan.device),
            )
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As bitsandbytes': `step` an int, `state1`, `state2`, and in 8 bits `qmap1`, `qmap2`, `absmax1`,
        `absmax2`."""
        found = super().state_dict()
        for key, state in found["state"].items():
            found["state"][key] = {k: int(v) if k == "step" else v for k, v in state.items()}
        return found

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Take over a checkpoint of this class or of bitsandbytes' of the same name.

        Parameters
        ----------
        state_dict : dict
            Moments are in the bits that it has them in, not in those that this optimizer would choose.
        move_to_device : bool
            bitsandbytes' argument; states always go to their parameters' devices.

        Raises
        ------
        ValueError
            Other groups, shapes, blocksize or maps than here, or something is missing: nothing is loaded.
        """
        state_dict = copy(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        if missing := [name for name in ("state", "param_groups") if name not in state_dict]:
            raise ValueError(f"state_dict: expected state and param_groups, got no {', '.join(missing)}")
        saved = state_dict["param_groups"]
        sizes = [len(group["params"]) for group in self.param_groups]
        if [len(group["params"]) for group in saved] != sizes:
            got = [len(group["params"]) for group in saved]
            raise ValueError(f"param_groups: expected groups of {sizes} parameters, got {got}")
        by_key = {
            key: (p, self._name(p))
            for group, mine in zip(saved, self.param_groups, strict=True)
            for key, p in zip(group["params"], mine["params"], strict=True)
        }
        if unknown := [key for key in state_dict["state"] if key not in by_key]:
            raise ValueError(f"state: expected entries for parameters of param_groups, got {unknown[:3]}")
        for group in saved:
            if lacking := [name for name in ("lr", "betas", "weight_decay") if name not in group]:
                raise ValueError(f"param_groups: a group has no {', '.join(lacking)}")
        lion = self._kind == "lion"
        state = {}
        for key, entry in state_dict["state"].items():
            p, what = by_key[key]
            if flat := unwrapped(entry):
                state[p] = self._with_compensation(p, checked(flat, p, what, lion))
        groups = [
            self.defaults | group | {"params": mine["params"]}
            for group, mine in zip(saved, self.param_groups, strict=True)
        ]
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
            "is_paged",
            "_overrides",
            "_dtypes",
        )
        return super().__getstate__() | {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._seeds = {}
        self._forget()

    def _forget(self) -> None:
        """What was gathered for steps: parameters, states or groups are others."""
        self._plans: list[Plan] = []
        self._configs: list[tuple[int, dict[str, Any]]] = []

    def _plans_for(self, active: list[Tensor]) -> list[Plan]:
        """One for each device, kept from the step before if they serve."""
        by_device: dict[torch.device, list[Tensor]] = {}
        for p in active:
            by_device.setdefault(p.device, []).append(p)
        if len(by_device) > 1 and self._max_grad_norm:
            raise ValueError(
                f"max_grad_norm: expected parameters on one device, got {len(by_device)} devices"
            )
        parts = list(by_device.values())
        if len(parts) == len(self._plans) and all(map(Plan.serves, self._plans, parts)):
            return self._plans
        made = {p: self._new_state(p) for p in active if not self.state.get(p)}
        for p, state in made.items():
            self.state[p].update(state)
            self._dtypes[p] = p.dtype
        configs: list[tuple[int, dict[str, Any]]] = []
        numbers: dict[Tensor, int] = {}
        for at, group in enumerate(self.param_groups):
            for p in group["params"]:
                config = at, self._overrides.get(p, {})
                if config not in configs:
                    configs.append(config)
                numbers[p] = configs.index(config)
        plans = []
        for part in parts:
            states = [self.state[p] for p in part]
            for p, state in zip(part, states, strict=True):
                for name, value in state.items():
                    if isinstance(value, Tensor):
                        state[name] = value.to(p.device)
            names, dtypes = [self._name(p) for p in part], [self._dtypes[p] for p in part]
            plans.append(Plan(part, names, dtypes, states, [numbers[p] for p in part], self._kind))
        self._plans, self._configs = plans, configs
        return plans

    def _new_state(self, p: Tensor) -> dict[str, Any]:
        """A parameter's state before its first step."""
        if not p.is_floating_point():
            raise ValueError(f"{self._name(p)}: expected a floating dtype, got {p.dtype}")
        bits = self._bits | self._overrides.get(p, {})
        in_8bit = bits["optim_bits"] == 8 and p.numel() >= bits["min_8bit_size"]
        state: dict[str, Any] = {"step": 0}
        for i in moment_names(self._kind == "lion"):
            state[f"state{i}"] = self._allocate(p, torch.uint8 if in_8bit else torch.float32)
            if in_8bit:
                state[f"qmap{i}"] = dynamic_map(p.device, i == 1)
                state[f"absmax{i}"] = torch.zeros(blocks_of(p), device=p.device)
        return self._with_compensation(p, state)

    def _allocate(self, p: Tensor, dtype: torch.dtype) -> Tensor:
        """A moment of p, zero. Where paged states are made."""
        if self.is_paged:
            if p.device.type != "cpu":
                raise RuntimeError(
                    f"{type(self).__name__}: there is no paging on {p.device.type} devices yet"
                )
            tell_once("paging has no effect on a CPU: the optimizer's states are in memory as any other's")
        return torch.zeros(p.shape, dtype=dtype, device=p.device)

    def _with_compensation(self, p: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        there = state.pop("compensation", None)
        if self._rounding == "kahan" and p.dtype == torch.bfloat16:
            fits = there is not None and there.shape == p.shape
            state["compensation"] = (
                there.to(p.device, p.dtype, copy=True)
                if fits
                else torch.zeros_like(p, memory_format=torch.contiguous_format)
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

    def _seed_on(self, device: torch.device) -> Tensor | None:
        if self._rounding != "stochastic":
            return None
        if device not in self._seeds:
            self._seeds[device] = torch.tensor(self._seed, device=device)
        return self._seeds[device]


_told: set[str] = set()


def tell_once(sentence: str) -> None:
    if sentence not in _told:
        _told.add(sentence)
        logger.warning("%s", sentence)


def _check_numbers(values: dict[str, Any]) -> None:
    """ValueError for a hyperparameter out of range."""
    for name in ("lr", "eps", "weight_decay"):
        value = values.get(name, 0.0)
        if not isinstance(value, Tensor) and not 0 <= value < math.inf:
            raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")
    betas = values.get("betas", (0.0, 0.0))
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas: expected two numbers from 0 to below 1, got {betas}")

"""Attention modules like Llama's: projections, perhaps norms of the heads, rotary embeddings, the cache, the
attention function that the configuration names, the output projection."""

from __future__ import annotations

import inspect
from functools import partial
from types import FunctionType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..fused import plain_class
from .stand_in import StandIn, agree, unwrapped
from .verdict import Verdict, cached, recognise

PROJECTIONS = ("q_proj", "k_proj", "v_proj")

_CACHES = ("cache", "past_key_values")
"""Names of the argument for the KV cache."""
_SETTINGS = ("sliding_window", "attn_logit_softcapping")
"""Attributes of a module or its configuration that forwards pass to the attention function."""

_HEAD, _FEATURES, _HEADS = 4, 8, {"q_proj": 2, "k_proj": 1, "v_proj": 1, "o_proj": 2}
_SCALING, _DROPOUT, _LAYER, _MASK, _WEIGHTS = 0.37, 0.25, 5, "the mask", "the weights"
_OTHERS = {"position_ids": "the position_ids", "more": "another argument"}
_NOT_GIVEN = "not given"
_KWARGS = ("kwargs",)
_UNKNOWN = "its forward is none of those known here; nothing to do"


class Attention(NamedTuple):
    """What the forward of an attention module computes, where it differs from model to model."""

    normed: bool
    """The heads of queries and keys are normed."""
    passed: tuple[tuple[str, str, str], ...]
    """Further arguments of the attention function: keyword, holder (the module's attribute, "" for itself)
    and attribute name."""
    rotates: str
    """The attribute of the module that says whether it applies rotary embeddings; "" where all do."""
    cache: str
    """The name of its argument for the KV cache."""
    own: tuple[str, ...]
    """Its arguments after the cache, which are not passed on to the attention function."""
    update: tuple[str, ...]
    """What `update` of the cache is given after the layer's index: nothing, its `kwargs` (transformers 5.24),
    or these entries of `cache_kwargs` (5.0)."""
    names: dict[str, Any]
    """The globals of its file."""

    def update_arguments(self, kwargs: dict[str, Any], positions: Any) -> dict[str, Any]:
        """The arguments of the cache's `update` after the layer's index. Takes the module's own arguments out
        of `kwargs`, the others go to the attention function."""
        own = {name: kwargs.pop(name, None) for name in self.own}
        if self.update == _KWARGS:
            return {"kwargs": kwargs}
        given = dict(zip(("cos", "sin"), positions, strict=True)) | own
        return {"cache_kwargs": {name: given[name] for name in self.update}} if self.update else {}


def is_attention(module: nn.Module) -> bool:
    """Whether a module has projections of queries, keys and values with Llama's names."""
    return all(module._modules.get(name) is not None for name in PROJECTIONS)


def attention(module: nn.Module) -> Verdict:
    """What the forward of an attention module computes: an Attention."""
    cls: Any = plain_class(module)
    forward: Any = cls.forward
    names = getattr(inspect.unwrap(forward), "__globals__", {})
    # Other libraries replace these functions. With `kernels`, the first is a module with a forward.
    rotary: Any = names.get("apply_rotary_pos_emb")
    rotate_half = getattr(rotary, "__globals__", names).get("rotate_half")
    key = "attention", cls, forward, rotary, getattr(rotary, "forward", None), rotate_half
    return cached(key) or recognise(key, lambda: _trial(module, forward), _UNKNOWN)


def _trial(module: nn.Module, forward: Any) -> Attention | None:
    inner = unwrapped(forward)
    try:
        kind = None if inner is None else _kind(module, inner)
    except Exception:  # an unknown forward may raise anything
        return None
    if kind is None:
        return None
    for implementation in ("sdpa", "eager", "flash_attention_2"):
        for rotates in (True, False) if kind.rotates else (True,):
            trial = _Trial(module, inner, kind, implementation, rotates)
            if not agree(trial.theirs, trial.ours, _FEATURES):
                return None
    return kind


def _kind(module: nn.Module, forward: FunctionType) -> Attention | None:
    """What the signature of a forward and one call of it tell."""
    parameters = inspect.signature(forward).parameters.values()
    _, *names = [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]
    if names[:3] != ["hidden_states", "position_embeddings", "attention_mask"] or names[3] not in _CACHES:
        return None
    kind = Attention(
        normed=all(module._modules.get(name) is not None for name in ("q_norm", "k_norm")),
        passed=(),
        rotates="use_rope" if "use_rope" in vars(module) else "",
        cache=names[3],
        own=tuple(names[4:]),
        update=(),
        names=forward.__globals__,
    )
    x = torch.ones(1, 2, _FEATURES, device="cpu")
    (_, (updated, attended), _), _ = _Trial(module, forward, kind, "sdpa", True).theirs(x, False)
    update = _KWARGS if updated["kwargs"] is not _NOT_GIVEN else tuple(updated["cache_kwargs"] or ())
    settings = {value: place for place, value in _given_settings()}
    passed = [(key, *settings[value]) for key, value in attended["options"].items() if value in settings]
    return kind._replace(passed=tuple(passed), update=update)


def _given_settings() -> list[tuple[tuple[str, str], str]]:
    """Holder and name of each setting, and its value in a trial."""
    return [((holder, name), f"{name} of {holder}") for holder in ("", "config") for name in _SETTINGS]


class _Trial(NamedTuple):
    """One attention function by name, with a rotary embedding or without."""

    module: Any
    inner: Any
    kind: Attention
    implementation: str
    rotates: bool

    def theirs(self, x: Tensor, training: bool) -> Any:
        return self._theirs(x, training, True), self._theirs(x, training, False)

    def ours(self, x: Tensor, training: bool) -> Any:
        return self._ours(x, training, True), self._ours(x, training, False)

    def _theirs(self, x: Tensor, training: bool, has_cache: bool) -> Any:
        calls: list[Any] = []
        settings: dict[str, dict[str, str]] = {"": {}, "config": {}}
        for (holder, name), value in _given_settings():
            settings[holder][name] = value
        config = StandIn(
            self.module.config, {**settings["config"], "_attn_implementation": self.implementation}
        )
        replaced: dict[str, Any] = {name: partial(_projected, name) for name in _HEADS}
        replaced |= {name: partial(_normed, name) for name in ("q_norm", "k_norm") if self.kind.normed}
        replaced |= {self.kind.rotates: self.rotates} if self.kind.rotates else {}
        replaced |= {"head_dim": _HEAD, "scaling": _SCALING, "attention_dropout": _DROPOUT}
        replaced |= {"layer_idx": _LAYER, "config": config, **settings[""]}
        stand_in = StandIn(self.module, replaced, training)
        forward = self.inner
        eager = partial(_attend, calls, "eager")
        functions = _Functions(calls)
        names = {
            **forward.__globals__,
            "ALL_ATTENTION_FUNCTIONS": functions,
            "eager_attention_forward": eager,
        }
        inside = FunctionType(
            forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
        )
        inside.__kwdefaults__ = forward.__kwdefaults__
        cache = SimpleNamespace(update=partial(_update, calls)) if has_cache else None
        y = inside(stand_in, x, _positions(x), _MASK, cache, **self._kwargs())
        return y, calls, [*stand_in.reads, *config.reads]

    def _ours(self, x: Tensor, training: bool, has_cache: bool) -> Any:
        calls: list[Any] = []
        kind, positions, kwargs = self.kind, _positions(x), self._kwargs()
        q, k, v = (_projected(name, x).view(*x.shape[:-1], -1, _HEAD) for name in PROJECTIONS)
        if kind.normed:
            q, k = _normed("q_norm", q), _normed("k_norm", k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if self.rotates:
            q, k = _rotated(q, *positions), _rotated(k, *positions)
        more = kind.update_arguments(kwargs, positions)
        if has_cache:
            k, v = _update(calls, k, v, _LAYER, **more)
        given = dict(_given_settings())
        options = {keyword: given[holder, name] for keyword, holder, name in kind.passed}
        dropout = _DROPOUT if training else 0.0
        y, weights = _attend(
            calls,
            self.implementation,
            None,
            q,
            k,
            v,
            _MASK,
            dropout=dropout,
            scaling=_SCALING,
            **options,
            **kwargs,
        )
        return (_projected("o_proj", y.reshape(*x.shape[:-1], -1)), weights), calls, []

    def _kwargs(self) -> dict[str, Any]:
        return {**_OTHERS, **{name: f"the {name}" for name in self.kind.own}}


class _Functions:
    """transformers' registry of attention functions."""

    def __init__(self, calls: list[Any]) -> None:
        self._calls = calls

    def __getitem__(self, name: str) -> Any:
        return partial(_attend, self._calls, name)

    def get_interface(self, name: str, default: Any) -> Any:
        return default if name == "eager" else self[name]

    get = get_interface


def _projected(name: str, x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(list(_HEADS).index(name))
    features = _FEATURES if name == "o_proj" else _HEADS[name] * _HEAD
    weight = torch.randn(features, x.shape[-1], generator=generator, dtype=torch.float64, device="cpu")
    return nn.functional.linear(x, weight.to(x.dtype))


def _normed(name: str, x: Tensor) -> Tensor:
    return x * (1.5 if name == "q_norm" else 0.5) + torch.arange(_HEAD, device="cpu").to(x.dtype)


def _positions(x: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (1, rows, head) that no two features share."""
    angles = torch.linspace(0.1, 3, x.shape[1] * _HEAD, dtype=torch.float64, device="cpu")
    angles = angles.view(1, x.shape[1], _HEAD)
    return angles.cos().to(x.dtype), (2 * angles).sin().to(x.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]


def _update(
    calls: list[Any],
    keys: Tensor,
    values: Tensor,
    layer_idx: int,
    cache_kwargs: Any = None,
    kwargs: Any = _NOT_GIVEN,
) -> tuple[Tensor, Tensor]:
    calls.append(
        {"layer": layer_idx, "states": (keys, values), "cache_kwargs": cache_kwargs, "kwargs": kwargs}
    )
    return keys + 1, values - 1


def _attend(
    calls: list[Any], name: str, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any
) -> tuple[Tensor, str]:
    calls.append({"name": name, "states": (q, k, v), "mask": mask, "options": options})
    return (q + (k * v).sum(-1, keepdim=True)).transpose(1, 2), _WEIGHTS

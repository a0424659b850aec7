"""TRL's trainers with shared prompts, and log-probabilities without logits.

Chosen and rejected completions of a prompt, or all its sampled completions, form one row in which the prompt
is computed once, for policy and reference; the head runs on completions only. Losses, metrics and options are
TRL's: only the model's forward for log-probabilities is replaced."""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from trl import __version__ as trl_version
from trl.trainer import utils as trl_utils
from trl.trainer.dpo_trainer import DPOTrainer as TheirDPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer as TheirGRPOTrainer
from trl.trainer.sft_trainer import SFTTrainer as TheirSFTTrainer

from ...patch.fused import plain_class
from ...patch.loss.trl_head import IGNORED, OUTPUTS, TrlHead, theirs_of
from .. import attention
from . import shared_prompts
from .shared_prompts import Rows

__all__ = ["DPOTrainer", "DistillationTrainer", "GKDTrainer", "GRPOTrainer", "SFTTrainer"]

if not hasattr(trl_utils, "add_fused_lm_head"):
    raise ImportError(
        f"trl: expected 1.15 or later for these trainers, got {trl_version}; "
        "with older versions use TRL's own trainers and pk.patch"
    )

logger = logging.getLogger("peft_kernels")

_LATER = {"DistillationTrainer": ".distillation", "GKDTrainer": ".gkd"}


def __getattr__(name: str) -> Any:
    """Imports trainers that some versions of TRL lack when they are first used."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name], __name__), name)


_LENGTHS = ("position", "length", "n_ctx")
"""Parts of names of config entries that are lengths above which a model may compute differently."""
_NOISES = ("drop", "jitter", "neftune_noise")
"""Parts of names of module attributes that are noise rates in training."""
_IGNORED_ARGUMENTS = frozenset({"use_cache", "return_dict"})


class Kind(NamedTuple):
    """Properties of a batch that may change how a model computes: left padding (some derive positions from
    the mask), and how many lengths of the configuration the batch and its shared rows exceed."""

    is_left_padded: bool
    batch: int
    rows: int


class LogProbs(TrlHead):
    """Computes log-probabilities instead of TRL's forward.

    `fallbacks`: number of calls without shared prompts, by reason. `shares`: whether to look for common
    prompts."""

    def __init__(
        self,
        model: Any,
        *,
        never: str,
        temperature: float,
        outputs: tuple[str, ...],
        head: str,
        shares: bool = True,
    ) -> None:
        super().__init__(model, theirs_of(model.forward), temperature, outputs, head)
        self.fallbacks: Counter[str] = Counter()
        self.shares = shares
        self.never = never or _unfit(model)
        self.misfits: dict[Kind, str] = {}
        """By kind of batch, whose first is tried: why shared rows would be wrong, or ""."""

    def __call__(self, model: Any, labels: Tensor, kwargs: dict[str, Any]) -> Any:
        """A FusedCausalLMOutput (batch, length - 1), like TRL's forward."""
        given = {k: v for k, v in kwargs.items() if v is not None and k not in _IGNORED_ARGUMENTS}
        rows = self._rows(model, labels, given) if self.shares else ""
        if isinstance(rows, str) and self.shares:
            self._count_fallback(rows)
        mask = labels[:, 1:] != IGNORED
        reason = self.reason(model)
        if not reason and self.shares and (extra := given.keys() - {"input_ids", "attention_mask"}):
            reason = f"extra arguments ({', '.join(sorted(extra))})"
        if reason:
            self.heads[reason] += 1
            if isinstance(rows, str):
                return self.theirs(labels=labels, fused_lm_head=True, **kwargs)
            theirs = self.theirs(**_inputs(model, rows), shift_labels=rows.targets, fused_lm_head=True)
            names = "log_probs", *OUTPUTS
            parts = {name: theirs[name].flatten()[rows.index] for name in names if name in theirs}
        else:
            if isinstance(rows, str):
                hidden = self.hidden(model, mask, **given)
            else:
                hidden = _hidden(model, rows).flatten(0, 1)[rows.index]
            parts = self.parts(model, hidden, labels[:, 1:][mask])
        return self.output(parts, mask)

    def __str__(self) -> str:
        lines = ["log-probabilities: by pk.token_log_probs" if not self.heads else "log-probabilities:"]
        lines += [f"by TRL's head, {count}x: {reason}" for reason, count in self.heads.items()]
        lines += [f"each prompt by itself, {count}x: {reason}" for reason, count in self.fallbacks.items()]
        return "\n".join(lines)

    def _rows(self, model: Any, labels: Tensor, given: dict[str, Any]) -> Rows | str:
        reason = self.never or _unfit_call(model, given)
        if reason:
            return reason
        hidden_size = model.config.hidden_size
        rows = shared_prompts.share(given["input_ids"], given["attention_mask"], labels, hidden_size)
        if isinstance(rows, str):
            return rows
        kind = _kind(model, rows, given["input_ids"].shape[1])
        if kind not in self.misfits:
            try:
                self.misfits[kind] = _misfit(model, rows, given, labels[:, 1:] != IGNORED)
            except Exception as error:  # the model may not support 4-d masks
                self.misfits[kind] = f"{type(model).__name__} raised {type(error).__name__}: {error}"
        return self.misfits[kind] or rows

    def _count_fallback(self, reason: str) -> None:
        if not self.fallbacks[reason]:
            level = logging.WARNING if reason in (self.never, *self.misfits.values()) else logging.INFO
            logger.log(level, "prompts are computed for each completion: %s", reason)
        self.fallbacks[reason] += 1


def _unfit(model: Any) -> str:
    """Why a model cannot compute several completions in a row, or ""."""
    config = model.config
    if config.get_text_config() is not config:
        return f"{type(model).__name__} takes more than text"
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        return f"{type(model).__name__} takes no position_ids"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        return f"{type(model).__name__} has layers of other kinds: {', '.join(sorted(kinds))}"
    window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if window or "local" in (getattr(config, "attention_layers", None) or ()):  # GPT-Neo's
        return f"{type(model).__name__} attends within a window"
    if reason := _unknown_rope(model):
        return reason
    if getattr(config, "alibi", False):
        return f"{type(model).__name__} has no positions but distances in rows"
    if not isinstance(getattr(config, "hidden_size", None), int):
        return f"the configuration of {type(model).__name__} has no hidden_size"
    return ""


def _unfit_call(model: Any, given: dict[str, Any]) -> str:
    if extra := given.keys() - {"input_ids", "attention_mask"}:
        return f"extra arguments ({', '.join(sorted(extra))})"
    if missing := {"input_ids", "attention_mask"} - given.keys():
        return f"no {', '.join(sorted(missing))}"
    if given["attention_mask"].dim() != 2:
        return "an attention mask of its own"
    if getattr(model.config, "output_router_logits", False):
        return "the loss that balances experts counts every prompt"
    if (kind := model.config._attn_implementation) not in ("sdpa", "eager", attention.NAME):
        return f"attention implementation {kind} takes no mask of queries and keys"
    if torch.compiler.is_compiling():
        return "the model is being compiled"
    if model.training and _noise(model):
        return "dropout or other noise, which differs between completions"
    return ""


def _noise(model: Any) -> bool:
    """Whether training is random: dropout modules, rates kept as attributes, router jitter, NEFTune. Disabled
    adapters are ignored."""
    off: set[nn.Module] = set()
    layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        if layer.disable_adapters:
            off |= set(layer.modules()) - set(layer.get_base_layer().modules())
    return any(
        module.p > 0
        if isinstance(module, _DropoutNd)
        else any(
            isinstance(value, float) and value > 0
            for name, value in vars(module).items()
            if any(word in name for word in _NOISES)
        )
        for module in set(model.modules()) - off
    )


def _inputs(model: Any, rows: Rows, input_ids: Tensor | None = None) -> dict[str, Any]:
    visible = rows.visible
    if model.config._attn_implementation == "eager":  # adds the mask to the scores
        dtype = model.get_input_embeddings().weight.dtype
        visible = torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
    return {
        "input_ids": rows.input_ids if input_ids is None else input_ids,
        "attention_mask": visible,
        "position_ids": rows.position_ids,
        "use_cache": False,
    }


def _hidden(model: Any, rows: Rows, input_ids: Tensor | None = None) -> Tensor:
    """(rows, length, hidden_size)."""
    hidden: Tensor = model.base_model(**_inputs(model, rows, input_ids)).last_hidden_state
    return hidden


def _kind(model: Any, rows: Rows, length: int) -> Kind:
    limits = list(_values(vars(model.config), _LENGTHS, int))

    def exceeded(length: int) -> int:
        return sum(length > limit for limit in limits)

    return Kind(
        bool((rows.position_ids[:, 0] > 0).any()), exceeded(length), exceeded(rows.input_ids.shape[1])
    )


def _values(config: dict[str, Any], names: tuple[str, ...], kind: type) -> Iterator[Any]:
    """Values of a type in a (nested) configuration whose keys contain one of `names`."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _values(value, names, kind)
        elif type(value) is kind and any(part in str(name) for part in names):
            yield value


def _unknown_rope(model: Any) -> str:
    """Why rotary embeddings may depend on the length of rows, or "". Those of transformers depend on the
    greatest position, which shared rows keep."""
    config = vars(model.config)
    ropes = {name: value for name, value in config.items() if name in ("rope_parameters", "rope_scaling")}
    for kind in _values(ropes, ("type",), str):
        if "dynamic" not in kind and kind not in ("longrope", "su"):  # "su" in Phi-3's own code
            continue
        for cls in {plain_class(module) for module in model.modules()}:
            if "rotary" in cls.__name__.lower() and not cls.__module__.startswith("transformers."):
                return f"{cls.__name__} is not transformers', and rope_type {kind} depends on lengths"
    return ""


def _misfit(model: Any, rows: Rows, given: dict[str, Any], counted: Tensor) -> str:
    """Why shared rows give wrong results, or "". Runs the model to check that completions do not affect each
    other, and that results match separate rows."""
    name, most = type(model).__name__, _rounding(model)
    with torch.no_grad():
        found = shared_prompts.leak(rows, functools.partial(_hidden, model, rows))
        if not found <= most / 10:  # other tokens use the same operations
            return f"{name} does not keep to an attention mask: completions change each other by {found:.2g}"
        alone = model.base_model(**given, use_cache=False).last_hidden_state[:, :-1][counted]
        found = shared_prompts.apart(_hidden(model, rows).flatten(0, 1)[rows.index], alone)
    if not found <= most:
        return f"{name} computes something else for completions in a row: hidden states differ by {found:.2g}"
    return ""


def _rounding(model: Any) -> float:
    """Maximum relative difference of hidden states from rounding: half of the digits of the coarsest dtype in
    use."""
    device = model.get_input_embeddings().weight.device.type
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point() and p.element_size() > 1}
    dtypes |= {d for m in model.modules() if isinstance(d := getattr(m, "compute_dtype", None), torch.dtype)}
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    return float(max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5)


def share_prompts(
    trainer: Any,
    model: Any,
    outputs: tuple[str, ...],
    temperature: float = 1.0,
    head: str = "",
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    shares: bool = True,
) -> LogProbs:
    """Makes a trainer's model, or its reference, compute log-probabilities with `LogProbs`, inside `context`.
    `head`: why the head must be TRL's, or "". `shares`: whether prompts may be shared."""
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    never = ""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        never = "FSDP and DeepSpeed have not been tried"
    head = head or never  # which may have sharded the weight
    log_probs = LogProbs(
        model, never=never, temperature=temperature, outputs=outputs, head=head, shares=shares
    )

    @functools.wraps(type(model).forward)  # `generate` inspects the signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked = kwargs.get("fused_lm_head") and kwargs.get("labels") is not None
        if not asked or args or kwargs.get("shift_labels") is not None or "num_items_in_batch" in kwargs:
            return log_probs.theirs(*args, **kwargs)
        kwargs.pop("fused_lm_head")
        with context():
            return log_probs(self, kwargs.pop("labels"), kwargs)

    model.forward = types.MethodType(forward, model)
    return log_probs


def _share_for_reference(trainer: Any, temperature: float = 1.0, head: str = "") -> LogProbs | None:
    """`share_prompts` for a reference that is a separate model."""
    reference = trainer.ref_model
    if reference is None or isinstance(reference, PeftModel):
        return None
    # The replaced forward was wrapped in autocast.
    return share_prompts(trainer, reference, (), temperature, head, trainer.accelerator.autocast)


class DPOTrainer(TheirDPOTrainer):
    """TRL's DPOTrainer with each prompt computed once for chosen and rejected, by policy and reference.

    Same arguments, and up to rounding same losses and metrics, with every `loss_type`. Unsupported batches
    and models fall back to TRL: `log_probs.fallbacks` counts reasons, and a reason that holds for the whole
    model is logged once. `ref_log_probs` belongs to a separate reference model, else None."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        weighting = ("log_sum_sq_probs",) if self.use_weighting else ()
        self.log_probs = share_prompts(self, self.model, ("entropy", "mean_logits", "is_top1", *weighting))
        self.ref_log_probs = _share_for_reference(self)


class GRPOTrainer(TheirGRPOTrainer):
    """TRL's GRPOTrainer with each prompt computed once for all its completions in a batch: for
    log-probabilities of the old policy and the reference, and of the policy if a batch has several
    completions of a prompt.

    Same arguments; falls back to TRL as `DPOTrainer` does.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        head = "the head computes in fp32" if getattr(self.args, "cast_lm_head_to_fp32", False) else ""
        self.log_probs = share_prompts(self, self.model, ("entropy",), self.temperature, head)
        self.ref_log_probs = _share_for_reference(self, self.temperature, head)


class SFTTrainer(TheirSFTTrainer):
    """TRL's SFTTrainer with a head that computes log-probabilities, entropy and accuracy without logits, only
    for labelled tokens.

    Same arguments, and up to rounding same losses and metrics. Unsupported heads use TRL's: `log_probs.heads`
    counts these calls by reason.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.log_probs = share_prompts(self, self.model, ("entropy", "is_top1"), shares=False)

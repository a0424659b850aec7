"""The head that TRL's trainers add to a model (`add_fused_lm_head`), by `token_log_probs`.

TRL replaces the model's forward on the instance; with `fused_lm_head=True` it returns log-probabilities of
the labels. A patched model puts ours around it, which runs TRL's for all other calls.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from ...nf4.weight import PackedWeight
from ...nn import NF4Linear
from ...ops.arguments import autocast_dtype
from ...ops.loss.token_loss import token_log_probs
from ..fused import REPLACES, plain_class, record_of
from ..rules.loss import device_reason

IGNORED = -100
"""The label of tokens without a loss, in TRL and transformers."""
OUTPUTS = ("entropy", "is_top1", "mean_logits", "log_sum_sq_probs")
"""Fields of TRL's output besides `log_probs`, in the order of `token_log_probs`."""


class TrlHead:
    """Computes what TRL's `theirs`, a forward with a fused head, would return for labels.

    `heads`: number of calls with TRL's head, by reason. `head`: why all use it, or ""."""

    def __init__(
        self, model: Any, theirs: Any, temperature: float, outputs: tuple[str, ...], head: str
    ) -> None:
        self.heads: Counter[str] = Counter()
        self.theirs = theirs
        self.temperature, self.outputs = temperature, outputs
        closure = closure_of(theirs)
        known = {"logit_scale", "final_logit_softcapping"} <= closure.keys()
        if model.config.get_text_config() is not model.config:
            head = head or "the model takes more than text"
        self.head = head or ("" if known else "unknown scaling of logits in this version of TRL")
        self.scale: float = closure.get("logit_scale", 1.0)
        self.cap: float | None = closure.get("final_logit_softcapping")

    def reason(self, model: Any) -> str:
        """Why a call uses TRL's head, or ""."""
        if self.head:
            return self.head
        head = active_head(model)
        weight, packed = head.weight, type(head.weight) is PackedWeight
        if plain_class(head) not in (nn.Linear, NF4Linear):
            return f"the head is a {type(head).__name__}; nothing to do"
        if not packed and type(weight) not in (Tensor, nn.Parameter):
            return f"the weight of the head is a {type(weight).__name__}; nothing to do"
        if reason := device_reason(weight):
            return reason
        if hasattr(weight, "ds_id"):
            return "DeepSpeed shards the weight of the head; nothing to do"
        if getattr(model.config, "output_router_logits", False):
            return "the loss that balances experts is TRL's; leave out output_router_logits"
        return ""

    def parts(self, model: Any, hidden: Tensor, targets: Tensor) -> dict[str, Tensor | None]:
        """Log-probabilities of `targets` (tokens,), and TRL's other outputs, given hidden (tokens,
        hidden_size). TRL divides logits by the temperature after the softcap."""
        head = active_head(model)
        weight, bias = head.weight, head.bias
        if type(weight) is not PackedWeight and autocast_dtype(hidden.device.type) is None:
            weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        scale, cap = self.scale / self.temperature, None if self.cap is None else self.cap / self.temperature
        asked: dict[str, Any] = {name: True for name in OUTPUTS if name in self.outputs}
        found = token_log_probs(hidden, weight, targets, bias, logit_scale=scale, softcap=cap, **asked)
        values = found if asked else (found,)
        return dict.fromkeys(OUTPUTS) | dict(zip(("log_probs", *asked), values, strict=True))

    @staticmethod
    def output(parts: dict[str, Tensor | None], mask: Tensor, count: Any = None) -> Any:
        """TRL's FusedCausalLMOutput (batch, length - 1) of values at labels. The loss is their sum / `count`,
        by default the number of labels."""
        from trl.trainer.utils import FusedCausalLMOutput

        found: dict[str, Any] = {
            n: None if x is None else x.new_zeros(mask.shape).masked_scatter(mask, x)
            for n, x in parts.items()
        }
        loss = -found["log_probs"].sum() / (mask.sum().clamp(min=1) if count is None else count)
        return FusedCausalLMOutput(loss=loss, label_mask=mask, **found)

    def hidden(self, model: Any, mask: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Hidden states of the tokens before labels, (tokens, hidden_size)."""
        given = {name: value for name, value in kwargs.items() if name != "use_cache"}
        states: Tensor = model.base_model(*args, **given, use_cache=False).last_hidden_state
        return states[:, :-1][mask]


def active_head(model: Any) -> Any:
    """The layer that currently computes a model's logits: with PEFT's `modules_to_save` the active adapter's
    copy, or the original if adapters are disabled."""
    head = model.get_output_embeddings()
    peft = sys.modules.get("peft.utils")
    if peft is None or not isinstance(head, peft.ModulesToSaveWrapper):
        return head
    active = [] if head.disable_adapters else head.active_adapters
    if not active:
        return head.original_module
    copies, name = head.modules_to_save, active[0]
    return copies[name] if name in copies else head  # noqa: SIM401  (a ModuleDict has no `get`)


def closure_of(theirs: Any) -> dict[str, Any]:
    """What TRL's forward with a fused head, perhaps wrapped by accelerate, was made with, else {}."""
    forward = theirs
    while forward is not None:
        forward = getattr(forward, "__func__", forward)
        found = inspect.getclosurevars(forward).nonlocals if inspect.isfunction(forward) else {}
        if "final_logit_softcapping" in found:
            return dict(found)
        forward = getattr(forward, "__wrapped__", None)
    return {}


def theirs_of(forward: Any) -> Any:
    """TRL's forward, which ours replaced, or `forward` itself."""
    return getattr(forward, REPLACES, forward)


def is_added(forward: Any) -> bool:
    """Whether this is a forward that TRL sets on a model to add its head."""
    function = getattr(forward, "__func__", None)  # named like the model's own
    return (
        inspect.isfunction(function)
        and function.__globals__.get("__name__") == "trl.trainer.utils"
        and "fused_lm_head" in function.__code__.co_varnames
    )


def has_trl_head(module: nn.Module) -> bool:
    """Whether TRL has added its head to a model, and ours is not around it."""
    return is_added(module.__dict__.get("forward"))


def around(model: Any, theirs: Any) -> Any:
    """A forward to set on a patched model instead of TRL's."""
    closure = closure_of(theirs)
    outputs = tuple(name for name in closure.get("outputs", ()) if name != "log_probs")
    reason = (
        "it computes in fp32; leave out cast_lm_head_to_fp32"
        if closure.get("cast_lm_head_to_fp32", False)
        else ""
    )
    head = TrlHead(model, theirs, closure.get("temperature", 1.0), outputs, reason)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        record, labels = record_of(self), kwargs.get("labels")
        asked = kwargs.get("fused_lm_head") and kwargs.get("shift_labels") is None
        if not asked or labels is None or record is None or torch.compiler.is_compiling():
            return theirs(*args, **kwargs)
        if reason := head.reason(self) or ("router logits" if kwargs.get("output_router_logits") else ""):
            record.fallbacks[f"TRL's head, {reason}"] += 1
            return theirs(*args, **kwargs)
        given = {n: v for n, v in kwargs.items() if n not in ("fused_lm_head", "labels", "shift_labels")}
        count = given.pop("num_items_in_batch", None)
        mask = labels[:, 1:] != IGNORED
        hidden = head.hidden(self, mask, *args, **given)
        return head.output(head.parts(self, hidden, labels[:, 1:][mask]), mask, count)

    forward.__signature__ = inspect.signature(theirs)  # type: ignore[attr-defined]
    setattr(forward, REPLACES, theirs)
    return types.MethodType(forward, model)

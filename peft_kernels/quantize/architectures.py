"""Recognises linear layers and heads of transformers models."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

HEAD_NAMES = ("lm_head", "score", "classifier", "qa_outputs", "summary", "v_head")

_WITH_A_HEAD = re.compile(
    r"For\w*(Classification|QuestionAnswering|MultipleChoice|Regression)|Reward\w*Model"
)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is exactly nn.Linear, or FalconLinear or Conv1D of transformers.

    Conv1D (GPT-2) is not a subclass of nn.Linear; its weight is (in_features, out_features).
    """
    if type(module) is nn.Linear:
        return True
    name, home = type(module).__name__, type(module).__module__
    return (name, home) in (
        ("Conv1D", "transformers.pytorch_utils"),
        ("FalconLinear", "transformers.models.falcon.modeling_falcon"),
    )


def heads(model: nn.Module) -> dict[nn.Module, str]:
    """Modules that fine-tuning trains or that must keep their precision, with the reason."""
    found: dict[nn.Module, str] = {}
    if "transformers" not in sys.modules:
        return found
    from transformers import PreTrainedModel

    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        embeddings = _output_embeddings(module)
        if embeddings is not None:
            found[embeddings] = "the output embeddings"
        found.update((m, "in the model's head") for m in _task_head(module))
        for key in _names(module, "_tied_weights_keys"):
            found.update((m, f"in {type(module).__name__}._tied_weights_keys") for m in _find(module, key))
        for key in _names(module, "_keep_in_fp32_modules"):
            found.update((m, f"in {type(module).__name__}._keep_in_fp32_modules") for m in _find(module, key))
    return found


def in_task_head(model: nn.Module) -> set[nn.Module]:
    """Modules of task heads (classifiers, for example), which fine-tuning initialises anew."""
    if "transformers" not in sys.modules:
        return set()
    from transformers import PreTrainedModel

    return {m for one in model.modules() if isinstance(one, PreTrainedModel) for m in _task_head(one)}


def _task_head(model: Any) -> list[nn.Module]:
    if not _WITH_A_HEAD.search(type(model).__name__) or model.base_model is model:
        return []
    inside = set(model.base_model.modules())
    return [module for module in model.modules() if module not in inside and module is not model]


def _output_embeddings(model: Any) -> nn.Module | None:
    try:
        embeddings = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return embeddings if isinstance(embeddings, nn.Module) else None


def _names(model: nn.Module, attribute: str) -> list[str]:
    return [str(key).removesuffix(".weight") for key in getattr(model, attribute, None) or ()]


def _find(model: nn.Module, key: str) -> Iterator[nn.Module]:
    """Modules whose dotted name contains `key`, and their submodules."""
    for name, module in model.named_modules():
        if f".{key}." in f".{name}.":
            yield module

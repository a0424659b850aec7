"""LoRA+: parameter groups with a higher learning rate for B than for A, for any torch optimizer."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from .groups import check_number


def lora_plus_groups(
    model: nn.Module, lr: float, lr_ratio: float = 16.0, weight_decay: float = 0.0, lr_embedding: float = 1e-6
) -> list[dict[str, Any]]:
    """Parameter groups in which the LoRA B matrices have `lr_ratio` times the learning rate of A.

    The groups, and what is in each, are those of `peft.optimizers.create_loraplus_optimizer`:

    | name               | trainable parameters                              | lr            | weight decay |
    |--------------------|---------------------------------------------------|---------------|--------------|
    | `groupA`           | A matrices, and other non-vectors                 | lr            | weight_decay |
    | `embedding`        | LoRA on nn.Embedding                              | lr_embedding  | weight_decay |
    | `groupB`           | B matrices, and vectors such as DoRA's magnitudes | lr * lr_ratio | weight_decay |
    | `groupB_no_decay`  | biases, and vectors of nn.LayerNorm               | lr * lr_ratio | 0            |

    Parameters
    ----------
    model : nn.Module
        A PEFT model, a model with `peft_kernels.nn.LoRALinear` layers, or both.
    lr : float
        Learning rate of A. Half the learning rate of plain LoRA is a good start.
    lr_ratio : float
        Ratio of the learning rates of B and A; 1 is plain LoRA.
    weight_decay : float
        Weight decay of all groups but `groupB_no_decay`.
    lr_embedding : float
        Learning rate of adapters on embeddings.

    Returns
    -------
    list of dict
        Dicts with "name", "params", "lr" and "weight_decay". Each parameter with requires_grad is in exactly
        one; empty groups are omitted.

    Raises
    ------
    ValueError
        lr, weight_decay or lr_embedding is negative, lr_ratio is not positive, one of them is not finite, or
        nothing in the model is trainable.

    Examples
    --------
    >>> optimizer = torch.optim.AdamW(pk.optim.lora_plus_groups(model, lr=1e-4))

    References
    ----------
    Hayou, Ghosh and Yu 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv:2402.12354.
    """
    check_number("lr_ratio", lr_ratio)
    for argument, value in (("lr", lr), ("weight_decay", weight_decay), ("lr_embedding", lr_embedding)):
        check_number(argument, value)
        if not 0 <= value < math.inf:
            raise ValueError(f"{argument}: expected a finite number of at least 0, got {value}")
    if not 0 < lr_ratio < math.inf:
        raise ValueError(f"lr_ratio: expected a finite number above 0, got {lr_ratio}")
    groups: dict[str, dict[str, Any]] = {
        name: {"name": name, "params": [], "lr": rate, "weight_decay": decay}
        for name, rate, decay in (
            ("groupA", lr, weight_decay),
            ("embedding", lr_embedding, weight_decay),
            ("groupB", lr * lr_ratio, weight_decay),
            ("groupB_no_decay", lr * lr_ratio, 0.0),
        )
    }
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():  # lists shared parameters once
        if parameter.requires_grad:
            groups[_group(name, parameter, modules)]["params"].append(parameter)
    trainable = [group for group in groups.values() if group["params"]]
    if not trainable:
        raise ValueError("model: expected at least one parameter with requires_grad, got none")
    return trainable


def _group(name: str, parameter: nn.Parameter, modules: dict[str, nn.Module]) -> str:
    path = name.split(".")
    # `embed` for `embed.lora_embedding_A.default`. Other LoRA layers of PEFT have an empty lora_embedding_A.
    # Checked by attribute, so that PEFT need not be installed.
    layer = modules[".".join(path[:-2])]
    if len(getattr(layer, "lora_embedding_A", ())) > 0:
        return "embedding"
    if "lora_B" not in name and parameter.ndim != 1:
        return "groupA"
    in_norm = isinstance(modules[".".join(path[:-1])], nn.LayerNorm)
    return "groupB_no_decay" if in_norm or "bias" in name else "groupB"

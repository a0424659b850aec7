"""AdapterConfig: the shape and place of an adapter, with the presets of the papers."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, fields
from typing import Any

from ..ops.gated import ACTIVATIONS

ALIASES = {"swish": "silu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
"""transformers' names of our activations."""


@dataclass(frozen=True)
class AdapterConfig:
    """The shape and place of an adapter.

    Attributes
    ----------
    attention, feed_forward : bool
        Sublayers of each layer that get an adapter.
    parallel : bool
        Read the sublayer's input instead of its output (He et al. 2022). The result is added to the output
        before the layer's residual is added.
    after_norm : bool
        Read the output of the layer norm after the sublayer and add to its input (Pfeiffer et al. 2021); the
        norm is computed twice. For post-norm models such as BERT and RoBERTa.
    reduction : float
        Model features per bottleneck feature; the bottleneck has at least one.
    activation : str
        "relu", "gelu" (exact), "gelu_tanh" or "silu"; also transformers' "gelu_new",
        "gelu_pytorch_tanh" and "swish".
    scaling : float
    norm : bool
        A trained layer norm before the bottleneck.
    bias : bool
        Biases in both projections.
    dropout : float
        Dropout after the activation, in training.

    Raises
    ------
    ValueError
        An invalid value.
    """

    attention: bool
    feed_forward: bool
    parallel: bool = False
    reduction: float = 16
    activation: str = "gelu"
    scaling: float = 1.0
    norm: bool = False
    bias: bool = True
    dropout: float = 0.0
    after_norm: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            kind: Any = {"bool": bool, "float": (int, float), "str": str}[str(field.type)]
            if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
                raise ValueError(f"{field.name}: expected a {field.type}, got {value!r}")
        object.__setattr__(self, "activation", ALIASES.get(self.activation, self.activation))
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        if not (self.attention or self.feed_forward):
            raise ValueError("attention, feed_forward: expected one of them or both, got neither")
        if self.parallel and self.after_norm:
            raise ValueError("parallel, after_norm: expected one of them at most, got both")
        if not 0.001 <= self.reduction < math.inf:
            raise ValueError(f"reduction: expected a finite number, 0.001 at least, got {self.reduction}")
        if not abs(self.scaling) <= sys.float_info.max:  # JSON may have integers beyond
            raise ValueError(f"scaling: expected a finite number, got {self.scaling}")
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"dropout: expected 0 to 1, got {self.dropout}")

    @classmethod
    def houlsby(cls, **options: Any) -> AdapterConfig:
        """After attention and feed-forward, reduction 16, gelu (Houlsby et al. 2019)."""
        preset: dict[str, Any] = {"attention": True, "feed_forward": True}
        return cls(**preset | options)

    @classmethod
    def pfeiffer(cls, **options: Any) -> AdapterConfig:
        """After the feed-forward alone, reduction 16, relu (Pfeiffer et al. 2021, who have after_norm=True in
        BERT)."""
        preset: dict[str, Any] = {"attention": False, "feed_forward": True, "activation": "relu"}
        return cls(**preset | options)

    @classmethod
    def beside(cls, **options: Any) -> AdapterConfig:
        """Parallel to the feed-forward, reduction 16, relu, scaled by 4 (the scaled parallel adapter of He et
        al. 2022, whose own bottlenecks are wider: 512 of 1024)."""
        preset: dict[str, Any] = {"attention": False, "feed_forward": True, "activation": "relu"}
        return cls(**preset | {"parallel": True, "scaling": 4.0} | options)

    def bottleneck_size(self, features: int) -> int:
        return max(1, round(features / self.reduction))


PRESETS = {
    "houlsby": AdapterConfig.houlsby,
    "pfeiffer": AdapterConfig.pfeiffer,
    "parallel": AdapterConfig.beside,
}


def config_of(config: AdapterConfig | str) -> AdapterConfig:
    """The config, or the preset of this name. Raises ValueError for other names."""
    if isinstance(config, AdapterConfig):
        return config
    if not isinstance(config, str) or config not in PRESETS:
        expected = f"an AdapterConfig or one of {', '.join(PRESETS)}"
        raise ValueError(f"config: expected {expected}, got {config!r}")
    return PRESETS[config]()

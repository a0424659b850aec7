"""What quantisation did with a model."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from ..nf4.model import record_of


@dataclass
class QuantizeReport:
    """What `quantize_model` did with a model. `print(report)` sums it up."""

    layers: list[str] = field(default_factory=list)
    """Names of the layers that are NF4."""
    bytes_before: int = 0
    """Of all parameters of the model."""
    bytes_after: int = 0
    left: dict[str, str] = field(default_factory=dict)
    """Why a linear layer, or a set of experts, stayed as it was, by name."""

    def __str__(self) -> str:
        before, after = (f"{n / 1e9:.3g} GB" if n >= 1e9 else f"{n / 1e6:.3g} MB" for n in self._bytes)
        layers = "1 layer is" if len(self.layers) == 1 else f"{len(self.layers)} layers are"
        lines = [f"peft_kernels: {layers} NF4, the model takes {after} of {before}"]
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            by_reason.setdefault(reason, []).append(name)
        for reason, names in by_reason.items():
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            lines.append(
                f"{len(names)} left as {'it is' if len(names) == 1 else 'they are'} ({shown}): {reason}"
            )
        return "\n".join(lines)

    @property
    def _bytes(self) -> tuple[int, int]:
        return self.bytes_before, self.bytes_after


def report_of(model: nn.Module) -> QuantizeReport | None:
    """What `quantize_model` did with a model, or with one inside it (under PEFT, say).

    None when it has done nothing, or no NF4 layer is left."""
    record = record_of(model)
    return None if record is None else record.report


def nbytes_of(model: nn.Module) -> int:
    """Of a DTensor, those of this process's part."""
    return sum(getattr(p, "_local_tensor", p).nbytes for p in model.parameters())

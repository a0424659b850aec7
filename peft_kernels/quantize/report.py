"""The report of `quantize_model`."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from ..nf4.model import record_of


@dataclass
class QuantizeReport:
    """Which layers of a model are NF4 and why others are not. `print(report)` summarises it."""

    layers: list[str] = field(default_factory=list)
    """Names of NF4 layers."""
    bytes_before: int = 0
    """Bytes of all parameters."""
    bytes_after: int = 0
    left: dict[str, str] = field(default_factory=dict)
    """Why linear layers and sets of experts were skipped, by name."""

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
    """The report of a model or of a model inside it (under PEFT, say); None if it has no NF4 layer."""
    record = record_of(model)
    return None if record is None else record.report


def nbytes_of(model: nn.Module) -> int:
    """Bytes of a model's parameters; of DTensors, of their local shards."""
    return sum(getattr(p, "_local_tensor", p).nbytes for p in model.parameters())

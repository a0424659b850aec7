"""Quantisation of models: `quantize_model`, which layers it takes, and what came of it."""

from .model import quantize_model
from .report import QuantizeReport, report_of

__all__ = ["QuantizeReport", "quantize_model", "report_of"]

"""Quantises models: `quantize_model`, selection of layers, and a report."""

from .model import quantize_model
from .report import QuantizeReport, report_of

__all__ = ["QuantizeReport", "quantize_model", "report_of"]

"""Prefixes of PEFT's prefix tuning (Li and Liang 2021): started from a text, and folded for deployment.

pk.prefix.init_from_text(model, tokenizer, "Translate to French.")
pk.prefix.fold(model)      # the network of prefix_projection=True goes, the logits stay
"""

from .fold import fold
from .text import init_from_text

__all__ = ["fold", "init_from_text"]

"""Prefixes of PEFT's prefix tuning (Li and Liang 2021): initialisation from text, and folding for deployment.

pk.prefix.init_from_text(model, tokenizer, "Translate to French.")
pk.prefix.fold(model)      # removes the MLP of prefix_projection=True; same logits
"""

from .fold import fold
from .text import init_from_text

__all__ = ["fold", "init_from_text"]

"""Calls too small for a fused kernel to pay for the check that selects it."""

FEW_PRODUCTS = 1 << 16
"""Products of queries and keys below which attention runs transformers' "sdpa"."""
FEW_LOGITS = 1 << 18
"""Number of logits below which a loss computes them."""

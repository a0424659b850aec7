"""Calls so small that choosing another way takes longer than that way saves."""

FEW_PRODUCTS = 1 << 16
"""Products of queries and keys below which attention runs transformers' "sdpa"."""
FEW_LOGITS = 1 << 18
"""Number of logits below which a loss computes them."""

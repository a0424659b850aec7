"""Tests of the kernels on the card at hand, against plain torch, before their first use there.

`cases` has arguments for every op, `compare` judges results and gradients, `gemms` looks for kernels of NF4
GEMMs that are wrong, `verdicts` decides when to test and remembers what was found.
"""

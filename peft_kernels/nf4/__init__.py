"""NF4 weights: the tensor (`weight`), what it holds (`state`), what torch asks of it (`tensor`), views of it
(`read_only`), the rows of one that a process has (`shard`, `cut`, `part`), experts, models with such weights.
"""

"""NF4 weights: the tensor (`weight`), torch's functions and ops on it (`tensor`), bitsandbytes' format,
packed experts, and shards of weights (`sharded`)."""

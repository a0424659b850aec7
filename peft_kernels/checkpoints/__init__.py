"""Checkpoints on disk: read with suspicion, checked, loaded whole or not at all, quantised shard by shard."""

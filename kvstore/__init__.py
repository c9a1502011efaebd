"""A KV cache in three tiers: device memory, host memory, disk."""

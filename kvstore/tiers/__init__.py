"""Media that hold blocks: slabs of slots in memory, LMDB on disk."""

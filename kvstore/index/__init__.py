"""Which blocks match a query best: exact search, HNSW segments, and the choice between them."""

from kvstore.index.landmark_index import IndexStats, LandmarkIndex

__all__ = ["IndexStats", "LandmarkIndex"]

"""Which blocks match a query best: exact search, HNSW segments, and the choice between them."""

from kvstore.index.graph_files import GraphFiles
from kvstore.index.landmark_index import IndexStats, LandmarkIndex

__all__ = ["GraphFiles", "IndexStats", "LandmarkIndex"]

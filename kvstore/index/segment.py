"""One frozen HNSW graph over consecutive landmarks of one stream.

Owns the graph. Never changes it once it is built, so forks share it and an answer never depends on
when it was asked. The only file that imports hnswlib.

HNSW (Malkov & Yashunin 2016, arXiv 1603.09320) wants a metric, and the inner product is none:
trained landmarks have so much in common, and queries so little with them, that a graph by inner
products finds a tenth of what it should. So the landmarks' mean is taken off, which changes every
score of a query by the same, and one more coordinate makes all of them equally long, so that the
nearest in Euclidean distance has the largest inner product (Bachrach et al. 2014, "Speeding up the
Xbox recommender system"). Both need all landmarks at once, which a frozen segment has.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import hnswlib
import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from kvstore.config import IndexConfig
from kvstore.errors import KVStoreError
from kvstore.index.graph_files import GraphFiles
from kvstore.index.pages import stack

BATCH = 256
"""Landmarks added between two looks at whether the building was called off."""


def plan(count: int, segment: int) -> list[tuple[int, int]]:
    """Return the ranges (start, stop) of the segments over `count` landmarks.

    They follow each other from 0, sizes descending powers of two times `segment`; fewer than
    `segment` landmarks are left over. Depends on nothing else, so a rebuild cuts the same.
    """
    ranges = []
    start, left = 0, count // segment
    while left:
        size = 1 << (left.bit_length() - 1)
        ranges.append((start, start + size * segment))
        start += size * segment
        left -= size
    return ranges


class Segment:
    """Landmarks start..stop of one stream, searchable once `build` has run, on any thread.

    views: the landmarks [n, dim] in order, n adding up to stop - start.
    """

    def __init__(
        self,
        config: IndexConfig,
        start: int,
        stop: int,
        views: Sequence[torch.Tensor],
        files: GraphFiles | None = None,
    ) -> None:
        self.start = start
        self.stop = stop
        self.error: Exception | None = None
        self._raised = False
        self._config = config
        self._files = files
        self._views: Sequence[torch.Tensor] = views
        self._graph: hnswlib.Index | None = None
        self._done = threading.Event()

    def build(self, called_off: threading.Event) -> None:
        """Build the graph, in block order; on failure keep the error for `raise_error`."""
        try:
            rows = self._lengthen(stack(self._views))
            key = self._key(rows) if self._files else ""
            graph = self._load(key, rows)
            if graph is None:
                graph = hnswlib.Index("l2", rows.shape[1])
                self._insert(graph, rows, called_off)
                if self._files:
                    self._files.keep(key, graph.save_index)
            graph.set_ef(self._config.ef_search)
            self._graph = graph
        except Exception as error:
            # Its traceback would keep all that is here, this segment too, until Python looks for
            # cycles.
            self.error = error.with_traceback(None)
        finally:
            self._views = ()
            self._done.set()

    def _load(self, key: str, rows: NDArray[np.float32]) -> hnswlib.Index | None:
        path = self._files.find(key) if self._files else None
        if path is None:
            return None
        graph = hnswlib.Index("l2", rows.shape[1])
        try:
            graph.load_index(str(path), max_elements=len(rows))
        except RuntimeError:  # it had to make room just now
            return None
        return graph

    def _insert(
        self, graph: hnswlib.Index, rows: NDArray[np.float32], called_off: threading.Event
    ) -> None:
        graph.init_index(
            len(rows),
            M=self._config.m,
            ef_construction=self._config.ef_construction,
            random_seed=self._config.seed,
        )
        for i in range(0, len(rows), BATCH):
            if called_off.is_set():
                raise KVStoreError("the index was closed while a segment was being built")
            some = rows[i : i + BATCH]
            # One thread: with more, the order of insertion and so the graph would vary.
            graph.add_items(some, np.arange(len(some)) + (self.start + i), num_threads=1)

    def _key(self, rows: NDArray[np.float32]) -> str:
        """Name the graph by all that it follows from."""
        config = self._config
        made = f"{self.start} {config.m} {config.ef_construction} {config.seed}"
        return xxhash.xxh3_128_hexdigest(rows.tobytes() + made.encode())

    def _lengthen(self, landmarks: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return landmarks [n, dim] without their mean, all of one length: [n, dim + 1]."""
        self._mean = landmarks.mean(axis=0)
        landmarks -= self._mean
        squares = np.square(landmarks).sum(axis=1)
        self._square = float(squares.max())
        last = np.sqrt(self._square - squares)
        return np.concatenate((landmarks, last[:, None]), axis=1)

    def ready(self) -> Segment:
        """Wait until it is built; raise KVStoreError if that failed."""
        self._done.wait()
        if self.error is not None:
            raise self._failure()
        return self

    def raise_error(self) -> None:
        """Raise KVStoreError if building failed and that has not been raised yet."""
        if self.error is not None and not self._raised:
            raise self._failure()

    def _failure(self) -> KVStoreError:
        self._raised = True
        failure = KVStoreError(f"an index segment could not be built: {self.error}")
        failure.__cause__ = self.error
        return failure

    def search(
        self, queries: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]] | None:
        """Return (numbers [m, k'], scores [m, k']), best first, k' = min(k, stop - start).

        queries: [m, dim]. None when the graph does not reach that many landmarks: many equal ones
        can leave it in pieces.
        """
        assert self._graph is not None
        points = np.concatenate((queries, np.zeros((len(queries), 1), np.float32)), axis=1)
        try:
            labels, distances = self._graph.knn_query(
                points, k=min(k, self.stop - self.start), num_threads=1
            )
        except RuntimeError:
            return None
        # |q - x|^2 = |q|^2 + |x|^2 - 2 q x, and |x|^2 is the same for all.
        same = np.square(queries).sum(axis=1) + self._square + 2 * (queries @ self._mean)
        return labels.view(np.int64), (same[:, None] - distances) / 2

    @property
    def nbytes(self) -> int:
        """Bytes of the graph and of its own copy of the landmarks; 0 until built."""
        return 0 if self._graph is None else int(self._graph.index_file_size())

"""The index of one context: landmarks of its streams, and which of them match a query best.

Owns the choice between exact search and HNSW. Never knows what a block holds or where it lies.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from kvstore import _native
from kvstore.config import IndexConfig
from kvstore.errors import StoreClosedError
from kvstore.index import cost
from kvstore.index.builder import Builder
from kvstore.index.exact import ExactSearch
from kvstore.index.graph_files import GraphFiles
from kvstore.index.pages import LandmarkPages
from kvstore.index.segment import Segment, plan
from kvstore.index.segments import Segments
from kvstore.streams import stream_numbers

Kind = Literal["exact", "hnsw"]

OVERHANG = 64
"""Landmarks at a segment's end that a query may have to leave out.

So many more are asked of the segment then, and left out of its answer. A model that treats its
newest blocks apart would otherwise never be able to use a segment that was just finished.
"""

_ALL = 2**63 - 1


@dataclass(frozen=True)
class IndexStats:
    """What an index holds, and what was asked of it and its forks so far.

    kind: what answered the last query. queries: one per stream. mean_query_us: of wall time per
    query; on CUDA without what is still running on the device. recall: of sampled HNSW queries,
    the share of the exact top k that was found; None before the first sample.
    """

    kind: Kind
    landmarks: int
    bytes: int
    queries: int
    mean_query_us: float
    recall: float | None


@dataclass(frozen=True)
class _Choice:
    """How a search of one stream is done: what it follows from, and the segments, none: exactly.

    key: landmarks, those of segments in use, queries, k, lowest and highest bound. loss: what it
    takes longer, in microseconds, for want of segments up to `due`, which cost `price` to build.
    """

    key: tuple[int, int, int, int, int, int]
    graphs: list[Segment]
    loss: float = 0.0
    price: float = 0.0
    due: int = 0


class _Tally:
    """Counters of an index and its forks."""

    def __init__(self) -> None:
        self.kind: Kind = "exact"
        self.queries = 0
        self.seconds = 0.0
        self.graph_queries = 0
        self.sampled = 0
        self.recall = 0.0


class LandmarkIndex:
    """Maximum inner product search over landmarks [streams, n, dim], float32, on `device`.

    Block numbers are implied: the first landmark added to a stream is block 0. The landmarks stay
    in memory for exact search; HNSW segments come on top, over all but the newest.

    The same landmarks, searches and config give the same answers: where a segment takes over from
    exact search depends on counts, never on timing. With kind "hnsw" segments are built while
    landmarks are added and a segment is used half a segment later; with "auto" (on a CPU) when
    exact search has cost so much more than segments would have that building them would have been
    paid for (by kvstore.index.cost), and used when it has been paid for one and a half times.
    `wait` does both at once.

    Used by one thread.
    """

    def __init__(
        self,
        config: IndexConfig,
        streams: int,
        dim: int,
        device: torch.device | str = "cpu",
        files: GraphFiles | None = None,
    ) -> None:
        """files: where graphs are kept that would have to be built again."""
        if streams < 1 or dim < 1:
            raise ValueError(f"an index needs streams and dim of at least 1, not {streams}, {dim}")
        self.config = config
        self.streams = streams
        self.dim = dim
        self.device = torch.device(device)
        self._graphs = config.kind == "hnsw" or (
            config.kind == "auto" and self.device.type == "cpu"
        )
        self._pages = LandmarkPages(streams, dim, self.device)
        self._builder = Builder()
        self._segments = Segments(config, self._pages, self._builder, files=files)
        self._exact = ExactSearch(self.device)
        self._tally = _Tally()
        # What exact search cost more than segments would have, and up to where to use segments.
        self._lost_us = [0.0] * streams
        self._target = [0] * streams
        self._choices: list[_Choice | None] = [None] * streams
        self._closed = False

    def fork(self) -> LandmarkIndex:
        """Return an index with the same landmarks and segments, without copying them.

        Either may go on adding; neither sees what the other adds. Statistics are counted together.
        """
        self._check()
        fork = LandmarkIndex.__new__(LandmarkIndex)
        fork.config, fork.streams, fork.dim = self.config, self.streams, self.dim
        fork.device, fork._graphs = self.device, self._graphs
        fork._pages = self._pages.fork()
        fork._builder = self._builder.retain()
        fork._segments = self._segments.fork(fork._pages)
        fork._exact, fork._tally = self._exact, self._tally
        fork._lost_us, fork._target = list(self._lost_us), list(self._target)
        fork._choices = list(self._choices)
        fork._closed = False
        return fork

    def add(self, streams: slice | Sequence[int], landmarks: torch.Tensor) -> None:
        """Append landmarks [s, n, dim], of any float dtype, to each of s streams.

        Raises ValueError for another shape or for numbers that are not finite; whatever is raised,
        nothing is added.
        """
        self._check()
        rows = stream_numbers(streams, self.streams)
        values = self._floats("landmarks", landmarks, len(rows))
        counts = self._pages.counts
        before = list(counts)
        try:
            for i, stream in enumerate(rows):
                self._pages.append(stream, values[i])
                if self.config.kind == "hnsw":
                    self._segments.request(stream, counts[stream])
        except BaseException:
            counts[:] = before
            for stream in rows:
                self._segments.retract(stream, counts[stream])
            raise

    def search(
        self,
        streams: slice | Sequence[int],
        queries: torch.Tensor,
        k: int,
        before: torch.Tensor | NDArray[np.int64] | int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the k blocks whose landmarks have the largest inner products with each query.

        queries: [s, m, dim], any float dtype; before: only blocks with a smaller number count, for
        each query [m] int64 or for all of them; None: all blocks do. Returns blocks int64
        [s, m, k] and scores float32 [s, m, k] on the index's device, best first, -1 and -inf where
        there are fewer than k blocks. Raises ValueError for other shapes, k < 1 and queries that
        are not finite.
        """
        began = time.perf_counter()
        self._check()
        rows = stream_numbers(streams, self.streams)
        values = self._floats("queries", queries, len(rows))
        s, m, _ = values.shape
        if k < 1:
            raise ValueError(f"k is {k}; it must be at least 1")
        bounds = _bounds(before, m)
        if not s or not m:
            return self._exact.top_k(self._pages, rows, values, k, bounds)
        low, high = _extent(bounds)
        graphs = [self._graphs_for(stream, m, k, low, high) for stream in rows]
        if not any(graphs):
            found = self._exact.top_k(self._pages, rows, values, k, bounds)
        else:
            if isinstance(bounds, int):
                bounds = np.full(m, bounds)
            found = self._merge(graphs, rows, values, k, bounds)
        self._tally.kind = "hnsw" if any(graphs) else "exact"
        self._tally.queries += s * m
        self._tally.seconds += time.perf_counter() - began
        for i, stream in enumerate(rows):
            if graphs[i]:
                assert not isinstance(bounds, int)
                self._sample(stream, values[i], k, bounds, found[0][i, 0])
        return found

    def wait(self) -> None:
        """Build what single queries profit from, wait for it, and use it from now on.

        Worth it before many single queries. What they find is the same whether or not the thread
        had been at it before. Raises KVStoreError if building failed.
        """
        self._check()
        counts = self._pages.counts
        streams = [s for s in range(self.streams) if self._graphs and self._profits(s)]
        for stream in streams:
            self._segments.request(stream, counts[stream])
        for stream in streams:
            self._segments.settle(stream, counts[stream])
            self._target[stream] = self._segments.settled[stream]

    def progress(self) -> dict[str, torch.Tensor]:
        """Return what `resume` needs, beside the landmarks, for the same answers again."""
        return {
            "settled": torch.tensor(self._segments.settled, dtype=torch.int64),
            "lost_us": torch.tensor(self._lost_us, dtype=torch.float64),
        }

    def resume(self, progress: dict[str, torch.Tensor]) -> None:
        """Go on where `progress` was taken; the same landmarks have been added to this index.

        The segments are built in the background; the first search that needs one waits for it.
        """
        self._check()
        settled, lost = progress["settled"].tolist(), progress["lost_us"].tolist()
        if len(settled) != self.streams or len(lost) != self.streams:
            raise ValueError(f"the progress is of {len(settled)} streams, not {self.streams}")
        if any(a > b for a, b in zip(settled, self._pages.counts, strict=True)):
            raise ValueError("the progress is of an index with more landmarks")
        self._lost_us = lost
        self._target = settled
        if self._graphs:
            for stream, count in enumerate(settled):
                self._segments.request(stream, count)

    def length(self, stream: int) -> int:
        """Return the number of landmarks of a stream."""
        return self._pages.counts[self._number(stream)]

    def landmarks(self, stream: int) -> torch.Tensor:
        """Return a stream's landmarks, float32 [n, dim]: a view, or a copy after a fork."""
        return self._pages.tensor(self._number(stream))

    def gather(self, streams: slice | Sequence[int], blocks: torch.Tensor) -> torch.Tensor:
        """Return the landmarks float32 [s, ..., dim] of blocks int64 [s, ...] of s streams.

        Where a block is -1 the landmark is not defined; KeyError for one that does not exist.
        """
        self._check()
        rows = stream_numbers(streams, self.streams)
        if blocks.dtype != torch.int64 or not blocks.dim() or len(blocks) != len(rows):
            raise ValueError(
                f"blocks are {blocks.dtype} of shape {tuple(blocks.shape)}; "
                f"expected int64 ({len(rows)}, ...)"
            )
        return self._pages.gather(rows, blocks)

    def kind_for(self, m: int, k: int = 1, stream: int = 0) -> Kind:
        """Return what would answer m queries at once now; changes nothing."""
        return "hnsw" if self._pick(self._number(stream), m, k, _ALL, _ALL)[0] else "exact"

    @property
    def nbytes(self) -> int:
        """Bytes of landmarks, graphs and buffers, those shared with forks included."""
        return self._pages.nbytes + self._segments.nbytes + self._exact.nbytes

    @property
    def stats(self) -> IndexStats:
        """What it holds, and what was asked of it and its forks so far."""
        tally = self._tally
        return IndexStats(
            kind=tally.kind,
            landmarks=sum(self._pages.counts),
            bytes=self.nbytes,
            queries=tally.queries,
            mean_query_us=1e6 * tally.seconds / max(tally.queries, 1),
            recall=tally.recall / tally.sampled if tally.sampled else None,
        )

    def close(self) -> None:
        """End it; forks live on. The last one to close ends the building thread."""
        if not self._closed:
            self._closed = True
            self._builder.release()

    def _graphs_for(self, stream: int, m: int, k: int, low: int, high: int) -> list[Segment]:
        """Return the segments to search, none for exact search, after starting to use due ones.

        low, high: the smallest and the largest of the queries' bounds.
        """
        if not self._graphs:
            return []
        if self.config.kind == "hnsw":
            # Half a segment later: until then the thread has time to build it.
            ripe = self._pages.counts[stream] - self.config.segment // 2
            self._target[stream] = max(self._target[stream], ripe)
        segments = self._segments
        # While nothing has changed, as from one token of a block to the next, the choice stays.
        key = (self._pages.counts[stream], segments.settled[stream], m, k, low, high)
        choice = self._choices[stream]
        if choice is None or choice.key != key:
            choice = self._choices[stream] = self._choose(key, stream)
        if choice.loss:
            self._rent(stream, choice)
        if self._target[stream] >= segments.settled[stream] + self.config.segment:
            segments.settle(stream, self._target[stream])
            return self._pick(stream, m, k, low, high)[0]
        return choice.graphs

    def _choose(self, key: tuple[int, int, int, int, int, int], stream: int) -> _Choice:
        count, settled, m, k, low, high = key
        graphs, us = self._pick(stream, m, k, low, high)
        due = count - count % self.config.segment
        if self.config.kind != "auto" or due <= settled or due > low + OVERHANG:
            return _Choice(key, graphs)
        planned = len(plan(due, self.config.segment))
        loss = us - self._graph_us(planned, min(high, count) - due, m, k)
        missing = self._segments.missing(stream, due)
        price = cost.build_us(missing, self.dim, self.config.ef_construction)
        return _Choice(key, graphs, max(loss, 0.0), price, due)

    def _pick(
        self, stream: int, m: int, k: int, low: int, high: int
    ) -> tuple[list[Segment], float]:
        """Return the segments to search, and the microseconds that the search should take."""
        high = min(high, self._pages.counts[stream])
        exact = cost.exact_us(high, m, self.dim)
        usable = [s for s in self._segments.active[stream] if s.stop <= low + OVERHANG]
        if not usable:
            return usable, exact
        graph = self._graph_us(len(usable), high - usable[-1].stop, m, k)
        if self.config.kind == "auto" and exact < graph:
            return [], exact
        return usable, graph

    def _graph_us(self, graphs: int, rest: int, m: int, k: int) -> float:
        beam = max(self.config.ef_search, k)
        return cost.graph_us(graphs, max(rest, 0), m, self.dim, beam)

    def _rent(self, stream: int, choice: _Choice) -> None:
        """Count what a search loses for want of segments; ask for them when it has paid for them.

        Rent or buy: whatever the number of queries turns out to be, at most about twice the time
        is spent that would have been best in hindsight.
        """
        self._lost_us[stream] += choice.loss
        if self._lost_us[stream] >= choice.price:
            self._segments.request(stream, choice.due)
        if self._lost_us[stream] >= 1.5 * choice.price:
            self._target[stream] = choice.due
            self._lost_us[stream] = 0.0

    def _profits(self, stream: int) -> bool:
        count = self._pages.counts[stream]
        graphs = len(plan(count, self.config.segment))
        graph = self._graph_us(graphs, count % self.config.segment, 1, 1)
        return self.config.kind == "hnsw" or graph < cost.exact_us(count, 1, self.dim)

    def _merge(
        self,
        graphs: list[list[Segment]],
        rows: list[int],
        queries: torch.Tensor,
        k: int,
        bounds: NDArray[np.int64] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the best of each stream's segments and, exactly, of the rest; queries [s, m, dim].

        Streams grow together, so their segments end at the same landmark as a rule, and the rest
        is searched in one go.
        """
        points = queries.cpu().numpy()
        parts = [_ask_graphs(of_stream, points[i], k, bounds) for i, of_stream in enumerate(graphs)]
        best = torch.empty((len(rows), queries.shape[1], k), dtype=torch.int64, device=self.device)
        values = torch.empty(best.shape, device=self.device)
        alike: dict[tuple[int, int], list[int]] = {}
        for i, (rest, known, _) in enumerate(parts):
            alike.setdefault((rest, known.shape[1]), []).append(i)
        for (rest, width), group in alike.items():
            found = [self._from_graphs([parts[i] for i in group])]
            ends = [self._pages.counts[rows[i]] for i in group]
            high = max(ends) if bounds is None else min(max(ends), int(bounds.max()))
            if rest < high or width < k:
                some = queries if len(group) == len(rows) else queries[group]
                streams = [rows[i] for i in group]
                found.append(self._exact.top_k(self._pages, streams, some, k, bounds, rest))
            numbers, scores = found[0]
            if len(found) > 1 or scores.shape[-1] > k or len(graphs[group[0]]) > 1:
                numbers = torch.cat([part for part, _ in found], dim=-1)
                scores, order = torch.cat([part for _, part in found], dim=-1).topk(k)
                numbers = numbers.gather(-1, order)
            if len(group) == len(rows):
                return numbers, scores
            best[group], values[group] = numbers, scores
        return best, values

    def _from_graphs(
        self, parts: list[tuple[int, NDArray[np.int64], NDArray[np.float32]]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        numbers = torch.from_numpy(np.stack([part for _, part, _ in parts]))
        scores = torch.from_numpy(np.stack([part for _, _, part in parts]))
        return numbers.to(self.device), scores.to(self.device)

    def _sample(
        self,
        stream: int,
        queries: torch.Tensor,
        k: int,
        bounds: NDArray[np.int64] | None,
        found: torch.Tensor,
    ) -> None:
        """Answer one in so many HNSW queries exactly too, and note how much of that was found."""
        tally, every = self._tally, self.config.sample
        before = tally.graph_queries
        tally.graph_queries += len(queries)
        if not every or before // every == tally.graph_queries // every:
            return
        bounds = None if bounds is None else bounds[:1]
        exact, _ = self._exact.top_k(self._pages, [stream], queries[None, :1], k, bounds)
        want = {number for number in exact.flatten().tolist() if number >= 0}
        if want:
            tally.sampled += 1
            tally.recall += len(want.intersection(found.tolist())) / len(want)

    def _check(self) -> None:
        if self._closed:
            raise StoreClosedError("the index is closed")
        self._builder.raise_failure()

    def _number(self, stream: int) -> int:
        return stream_numbers([stream], self.streams)[0]

    def _floats(self, name: str, tensor: torch.Tensor, streams: int) -> torch.Tensor:
        shape = tuple(tensor.shape)
        if len(shape) != 3 or shape[0] != streams or shape[2] != self.dim:
            raise ValueError(f"{name} have shape {shape}; expected ({streams}, n, {self.dim})")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} are {tensor.dtype}; expected a float dtype")
        values = tensor
        if values.dtype is not torch.float32 or values.device != self.device:
            values = values.to(self.device, torch.float32)
        if values.requires_grad:
            values = values.detach()
        if values.is_cpu:
            values = values.contiguous()
            finite = _native.finite(values.data_ptr(), values.numel())
        else:
            # The sum is not finite if a number is not, and can else only have overflowed.
            finite = math.isfinite(values.sum()) or bool(values.isfinite().all())
        if not finite:
            raise ValueError(f"{name} hold numbers that are not finite")
        return values


def _ask_graphs(
    graphs: list[Segment], points: NDArray[np.float32], k: int, bounds: NDArray[np.int64] | None
) -> tuple[int, NDArray[np.int64], NDArray[np.float32]]:
    """Search one stream's segments for points [m, dim].

    Returns from which landmark on they know nothing, and of what they know numbers [m, n] and
    scores [m, n], -1 and -inf where a number is not below the point's bound.
    """
    low = _ALL if bounds is None else int(bounds.min())
    nothing = np.empty((len(points), 0), np.int64), np.empty((len(points), 0), np.float32)
    parts = [nothing]
    for graph in graphs:
        overhang = max(graph.stop - low, 0)
        found = graph.search(points, k + overhang)
        if found is None:
            return 0, *nothing
        numbers, scores = found
        if overhang:
            assert bounds is not None
            beyond = numbers >= bounds[:, None]
            if beyond.any():
                numbers[beyond], scores[beyond] = -1, -np.inf
                order = np.argsort(-scores, axis=1, kind="stable")
                numbers = np.take_along_axis(numbers, order, 1)
                scores = np.take_along_axis(scores, order, 1)
            numbers, scores = numbers[:, :k], scores[:, :k]
        parts.append((numbers, scores))
    if len(parts) == 2:
        return graphs[-1].stop, *parts[1]
    numbers, scores = (np.concatenate(kind, axis=1) for kind in zip(*parts, strict=True))
    return (graphs[-1].stop if graphs else 0), numbers, scores


def _bounds(
    before: torch.Tensor | NDArray[np.int64] | int | None, m: int
) -> NDArray[np.int64] | int | None:
    """Check `before`: one number for all queries, or one for each."""
    if before is None or (isinstance(before, int) and before >= 0):
        return before
    given = before.cpu().numpy() if isinstance(before, torch.Tensor) else np.asarray(before)
    if given.dtype.kind not in "iu" or given.shape not in ((), (m,)):
        raise ValueError(
            f"before is {given.dtype} of shape {given.shape}; expected whole numbers, one or {m}"
        )
    bounds = np.broadcast_to(given, (m,)).astype(np.int64)
    if m and bounds.min() < 0:
        raise ValueError(f"before is {bounds.min()}; block numbers begin at 0")
    return bounds


def _extent(bounds: NDArray[np.int64] | int | None) -> tuple[int, int]:
    if bounds is None:
        return _ALL, _ALL
    if isinstance(bounds, int):
        return bounds, bounds
    return int(bounds.min()), int(bounds.max())

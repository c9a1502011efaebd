"""Which segments an index has, which are in use, and which are on their way.

Owns the segments of all streams of one index. Never picks between them and exact search.
"""

from __future__ import annotations

from kvstore.config import IndexConfig
from kvstore.index.builder import Builder
from kvstore.index.graph_files import GraphFiles
from kvstore.index.pages import LandmarkPages
from kvstore.index.segment import Segment, plan


class Segments:
    """Segments over the first landmarks of each stream.

    A stream is *settled* up to a count: its segments in use are plan(settled). Which count that is
    says the index; it never depends on which segment happens to be ready.
    """

    def __init__(
        self,
        config: IndexConfig,
        pages: LandmarkPages,
        builder: Builder,
        origin: Segments | None = None,
        files: GraphFiles | None = None,
    ) -> None:
        streams = len(pages.counts)
        self._config = config
        self._pages = pages
        self._builder = builder
        self._files = files
        # What lies below the fork is built once, for both sides, in the origin's table: a
        # throwaway fork often is the one that first asks for it.
        self._origin = origin
        self._shared = list(pages.counts) if origin else [0] * streams
        self._built: list[dict[tuple[int, int], Segment]] = [{} for _ in range(streams)]
        self._requested = [0] * streams
        self.settled = [0] * streams
        self.active: list[list[Segment]] = [[] for _ in range(streams)]

    def fork(self, pages: LandmarkPages) -> Segments:
        """Return segments for a fork's pages, sharing what is built or on its way."""
        fork = Segments(self._config, pages, self._builder, self, self._files)
        fork._requested = list(self._requested)
        fork.settled = list(self.settled)
        fork.active = [list(segments) for segments in self.active]
        return fork

    def missing(self, stream: int, count: int) -> list[int]:
        """Return the sizes of plan(count)'s segments that are not in use."""
        have = {(segment.start, segment.stop) for segment in self.active[stream]}
        return [b - a for a, b in plan(count, self._config.segment) if (a, b) not in have]

    def request(self, stream: int, count: int) -> None:
        """Have the segments of plan(count) built in the background."""
        count -= count % self._config.segment
        if count > self._requested[stream]:
            self._requested[stream] = count
            for start, stop in plan(count, self._config.segment):
                self._get(stream, start, stop)

    def retract(self, stream: int, count: int) -> None:
        """Forget the segments that reach beyond `count` landmarks, none of which is in use."""
        table = self._built[stream]
        for key in [key for key in table if key[1] > count]:
            del table[key]
        self._requested[stream] = min(self._requested[stream], count)

    def settle(self, stream: int, count: int) -> None:
        """Use the segments of plan(count) from now on; wait for those that are not ready."""
        count -= count % self._config.segment
        if count <= self.settled[stream]:
            return
        ranges = plan(count, self._config.segment)
        found = [self._get(stream, start, stop) for start, stop in ranges]
        self.active[stream] = [segment.ready() for segment in found]
        self.settled[stream] = count
        self._requested[stream] = max(self._requested[stream], count)
        keep = {*ranges, *plan(self._requested[stream], self._config.segment)}
        table = self._built[stream]
        for key in [key for key in table if key not in keep]:
            del table[key]

    def _get(self, stream: int, start: int, stop: int) -> Segment:
        if self._origin is not None and stop <= self._shared[stream]:
            return self._origin._get(stream, start, stop)
        table = self._built[stream]
        segment = table.get((start, stop))
        if segment is None or segment.error is not None:
            views = self._pages.rows(stream, start, stop)
            if self._pages.device.type != "cpu":
                # Here, in the order of the owner's stream; the builder's thread has its own.
                views = [view.cpu() for view in views]
            segment = Segment(self._config, start, stop, views, self._files)
            table[start, stop] = segment
            self._builder.submit(segment)
        return segment

    @property
    def nbytes(self) -> int:
        """Bytes of the graphs, those shared with a fork included."""
        found: set[Segment] = {s for active in self.active for s in active}
        table: Segments | None = self
        while table is not None:
            found.update(s for built in table._built for s in built.values())
            table = table._origin
        return sum(segment.nbytes for segment in found)

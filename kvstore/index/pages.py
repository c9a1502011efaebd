"""Append-only landmarks of several streams, shared between forks without a copy.

Owns the landmarks' memory. Never searches.

A landmark is written once and never moves: growing adds a page instead of copying what is there,
and a fork sees the same pages up to its own counts. Only the one that made a page writes to it, so
both sides of a fork go on without seeing each other's landmarks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

LANES = 64
"""Scores are computed for this many landmarks at a time, so each page ends in as much slack.

With whole lanes a score does not depend on how the landmarks are cut into pages (measured: bit for
bit; a matmul's last odd columns go through another kernel and differ in the last bit), and
therefore a context that was forked, or closed and reopened, gives the same answers.
"""

FIRST_PAGE = 1024
"""Landmarks of a stream that the first page holds."""


class Page:
    """Landmarks [streams, dim, size + LANES]: column c of stream s is landmark base[s] + c.

    Stored across, because a few queries times landmarks [dim, n] is 1.2 to 1.8 times faster than
    times landmarks [n, dim] (2 to 64 queries, dim 64, 32,768 landmarks).
    """

    def __init__(self, base: list[int], size: int, dim: int, device: torch.device) -> None:
        self.base = base
        self.size = size
        self.data = torch.empty(len(base), dim, size + LANES, device=device)
        self.streams = list(self.data.unbind(0))

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.data.nbytes


class LandmarkPages:
    """Landmarks of `streams` streams, numbered 0, 1, 2, ... in each."""

    def __init__(self, streams: int, dim: int, device: torch.device) -> None:
        self.dim = dim
        self.device = device
        self.counts = [0] * streams
        self._pages: list[Page] = []
        self._own = 0  # the pages from here on are ours to write to
        self._next = [0] * streams  # where the next page begins, in each stream

    def fork(self) -> LandmarkPages:
        """Return pages with the same landmarks; neither side sees what the other appends."""
        fork = LandmarkPages(len(self.counts), self.dim, self.device)
        fork.counts = list(self.counts)
        fork._pages = list(self._pages)
        fork._own = len(self._pages)
        fork._next = list(self.counts)
        return fork

    def append(self, stream: int, rows: torch.Tensor) -> None:
        """Append rows [n, dim] float32 to one stream."""
        count, total = self.counts[stream], len(rows)
        done = 0
        while done < total:
            page = self._page_at(stream, count + done)
            column = count + done - page.base[stream]
            some = min(total - done, page.size - column)
            page.streams[stream][:, column : column + some] = rows[done : done + some].T
            done += some
        self.counts[stream] = count + total

    def _page_at(self, stream: int, number: int) -> Page:
        while number >= self._next[stream]:
            own = sum(page.size for page in self._pages[self._own :])
            # Half as much again: eleven pages at 32,768 landmarks, at most a third of them empty.
            size = max(FIRST_PAGE, own // 2 // LANES * LANES)
            self._pages.append(Page(list(self._next), size, self.dim, self.device))
            self._next = [start + size for start in self._next]
        return next(p for p in reversed(self._pages) if p.base[stream] <= number)

    def spans(self, stream: int, start: int, stop: int) -> Iterator[tuple[int, Page, int, int]]:
        """Yield (number, page, column, width) for landmarks start..stop, in order, without gaps."""
        end = self.counts[stream] if stop > self.counts[stream] else stop
        found = []
        for page in reversed(self._pages):
            base = page.base[stream]
            if base < end:
                number = base if base > start else start
                found.append((number, page, number - base, end - number))
                end = number
                if number == start:
                    break
        return reversed(found)

    def rows(self, stream: int, start: int, stop: int) -> list[torch.Tensor]:
        """Return views [dim, n] of landmarks start..stop; landmarks once written never change."""
        return [
            page.streams[stream][:, column : column + width]
            for _, page, column, width in self.spans(stream, start, stop)
        ]

    def tensor(self, stream: int) -> torch.Tensor:
        """Return a copy of a stream's landmarks [n, dim]."""
        views = self.rows(stream, 0, self.counts[stream])
        if not views:
            return torch.empty(0, self.dim, device=self.device)
        return torch.cat(views, dim=1).T.contiguous()

    @property
    def nbytes(self) -> int:
        """Bytes allocated for the pages, those shared with a fork included."""
        return sum(page.nbytes for page in self._pages)


def stack(views: Sequence[torch.Tensor]) -> NDArray[np.float32]:
    """Copy views [dim, n] into one contiguous array [sum of n, dim] in host memory."""
    rows: NDArray[np.float32] = np.concatenate([view.cpu().numpy().T for view in views])
    return np.ascontiguousarray(rows)

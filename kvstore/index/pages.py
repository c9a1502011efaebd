"""Append-only landmarks of several streams, shared between forks without a copy.

Owns the landmarks' memory. Never searches.

A fork sees the same pages up to its own counts, and what it appends goes to a page of its own. Only
the one that made a page writes to it, and nobody writes twice to the same place, so both sides of
a fork go on without seeing each other's landmarks. A page that is full is replaced by a larger
copy; a fork keeps the one it knows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

LANES = 64
"""Scores are computed for this many landmarks at a time, so each page ends in as much slack.

With whole lanes a score does not depend on how the landmarks are cut into pages (measured: bit for
bit; a matmul's last odd columns go through another kernel and differ in the last bit), and
therefore a context that was forked, or closed and reopened, gives the same answers.
"""

SMALLEST = 1024
"""Landmarks of a stream that a page has room for at least."""


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


class LandmarkPages:
    """Landmarks of `streams` streams, numbered 0, 1, 2, ... in each."""

    def __init__(self, streams: int, dim: int, device: torch.device) -> None:
        self.dim = dim
        self.device = device
        self.counts = [0] * streams
        self._pages: list[Page] = []
        self._own = False  # the last page is ours to write to

    def fork(self) -> LandmarkPages:
        """Return pages with the same landmarks; neither side sees what the other appends."""
        fork = LandmarkPages(len(self.counts), self.dim, self.device)
        fork.counts = list(self.counts)
        fork._pages = list(self._pages)
        return fork

    def append(self, stream: int, rows: torch.Tensor) -> None:
        """Append rows [n, dim] float32 to one stream."""
        if not len(rows):
            return
        count = self.counts[stream]
        page = self._room(stream, count + len(rows))
        column = count - page.base[stream]
        page.streams[stream][:, column : column + len(rows)] = rows.T
        self.counts[stream] = count + len(rows)

    def _room(self, stream: int, stop: int) -> Page:
        """Return a page of ours that has room for landmarks of a stream up to stop."""
        if self._own and stop - self._pages[-1].base[stream] <= self._pages[-1].size:
            return self._pages[-1]
        keep = len(self._pages) - self._own
        base = list(self._pages[-1].base if self._own else self.counts)
        # Small pages before it are copied too, so that a fork of a fork of a fork has few pages.
        while keep:
            length = max(b - a for a, b in zip(self._pages[keep - 1].base, base, strict=True))
            own = max(c - b for c, b in zip(self.counts, base, strict=True))
            if length > SMALLEST + 2 * own:
                break
            keep -= 1
            base = list(self._pages[keep].base)
        need = max(stop - base[stream], *(c - b for c, b in zip(self.counts, base, strict=True)))
        size = -(-max(SMALLEST, need + need // 2) // LANES) * LANES
        page = Page(base, size, self.dim, self.device)
        for s, count in enumerate(self.counts):
            for number, old, column, width in self.spans(s, base[s], count):
                to = number - base[s]
                page.streams[s][:, to : to + width] = old.streams[s][:, column : column + width]
        self._pages[keep:] = [page]
        self._own = True
        return page

    def spans(self, stream: int, start: int, stop: int) -> list[tuple[int, Page, int, int]]:
        """Return (number, page, column, width) that cover landmarks start..stop, in order."""
        end = min(stop, self.counts[stream])
        found = []
        for page in reversed(self._pages):
            if end <= start:
                break
            base = page.base[stream]
            if base < end:
                number = base if base > start else start
                found.append((number, page, number - base, end - number))
                end = number
        return found[::-1]

    def rows(self, stream: int, start: int, stop: int) -> list[torch.Tensor]:
        """Return views [dim, n] of landmarks start..stop; landmarks once written never change."""
        return [
            page.streams[stream][:, column : column + width]
            for _, page, column, width in self.spans(stream, start, stop)
        ]

    def tensor(self, stream: int) -> torch.Tensor:
        """Return a stream's landmarks [n, dim]; a view where one page holds them all."""
        views = self.rows(stream, 0, self.counts[stream])
        if not views:
            return torch.empty(0, self.dim, device=self.device)
        return (views[0] if len(views) == 1 else torch.cat(views, dim=1)).T

    def gather(self, streams: Sequence[int], numbers: torch.Tensor) -> torch.Tensor:
        """Return landmarks [s, n, dim] of s streams; numbers int64 [s, n], which exist."""
        first = streams[0]
        if list(streams) != list(range(first, first + len(streams))):
            parts = [self.gather([s], numbers[i : i + 1]) for i, s in enumerate(streams)]
            return torch.cat(parts)
        chosen = slice(first, first + len(streams))
        shape = (len(streams), self.dim, numbers.shape[1])
        found = torch.empty(0, device=self.device)
        for page in self._pages:
            columns = numbers.unsqueeze(1)
            if page is not self._pages[0]:
                base = torch.tensor(page.base[chosen], device=self.device)
                columns = columns - base[:, None, None]
            if len(self._pages) == 1:
                return page.data[chosen].gather(2, columns.expand(shape)).transpose(1, 2)
            # Those of later pages are overwritten in their turn.
            inside = columns.clamp(0, page.data.shape[-1] - 1).expand(shape)
            here = page.data[chosen].gather(2, inside)
            found = here if page is self._pages[0] else torch.where(columns >= 0, here, found)
        return found.transpose(1, 2)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for the pages, those shared with a fork included."""
        return sum(page.data.nbytes for page in self._pages)


def stack(views: Sequence[torch.Tensor]) -> NDArray[np.float32]:
    """Copy views [dim, n] into one contiguous array [sum of n, dim] in host memory."""
    rows: NDArray[np.float32] = np.concatenate([view.cpu().numpy().T for view in views])
    return np.ascontiguousarray(rows)

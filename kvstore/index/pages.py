"""Append-only landmarks of several streams, shared between forks without a copy.

Owns the landmarks' memory. Never searches.

A fork sees the same pages up to its own counts, and what it appends goes to a page of its own. Only
the one that made a page writes to it, and nobody writes twice to the same place, so both sides of
a fork go on without seeing each other's landmarks. A page that is full is replaced by a larger
copy; a fork keeps the one it knows.

In host memory a page also has its landmarks in a byte a number, for search by few queries, and says
along which axes they differ most.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from kvstore import _native

LANES = 64
"""Scores are computed for this many landmarks at a time, so each page ends in as much slack.

With whole lanes a score does not depend on how the landmarks are cut into pages (measured: bit for
bit; a matmul's last odd landmarks go through another kernel and differ in the last bit), and
therefore a context that was forked, or closed and reopened, gives the same answers.
"""

SMALLEST = 1024
"""Landmarks of a stream that a page has room for at least."""

ENOUGH = 64
"""Landmarks whose mean is taken for what all of a stream have in common."""

MANY = 8192
"""Landmarks from which on the axes are looked for along which a stream's differ most: fewer are
read as fast whole."""

SEEN = 4096
"""Landmarks that are looked at for that, and some more at most."""

NUMBERS = range(16, 257)
"""Of a landmark, for which that is done: it takes their cube."""

LEADING = 0.95
"""The share of what landmarks differ by that half of the axes must have, to be read first."""


class Page:
    """Landmarks [streams, size + LANES, dim]: row r of stream s is landmark base[s] + r.

    Not stored across, [dim, n], though 16 queries at once are answered 1.8 times faster then (from
    64 on it makes no difference): a single landmark is one piece so, and few queries, and the
    gate, want single ones. Read from cold memory 16 of them take 2 us so and 13 across.
    """

    def __init__(self, base: list[int], size: int, dim: int, device: torch.device) -> None:
        self.base = base
        self.size = size
        self.data = torch.empty(len(base), size + LANES, dim, device=device)
        self.streams = list(self.data.unbind(0))
        self.codes = _native.Codes(self.data.numpy(), base) if device.type == "cpu" else None
        self._followed = False

    def write(self, stream: int, row: int, landmarks: torch.Tensor) -> None:
        """Write landmarks [n, dim] of a stream from a row on, which nobody has written."""
        end = row + len(landmarks)
        self.streams[stream][row:end] = landmarks
        if self.codes is not None:
            if not row:
                self._refer(stream, landmarks.numpy())
            self.codes.encode(stream, row, end)

    def follow(self, other: Page) -> None:
        """Take what landmarks have in common from another page until there are enough here."""
        if self.codes is not None and other.codes is not None:
            self.codes.follow(other.codes)
            self._followed = True

    def _refer(self, stream: int, landmarks: NDArray[np.float32]) -> None:
        """Tell codes what a stream's first landmarks [n, dim] have in common."""
        assert self.codes is not None
        n, dim = landmarks.shape
        if n < ENOUGH and self._followed:
            return
        mean = landmarks.mean(0, dtype=np.float64)
        axes: NDArray[np.float64] | None = None
        if n >= MANY and dim in NUMBERS:
            some = landmarks[:: max(1, n // SEEN)] - mean
            spread, columns = np.linalg.eigh(some.T @ some)  # the least first
            if spread[-(dim // 2) :].sum() > LEADING * spread.sum():
                axes = np.ascontiguousarray(columns[:, ::-1])
        self.codes.refer(stream, mean, axes, dim // 2)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.data.nbytes + (self.codes.nbytes if self.codes is not None else 0)


class LandmarkPages:
    """Landmarks of `streams` streams, numbered 0, 1, 2, ... in each."""

    def __init__(self, streams: int, dim: int, device: torch.device) -> None:
        self.dim = dim
        self.device = device
        self.counts = [0] * streams
        self._pages: list[Page] = []
        self.codes: list[_native.Codes] = []  # of each page, in host memory
        self._own = False  # the last page is ours to write to

    def fork(self) -> LandmarkPages:
        """Return pages with the same landmarks; neither side sees what the other appends."""
        fork = LandmarkPages(len(self.counts), self.dim, self.device)
        fork.counts = list(self.counts)
        fork._pages = list(self._pages)
        fork.codes = list(self.codes)
        return fork

    def append(self, stream: int, rows: torch.Tensor) -> None:
        """Append rows [n, dim] float32 to one stream."""
        if not len(rows):
            return
        count = self.counts[stream]
        page = self._room(stream, count + len(rows))
        page.write(stream, count - page.base[stream], rows)
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
        if self._pages:
            page.follow(self._pages[-1])
        for s, count in enumerate(self.counts):
            views = self.rows(s, base[s], count)
            if views:
                page.write(s, 0, views[0] if len(views) == 1 else torch.cat(views))
        self._pages[keep:] = [page]
        self.codes[keep:] = [page.codes] if page.codes is not None else []
        self._own = True
        return page

    def spans(self, stream: int, start: int, stop: int) -> list[tuple[int, Page, int, int]]:
        """Return (number, page, row, length) that cover landmarks start..stop, in order."""
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
        """Return views [n, dim] of landmarks start..stop; landmarks once written never change."""
        return [
            page.streams[stream][row : row + length]
            for _, page, row, length in self.spans(stream, start, stop)
        ]

    def tensor(self, stream: int) -> torch.Tensor:
        """Return a stream's landmarks [n, dim]; a view where one page holds them all."""
        views = self.rows(stream, 0, self.counts[stream])
        if not views:
            return torch.empty(0, self.dim, device=self.device)
        return views[0] if len(views) == 1 else torch.cat(views)

    def gather(self, streams: Sequence[int], numbers: torch.Tensor) -> torch.Tensor:
        """Return landmarks [s, ..., dim] of s streams; numbers int64 [s, ...], -1: undefined.

        KeyError for one that does not exist.
        """
        if self.device.type == "cpu":
            if not (numbers.is_cpu and numbers.is_contiguous()):
                numbers = numbers.cpu().contiguous()
            at, shape = numbers.data_ptr(), numbers.shape
            found = _native.gather(self.codes, streams, self.counts, at, shape, self.dim)
            return torch.from_numpy(found)
        chosen = torch.empty(*numbers.shape, self.dim, device=self.device)
        for i, stream in enumerate(streams):
            low, high = (int(n) for n in numbers[i].aminmax()) if numbers[i].numel() else (-1, -1)
            if low < -1 or high >= self.counts[stream]:
                raise KeyError(f"stream {stream} has no block {high if low >= -1 else low}")
            some = numbers[i].to(self.device)
            for page in self._pages:
                # Those of later pages are overwritten in their turn.
                rows = some - page.base[stream]
                here = page.streams[stream][rows.clamp(0, page.size - 1)]
                chosen[i] = torch.where(rows.unsqueeze(-1) >= 0, here, chosen[i])
        return chosen

    @property
    def nbytes(self) -> int:
        """Bytes allocated for the pages, those shared with a fork included."""
        return sum(page.nbytes for page in self._pages)


def stack(views: Sequence[torch.Tensor]) -> NDArray[np.float32]:
    """Copy views [n, dim] into one contiguous array [sum of n, dim] in host memory."""
    rows: NDArray[np.float32] = np.concatenate([view.cpu().numpy() for view in views])
    return rows

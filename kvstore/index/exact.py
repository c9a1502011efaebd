"""Exact maximum inner product search: no landmark is left out that could be among the best.

Many queries are multiplied by all landmarks. Few are multiplied, in host memory, by a byte for each
number of a landmark, a quarter of what must be read otherwise. What that is off by is bounded for
each landmark, so that it says for nearly all that they cannot be among the k best; the others,
some ten of 32,768, are scored. Of landmarks that differ along few axes half of the bytes do for
nearly all. Both give what a look at all scores would (Cauchy-Schwarz: |q (x - x')| <= |q| |x - x'|;
see kvstore/native/search.cpp).

Owns its buffer of scores. Never remembers a landmark or a query.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from kvstore import _native
from kvstore.index.cost import FEW
from kvstore.index.pages import LANES, LandmarkPages

GROUP = 64
"""Landmarks whose maximum stands for them in the first stage of the selection."""

SMALL = 16384
"""Scores up to which one stage is faster: there the calls cost more than the looking."""

SCORES = 16 * 2**20
"""Scores computed at a time: 64 MiB."""

NARROWEST = 4096
"""Landmarks scored at a time at least, when there are very many queries."""


class ExactSearch:
    """Searches all landmarks in range, some queries and some landmarks at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._scores = torch.empty(0, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer of scores: at most about 64 MiB."""
        return self._scores.nbytes

    def top_k(
        self,
        pages: LandmarkPages,
        streams: Sequence[int],
        queries: torch.Tensor,
        k: int,
        before: NDArray[np.int64] | int | None = None,
        start: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the k landmarks of each stream with the largest inner products, best first.

        queries: float32 [s, m, D]; before: [m] or for all, only landmarks below it count, None: all
        do; start: landmarks below it don't count. Returns numbers int64 [s, m, k], scores float32
        [s, m, k], with -1 and -inf where there are fewer than k. Of few queries, equal scores come
        in the order of their numbers.
        """
        s, m, dim = queries.shape
        if m <= FEW and self.device.type == "cpu":
            if not queries.is_contiguous():
                queries = queries.contiguous()
            at = queries.data_ptr()
            threads = torch.get_num_threads()
            few = _native.top_k(
                pages.codes, streams, pages.counts, at, m, dim, k, before, start, threads
            )
            return torch.from_numpy(few[0]), torch.from_numpy(few[1])
        if isinstance(before, int):
            before = np.full(m, before)
        stop = max((pages.counts[stream] for stream in streams), default=0)
        if before is not None:
            stop = min(stop, int(before.max(initial=0)))
        if stop <= start or not m:
            return (
                torch.full((s, m, k), -1, device=self.device),
                torch.full((s, m, k), -torch.inf, device=self.device),
            )
        rows = max(1, SCORES // (s * min(NARROWEST, stop - start)))
        if m > rows:
            parts = [
                self.top_k(
                    pages,
                    streams,
                    queries[:, i : i + rows],
                    k,
                    None if before is None else before[i : i + rows],
                    start,
                )
                for i in range(0, m, rows)
            ]
            return torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts], 1)

        width = max(NARROWEST, SCORES // (s * m) // GROUP * GROUP)
        found = [
            self._tile(pages, streams, queries, k, before, first, min(first + width, stop))
            for first in range(start, stop, width)
        ]
        numbers, scores = found[0]
        if len(found) > 1:
            numbers = torch.cat([numbers for numbers, _ in found], dim=-1)
            scores, order = torch.cat([scores for _, scores in found], dim=-1).topk(
                min(k, numbers.shape[-1])
            )
            numbers = numbers.gather(-1, order)
        fewest = min(pages.counts[stream] for stream in streams)
        if before is not None:
            fewest = min(fewest, int(before.min()))
        if fewest - start < k:
            numbers = numbers.masked_fill(scores == -torch.inf, -1)
        missing = k - numbers.shape[-1]
        if missing > 0:
            numbers = torch.nn.functional.pad(numbers, (0, missing), value=-1)
            scores = torch.nn.functional.pad(scores, (0, missing), value=-torch.inf)
        return numbers, scores

    def _tile(
        self,
        pages: LandmarkPages,
        streams: Sequence[int],
        queries: torch.Tensor,
        k: int,
        before: NDArray[np.int64] | None,
        first: int,
        last: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the top min(k, last - first) of landmarks first..last, unmarked where missing."""
        s, m, _ = queries.shape
        n = last - first
        width = -(-n // GROUP) * GROUP + LANES
        scores = self._buffer(s * m * width).view(s, m, width)
        for i, stream in enumerate(streams):
            rows = scores[i]
            for number, page, row, some in pages.spans(stream, first, last):
                # Whole lanes: what is written past the span is overwritten by the next one.
                some = -(-some // LANES) * LANES
                torch.mm(
                    queries[i],
                    page.streams[stream].narrow(0, row, some).T,
                    out=rows.narrow(1, number - first, some),
                )
            end = min(n, max(pages.counts[stream] - first, 0))
            rows.narrow(1, end, width - end).fill_(-torch.inf)
        if before is not None:
            low = max(int(before.min()) - first, 0)
            if low < n:
                columns = torch.arange(first + low, last, device=self.device)
                bounds = torch.from_numpy(before).to(self.device).unsqueeze(1)
                scores[:, :, low:n].masked_fill_(columns >= bounds, -torch.inf)
        numbers, values = select(scores.view(s * m, width), min(k, n))
        return numbers.add_(first).view(s, m, -1), values.view(s, m, -1)

    def _buffer(self, size: int) -> torch.Tensor:
        # Kept and grown by an eighth more than needed: fresh memory of this size costs a page
        # fault per 4 KiB, more than the scores themselves.
        if self._scores.numel() < size:
            self._scores = torch.empty(0, device=self.device)
            self._scores = torch.empty(size + size // 8, device=self.device)
        return self._scores[:size]


def select(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (indices int64 [r, k], values [r, k]) of each row's k largest of scores [r, w].

    w is a multiple of GROUP. In two stages: the k largest lie in the k groups with the largest
    maxima, so only these groups are looked through. Exact, and 2 to 5 times faster than topk over
    the row (32,768 landmarks, k 4 to 16).
    """
    rows, width = scores.shape
    groups = width // GROUP
    if groups <= 2 * k or rows * width <= SMALL:
        values, indices = scores.topk(k)
        return indices, values
    best = scores.view(rows, groups, GROUP).amax(-1).topk(k, sorted=False).indices
    if rows == 1:
        flat = best.view(-1)
    else:
        flat = (best + torch.arange(0, rows * groups, groups, device=best.device)[:, None]).view(-1)
    candidates = scores.view(-1, GROUP).index_select(0, flat).view(rows, k * GROUP)
    values, within = candidates.topk(k)
    return best.gather(1, within // GROUP) * GROUP + within % GROUP, values

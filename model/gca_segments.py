"""Which rows of a piece of text use the same chunks, and which of them ask for these."""

from __future__ import annotations

import torch
from torch import Tensor

from model.stream import Rows


class Segments:
    """Rows regrouped by who uses the same chunks: Q segments of R' rows.

    A piece of whole chunks has block_size / segment segments a chunk (one if a chunk searches as
    one), each with its tokens' rows and the landmark's, which counts only in the chunk's last one.
    In a piece inside one chunk each row stands alone.

    by_chunk: whether landmarks ask. asking: how many queries there are; limits: int64 [asking],
    chunks below it are older; goes_on: whether the first rows use what was found before;
    of_row: which of what was found (that before first, if goes_on) each of the Q uses.
    """

    def __init__(self, rows: Rows, segment: int, device: torch.device) -> None:
        self.rows = rows
        self.by_chunk = segment == 0
        self._segment = segment or rows.block_size
        self.goes_on = False
        if rows.whole:
            per_chunk = rows.block_size // self._segment
            self.asking = rows.blocks * per_chunk
            number = torch.arange(rows.blocks, device=device).repeat_interleave(per_chunk)
            self.of_row = torch.arange(self.asking, device=device)
        else:
            place = torch.arange(rows.start, rows.stop, device=device)
            place = place.clamp(max=rows.block_size - 1)  # the landmark is of the last segment
            mine = place // self._segment
            self._first = -(-rows.start // self._segment)  # the first segment that begins here
            self.goes_on = bool(rows.start % self._segment)
            self.asking = max(0, int(mine[-1]) - self._first + 1)
            number = torch.zeros(self.asking, dtype=torch.int64, device=device)
            self.of_row = mine - self._first + self.goes_on
        self.limits = number + rows.first

    def askers(self, x: Tensor) -> Tensor:
        """[N, R, width] -> [asking, width]: the rows that ask."""
        if self.rows.whole:
            return x[:, : self.rows.block_size : self._segment].flatten(0, 1)
        first = self._first * self._segment - self.rows.start
        return x[0, first : self.rows.tokens : self._segment][: self.asking]

    def gather(self, x: Tensor) -> Tensor:
        """[N, R, width] -> [Q, R', width]."""
        if not self.rows.whole:
            return x[0, :, None]
        tokens = x[:, :-1].unflatten(1, (-1, self._segment))  # [N, G, segment, width]
        landmark = x[:, None, -1:].expand(-1, tokens.shape[1], 1, -1)
        return torch.cat((tokens, landmark), dim=2).flatten(0, 1)

    def scatter(self, x: Tensor) -> Tensor:
        """[Q, R', width] -> [N, R, width]."""
        if not self.rows.whole:
            return x[:, 0][None]
        x = x.unflatten(0, (self.rows.blocks, -1))
        return torch.cat((x[:, :, :-1].flatten(1, 2), x[:, -1, -1:]), dim=1)

"""Where each block lies. Owns the tables from block id to place and the supply of ids.

Truth lies here: what a tier's occupancy says follows from these tables. Never touches a byte.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvstore import _native
from kvstore.trace import Tier

Ids = NDArray[np.int64]

HOT, WARM, COLD, ABSENT = Tier

_FIRST_IDS = 1024


class Residency:
    """Tables over all block ids; a table says -1 where the block has no copy in its tier.

    hot, warm: int32 [ids], slots. cold: int64 [ids], locations. reading: bool [ids], on the way up
    in the background. The tables are longer than the ids in use and double when they are full.
    """

    def __init__(self) -> None:
        self.hot = np.full(_FIRST_IDS, -1, np.int32)
        self.warm = np.full(_FIRST_IDS, -1, np.int32)
        self.cold = np.full(_FIRST_IDS, -1, np.int64)
        self.reading = np.zeros(_FIRST_IDS, bool)
        self._place = np.zeros(_FIRST_IDS, np.int32)
        self._next = 0
        self._recycled: list[Ids] = []

    def allocate(self, n: int) -> Ids:
        """n ids that name no block. An id comes back only when all the tables' ids were used."""
        recycled = sum(map(len, self._recycled))
        fresh = min(n, len(self.hot) - self._next)
        if n > fresh + recycled:
            self._grow(self._next + n - recycled)
            fresh = n - recycled
        ids = np.arange(self._next, self._next + fresh, dtype=np.int64)
        self._next += fresh
        if fresh < n:
            supply = np.concatenate(self._recycled)
            ids = np.concatenate((ids, supply[: n - fresh]))
            self._recycled = [supply[n - fresh :]]
        return ids

    def recycle(self, ids: Ids) -> None:
        """Take back ids that no table names any more."""
        if len(ids):
            self._recycled.append(ids)

    def restore(self, ids: Ids, locations: NDArray[np.int64]) -> None:
        """Take over what a disk tier holds, into empty tables."""
        top = int(ids.max(initial=-1)) + 1
        self._grow(top)
        self.cold[ids] = locations
        self.reclaim(top)

    def reclaim(self, top: int | None = None, taken: Ids | None = None) -> None:
        """Derive the supply of ids from the tables.

        top: the least id never used, if it is not the present one. taken: ids not to give out yet.
        """
        self._next = self._next if top is None else top
        ids = np.arange(self._next)
        idle = self.tiers(ids) == ABSENT
        if taken is not None:
            idle[taken] = False
        self._recycled = [ids[idle]]

    @property
    def issued(self) -> int:
        """How many different ids were ever given out."""
        return self._next

    def idle(self) -> Ids:
        """The ids that were given out and name no block now."""
        return np.concatenate([np.empty(0, np.int64), *self._recycled])

    def find(self, ids: Ids) -> tuple[Ids, NDArray[np.uint8], tuple[int, int, int, int]]:
        """Look up ids [n], whether or not they name blocks.

        Returns them without repeats, in order of first appearance; the highest Tier in which each
        block lies, ABSENT where none has it; and how many lie in each Tier.
        """
        return _native.find_tiers(ids, self.hot, self.warm, self.cold, self._place)

    def present(self) -> Ids:
        """The ids of all blocks, ascending."""
        return np.flatnonzero((self.hot >= 0) | (self.warm >= 0) | (self.cold >= 0))

    def tiers(self, ids: Ids) -> NDArray[np.uint8]:
        """The highest Tier in which each of these distinct blocks lies, ABSENT where none has it.

        ids: int64 [n].
        """
        return self.find(ids)[1]

    def _grow(self, least: int) -> None:
        size = len(self.hot)
        while size < least:
            size *= 2
        more = size - len(self.hot)
        if more:
            self.hot = np.concatenate((self.hot, np.full(more, -1, np.int32)))
            self.warm = np.concatenate((self.warm, np.full(more, -1, np.int32)))
            self.cold = np.concatenate((self.cold, np.full(more, -1, np.int64)))
            self.reading = np.concatenate((self.reading, np.zeros(more, bool)))
            self._place = np.zeros(size, np.int32)

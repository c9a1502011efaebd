"""Which id each block of each stream of a context has, shared between forks.

Owns the ids and who holds them. Never touches a block.

Ids lie in *runs*. A context appends to a run of its own; its forks refer to the part of it that
there was. A run knows for each of its holders up to where: what lies beyond everybody's is free.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import numpy as np
from numpy.typing import NDArray

from kvstore import _native

Ids = NDArray[np.int64]

_SMALLEST = 64
_MANY = 4
_keys = count()


class Run:
    """Ids of consecutive blocks of every stream.

    base: int64 [streams], the block in column 0. table: int64 [streams, size]. stops: for each
    holder the blocks, int64 [streams], before which it holds them. saved: a kept context that is
    not open may refer to some of them.
    """

    def __init__(self, base: Ids, table: Ids, saved: bool = False) -> None:
        self.base = base
        self.table = table
        self.stops: dict[int, Ids] = {}
        self.saved = saved

    def beyond(self, stops: Ids) -> Ids:
        """Return the ids before `stops`, int64 [streams], that no holder holds, [n]."""
        held = self.base
        for others in self.stops.values():
            held = np.maximum(held, others)
        parts = [
            self.table[s, held[s] - self.base[s] : stops[s] - self.base[s]]
            for s in np.flatnonzero(stops > held)
        ]
        return np.concatenate([np.empty(0, np.int64), *parts])


class BlockMap:
    """The ids of one context: [stream, block] -> id.

    counts: int64 [streams], the blocks of each stream.
    """

    def __init__(self, streams: int) -> None:
        self.counts = np.zeros(streams, np.int64)
        self._key = next(_keys)
        self._runs: list[Run] = []
        self._own = False  # the last run is ours to append to

    @classmethod
    def load(cls, counts: Ids, ids: Ids) -> BlockMap:
        """Make one from what `counts` and `ids` gave when it was saved."""
        loaded = cls(len(counts))
        if not len(ids):
            return loaded
        table = np.full((len(counts), int(counts.max(initial=0))), -1)
        table[np.arange(table.shape[1]) < counts[:, None]] = ids
        run = Run(np.zeros_like(counts), table, saved=True)
        run.stops[loaded._key] = counts.copy()
        loaded.counts = counts.copy()
        loaded._runs = [run]
        return loaded

    def fork(self) -> BlockMap:
        """Return a map with the same blocks; neither side sees what the other appends."""
        self._merge()
        fork = BlockMap(len(self.counts))
        fork.counts = self.counts.copy()
        fork._runs = list(self._runs)
        for run in self._runs:
            run.stops[fork._key] = run.stops[self._key].copy()
        return fork

    def append(self, streams: Sequence[int], ids: Ids) -> None:
        """Append ids [s, n] to s streams, n to each."""
        n = ids.shape[1]
        if not self._own:
            base = self.counts.copy()
            run = Run(base, np.empty((len(base), _SMALLEST), np.int64))
            run.stops[self._key] = base.copy()
            self._runs.append(run)
            self._own = True
        run = self._runs[-1]
        rows = np.asarray(streams, np.int64)
        columns = self.counts[rows] - run.base[rows]
        need = int(columns.max(initial=0)) + n
        size = run.table.shape[1]
        if need > size:
            table = np.empty((len(run.table), need + need // 2), np.int64)
            table[:, :size] = run.table
            run.table = table
        run.table[rows[:, None], columns[:, None] + np.arange(n)] = ids
        self.counts[rows] += n
        run.stops[self._key][rows] += n

    def take_back(self, streams: Sequence[int], n: int) -> None:
        """Undo the last append, of n ids to each of these streams."""
        rows = np.asarray(streams, np.int64)
        self.counts[rows] -= n
        self._runs[-1].stops[self._key][rows] -= n

    def lookup(self, streams: Sequence[int], blocks: Ids) -> Ids:
        """Return the ids of blocks [s, ...] of s streams; KeyError for one that is not there."""
        if not blocks.size:
            return np.empty(blocks.shape, np.int64)
        blocks = np.ascontiguousarray(blocks, np.int64)
        runs = [(run.base, run.table) for run in self._runs]
        ids = _native.find_ids(list(streams), blocks, self.counts, runs)
        if ids is None:
            rows, flat = np.asarray(streams, np.int64), blocks.reshape(len(streams), -1)
            i, j = np.argwhere((flat < 0) | (flat >= self.counts[rows, None]))[0]
            raise KeyError(
                f"stream {rows[i]} has no block {flat[i, j]}, only {self.counts[rows[i]]}"
            )
        return ids

    def ids(self) -> Ids:
        """Return the ids of all blocks, [sum of counts], stream after stream."""
        parts = [
            run.table[s, : run.stops[self._key][s] - run.base[s]]
            for s in range(len(self.counts))
            for run in self._runs
        ]
        return np.concatenate([np.empty(0, np.int64), *parts])

    def mark_saved(self) -> None:
        """Note that a kept context refers to these blocks."""
        for run in self._runs:
            run.saved = True

    def release(self) -> tuple[Ids, Ids]:
        """Let go of all blocks. Return ids [n] that no map holds any more, apart in two.

        The first never were part of a saved context; the second were, and another saved one may
        refer to them.
        """
        free: list[Ids] = [np.empty(0, np.int64)]
        saved: list[Ids] = [np.empty(0, np.int64)]
        for run in self._runs:
            mine = run.stops.pop(self._key)
            (saved if run.saved else free).append(run.beyond(mine))
        self._runs = []
        self._own = False
        self.counts = np.zeros_like(self.counts)
        return np.concatenate(free), np.concatenate(saved)

    def _merge(self) -> None:
        """Join runs that nobody else holds, where forks of forks have left many."""
        if len(self._runs) <= _MANY:
            return
        merged: list[Run] = []
        for run in self._runs:
            before = merged[-1] if merged else None
            if before is None or len(before.stops) > 1 or len(run.stops) > 1:
                merged.append(run)
                continue
            stops = run.stops[self._key]
            joint = Run(
                before.base,
                np.empty((len(stops), int((stops - before.base).max())), np.int64),
                before.saved or run.saved,
            )
            joint.stops[self._key] = stops
            for s, stop in enumerate(stops):
                middle = run.base[s] - before.base[s]
                end = stop - before.base[s]
                joint.table[s, :middle] = before.table[s, :middle]
                joint.table[s, middle:end] = run.table[s, : end - middle]
            merged[-1] = joint
        self._runs = merged

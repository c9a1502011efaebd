"""Least recently used. Owns the order of a tier's slots by last access, and nothing else."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvstore.policy.protocol import Slots

_SLACK = 8192
_REACH = 256


class LRU:
    """Evict the slot whose last admission or hit lies furthest back.

    Every access is appended to a log of slots; the entry that `_place` names is a slot's newest,
    all its older ones are stale. So the live entries, read from the head, are the textbook's list,
    an access costs one append, and nothing is ever sorted. Stale entries are dropped when the head
    passes them, or all at once when the log is full, which is at most once in `slots` accesses.

    slots: of the tier. Takes 12 bytes a slot.
    """

    def __init__(self, slots: int) -> None:
        # Twice the slots: after compaction there is room for a batch of every slot.
        self._log = np.empty(2 * slots + _SLACK, np.int32)
        self._place = np.zeros(slots, np.int32)
        self._head = 0
        self._tail = 0

    def admit(self, slots: Slots) -> None:
        if self._tail + len(slots) > len(self._log):
            self._compact()
        start, self._tail = self._tail, self._tail + len(slots)
        self._log[start : self._tail] = slots
        self._place[slots] = np.arange(start, self._tail, dtype=np.int32)

    def touch(self, slots: Slots) -> None:
        self.admit(slots)

    def weigh(self, slots: Slots, weights: NDArray[np.float32]) -> None:
        """Ignored: recency alone decides."""

    def release(self, slots: Slots) -> None:
        self._place[slots] = -1

    def victims(self, count: int, pinned: NDArray[np.bool_]) -> Slots:
        chosen = self.peek(count, pinned)
        self.release(chosen)
        return chosen

    def peek(self, count: int, pinned: NDArray[np.bool_]) -> Slots:
        reach = max(2 * count, _REACH)
        while True:
            stop = min(self._head + reach, self._tail)
            live = self._live(stop)
            free = live[~pinned[live]]
            if len(free) >= count or stop == self._tail:
                break
            reach *= 4
        # The live entries move up against the stop, so that neither stale entries nor the gaps
        # behind a slot that stays pinned are read twice. Their order is unchanged.
        if len(live) < stop - self._head:
            self._head = stop - len(live)
            self._log[self._head : stop] = live
            self._place[live] = np.arange(self._head, stop, dtype=np.int32)
        return free[:count].astype(np.int64)

    def _live(self, stop: int) -> NDArray[np.int32]:
        """The slots whose newest entry lies before `stop`, oldest first."""
        entries = self._log[self._head : stop]
        places = np.arange(self._head, stop, dtype=np.int32)
        live: NDArray[np.int32] = entries[self._place[entries] == places]
        return live

    def _compact(self) -> None:
        live = self._live(self._tail)
        self._head, self._tail = 0, len(live)
        self._log[: self._tail] = live
        self._place[live] = np.arange(self._tail, dtype=np.int32)

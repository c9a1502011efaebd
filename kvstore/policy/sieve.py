"""SIEVE. Owns a tier's queue in order of admission, its visited bits and the hand; nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from kvstore.policy.protocol import Slots

_SLACK = 8192
_REACH = 1024

_GONE, _UNVISITED, _VISITED = 0, 1, 2


class SIEVE:
    """Evict the first unvisited slot at a hand that moves from the oldest to the newest.

    Zhang et al., "SIEVE is Simpler than LRU", NSDI 2024. A hit sets a slot's visited bit and moves
    nothing; the hand clears the bits it passes, evicts the first slot without one, stays behind it,
    and goes from the newest back to the oldest. A pinned slot is passed with its bit as it is.

    The queue is an array that admissions append to; `_state` holds the bits in the same order, so
    that the hand reads them as contiguous bytes, a thousand and more at a step. What has gone
    leaves a gap; gaps are closed when the array is full, at most once in `slots` admissions.

    slots: of the tier. Takes 14 bytes a slot.
    """

    def __init__(self, slots: int) -> None:
        # Twice the slots: after compaction there is room for a batch of every slot.
        self._queue = np.empty(2 * slots + _SLACK, np.int32)
        self._state = np.zeros(len(self._queue), np.uint8)
        self._place = np.zeros(slots, np.int32)
        self._tail = 0
        self._hand = 0

    def admit(self, slots: Slots) -> None:
        self._settle_hand()
        if self._tail + len(slots) > len(self._queue):
            self._compact()
        start, self._tail = self._tail, self._tail + len(slots)
        self._queue[start : self._tail] = slots
        self._state[start : self._tail] = _UNVISITED
        self._place[slots] = np.arange(start, self._tail, dtype=np.int32)

    def touch(self, slots: Slots) -> None:
        self._state[self._place[slots]] = _VISITED

    def weigh(self, slots: Slots, weights: NDArray[np.float32]) -> None:
        """Ignored: one bit of use decides."""

    def release(self, slots: Slots) -> None:
        self._state[self._place[slots]] = _GONE

    def victims(self, count: int, pinned: NDArray[np.bool_]) -> Slots:
        chosen = self._choose(count, pinned)
        if len(chosen) == 0:
            return np.empty(0, np.int64)
        last = int(chosen[-1])
        # A visited victim means that the hand has been round once and cleared every bit.
        full_round = self._state[last] == _VISITED
        for start, end in self._round():
            stop = last if start <= last and not full_round else end
            passed = start + np.flatnonzero(self._state[start:stop] == _VISITED)
            self._state[passed[~pinned[self._queue[passed]]]] = _UNVISITED
            if stop < end:
                break
        self._state[chosen] = _GONE
        self._hand = last + 1
        return self._queue[chosen].astype(np.int64)

    def peek(self, count: int, pinned: NDArray[np.bool_]) -> Slots:
        return self._queue[self._choose(count, pinned)].astype(np.int64)

    def _choose(self, count: int, pinned: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The next victims' places in the queue, in order.

        In its first round the hand takes the unvisited; in a second one it finds the rest with
        their bits cleared.
        """
        chosen: list[NDArray[np.int64]] = []
        short = count
        for wanted in (_UNVISITED, _VISITED):
            reach = max(4 * count, _REACH)
            for start, end in self._round():
                while start < end and short > 0:
                    stop = min(start + reach, end)
                    found = start + np.flatnonzero(self._state[start:stop] == wanted)
                    found = found[~pinned[self._queue[found]]][:short]
                    chosen.append(found)
                    short -= len(found)
                    start = stop
                    reach *= 2
        return np.concatenate(chosen) if chosen else np.empty(0, np.int64)

    def _round(self) -> Iterator[tuple[int, int]]:
        """The queue from the hand to the newest, then from the oldest to the hand."""
        yield self._hand, self._tail
        yield 0, self._hand

    def _settle_hand(self) -> None:
        """Move the hand over gaps; with none newer left it goes back to the oldest.

        The textbook decides that when the slot at the hand leaves. Only an admission could tell
        the difference, so it is soon enough to decide then.
        """
        while self._hand < self._tail:
            if self._state[self._hand] != _GONE:
                return
            present = self._state[self._hand : min(self._hand + _REACH, self._tail)] != _GONE
            self._hand += int(present.argmax()) if present.any() else len(present)
        self._hand = 0

    def _compact(self) -> None:
        kept = np.flatnonzero(self._state[: self._tail])
        self._hand = int(np.searchsorted(kept, self._hand))
        queue, state = self._queue[kept], self._state[kept]
        self._tail = len(kept)
        self._queue[: self._tail] = queue
        self._state[: self._tail] = state
        self._place[queue] = np.arange(self._tail, dtype=np.int32)

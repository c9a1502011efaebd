"""Looking blocks up: what lies in hot is held there, what does not is brought up first.

Owns what a lookup is, its counts, and the pins. Moves nothing itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray

from kvstore import _native
from kvstore.config import format_size
from kvstore.errors import CorruptBlockError, HotTierTooSmallError
from kvstore.guard import Guard
from kvstore.mover import Mover
from kvstore.prefetch import Prefetch
from kvstore.recorder import Recorder
from kvstore.residency import ABSENT, Ids
from kvstore.stats import StoreStats
from kvstore.tiers.slots import Slots

_NONE = np.empty(0, np.int64)


class Pin:
    """Blocks held in hot for the length of a `with` statement.

    slots: int64, the shape of the ids asked for: each id's slot in `Store.hot_planes`.
    """

    __slots__ = ("_begin", "_explain", "_held", "_ids", "_lookups", "slots")

    slots: Slots

    def __init__(
        self,
        lookups: Lookups,
        begin: Callable[[], None],
        explain: Callable[[CorruptBlockError], CorruptBlockError],
        ids: Ids,
    ) -> None:
        """begin: called first; explain: says more of a damaged block, such as whose it is."""
        self._lookups = lookups
        self._begin = begin
        self._explain = explain
        self._ids = ids

    def __enter__(self) -> Pin:
        self._begin()
        try:
            slots, self._held = self._lookups.hold(self._ids.ravel())
        except CorruptBlockError as error:
            raise self._explain(error) from None
        self.slots = slots.reshape(self._ids.shape)
        return self

    def __exit__(self, *_: object) -> None:
        self._lookups.let_go(self._held)

    def weigh(self, weights: torch.Tensor | NDArray[np.float32]) -> None:
        """Tell the policy and the trace the gate weight that each of the ids received.

        weights: the shape of the ids. What an id received in several places is added up.
        """
        if isinstance(weights, torch.Tensor):
            weights = weights.to(torch.float32).numpy(force=True)
        given = np.asarray(weights, np.float32)
        if given.shape != self.slots.shape:
            raise ValueError(
                f"weights have shape {given.shape}, the ids that were pinned {self.slots.shape}"
            )
        self._lookups.weigh(self.slots.ravel(), given.ravel())


class Lookups:
    """Holds blocks in hot, for pins that may nest.

    A lookup is one distinct block of one fetch. It is the hit of the tier where the block lay when
    it was asked for.
    """

    def __init__(
        self,
        mover: Mover,
        prefetch: Prefetch | None,
        guard: Guard,
        stats: StoreStats,
        recorder: Recorder,
    ) -> None:
        self._mover = mover
        self._prefetch = prefetch
        self._guard = guard
        self._stats = stats
        self._recorder = recorder
        # Pins that ended while a device may still read their slots.
        self._ending: deque[tuple[torch.cuda.Event, Slots]] = deque()

    def hold(self, ids: Ids) -> tuple[Slots, Slots]:
        """Pin blocks in hot. ids: int64 [n]. Returns each id's slot [n] and the distinct slots."""
        mover = self._mover
        pinned = mover.hot.pin_present(ids, mover.residency.hot)
        if pinned is not None:
            slots, held = pinned
            mover.hot.policy.touch(held)
            self._stats.lookups += len(held)
            self._stats.hot.hits += len(held)
            if self._recorder.active:
                self._recorder.note("fetch", mover.hot.block[held], np.zeros(len(held), np.uint8))
            mover.use_early(held)
        else:
            held = self._hold_missing(ids)
            _, slots, _ = _native.split(ids, mover.residency.hot)
        mover.hot_slab.await_writes()
        return slots, held

    def _hold_missing(self, ids: Ids) -> Slots:
        """Pin blocks of which some are not in hot. Returns distinct slots, in any order."""
        mover, hot = self._mover, self._mover.hot
        ids, tiers, (in_hot, in_warm, in_cold, absent) = mover.residency.find(ids)
        self._stats.lookups += len(tiers)
        self._stats.hot.hits += in_hot
        self._stats.warm.hits += in_warm
        self._stats.cold.hits += in_cold
        self._stats.not_found += absent
        if self._recorder.active:
            self._recorder.note("fetch", ids, tiers)
        if absent:
            self.require_present(ids, tiers)
        # Most often all are somewhere else, and then there is nothing to take apart.
        held, missing = _NONE, ids
        if in_hot:
            _, held, missing = _native.split(ids, mover.residency.hot)
            hot.pin(held)
        try:
            room = self.room(len(missing))
            if len(missing) > room:
                raise self.too_small(self._mover.hot.slots - room + len(missing))
            with self._guard:
                if in_hot:
                    hot.policy.touch(held)
                arrived = _NONE
                if self._prefetch is not None and self._prefetch.await_blocks(missing):
                    _, arrived, missing = _native.split(missing, mover.residency.hot)
                for slots in chain((arrived,), mover.bring_up(missing)):
                    if len(slots):
                        hot.pin(slots)
                        held = np.concatenate((held, slots)) if len(held) else slots
        except BaseException:
            hot.unpin(held)
            raise
        mover.use_early(held)
        return held

    def require_present(self, ids: Ids, tiers: NDArray[np.uint8]) -> None:
        absent = ids[tiers == ABSENT]
        if len(absent):
            more = f", nor have {len(absent) - 1} others" if len(absent) > 1 else ""
            raise KeyError(f"no block has the id {absent[0]}{more}")

    def weigh(self, slots: Slots, weights: NDArray[np.float32]) -> None:
        distinct, sums = self._mover.hot.sum_weights(slots, weights)
        self._mover.hot.policy.weigh(distinct, sums)
        if self._recorder.active:
            self._recorder.note("weigh", self._mover.hot.block[distinct], sums)

    def let_go(self, slots: Slots) -> None:
        """End a pin, on a device as soon as what was given to it has run."""
        event = self._mover.hot_slab.mark_reads()
        if event is None:
            self._mover.hot.unpin(slots)
        else:
            self._ending.append((event, slots))

    def end_pins(self, wait: bool = False) -> None:
        while self._ending:
            event, slots = self._ending[0]
            if wait:
                event.synchronize()
            elif not event.query():  # type: ignore[no-untyped-call]
                return
            self._ending.popleft()
            self._mover.hot.unpin(slots)

    def drop_pins(self) -> None:
        """End all pins, also those that an interrupt has left behind: nobody uses a slot again."""
        self.end_pins(wait=True)
        self._mover.hot.drop_pins()

    def room(self, enough: int) -> int:
        """Hot slots that are not pinned; waits for a device's last reads if they are too few."""
        room = self._mover.room()
        if room < enough and self._ending:
            self.end_pins(wait=True)
            room = self._mover.room()
        return room

    def too_small(self, least: int) -> HotTierTooSmallError:
        nbytes = least * self._mover.spec.nbytes
        return HotTierTooSmallError(
            f"the hot tier holds {self._mover.hot.slots} blocks and {least} are needed at once: "
            f"give hot at least {nbytes} bytes ({format_size(nbytes)})"
        )

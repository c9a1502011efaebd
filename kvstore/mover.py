"""The movement of blocks between tiers, and the tables that say so.

Owns the order in which the two happen. Where a block lies is residency's, what a slot holds
occupancy's, the bytes are the tiers'. Never decides when to move: store, writer and prefetch do.

The rules of movement:

- A new block goes to hot. A promotion to hot leaves the copy in warm, first in line to be
  reclaimed. A block that leaves hot goes to warm unless it has a copy there; one that leaves warm
  has a copy on disk, or else it may not leave. Where hot is full and there is a disk, a few more
  leave than have to, the next in the policy's order: the next fetches find free slots.
- A block is *unsaved* while it has no copy on disk. With a disk tier there are never more unsaved
  blocks than warm has slots, so each has a place in memory besides hot: a fetch finds room in hot
  whatever the disk does, and never waits for a write. The price is paid by `put`, which waits.
- Without a disk tier hot and warm hold each block once between them; where both are full a fetch
  lets blocks change places.
- Copy first, drop second: a table names a slot only after the bytes are there, and stops naming it
  before they are overwritten. The rest follows from the tables and can be rebuilt, so a move that
  is cut short (Ctrl-C, a device that fails) leaves the store as it was or as it was going to be.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from kvstore import _native
from kvstore.block import BlockSpec
from kvstore.config import StoreConfig
from kvstore.errors import KVStoreError
from kvstore.occupancy import Occupancy
from kvstore.recorder import Recorder
from kvstore.residency import HOT, WARM, Ids, Residency
from kvstore.stats import StoreStats
from kvstore.tiers.cuda import CudaSlotTier
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.slots import Buffer, Rows, Slots, SlotTier, copy_slots, rows_of

_NONE = np.empty(0, np.int64)

# Small enough for a core's second-level cache, large enough for a call a plane to cost little.
_HOP_BYTES = 512 * 1024
# On CUDA a hop is one transfer, and those want megabytes.
_CUDA_HOP_BYTES = 4 * 1024 * 1024

# Where hot is full, one in so many of its slots is emptied beyond what is asked for, and so many at
# most: for a few blocks most of the time goes into finding out what is to go where.
_AHEAD_SHARE = 256
_MOST_AHEAD = 16

# Blocks from warm are few where they are this part of its slots.
_FEW = 64


class Mover:
    """The three tiers of a store and all that moves in them.

    disk: None where there is no cold tier. Counters go to `stats`, evictions to `recorder`.

    live: blocks stored. unsaved: those without a copy on disk, where there is a disk. early: blocks
    in hot that were prefetched and not looked up yet.
    """

    def __init__(
        self,
        spec: BlockSpec,
        config: StoreConfig,
        disk: DiskTier | None,
        stats: StoreStats,
        recorder: Recorder,
    ) -> None:
        self.spec = spec
        self._nbytes = spec.nbytes
        self.disk = disk
        self.residency = Residency()
        self.hot = Occupancy(config.hot // spec.nbytes, config.policy)
        self.warm = Occupancy(config.warm // spec.nbytes, config.policy)
        device = config.torch_device
        cuda = device.type == "cuda"
        self.hot_slab: SlotTier = (
            CudaSlotTier(spec, self.hot.slots, device) if cuda else SlotTier(spec, self.hot.slots)
        )
        self.warm_slab = SlotTier(spec, self.warm.slots, pinned=cuda)
        hop_blocks = max(1, (_CUDA_HOP_BYTES if cuda else _HOP_BYTES) // spec.nbytes)
        self._hops = [Buffer(spec, hop_blocks, pinned=cuda) for _ in range(2)]
        # Without a disk hot and warm are full together, and what leaves one has to go to the other.
        self._ahead = min(_MOST_AHEAD, self.hot.slots // _AHEAD_SHARE) if disk is not None else 0
        # Half of staging; the other half belongs to those who write behind and read ahead.
        self._staging = Buffer(spec, max(1, config.staging // 2 // spec.nbytes), pinned=cuda)
        self._stats = stats
        self._recorder = recorder
        self.live = 0
        self.unsaved = 0
        self.early = 0
        self._abandoned = _NONE
        if disk is not None:
            ids, locations = disk.scan()
            self.residency.restore(ids, locations)
            self.live = len(ids)

    def room(self) -> int:
        """Hot slots that are not pinned: so many blocks can be brought up or added."""
        return self.hot.slots - self.hot.pinned_count

    # Up, into hot.

    def add(self, ids: Ids, planes: Sequence[torch.Tensor]) -> None:
        """Place new blocks in hot, for which there is room.

        planes: per plane [n, *shape].
        """
        slots, stuck = self._make_hot_room(len(ids))
        assert not len(stuck), "every block has a place beside hot"
        self.hot_slab.place(slots, planes)
        self._arrive(ids, slots)
        self.live += len(ids)
        if self.disk is not None:
            self.unsaved += len(ids)

    def add_through(self, ids: Ids, planes: Sequence[torch.Tensor]) -> int:
        """Write new blocks to disk and place them in hot, as many as staging holds.

        For a store without warm slots. Returns how many; KVStoreError where they cannot be written,
        and then none is stored.
        """
        assert self.disk is not None
        n = min(len(ids), self._staging.blocks)
        ids, planes = ids[:n], [plane[:n] for plane in planes]
        self.residency.cold[ids] = self.disk.write(ids, rows_of(self.spec, planes))
        self.live += n
        self._stats.cold.bytes_in += n * self._nbytes
        slots, stuck = self._make_hot_room(n)
        assert not len(stuck), "every block is on disk"
        self.hot_slab.place(slots, planes)
        self._arrive(ids, slots)
        return n

    def bring_up(self, ids: Ids) -> Iterator[Slots]:
        """Copy blocks to hot from warm and disk; there is room for all beside what is pinned.

        Yields hot slots, part by part; the caller pins them before it goes on. CorruptBlockError
        where a block on disk is damaged; what came before it is in place.
        """
        in_warm, sources, on_disk = _native.split(ids, self.residency.warm)
        slab = self.hot_slab.rows
        if len(on_disk) and slab is not None and len(in_warm) <= self.warm.slots // _FEW:
            yield self._promote_and_read(in_warm, sources, on_disk, slab)
            return
        if len(in_warm):
            yield self.promote(in_warm, sources)
        if len(on_disk) and slab is not None:
            yield self._promote_and_read(_NONE, _NONE, on_disk, slab)
            return
        for start in range(0, len(on_disk), self._staging.blocks):
            part = on_disk[start : start + self._staging.blocks]
            assert self.disk is not None
            rows = self._staging.rows(len(part))
            self.disk.read(part, self.residency.cold[part], rows)
            yield self.land(part, rows, self._staging)

    def _promote_and_read(self, in_warm: Ids, sources: Slots, on_disk: Ids, slab: Rows) -> Slots:
        """Copy blocks from warm and read others from disk right into hot, which is host memory.

        Room for both is made at once: for a few blocks that takes longer than to copy them. Until
        it is made none of the warm slots that they leave can be used, so of many blocks it would
        push others out of warm.
        """
        assert self.disk is not None
        free, stuck = self._make_room_beside(sources, len(on_disk))
        promoted = len(in_warm) - len(stuck)
        assert promoted >= 0, "every block has a place beside hot"
        slots = free[promoted:]
        lifted = _NONE
        if len(in_warm):
            lifted = self._lift(in_warm, sources, free[:promoted], stuck)
        try:
            self.disk.read(on_disk, self.residency.cold[on_disk], slab, slots)
        except BaseException:
            self.hot.give_back(slots)
            raise
        self._arrive(on_disk, slots)
        self._stats.hot.promotions += len(on_disk)
        self._stats.cold.bytes_out += len(on_disk) * self._nbytes
        return np.concatenate((lifted, slots)) if len(lifted) else slots

    def land(self, ids: Ids, rows: Rows, buffer: Buffer) -> Slots:
        """Place blocks that were read from disk in hot, for which there is room.

        rows: per plane [n, bytes], at the beginning of `buffer`. Returns hot slots [n].
        """
        slots, stuck = self._make_hot_room(len(ids))
        assert not len(stuck), "every block has a place beside hot"
        buffer.lend(self.hot_slab.scatter(slots, rows))
        self._arrive(ids, slots)
        self._stats.hot.promotions += len(ids)
        self._stats.cold.bytes_out += len(ids) * self._nbytes
        return slots

    def promote(self, ids: Ids, sources: Slots) -> Slots:
        """Copy blocks from warm slots to hot, for which there is room.

        Returns their slots, in any order.
        """
        return self._lift(ids, sources, *self._make_room_beside(sources))

    def _make_room_beside(self, sources: Slots, more: int = 0) -> tuple[Slots, Slots]:
        """Make room in hot for blocks in these warm slots and for some more; see _make_hot_room."""
        if len(sources):
            # Out of the order now, so that making room does not choose them.
            self.warm.policy.release(sources)
        return self._make_hot_room(len(sources) + more)

    def _lift(self, ids: Ids, sources: Slots, free: Slots, stuck: Slots) -> Slots:
        """Copy blocks from warm slots to empty hot slots, or let them change places with others.

        Returns their slots, in any order.
        """
        swapped = len(stuck)
        if swapped:
            # With a disk tier at least so many have a copy there, and these are not being written.
            order = np.argsort(self.warm.sole[sources], kind="stable")
            ids, sources = ids[order], sources[order]
            assert not self.warm.pinned[sources[:swapped]].any(), "a slot changes as it is written"
            self._exchange(ids[:swapped], sources[:swapped], stuck)
        left = sources[swapped:]
        copy_slots(self.warm_slab, left, self.hot_slab, free, self._hops)
        _native.mark(left, self.warm.spare, True)
        slots = np.concatenate((stuck, free)) if swapped else free
        self._arrive(ids, slots)
        self._stats.hot.promotions += len(ids)
        self._stats.warm.bytes_out += len(ids) * self._nbytes
        return slots

    def _arrive(self, ids: Ids, slots: Slots) -> None:
        """Let the tables say that blocks are in hot slots now, in this order."""
        _native.arrive(ids, slots, self.hot.block, self.residency.hot)
        self.hot.policy.admit(slots)
        self._stats.hot.bytes_in += len(ids) * self._nbytes

    # Down, out of hot and out of warm.

    def _make_hot_room(self, n: int) -> tuple[Slots, Slots]:
        """Empty n hot slots; the caller knows that so many are not pinned.

        Returns empty slots and those that could not be emptied because their blocks
        have no other copy and no room in warm. Both have left the eviction order.
        """
        free = self.hot.take_free(n)
        lacking = n - len(free)
        if not lacking:
            return free, _NONE
        # Only where all that lies nowhere else finds room in warm, whatever is taken out of it now.
        taken = self.unsaved + self.warm.pinned_count + n
        ahead = self._ahead if taken <= self.warm.slots else 0
        victims = self.hot.victims(lacking + ahead, self.hot.pinned)
        if len(victims) < lacking:
            raise RuntimeError(
                f"the policy {type(self.hot.policy).__name__} chose {len(victims)} slots where "
                f"{lacking} were asked for, although there are so many"
            )
        stuck = self._evict(victims)
        if stuck is not None:
            assert not ahead, "a block finds no room in warm"
            return np.concatenate((free, victims[~stuck])), victims[stuck]
        if len(victims) > lacking:
            self.hot.give_back(victims[lacking:])
            victims = victims[:lacking]
        return (np.concatenate((free, victims)) if len(free) else victims), _NONE

    def _evict(self, victims: Slots) -> NDArray[np.bool_] | None:
        """Empty hot slots. Returns which could not be, bool like victims; None where all were."""
        residency, hot, warm = self.residency, self.hot, self.warm
        self._waste_early(victims)
        below, sole, saved = _native.sort_victims(
            victims, hot.block, residency.warm, residency.cold
        )
        self._settle_spare(below)
        stuck = None
        lowered = 0
        if len(below) < len(victims):
            places = self._lower(*sole)
            lacking = sole[1][len(places) :]
            # A copy on disk would do, but what was wanted in hot is soon wanted again: dropping it
            # here left warm as it was after the last put, and cost 1.6 times (Zipf) to 5 times (a
            # drifting working set) the reads from disk.
            for more in (places, self._lower(*saved)):
                warm.policy.admit(more)
                lowered += len(more)
            if len(lacking):
                stuck = np.isin(victims, lacking)
                victims = victims[~stuck]
        ids = _native.leave(victims, hot.block, residency.hot, hot.spare, hot.sole)
        self._stats.hot.demotions += lowered
        self._stats.hot.evictions += len(ids) - lowered
        self._recorder.note("evict", ids, HOT)
        return stuck

    def _settle_spare(self, places: Slots) -> None:
        """Make spare copies in these warm slots the blocks' only ones in memory."""
        if len(places):
            _native.mark(places, self.warm.spare, False)
            # At once: while room is made for others, those with a copy on disk may have to go.
            self.warm.policy.admit(places)

    def _lower(self, ids: Ids, slots: Slots) -> Slots:
        """Copy blocks from hot slots to warm, the first of them, as far as room can be made.

        Returns their warm slots, which are not in the eviction order yet.
        """
        if not len(ids) or not self.warm.slots:
            return _NONE
        room = self._make_warm_room(len(ids))
        ids, slots = ids[: len(room)], slots[: len(room)]
        copy_slots(self.hot_slab, slots, self.warm_slab, room, self._hops)
        _native.mark_sole(ids, room, self.residency.cold, self.warm.sole)
        _native.arrive(ids, room, self.warm.block, self.residency.warm)
        nbytes = len(ids) * self._nbytes
        self._stats.hot.bytes_out += nbytes
        self._stats.warm.bytes_in += nbytes
        return room

    def _make_warm_room(self, n: int) -> Slots:
        """Take at most n warm slots: free ones, then spare copies, then the policy's victims among
        those with a copy on disk."""
        warm = self.warm
        slots = warm.take_free(n)
        if len(slots) < n:
            dropped = warm.next_spare(n - len(slots))
            lacking = n - len(slots) - len(dropped)
            if lacking and self.disk is not None:
                dropped = np.concatenate((dropped, warm.victims(lacking, warm.sole)))
            ids = _native.leave(dropped, warm.block, self.residency.warm, warm.spare, warm.sole)
            slots = np.concatenate((slots, dropped)) if len(slots) else dropped
            self._stats.warm.evictions += len(ids)
            self._recorder.note("evict", ids, WARM)
        return slots

    def _exchange(self, ids: Ids, warm_slots: Slots, hot_slots: Slots) -> None:
        """Let blocks in warm change places with blocks in hot, where neither tier has room."""
        residency, hot, warm = self.residency, self.hot, self.warm
        step = self._hops[0].blocks
        for start in range(0, len(ids), step):
            rising = ids[start : start + step]
            low, high = warm_slots[start : start + step], hot_slots[start : start + step]
            sinking = hot.block[high]
            up, down = (hop.rows(len(rising)) for hop in self._hops)
            self.warm_slab.gather(low, up)
            self.hot_slab.gather(high, down)
            try:
                self.warm_slab.scatter(low, down)
                self._hops[0].lend(self.hot_slab.scatter(high, up))
                residency.warm[rising], residency.hot[sinking] = -1, -1
                residency.warm[sinking], residency.hot[rising] = low, high
            except BaseException:
                # Both lie in the buffers, so there is a way back from every point.
                self.warm_slab.scatter(low, up)
                self._hops[1].lend(self.hot_slab.scatter(high, down))
                residency.warm[sinking], residency.hot[rising] = -1, -1
                residency.warm[rising], residency.hot[sinking] = low, high
                raise
            warm.block[low] = sinking
            warm.sole[low] = residency.cold[sinking] < 0
            warm.policy.admit(low)
            nbytes = len(rising) * self._nbytes
            self._stats.hot.bytes_out += nbytes
            self._stats.warm.bytes_in += nbytes
            self._stats.hot.demotions += len(rising)
            self._recorder.note("evict", sinking, HOT)

    # On to disk, by way of warm.

    def lower_copies(self, ids: Ids) -> NDArray[np.bool_]:
        """Give blocks a copy in warm that have none, as far as there is room.

        Returns which of them have one now: bool, like ids.
        """
        only_hot = self.residency.warm[ids] < 0
        if only_hot.any():
            high = ids[only_hot]
            self.warm.spare[self._lower(high, self.residency.hot[high].astype(np.int64))] = True
        has_copy: NDArray[np.bool_] = self.residency.warm[ids] >= 0
        return has_copy

    def save(self, ids: Ids, slots: Slots, locations: NDArray[np.int64]) -> None:
        """Let the tables say that blocks in these warm slots have been written to disk."""
        self.unsaved -= int(np.count_nonzero(self.residency.cold[ids] < 0))
        self.residency.cold[ids] = locations
        self.warm.sole[slots] = False

    # Out of the store.

    def remove(self, ids: Ids) -> None:
        """Forget distinct blocks that are not pinned in hot.

        A warm slot that is pinned, because it is being written, stays without a block, and its id
        is not given out again, until `release` is called for it.
        """
        residency, hot, warm = self.residency, self.hot, self.warm
        locations = residency.cold[ids]
        residency.cold[ids] = -1
        self.abandon(locations[locations >= 0])
        if self.disk is not None:
            self.unsaved -= int(np.count_nonzero(locations < 0))
        self.live -= len(ids)
        in_hot = residency.hot[ids]
        high = in_hot[in_hot >= 0].astype(np.int64)
        residency.hot[ids] = -1
        self._waste_early(high)
        hot.policy.release(high)
        hot.give_back(high)
        held = residency.warm[ids] >= 0
        low = residency.warm[ids[held]].astype(np.int64)
        residency.warm[ids] = -1
        warm.policy.release(low[~warm.spare[low]])
        pinned = warm.pinned[low]
        warm.block[low[pinned]] = -1
        warm.spare[low[pinned]] = False
        warm.sole[low[pinned]] = False
        warm.give_back(low[~pinned])
        held[held] = pinned
        residency.recycle(ids[~held])
        self.sweep()

    def abandon(self, locations: NDArray[np.int64]) -> None:
        """Take note of locations on disk that no table names any more, once or more often."""
        if len(locations):
            self._abandoned = np.union1d(self._abandoned, locations)

    @property
    def abandoned(self) -> int:
        """How many blocks are still on disk that belong to nobody."""
        return len(self._abandoned)

    def sweep(self) -> None:
        """Delete from disk what was abandoned."""
        if len(self._abandoned) and self.disk is not None:
            try:
                # Some may be gone: Ctrl-C may come between their deletion and the next line.
                self.disk.delete(self._abandoned, missing_ok=True)
            except KVStoreError:
                # A full disk refuses deletions too. They are tried again with the next.
                return
            self._abandoned = _NONE

    def release(self, ids: Ids, slots: Slots) -> None:
        """Give back warm slots, no longer pinned, of blocks that were removed meanwhile."""
        self.warm.give_back(slots)
        self.residency.recycle(ids)

    def mark_early(self, slots: Slots) -> None:
        """Note that blocks in these hot slots came by a prefetch."""
        self.hot.early[slots] = True
        self.early += len(slots)

    def use_early(self, slots: Slots) -> None:
        """Count those in these hot slots that came by a prefetch: they have been looked up."""
        if self.early:
            self._stats.prefetch.used += self._unmark_early(slots)

    def _waste_early(self, slots: Slots) -> None:
        if self.early:
            self._stats.prefetch.wasted += self._unmark_early(slots)

    def _unmark_early(self, slots: Slots) -> int:
        marked = int(np.count_nonzero(self.hot.early[slots]))
        if marked:
            self.hot.early[slots] = False
            self.early -= marked
        return marked

    # After a move was cut short.

    def rebuild(self, writing: Iterable[tuple[Ids, Slots]]) -> None:
        """Derive everything else from residency's tables. The orders of eviction start over.

        writing: ids and warm slots of the batches being written.
        """
        residency, hot, warm = self.residency, self.hot, self.warm
        warm.pins[:] = 0
        for _, slots in writing:
            warm.pins[slots] += 1
        for tier, table in ((hot, residency.hot), (warm, residency.warm)):
            ids = np.flatnonzero(table >= 0)
            tier.rebuild(ids, table[ids].astype(np.int64))
        in_hot = np.flatnonzero(hot.block >= 0)
        in_warm = np.flatnonzero(warm.block >= 0)
        warm.spare[in_warm] = residency.hot[warm.block[in_warm]] >= 0
        warm.sole[in_warm] = residency.cold[warm.block[in_warm]] < 0
        hot.policy.admit(in_hot)
        warm.policy.admit(in_warm[~warm.spare[in_warm]])
        residency.reclaim(taken=np.concatenate([_NONE, *(ids for ids, _ in writing)]))
        present = residency.present()
        self.live = len(present)
        if self.disk is not None:
            self.unsaved = int(np.count_nonzero(residency.cold[present] < 0))
        # What was cut short had been counted as neither, or as both.
        self._stats.prefetch.wasted += self.early - int(hot.early.sum())
        self.early = int(hot.early.sum())

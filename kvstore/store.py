"""The store: blocks in three tiers behind one interface. The only mover of blocks.

Owns the order in which bytes are copied and tables change. Where a block lies is residency's, what
a slot holds occupancy's, the bytes are the tiers'. Never looks inside a block, and knows nothing of
models.

The rules of movement:

- A new block goes to hot. A promotion to hot leaves the copy in warm, first in line to be
  reclaimed. A block that leaves hot goes to warm unless it has a copy there.
- A block is *unsaved* while it has no copy on disk. With a disk tier there are never more unsaved
  blocks than warm has slots, so each has a place in memory besides hot: a fetch finds room in hot
  whatever the disk does, and never waits for a write. The price is paid by `put`, which waits.
- Without a disk tier hot and warm hold each block once between them; where both are full a fetch
  lets blocks change places.
- Copy first, drop second: a table names a slot only after the bytes are there, and stops naming it
  before they are overwritten. What is derived from the tables can be rebuilt, so an interrupted
  move (Ctrl-C, a device that fails) leaves the store as it was or as it was going to be.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import get_ident
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvstore.block import BlockSpec
from kvstore.check import check_tables
from kvstore.config import StoreConfig, format_size
from kvstore.errors import (
    HotTierTooSmallError,
    KVStoreError,
    StoreClosedError,
    StoreFullError,
    WriteFailedError,
)
from kvstore.jobs import Crew, ReadJob, WriteJob
from kvstore.occupancy import Occupancy
from kvstore.residency import Ids, Residency
from kvstore.stats import StoreStats
from kvstore.tiers.cuda import CudaSlotTier
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.slots import Buffer, Slots, SlotTier, copy_slots, rows_of
from kvstore.trace import Tier, TraceWriter
from kvstore.waves import cut_waves

_NONE = np.empty(0, np.int64)

# Small enough for a core's second-level cache, large enough for a call a plane to cost little.
_HOP_BYTES = 512 * 1024
# On CUDA a hop is one transfer, and those want megabytes.
_CUDA_HOP_BYTES = 4 * 1024 * 1024
# A write of this size is one LMDB transaction of the size that committed fastest.
_BATCH_BYTES = 2 * 1024 * 1024
_BATCH_BLOCKS = 256
_READS_AHEAD = 2


@dataclass(frozen=True)
class TierUsage:
    """How full a tier is.

    capacity_bytes, used_bytes: of memory, or of the file. blocks: that have a copy here.
    """

    capacity_bytes: int
    used_bytes: int
    blocks: int


class Pin:
    """Blocks held in hot for the length of a `with` statement.

    slots: int64, the shape of the ids asked for: each id's slot in `Store.hot_planes`.
    """

    __slots__ = ("_held", "_ids", "_store", "slots")

    slots: Slots

    def __init__(self, store: Store, ids: Ids) -> None:
        self._store = store
        self._ids = ids

    def __enter__(self) -> Pin:
        slots, self._held = self._store._hold(self._ids.ravel())
        self.slots = slots.reshape(self._ids.shape)
        return self

    def __exit__(self, *_: object) -> None:
        self._store._let_go(self._held)

    def weigh(self, weights: torch.Tensor | NDArray[np.float32]) -> None:
        """Tell the policy and the trace the gate weight that each of the ids received.

        weights: the shape of the ids. What an id received in several places is added up.
        """
        if isinstance(weights, torch.Tensor):
            weights = weights.detach().to("cpu", torch.float32).numpy()
        given = np.asarray(weights, np.float32)
        if given.shape != self.slots.shape:
            raise ValueError(
                f"weights have shape {given.shape}, the ids that were pinned {self.slots.shape}"
            )
        self._store._weigh(self.slots.ravel(), given.ravel())


class Store:
    """Blocks in hot, warm and cold tiers.

    spec: what every block looks like. config: sizes, device, policy; see StoreConfig. ValueError
    where a block does not fit into hot, or the directory cannot be used.

    A context manager; `close` at the latest when the process ends. With a directory the blocks are
    kept in it, without one they are gone when the store closes. The thread that makes a store owns
    it: calls from another one, or from a forked process, raise RuntimeError. What fails in the
    background raises at the next call; the store stays readable.
    """

    def __init__(self, spec: BlockSpec, config: StoreConfig | None = None) -> None:
        self.spec = spec
        self.config = config = config or StoreConfig()
        self.stats = StoreStats()
        self._thread, self._pid = get_ident(), os.getpid()
        self._closed = False
        self._failure: KVStoreError | None = None

        hot_slots = config.hot // spec.nbytes
        warm_slots = config.warm // spec.nbytes
        if hot_slots < 1:
            raise ValueError(
                f"hot: {config.hot} bytes hold no block of {spec.nbytes} bytes; "
                f"give at least {spec.nbytes}"
            )
        if config.cold is not None and config.cold < spec.nbytes:
            raise ValueError(
                f"cold: {config.cold} bytes hold no block of {spec.nbytes} bytes; give more, "
                "or None for no disk tier"
            )
        with ExitStack() as stack:
            self._disk = self._open_disk(stack)
            self._trace = self._open_trace(stack, hot_slots, warm_slots)
            self._writers = Crew("kvstore-write", config.workers)
            stack.callback(self._writers.close)
            self._readers = Crew("kvstore-read", 1)
            stack.callback(self._readers.close)
            self._release = weakref.finalize(self, _close_in, self._pid, stack.pop_all())

        device = config.torch_device
        cuda = device.type == "cuda"
        self._residency = Residency()
        self._hot = Occupancy(hot_slots, config.policy)
        self._warm = Occupancy(warm_slots, config.policy)
        self._hot_slab = CudaSlotTier(spec, hot_slots, device) if cuda else SlotTier(spec, hot_slots)
        self._warm_slab = SlotTier(spec, warm_slots, pinned=cuda)

        # Half of staging is the owner's, a quarter reads ahead, a quarter is the writers'.
        def blocks(nbytes: int) -> int:
            return max(1, nbytes // spec.nbytes)

        self._staging = Buffer(spec, blocks(config.staging // 2), cuda)
        hop = blocks(_CUDA_HOP_BYTES if cuda else _HOP_BYTES)
        self._hops = [Buffer(spec, hop, cuda) for _ in range(2)]
        ahead = blocks(config.staging // 4 // _READS_AHEAD)
        self._idle_buffers = [Buffer(spec, ahead, cuda) for _ in range(_READS_AHEAD)]
        self._batch = min(
            _BATCH_BLOCKS,
            blocks(min(_BATCH_BYTES, config.staging // 4 // config.workers)),
            max(1, warm_slots // 4),
        )
        self._write_buffers: SimpleQueue[Buffer] = SimpleQueue()
        for _ in range(config.workers):
            self._write_buffers.put(Buffer(spec, self._batch))

        # Ids in the order in which they were put; some may have been saved or deleted since.
        self._queue: deque[Ids] = deque()
        self._unsaved = 0
        # Warm slots of blocks that were deleted while a worker read them.
        self._condemned = 0
        self._live = 0
        # A kept store writes as soon as it can, a temporary one only what warm may need soon.
        self._quiet = warm_slots // 2 if config.directory is None else self._batch - 1
        self._stalled = False
        self._writes: list[WriteJob] = []
        self._reads: list[ReadJob] = []
        # Pins that ended while the device may still read their slots.
        self._ending: deque[tuple[torch.cuda.Event, Slots]] = deque()
        self._early = 0
        self._place_of = np.zeros(hot_slots, np.int64)

        if self._disk is not None:
            ids, locations = self._disk.scan()
            self._residency.restore(ids, locations)
            self._live = len(ids)

    def _open_disk(self, stack: ExitStack) -> DiskTier | None:
        config = self.config
        if config.cold is None:
            return None
        directory = config.directory
        if directory is None:
            directory = Path(tempfile.mkdtemp(prefix="kvstore-"))
            stack.callback(shutil.rmtree, directory, ignore_errors=True)
        disk = DiskTier(directory, self.spec, config.cold)
        stack.callback(disk.close)
        return disk

    def _open_trace(
        self, stack: ExitStack, hot_slots: int, warm_slots: int
    ) -> TraceWriter | None:
        if self.config.trace is None:
            return None
        policy = self.config.policy
        header = {
            "block_bytes": self.spec.nbytes,
            "hot_slots": hot_slots,
            "warm_slots": warm_slots,
            "cold_bytes": self.config.cold,
            "policy": policy if isinstance(policy, str) else getattr(policy, "__name__", "?"),
        }
        trace = TraceWriter(self.config.trace, header)
        stack.callback(trace.close)
        return trace

    # The interface.

    @property
    def hot_planes(self) -> list[torch.Tensor]:
        """Per plane the hot tier's tensor [hot slots, *shape]: read it at pinned slots only."""
        return self._hot_slab.planes

    @property
    def hot_slots(self) -> int:
        """Blocks that fit into hot."""
        return self._hot.slots

    def __len__(self) -> int:
        """The number of blocks stored."""
        return self._live

    def put(self, planes: Sequence[torch.Tensor]) -> Ids:
        """Store n blocks.

        planes: per plane of the spec a tensor [n, *shape] of its dtype, on any device. Returns
        their ids, int64 [n]. ValueError for another shape or dtype; StoreFullError where they do
        not fit. Either all are stored or none.
        """
        self._enter()
        n = self._count(planes)
        capacity = self._hot.slots + self._warm.slots
        if self._disk is None and self._live + n > capacity:
            raise StoreFullError(
                f"hot and warm hold {capacity} blocks together and there is no cold tier: {n} more "
                f"do not fit beside {self._live}; give hot or warm at least "
                f"{format_size((self._live + n - capacity) * self.spec.nbytes)} more, or a cold "
                "tier"
            )
        ids = self._residency.allocate(n)
        done = 0
        try:
            while done < n:
                done += self._put_some(ids[done:], [plane[done:] for plane in planes])
        except KVStoreError:
            self._remove(ids[:done])
            self._residency.recycle(ids[done:])
            raise
        except BaseException:
            self._rebuild()
            self._remove(ids[self._residency.tiers(ids) != Tier.ABSENT])
            raise
        if self._disk is not None and not self._stalled:
            with self._whole():
                self._write_behind(self._quiet)
        self._note("put", ids)
        return ids

    def pinned(self, ids: Ids) -> Pin:
        """Hold blocks in hot: `with store.pinned(ids) as pin: ... pin.slots ...`.

        ids: int64, any shape, repeats allowed. When the `with` is entered, KeyError for an id that
        names no block, HotTierTooSmallError where the distinct blocks do not fit into hot beside
        what is pinned already, CorruptBlockError where a block's copy on disk is damaged.
        """
        return Pin(self, _as_ids(ids))

    def fetch(self, ids: Ids) -> list[torch.Tensor]:
        """Copy blocks out, as many as you like.

        ids: int64, any shape. Returns per plane a tensor [*ids.shape, *shape] on the hot device.
        """
        self._enter()
        ids = _as_ids(ids)
        flat = ids.ravel()
        device = self._hot_slab.planes[0].device
        out = [
            torch.empty((len(flat), *plane.shape), dtype=plane.dtype, device=device)
            for plane in self.spec.planes
        ]
        for part in self.waves(flat[:, None]):
            with self.pinned(flat[part]) as pin:
                index = torch.from_numpy(pin.slots).to(device)
                for copy, slab in zip(out, self.hot_planes, strict=True):
                    torch.index_select(slab, 0, index, out=copy[part])
        return [copy.view(*ids.shape, *copy.shape[1:]) for copy in out]

    def waves(self, selection: Ids) -> Iterator[slice]:
        """Cut a selection into consecutive waves that can each be pinned at once.

        selection: int64 [groups, ids a group]. Yields slices of groups. A wave holds as many groups
        as have distinct ids for the slots that are not pinned when the wave is taken. A single
        group that does not fit raises HotTierTooSmallError.
        """
        selection = _as_ids(selection)
        if selection.ndim != 2:
            raise ValueError(f"a selection is [groups, ids], not {list(selection.shape)}")
        self._enter()
        room = self._hot_room()
        for wave, distinct in cut_waves(selection, room):
            if distinct > room:
                raise self._too_small(self._hot.slots - room + distinct)
            yield wave

    def prefetch(self, ids: Ids) -> None:
        """Bring blocks up to hot before they are asked for.

        ids: int64, any shape. Those on disk are read in the background; a fetch that needs one of
        them waits for it. Never waits and never fails for want of room: what exceeds half of the
        hot slots that are not pinned, or the buffers, is left where it is. KeyError for an id that
        names no block.
        """
        self._enter()
        ids = _distinct(_as_ids(ids).ravel())
        tiers = self._residency.tiers(ids)
        self._require(ids, tiers)
        with self._whole():
            room = self._hot_room(0) // 2
            warm = ids[tiers == Tier.WARM][:room]
            if len(warm):
                slots = self._promote(warm)
                self._hot.early[slots] = True
                self._early += len(warm)
                self.stats.prefetch.issued += len(warm)
            cold = ids[tiers == Tier.COLD]
            cold = cold[~self._residency.reading[cold]][: room - len(warm)]
            while len(cold) and self._idle_buffers:
                buffer = self._idle_buffers.pop()
                self._read_ahead(buffer, cold[: buffer.blocks])
                cold = cold[buffer.blocks :]
        self._note("prefetch", ids)

    def delete(self, ids: Ids) -> None:
        """Forget blocks. ids: int64; KeyError for one that names no block, ValueError if pinned."""
        self._enter()
        ids = np.unique(_as_ids(ids))
        self._require(ids, self._residency.tiers(ids))
        self._end_pins(wait=True)
        with self._whole():
            self._await_reads(ids)
            slots = self._residency.hot[ids]
            held = ids[(slots >= 0) & self._hot.pinned[slots]]
            if len(held):
                raise ValueError(f"block {held[0]} is pinned")
            self._remove(ids)
            self._stalled = False
        self._note("delete", ids)

    def flush(self) -> None:
        """Write every block that has no copy on disk yet, and wait. Nothing without a disk tier."""
        self._enter()
        if self._disk is None:
            return
        with self._whole():
            while self._unsaved:
                self._write_behind(0)
                self._await_write()
            self._disk.sync()

    def put_record(self, key: bytes, value: bytes | None) -> None:
        """Keep a small record beside the blocks; None forgets it."""
        self.put_records({key: value})

    def put_records(self, records: Mapping[bytes, bytes | None]) -> None:
        """Keep several records, all or none."""
        self._enter()
        self._records().put_meta(dict(records))

    def get_record(self, key: bytes) -> bytes | None:
        """A record's value, None if there is none."""
        self._enter()
        return self._records().get_meta(key)

    def record_keys(self, prefix: bytes = b"") -> list[bytes]:
        """The keys of the records that begin with this, sorted."""
        self._enter()
        return self._records().meta_keys(prefix)

    def usage(self) -> dict[str, TierUsage]:
        """How full hot, warm and cold are."""
        self._enter()
        nbytes = self.spec.nbytes
        usage = {
            name: TierUsage(tier.slots * nbytes, tier.used * nbytes, tier.used)
            for name, tier in (("hot", self._hot), ("warm", self._warm))
        }
        disk = self._disk
        usage["cold"] = (
            TierUsage(disk.capacity_bytes, disk.used_bytes, disk.block_count)
            if disk
            else TierUsage(0, 0, 0)
        )
        return usage

    def check(self) -> None:
        """Raise AssertionError where the store's tables contradict one another."""
        self._enter()
        check_tables(
            self._residency,
            self._hot,
            self._warm,
            writes=[(job.ids, job.slots) for job in self._writes],
            reads=[job.ids for job in self._reads],
            disk=self._disk is not None,
            live=self._live,
            unsaved=self._unsaved,
            condemned=self._condemned,
            queued=np.concatenate([_NONE, *self._queue]),
        )
        assert self._hot.slots * self.spec.nbytes <= self.config.hot
        assert self._warm.slots * self.spec.nbytes <= self.config.warm
        assert self._early == self._hot.early.sum()
        if self._disk is not None and not self._writes:
            on_disk = int((self._residency.cold >= 0).sum())
            assert self._disk.block_count == on_disk, (self._disk.block_count, on_disk)
        self.stats.check()

    def close(self) -> None:
        """Write what a kept store has not written yet, and let go of everything.

        Closing again does nothing. An error of the last writes is raised after all is closed.
        """
        if self._closed:
            return
        self._require_owner()
        # What failed before is tried again by `flush`, or of no interest any more.
        self._failure = None
        try:
            if self.config.directory is not None:
                self.flush()
        finally:
            self._closed = True
            self._release()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # Who may call, and what happened meanwhile.

    def _require_owner(self) -> None:
        if get_ident() != self._thread:
            raise RuntimeError("a store belongs to the thread that made it; this is another one")
        if os.getpid() != self._pid:
            raise RuntimeError("a store does not survive a fork; make one in the new process")

    def _enter(self) -> None:
        """Begin a call: take in what the background has done, raise what failed there."""
        self._require_owner()
        if self._closed:
            raise StoreClosedError("the store is closed")
        if self._writes or self._reads:
            with self._whole():
                self._absorb()
        if self._ending:
            self._end_pins()
        self._raise_failure()

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _records(self) -> DiskTier:
        if self._disk is None:
            raise ValueError("records need a disk tier; give cold a size")
        return self._disk

    def _note(self, event: str, *of: Any) -> None:
        """Record in the trace. A trace that cannot be written must not stop a move half way."""
        if self._trace is not None:
            try:
                getattr(self._trace, event)(*of)
            except WriteFailedError as error:
                self._failure = self._failure or error

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Restore what the tables imply if a move is cut short where none is expected to end."""
        try:
            yield
        except (KVStoreError, ValueError, KeyError):
            raise
        except BaseException:
            self._rebuild()
            raise

    def _rebuild(self) -> None:
        """Derive everything else from residency's tables."""
        residency, hot, warm = self._residency, self._hot, self._warm
        warm.pins[:] = 0
        for job in self._writes:
            warm.pins[job.slots] += 1
        for tier, table in ((hot, residency.hot), (warm, residency.warm)):
            ids = np.flatnonzero(table >= 0)
            tier.rebuild(ids, table[ids])
        in_hot = np.flatnonzero(hot.block >= 0)
        in_warm = np.flatnonzero(warm.block >= 0)
        warm.spare[in_warm] = residency.hot[warm.block[in_warm]] >= 0
        warm.sole[in_warm] = residency.cold[warm.block[in_warm]] < 0
        hot.policy.admit(in_hot)
        warm.policy.admit(in_warm[~warm.spare[in_warm]])
        self._early = int(hot.early.sum())
        present = residency.present()
        self._live = len(present)
        on_the_way = np.concatenate([_NONE, *(job.ids for job in self._writes)])
        residency.reclaim(taken=on_the_way)
        if self._disk is not None:
            self._condemned = sum(int((warm.block[j.slots] != j.ids).sum()) for j in self._writes)
            unsaved = present[residency.cold[present] < 0]
            self._unsaved = len(unsaved)
            self._queue = deque([np.setdiff1d(unsaved, on_the_way)])

    # Looking up.

    def _hold(self, ids: Ids) -> tuple[Slots, Slots]:
        """Pin blocks in hot. ids: int64 [n]. Returns each id's slot [n] and the distinct slots."""
        self._enter()
        try:
            slots = self._residency.hot.take(ids)
            present = not len(ids) or (slots.min() >= 0 and ids.min() >= 0)
        except IndexError:
            present = False
        if present:
            slots = slots.astype(np.int64)
            distinct = self._distinct_slots(slots)
            self._hot.pin(distinct)
            self._hot.policy.touch(distinct)
            self.stats.lookups += len(distinct)
            self.stats.hot.hits += len(distinct)
            if self._trace is not None:
                self._note("fetch", self._hot.block[distinct], np.zeros(len(distinct), np.uint8))
            if self._early:
                self._count_early(distinct)
        else:
            slots, distinct = self._hold_missing(ids)
        self._hot_slab.await_writes()
        return slots, distinct

    def _distinct_slots(self, slots: Slots) -> Slots:
        """The slots without repeats, in order of first appearance."""
        # Written back to front, so that a slot's first place is what remains. Sorting instead, as
        # np.unique does, takes four times as long.
        places = np.arange(len(slots))
        self._place_of[slots[::-1]] = places[::-1]
        return slots[self._place_of[slots] == places]

    def _hold_missing(self, ids: Ids) -> tuple[Slots, Slots]:
        """`_hold` where not all blocks lie in hot."""
        distinct = _distinct(ids)
        tiers = self._residency.tiers(distinct)
        found = np.bincount(tiers, minlength=len(Tier)).tolist()
        stats = self.stats
        stats.lookups += len(distinct)
        stats.hot.hits += found[Tier.HOT]
        stats.warm.hits += found[Tier.WARM]
        stats.cold.hits += found[Tier.COLD]
        stats.not_found += found[Tier.ABSENT]
        self._note("fetch", distinct, tiers)
        self._require(distinct, tiers)
        hits = self._residency.hot[distinct[tiers == Tier.HOT]].astype(np.int64)
        missing = distinct[tiers != Tier.HOT]
        held = hits
        self._hot.pin(hits)
        try:
            room = self._hot_room(len(missing))
            if len(missing) > room:
                raise self._too_small(self._hot.slots - room + len(missing))
            with self._whole():
                self._hot.policy.touch(hits)
                self._await_reads(missing)
                # Reading ahead brought some of them up, if not just now then while we waited.
                arrived = self._residency.hot[missing]
                come = arrived[arrived >= 0].astype(np.int64)
                self._hot.pin(come)
                held = np.concatenate((hits, come))
                for slots in self._bring_up(missing[arrived < 0]):
                    self._hot.pin(slots)
                    held = np.concatenate((held, slots))
        except BaseException:
            self._hot.unpin(held)
            raise
        self._count_early(held)
        return self._residency.hot[ids].astype(np.int64), held

    def _require(self, ids: Ids, tiers: NDArray[np.uint8]) -> None:
        absent = ids[tiers == Tier.ABSENT]
        if len(absent):
            more = f", nor have {len(absent) - 1} others" if len(absent) > 1 else ""
            raise KeyError(f"no block has the id {absent[0]}{more}")

    def _let_go(self, slots: Slots) -> None:
        """End a pin, on a device as soon as what was given to it has run."""
        if self._closed:
            return
        event = self._hot_slab.mark_reads()
        if event is None:
            self._hot.unpin(slots)
        else:
            self._ending.append((event, slots))

    def _end_pins(self, wait: bool = False) -> None:
        while self._ending:
            event, slots = self._ending[0]
            if wait:
                event.synchronize()
            elif not event.query():
                return
            self._ending.popleft()
            self._hot.unpin(slots)

    def _weigh(self, slots: Slots, weights: NDArray[np.float32]) -> None:
        distinct = self._distinct_slots(slots)
        self._place_of[distinct] = np.arange(len(distinct))
        sums = np.bincount(self._place_of[slots], weights, len(distinct)).astype(np.float32)
        self._hot.policy.weigh(distinct, sums)
        if self._trace is not None:
            self._note("weigh", self._hot.block[distinct], sums)

    def _count_early(self, slots: Slots) -> None:
        """Count prefetched blocks that were looked up now."""
        used = int(self._hot.early[slots].sum())
        if used:
            self._hot.early[slots] = False
            self._early -= used
            self.stats.prefetch.used += used

    def _hot_room(self, enough: int | None = None) -> int:
        """Hot slots that are not pinned. Waits for what a device still reads if they are too few.

        enough: all of them, if it is not said.
        """
        room = self._hot.slots - int(np.count_nonzero(self._hot.pinned))
        if self._ending and (enough is None or room < enough):
            self._end_pins(wait=True)
            room = self._hot.slots - int(np.count_nonzero(self._hot.pinned))
        return room

    def _too_small(self, least: int) -> HotTierTooSmallError:
        nbytes = least * self.spec.nbytes
        return HotTierTooSmallError(
            f"the hot tier holds {self._hot.slots} blocks and {least} are needed at once: "
            f"give hot at least {nbytes} bytes ({format_size(nbytes)})"
        )

    # Moving.

    def _count(self, planes: Sequence[torch.Tensor]) -> int:
        """Check planes against the spec; returns how many blocks they are."""
        if len(planes) != len(self.spec.planes):
            names = ", ".join(plane.name for plane in self.spec.planes)
            raise ValueError(f"a block has {len(self.spec.planes)} planes ({names}), not {len(planes)}")
        n = len(planes[0])
        for plane, tensor in zip(self.spec.planes, planes, strict=True):
            if tensor.shape != (n, *plane.shape) or tensor.dtype != plane.dtype:
                raise ValueError(
                    f"{plane.name}: expected {plane.dtype} {[n, *plane.shape]}, "
                    f"got {tensor.dtype} {list(tensor.shape)}"
                )
        return n

    def _put_some(self, ids: Ids, planes: Sequence[torch.Tensor]) -> int:
        """Store as many of these blocks as can be at a time; returns how many."""
        n = min(len(ids), self._hot_room(len(ids)))
        if n == 0:
            raise self._too_small(self._hot.slots + 1)
        if self._disk is not None:
            n = self._await_room(n) if self._warm.slots else min(n, self._staging.blocks)
        ids, planes = ids[:n], [plane[:n] for plane in planes]
        locations = None
        if self._disk is not None and not self._warm.slots:
            # Nowhere to wait for a writer: straight to disk, then to hot as the copy of it.
            locations = self._disk.write(ids, rows_of(self.spec, planes))
        slots, stuck = self._make_hot_room(n)
        assert not len(stuck), "there is room in warm for every unsaved block"
        self._hot_slab.place(slots, planes)
        if locations is not None:
            self._residency.cold[ids] = locations
            self.stats.cold.bytes_in += n * self.spec.nbytes
        self._settle(ids, slots)
        self._live += n
        if self._disk is not None and locations is None:
            self._unsaved += n
            self._queue.append(ids)
        return n

    def _settle(self, ids: Ids, slots: Slots) -> None:
        """Let the tables say that blocks have arrived in hot slots, in this order."""
        self._hot.block[slots] = ids
        self._residency.hot[ids] = slots
        self._hot.policy.admit(slots)
        self.stats.hot.bytes_in += len(ids) * self.spec.nbytes

    def _bring_up(self, ids: Ids) -> Iterator[Slots]:
        """Copy blocks to hot from where they lie. Yields slots, to be pinned before going on."""
        in_warm = self._residency.warm[ids] >= 0
        if in_warm.any():
            yield self._promote(ids[in_warm])
        cold = ids[~in_warm]
        disk = self._disk
        step = self._staging.blocks
        for start in range(0, len(cold), step):
            part = cold[start : start + step]
            rows = self._staging.rows(len(part))
            assert disk is not None
            disk.read(part, self._residency.cold[part], rows)
            self.stats.cold.bytes_out += len(part) * self.spec.nbytes
            slots, stuck = self._make_hot_room(len(part))
            assert not len(stuck), "there is room in warm for every unsaved block"
            self._staging.lend(self._hot_slab.scatter(slots, rows))
            self._settle(part, slots)
            self.stats.hot.promotions += len(part)
            yield slots

    def _promote(self, ids: Ids) -> Slots:
        """Copy blocks from warm to hot, where there is room for them beside what is pinned."""
        sources = self._residency.warm[ids].astype(np.int64)
        # Out of the order now, so that making room does not choose them.
        self._warm.policy.release(sources)
        free, stuck = self._make_hot_room(len(ids))
        swapped = len(stuck)
        if swapped:
            self._exchange(ids[:swapped], sources[:swapped], stuck)
        sources = sources[swapped:]
        copy_slots(self._warm_slab, sources, self._hot_slab, free, self._hops)
        self._warm.spare[sources] = True
        slots = np.concatenate((stuck, free))
        self._settle(ids, slots)
        self.stats.hot.promotions += len(ids)
        self.stats.warm.bytes_out += len(ids) * self.spec.nbytes
        return slots

    def _make_hot_room(self, n: int) -> tuple[Slots, Slots]:
        """Free n hot slots; the caller knows that so many are not pinned.

        Returns free slots, and those that could not be freed because warm has no room for their
        blocks; these have left the eviction order, and the caller makes an exchange.
        """
        free = self._hot.take_free(n)
        if len(free) == n:
            return free, _NONE
        victims = self._hot.victims(n - len(free), self._hot.pinned)
        assert len(victims) == n - len(free), "more hot slots were promised than are not pinned"
        stuck = self._evict(victims)
        if len(stuck):
            victims = victims[~np.isin(victims, stuck)]
        return np.concatenate((free, victims)), stuck

    def _evict(self, victims: Slots) -> Slots:
        """Empty hot slots: drop what has a copy in warm, lower the rest there.

        Returns the slots whose blocks have no other copy and find no room.
        """
        residency, hot, warm = self._residency, self._hot, self._warm
        ids = hot.block[victims]
        self._waste_early(victims)
        below = residency.warm[ids]
        has_copy = below >= 0
        warm.spare[below[has_copy]] = False
        saved = ~has_copy & (residency.cold[ids] >= 0)
        sole = ~has_copy & ~saved
        self._lower(ids[sole], victims[sole])
        stuck = sole & (residency.warm[ids] < 0)
        if KEEP_DROPPED:
            self._lower(ids[saved], victims[saved])
        gone, slots = ids[~stuck], victims[~stuck]
        lowered = residency.warm[gone]
        warm.policy.admit(lowered[lowered >= 0].astype(np.int64))
        residency.hot[gone] = -1
        hot.block[slots] = -1
        self.stats.hot.evictions += len(gone)
        self._note("evict", gone, Tier.HOT)
        return victims[stuck]

    def _lower(self, ids: Ids, slots: Slots) -> None:
        """Copy blocks from hot slots to warm, the first of them, as far as room can be made."""
        if not len(ids):
            return
        room = self._make_warm_room(len(ids))
        ids, slots = ids[: len(room)], slots[: len(room)]
        copy_slots(self._hot_slab, slots, self._warm_slab, room, self._hops)
        self._warm.block[room] = ids
        self._warm.sole[room] = self._residency.cold[ids] < 0
        self._residency.warm[ids] = room
        nbytes = len(ids) * self.spec.nbytes
        self.stats.hot.bytes_out += nbytes
        self.stats.warm.bytes_in += nbytes

    def _make_warm_room(self, n: int) -> Slots:
        """Take at most n warm slots: free ones, then spare copies, then the policy's victims that
        have a copy on disk."""
        warm = self._warm
        slots = warm.take_free(n)
        if len(slots) < n:
            spare = np.flatnonzero(warm.spare & ~warm.pinned)[: n - len(slots)]
            slots = np.concatenate((slots, spare))
            dropped = spare
            if len(slots) < n and self._disk is not None:
                victims = warm.victims(n - len(slots), warm.sole)
                slots = np.concatenate((slots, victims))
                dropped = np.concatenate((spare, victims))
            ids = warm.block[dropped]
            self._residency.warm[ids] = -1
            warm.block[dropped] = -1
            warm.spare[dropped] = False
            warm.sole[dropped] = False
            self.stats.warm.evictions += len(ids)
            self._note("evict", ids, Tier.WARM)
        return slots

    def _exchange(self, ids: Ids, warm_slots: Slots, hot_slots: Slots) -> None:
        """Let blocks in warm change places with blocks in hot, where no tier has a free slot."""
        residency, hot, warm = self._residency, self._hot, self._warm
        step = self._hops[0].blocks
        for start in range(0, len(ids), step):
            rising = ids[start : start + step]
            low, high = warm_slots[start : start + step], hot_slots[start : start + step]
            sinking = hot.block[high]
            up, down = (hop.rows(len(rising)) for hop in self._hops)
            self._warm_slab.gather(low, up)
            self._hot_slab.gather(high, down)
            try:
                self._warm_slab.scatter(low, down)
                self._hops[0].lend(self._hot_slab.scatter(high, up))
                residency.warm[rising], residency.hot[sinking] = -1, -1
                residency.warm[sinking], residency.hot[rising] = low, high
            except BaseException:
                # Both are in the buffers, so the way back is open at every point.
                self._warm_slab.scatter(low, up)
                self._hops[1].lend(self._hot_slab.scatter(high, down))
                residency.warm[sinking], residency.hot[rising] = -1, -1
                residency.warm[rising], residency.hot[sinking] = low, high
                raise
            warm.block[low] = sinking
            warm.sole[low] = residency.cold[sinking] < 0
            warm.policy.admit(low)
            hot.block[high] = -1
            nbytes = len(ids) * self.spec.nbytes
            self.stats.hot.bytes_out += nbytes
            self.stats.warm.bytes_in += nbytes
            self.stats.hot.evictions += len(rising)
            self._note("evict", sinking, Tier.HOT)

    def _waste_early(self, slots: Slots) -> None:
        """Count prefetched blocks that leave hot without having been looked up."""
        if self._early:
            wasted = int(self._hot.early[slots].sum())
            self._hot.early[slots] = False
            self._early -= wasted
            self.stats.prefetch.wasted += wasted

    def _remove(self, ids: Ids) -> None:
        """Forget distinct blocks that are not pinned."""
        residency, hot, warm = self._residency, self._hot, self._warm
        locations = residency.cold[ids]
        if self._disk is not None:
            self._disk.delete(locations[locations >= 0])
            self._unsaved -= int((locations < 0).sum())
        self._live -= len(ids)
        residency.cold[ids] = -1
        high = residency.hot[ids]
        high = high[high >= 0].astype(np.int64)
        residency.hot[ids] = -1
        self._waste_early(high)
        hot.policy.release(high)
        hot.give_back(high)
        in_warm = residency.warm[ids] >= 0
        low = residency.warm[ids[in_warm]].astype(np.int64)
        residency.warm[ids] = -1
        warm.policy.release(low[~warm.spare[low]])
        # A slot that a worker reads stays taken, and its id unused, until the write is absorbed.
        written = warm.pinned[low]
        condemned = low[written]
        self._condemned += len(condemned)
        warm.block[condemned] = -1
        warm.spare[condemned] = False
        warm.sole[condemned] = False
        warm.give_back(low[~written])
        in_warm[in_warm] = written
        residency.recycle(ids[~in_warm])

    # Writing behind.

    def _await_room(self, n: int) -> int:
        """Wait until some of n new blocks may be unsaved; returns how many."""
        # Not for a single slot at a time: a quarter of warm at least, or all that was asked for.
        enough = min(n, max(1, self._warm.slots // 4))
        while self._warm.slots - self._unsaved - self._condemned < enough:
            self.stats.write_waits += 1
            self._write_behind(0)
            self._await_write()
        return min(n, self._warm.slots - self._unsaved - self._condemned)

    def _write_behind(self, quiet: int) -> None:
        """Give workers batches until at most `quiet` unsaved blocks are left out.

        Never more batches at a time than two for each worker.
        """
        waiting = self._unsaved - sum(len(job.ids) for job in self._writes)
        while waiting > quiet and len(self._writes) < 2 * self.config.workers:
            ids, slots = self._next_batch()
            if not len(ids):
                return
            assert self._disk is not None
            job = WriteJob(self._disk, self._warm_slab, self._write_buffers, ids, slots)
            self._warm.pin(slots)
            self._writes.append(job)
            self._writers.submit(job)
            waiting -= len(ids)

    def _next_batch(self) -> tuple[Ids, Slots]:
        """The next blocks to write, those put first, with their slots in warm."""
        residency, warm = self._residency, self._warm
        parts: list[Ids] = []
        lacking = self._batch
        while self._queue and lacking:
            ids = self._queue.popleft()
            low = residency.warm[ids]
            waiting = (residency.cold[ids] < 0) & ((residency.hot[ids] >= 0) | (low >= 0))
            ids = ids[waiting & ~((low >= 0) & warm.pinned[low])]
            if len(ids) > lacking:
                self._queue.appendleft(ids[lacking:])
            parts.append(ids[:lacking])
            lacking -= len(parts[-1])
        # An id that was deleted and given out again may be in the queue twice.
        ids = np.unique(np.concatenate([_NONE, *parts]))
        high = ids[residency.warm[ids] < 0]
        if len(high):
            # Workers read from warm only; the copy there is spare.
            self._lower(high, residency.hot[high].astype(np.int64))
            slots = residency.warm[high]
            warm.spare[slots[slots >= 0]] = True
            late = high[slots < 0]
            if len(late):
                self._queue.appendleft(late)
                ids = np.setdiff1d(ids, late)
        return ids, residency.warm[ids].astype(np.int64)

    def _await_write(self) -> None:
        """Wait for the oldest write; raises if it failed."""
        if self._writes:
            self._writers.wait(self._writes[0])
        self._absorb()
        self._raise_failure()

    def _absorb(self) -> None:
        """Let the tables say what the background has done."""
        for write in [job for job in self._writes if job.done]:
            self._absorb_write(write)
        for read in [job for job in self._reads if job.done]:
            self._absorb_read(read)

    def _absorb_write(self, job: WriteJob) -> None:
        residency, warm = self._residency, self._warm
        kept = warm.block[job.slots] == job.ids
        ids, slots = job.ids[kept], job.slots[kept]
        orphans = _NONE
        if job.error is None:
            residency.cold[ids] = job.locations[kept]
            warm.sole[slots] = False
            self._unsaved -= len(ids)
            orphans = job.locations[~kept]
            nbytes = len(job.ids) * self.spec.nbytes
            self.stats.writes_behind += len(job.ids)
            self.stats.warm.demotions += len(job.ids)
            self.stats.warm.bytes_out += nbytes
            self.stats.cold.bytes_in += nbytes
        else:
            self._queue.appendleft(ids)
            self._stalled = True
            self._failure = self._failure or _as_failure(job.error)
        self._writes.remove(job)
        self._writers.forget(job)
        warm.unpin(job.slots)
        warm.give_back(job.slots[~kept])
        self._condemned -= len(job.ids) - len(ids)
        residency.recycle(job.ids[~kept])
        if len(orphans) and self._disk is not None:
            self._disk.delete(orphans)

    # Reading ahead.

    def _read_ahead(self, buffer: Buffer, ids: Ids) -> None:
        assert self._disk is not None
        job = ReadJob(self._disk, buffer, ids, self._residency.cold[ids])
        self._residency.reading[ids] = True
        self._reads.append(job)
        self._readers.submit(job)
        self.stats.prefetch.issued += len(ids)

    def _await_reads(self, ids: Ids) -> None:
        """Wait for those of these blocks that are being read ahead, and take them in."""
        while self._reads and self._residency.reading[ids].any():
            self._readers.wait(self._reads[0])
            self._absorb()

    def _absorb_read(self, job: ReadJob) -> None:
        """Place what was read ahead in hot, as far as there is room."""
        residency = self._residency
        wanted = residency.tiers(job.ids) == Tier.COLD
        if job.error is not None:
            # A guess that could not be read hurts nobody; a fetch of the block will say why.
            wanted[:] = False
        places = np.flatnonzero(wanted)[: self._hot_room(0)]
        ids = job.ids[places]
        if len(ids):
            slots, stuck = self._make_hot_room(len(ids))
            assert not len(stuck), "there is room in warm for every unsaved block"
            # The wanted rows come first in the buffer, in place: a copy would have to outlive this.
            rows = job.buffer.rows(len(job.ids))
            if len(ids) < len(job.ids):
                for row in rows:
                    row[: len(ids)] = row[places]
            job.buffer.lend(self._hot_slab.scatter(slots, [row[: len(ids)] for row in rows]))
            self._settle(ids, slots)
            self._hot.early[slots] = True
            self._early += len(ids)
            self.stats.hot.promotions += len(ids)
            self.stats.cold.bytes_out += len(ids) * self.spec.nbytes
        self.stats.prefetch.wasted += len(job.ids) - len(ids)
        residency.reading[job.ids] = False
        self._reads.remove(job)
        self._readers.forget(job)
        self._idle_buffers.append(job.buffer)


KEEP_DROPPED = True


def _as_ids(ids: Any) -> Ids:
    given = np.asarray(ids)
    if given.dtype.kind not in "iu" and given.size:
        raise TypeError(f"block ids are integers, not {given.dtype}")
    return given.astype(np.int64, copy=False)


def _distinct(ids: Ids) -> Ids:
    """ids [n] without repeats, in order of first appearance."""
    _, first = np.unique(ids, return_index=True)
    first.sort()
    return ids[first]


def _as_failure(error: BaseException) -> KVStoreError:
    if isinstance(error, KVStoreError):
        return error
    failure = WriteFailedError(f"blocks could not be written to disk: {error}")
    failure.__cause__ = error
    return failure


def _close_in(pid: int, stack: ExitStack) -> None:
    """Close what a store had open, but only in its own process: a fork has a copy of this."""
    if os.getpid() == pid:
        stack.close()

"""Writing behind: unsaved blocks go to disk before warm needs their slots. Owns what waits for it.

Chooses when to write and what first; the tables are changed by the mover, the bytes by workers.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from kvstore.config import StoreConfig
from kvstore.errors import KVStoreError, StoreFullError, WriteFailedError
from kvstore.jobs import Committer, Crew, WriteJob
from kvstore.mover import Mover
from kvstore.residency import Ids
from kvstore.stats import StoreStats
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.slots import Slots

_NONE = np.empty(0, np.int64)

# What a worker compresses at a time: a transaction of as much commits as fast as any.
_BATCH_BYTES = 2 * 1024 * 1024
_BATCH_BLOCKS = 256


class Writer:
    """Writes the blocks of a store in the order in which they were put.

    A kept store writes as soon as there is a batch, a temporary one once half of warm is unsaved:
    what is deleted before never costs a write. Four batches for each worker, and
    one more, are under way at most.

    failure: what went wrong and was not raised yet. After it nothing is begun unasked.

    For a store that is only read it writes nothing: what is put stays in memory, while there is
    room.
    """

    def __init__(
        self,
        mover: Mover,
        disk: DiskTier,
        config: StoreConfig,
        crew: Crew,
        committer: Committer,
        stats: StoreStats,
    ) -> None:
        self._read_only = config.read_only
        self._mover = mover
        self._disk = disk
        self._crew = crew
        self._committer = committer
        self._stats = stats
        spec, slots = mover.spec, mover.warm.slots
        share = config.staging // 4 // (config.workers + 1)
        self._batch = max(
            1, min(_BATCH_BLOCKS, min(_BATCH_BYTES, share) // spec.nbytes, slots // 4)
        )
        # What is compressed, what waits until it fills a transaction, and what is committed
        # meanwhile: with fewer, one stands still for the other.
        self._most_jobs = 4 * config.workers + 1
        self._quiet = slots // 2 if config.directory is None else self._batch - 1
        # Some of these may have been saved or deleted since, or are being written.
        self._queue: deque[Ids] = deque()
        self._jobs: list[WriteJob] = []
        self._stopped = False
        self.failure: KVStoreError | None = None

    @property
    def busy(self) -> bool:
        """Whether a batch is being written, or is done and not absorbed."""
        return bool(self._jobs)

    def writing(self) -> list[tuple[Ids, Slots]]:
        """The ids and warm slots of each batch under way."""
        return [(job.ids, job.slots) for job in self._jobs]

    def waiting(self) -> Ids:
        """Ids in line to be written, and perhaps some that need no writing any more."""
        return np.concatenate([_NONE, *self._queue])

    def room(self) -> int:
        """How many more blocks may be unsaved."""
        return self._mover.warm.slots - self._mover.unsaved - self._removed()

    def await_room(self, n: int) -> int:
        """Wait until some of n new blocks may be unsaved; returns how many.

        Raises what went wrong in writing, if that is why there is no room.
        """
        # Not for one slot at a time: a quarter of warm, or all that was asked for.
        enough = min(n, max(1, self._mover.warm.slots // 4))
        while self.room() < enough:
            if self._read_only:
                if self.room():
                    break
                raise StoreFullError(
                    f"warm is full: {self._mover.unsaved} new blocks are in memory, and a store "
                    "that is only read writes none to disk; give warm more"
                )
            self._stats.write_waits += 1
            self._begin(0)
            self._await_one()
        return min(n, self.room())

    def enqueue(self, ids: Ids) -> None:
        """Take new blocks into the line."""
        self._queue.append(ids)

    def run(self) -> None:
        """Begin what is due."""
        if not self._stopped and not self._read_only:
            self._begin(self._quiet)

    def resume(self) -> None:
        """Begin again unasked after a failure: something was deleted."""
        self._stopped = False

    def flush(self) -> None:
        """Write everything and wait; raises what goes wrong."""
        if self._read_only:
            return
        # Also for batches of blocks that were deleted meanwhile: what they write must go again.
        while self._mover.unsaved or self._jobs:
            self._begin(0)
            self._await_one()

    def absorb(self) -> None:
        """Let the tables say what workers have done."""
        for job in [job for job in self._jobs if job.done]:
            self._absorb_job(job)
        self._mover.sweep()

    def raise_failure(self) -> None:
        """Raise what went wrong, if anything did: once, whatever else is under way."""
        if self.failure is not None:
            for job in self._jobs:
                job.wait()
            self.absorb()
            failure, self.failure = self.failure, None
            raise failure

    def rebuild(self) -> None:
        """Line up everything unsaved, and make sure of the batches, after a move was cut short."""
        residency = self._mover.residency
        present = residency.present()
        self._queue = deque([present[residency.cold[present] < 0]])
        for job in self._jobs:
            self._crew.submit(job)

    def _removed(self) -> int:
        """Warm slots whose blocks were deleted while they were being written."""
        block = self._mover.warm.block
        return sum(int(np.count_nonzero(block[job.slots] < 0)) for job in self._jobs)

    def _begin(self, quiet: int) -> None:
        """Begin batches until at most `quiet` unsaved blocks are left out, or workers are busy."""
        left_out = self._mover.unsaved - sum(len(job.ids) for job in self._jobs)
        while left_out > quiet and len(self._jobs) < self._most_jobs:
            ids, slots = self._next_batch()
            if not len(ids):
                return
            job = WriteJob(self._disk, self._mover.warm_slab, self._committer, ids, slots)
            self._mover.warm.pin(slots)
            self._jobs.append(job)
            self._crew.submit(job)
            left_out -= len(ids)

    def _next_batch(self) -> tuple[Ids, Slots]:
        """The next blocks to write and their slots in warm, from where alone workers read."""
        residency, warm = self._mover.residency, self._mover.warm
        parts: list[Ids] = []
        lacking = self._batch
        while self._queue and lacking:
            ids = self._queue.popleft()
            low = residency.warm[ids]
            unsaved = (residency.cold[ids] < 0) & ((low >= 0) | (residency.hot[ids] >= 0))
            ids = ids[unsaved & ~((low >= 0) & warm.pinned[low])]
            if len(ids) > lacking:
                self._queue.appendleft(ids[lacking:])
            parts.append(ids[:lacking])
            lacking -= len(parts[-1])
        ids = np.sort(np.concatenate([_NONE, *parts]))
        # An id that was deleted and given out again may have stood in line twice.
        ids = ids[np.diff(ids, prepend=-1) > 0]
        ready = self._mover.lower_copies(ids)
        if not ready.all():
            self._queue.appendleft(ids[~ready])
            ids = ids[ready]
        return ids, residency.warm[ids].astype(np.int64)

    def _await_one(self) -> None:
        assert self._jobs, "unsaved blocks that nobody writes"
        self._jobs[0].wait()
        self.absorb()
        self.raise_failure()

    def _absorb_job(self, job: WriteJob) -> None:
        warm = self._mover.warm
        kept = warm.block[job.slots] == job.ids
        ids, slots = job.ids[kept], job.slots[kept]
        if job.error is None:
            self._mover.save(ids, slots, job.locations[kept])
            self._mover.abandon(job.locations[~kept])
            nbytes = len(job.ids) * self._mover.spec.nbytes
            self._stats.writes_behind += len(job.ids)
            self._stats.warm.demotions += len(job.ids)
            self._stats.warm.bytes_out += nbytes
            self._stats.cold.bytes_in += nbytes
        else:
            self._queue.appendleft(ids)
            self._stopped = True
            self.failure = self.failure or _as_failure(job.error)
        self._jobs.remove(job)
        warm.unpin(job.slots)
        self._mover.release(job.ids[~kept], job.slots[~kept])


def _as_failure(error: BaseException) -> KVStoreError:
    if isinstance(error, KVStoreError):
        return error
    failure = WriteFailedError(f"blocks could not be written to disk: {error}")
    failure.__cause__ = error
    return failure

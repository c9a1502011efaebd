"""Reading ahead: blocks come up from disk before they are asked for. Owns what is on its way.

Never waits and never fails for want of anything: a prefetch is a guess, and a guess that finds no
buffer or no room is left where it is.
"""

from __future__ import annotations

from kvstore.config import StoreConfig
from kvstore.jobs import Crew, ReadJob
from kvstore.mover import Mover
from kvstore.residency import Ids
from kvstore.stats import StoreStats
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.slots import Buffer

_BUFFERS = 2


class Prefetch:
    """Reads blocks into a few buffers in the background and places them in hot."""

    def __init__(
        self, mover: Mover, disk: DiskTier, config: StoreConfig, crew: Crew, stats: StoreStats
    ) -> None:
        self._mover = mover
        self._disk = disk
        self._crew = crew
        self._stats = stats
        blocks = max(1, config.staging // 4 // _BUFFERS // mover.spec.nbytes)
        pinned = mover.hot_slab.planes[0].is_cuda
        self._buffers = [Buffer(mover.spec, blocks, pinned) for _ in range(_BUFFERS)]
        self._idle = list(self._buffers)
        self._jobs: list[ReadJob] = []

    @property
    def busy(self) -> bool:
        """Whether a batch is being read, or is done and not absorbed."""
        return bool(self._jobs)

    def reading(self) -> list[Ids]:
        """The ids of each batch under way."""
        return [job.ids for job in self._jobs]

    def begin(self, ids: Ids) -> None:
        """Start reading distinct blocks that lie on disk only, as far as there are buffers."""
        reading = self._mover.residency.reading
        ids = ids[~reading[ids]]
        while len(ids) and self._idle:
            buffer = self._idle.pop()
            part, ids = ids[: buffer.blocks], ids[buffer.blocks :]
            job = ReadJob(self._disk, buffer, part, self._mover.residency.cold[part])
            self._jobs.append(job)
            reading[part] = True
            self._crew.submit(job)
            self._stats.prefetch.issued += len(part)

    def await_blocks(self, ids: Ids) -> bool:
        """Wait for those of these blocks that are on their way, and take them in: if there are."""
        waited = False
        while self._jobs and self._mover.residency.reading[ids].any():
            self._jobs[0].wait()
            self.absorb()
            waited = True
        return waited

    def absorb(self) -> None:
        """Place what has been read in hot, as far as there is room beside what is pinned."""
        for job in [job for job in self._jobs if job.done]:
            self._absorb_job(job)

    def _absorb_job(self, job: ReadJob) -> None:
        # They lie on disk only still: whoever wants one meanwhile waits for it. A block that cannot
        # be read is of no interest unless somebody asks for it, and then reading it says why.
        ids = job.ids[: self._mover.room() if job.error is None else 0]
        self._stats.prefetch.wasted += len(job.ids) - len(ids)
        self._jobs.remove(job)
        try:
            if len(ids):
                slots = self._mover.land(ids, job.buffer.rows(len(ids)), job.buffer)
                self._mover.mark_early(slots)
        finally:
            self._mover.residency.reading[job.ids] = False
            self._idle.append(job.buffer)

    def rebuild(self) -> None:
        """Make sure of the batches under way after a move was cut short."""
        reading = self._mover.residency.reading
        reading[:] = False
        self._idle = list(self._buffers)
        for job in self._jobs:
            reading[job.ids] = True
            self._idle.remove(job.buffer)
            self._crew.submit(job)

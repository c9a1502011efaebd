"""Work behind the owner's back: threads, and the two jobs they do. Never touches a table.

The owner of a store submits a job, goes on, and absorbs it once it is done. A job fails by keeping
its error, never by raising in its thread.
"""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import StoreFullError
from kvstore.residency import Ids
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.pack import Packs, chain_packs
from kvstore.tiers.slots import Buffer, Slots, SlotTier

# So much goes into one transaction, and a job more at most: LMDB has a copy of it until the end.
_COMMITTED_BYTES = 2 * 1024 * 1024


class Job:
    """Something to be done once, however often it is submitted.

    error: why it could not be done. Neither that nor a result is read before it is `done`.
    """

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self._claim = threading.Lock()
        self._finished = threading.Event()

    @property
    def done(self) -> bool:
        """Whether it has been done, or has failed."""
        return self._finished.is_set()

    def wait(self) -> None:
        """Block until it is done; it must have been submitted."""
        self._finished.wait()

    def run(self) -> None:
        """Do it, if nobody has begun."""
        if not self._claim.acquire(blocking=False):
            return
        try:
            goes_on = self._do()
        except BaseException as error:  # whatever it is, the owner has to hear of it
            self.end(error)
        else:
            if not goes_on:
                self.end()

    def end(self, error: BaseException | None = None) -> None:
        """Let the owner know that it is done, or why it could not be."""
        self.error = error
        self._finished.set()

    def _do(self) -> bool:
        """Do it, or what this thread does of it; returns whether another one goes on."""
        raise NotImplementedError


class WriteJob(Job):
    """Copy blocks from warm to disk, all or none.

    They are compressed on the thread that runs the job, and committed by the committer: while it
    waits for the disk the next ones are compressed.

    ids, slots: int64 [n]; the owner keeps the slots pinned meanwhile. packs: the blocks compressed.
    locations: int64 [n], the result.
    """

    def __init__(
        self, disk: DiskTier, warm: SlotTier, committer: Committer, ids: Ids, slots: Slots
    ) -> None:
        super().__init__()
        self.ids = ids
        self.slots = slots
        self.packs = Packs([], [])
        self.locations: NDArray[np.int64] = np.empty(0, np.int64)
        self._disk = disk
        self._warm = warm
        self._committer = committer

    def _do(self) -> bool:
        assert self._warm.rows is not None, "warm is host memory"
        self._committer.expect()
        try:
            self.packs = self._disk.encode(self.ids, self._warm.rows, self.slots)
        except BaseException:
            self._committer.miss()
            raise
        self._committer.submit(self)
        return True


class ReadJob(Job):
    """Read blocks from disk into a buffer that the owner lends until it has absorbed the job.

    ids, locations: int64 [n].
    """

    def __init__(
        self, disk: DiskTier, buffer: Buffer, ids: Ids, locations: NDArray[np.int64]
    ) -> None:
        super().__init__()
        self.ids = ids
        self.buffer = buffer
        self._disk = disk
        self._locations = locations

    def _do(self) -> bool:
        self._disk.read(self.ids, self._locations, self.buffer.rows(len(self.ids)))
        return False


class Crew:
    """A fixed number of threads, which start when there is something to do."""

    def __init__(self, name: str, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)

    def submit(self, job: Job) -> None:
        """Run a job on the next idle thread."""
        self._pool.submit(job.run)

    def close(self) -> None:
        """Let what runs end, drop what has not begun."""
        self._pool.shutdown(wait=True, cancel_futures=True)


class Committer:
    """Commits what was compressed on a thread of its own, what waits in one transaction.

    It lets jobs wait while others are still being compressed, until they fill a transaction: each
    has a price, which is the higher the slower a disk is to say that something is on it.
    """

    def __init__(self, disk: DiskTier) -> None:
        self._disk = disk
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="kvstore-commit")
        self._waiting: deque[WriteJob] = deque()
        self._expected = 0
        self._counting = threading.Lock()

    def expect(self) -> None:
        """Hear that a job will be submitted, or missed."""
        with self._counting:
            self._expected += 1

    def miss(self) -> None:
        """Hear that an expected job will not come."""
        with self._counting:
            self._expected -= 1
        self._pool.submit(self._commit_waiting)

    def submit(self, job: WriteJob) -> None:
        """Commit an expected job's blocks soon; the job ends then."""
        with self._counting:
            self._expected -= 1
            self._waiting.append(job)
        try:
            self._pool.submit(self._commit_waiting)
        except BaseException:
            # No thread could be started. What ends by this error must not be written later.
            with suppress(ValueError):
                self._waiting.remove(job)
                raise

    def close(self) -> None:
        """Let what has begun end, drop what has not."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _commit_waiting(self) -> None:
        while jobs := self._due():
            self._commit(jobs)

    def _due(self) -> list[WriteJob]:
        """Take what is to be committed now, if anything is."""
        jobs: list[WriteJob] = []
        with self._counting:
            nbytes = sum(job.packs.nbytes for job in self._waiting)
            if not self._expected or nbytes >= _COMMITTED_BYTES:
                while self._waiting and sum(job.packs.nbytes for job in jobs) < _COMMITTED_BYTES:
                    jobs.append(self._waiting.popleft())
        return jobs

    def _commit(self, jobs: list[WriteJob]) -> None:
        try:
            ids = np.concatenate([job.ids for job in jobs])
            locations = self._disk.write_packs(ids, chain_packs([job.packs for job in jobs]))
            parts = np.split(locations, np.cumsum([len(job.ids) for job in jobs])[:-1])
            for job, part in zip(jobs, parts, strict=True):
                job.locations = part
        except StoreFullError as error:
            if len(jobs) == 1:
                jobs[0].end(error)
                return
            for job in jobs:  # there may be room for some of them
                self._commit([job])
        except BaseException as error:  # whatever it is, the owner has to hear of it
            for job in jobs:
                job.end(error)
        else:
            for job in jobs:
                job.packs = Packs([], [])
                job.end()

"""Work behind the owner's back: threads, and the two jobs they do. Never touches a table.

The owner of a store submits a job, goes on, and absorbs it once it is done. A job fails by keeping
its error, never by raising in its thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from kvstore.residency import Ids
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.slots import Buffer, Slots, SlotTier


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
        if self._claim.acquire(blocking=False):
            self._attempt(self._do)

    def _attempt(self, part: Callable[[], bool]) -> None:
        """Do a part of it, which says whether another thread goes on with it."""
        goes_on = False
        try:
            goes_on = part()
        except BaseException as error:  # whatever it is, the owner has to hear of it
            self.error = error
        finally:
            if not goes_on:
                self._finished.set()

    def _do(self) -> bool:
        raise NotImplementedError


class WriteJob(Job):
    """Copy blocks from warm to disk, in one transaction.

    They are compressed on the thread that runs the job, and committed by the committer: while it
    waits for the disk the next ones are compressed.

    ids, slots: int64 [n]; the owner keeps the slots pinned meanwhile.
    locations: int64 [n], the result.
    """

    def __init__(
        self,
        disk: DiskTier,
        warm: SlotTier,
        committer: Crew,
        ids: Ids,
        slots: Slots,
    ) -> None:
        super().__init__()
        self.ids = ids
        self.slots = slots
        self.locations: NDArray[np.int64] = np.empty(0, np.int64)
        self._disk = disk
        self._warm = warm
        self._committer = committer
        self._frames: list[bytes] = []

    def _do(self) -> bool:
        assert self._warm.rows is not None, "warm is host memory"
        self._frames = self._disk.encode(self.ids, self._warm.rows, self.slots)
        self._committer.call(lambda: self._attempt(self._commit))
        return True

    def _commit(self) -> bool:
        frames, self._frames = self._frames, []
        self.locations = self._disk.write_frames(self.ids, frames)
        return False


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

    def call(self, work: Callable[[], None]) -> None:
        """Run what never raises on the next idle thread."""
        self._pool.submit(work)

    def close(self) -> None:
        """Let what runs end, drop what has not begun."""
        self._pool.shutdown(wait=True, cancel_futures=True)

"""Work behind the owner's back: threads, and the two jobs they do. Never touches a table.

The owner of a store submits a job, goes on, and absorbs it once it is done. A job fails by keeping
its error, never by raising in its thread.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvstore.residency import Ids
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.slots import Buffer, Slots, SlotTier


@dataclass(eq=False)
class WriteJob:
    """Copy blocks from warm to disk.

    ids, slots: int64 [n]; the owner keeps the slots pinned meanwhile. buffers: one for each thread.
    locations: int64 [n], when it is done without an error.
    """

    disk: DiskTier
    warm: SlotTier
    buffers: SimpleQueue[Buffer]
    ids: Ids
    slots: Slots
    locations: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    error: BaseException | None = None
    done: bool = False

    def run(self) -> None:
        buffer = self.buffers.get()
        try:
            rows = buffer.rows(len(self.ids))
            self.warm.gather(self.slots, rows)
            self.locations = self.disk.write(self.ids, rows)
        except BaseException as error:  # whatever it is, the owner has to hear of it
            self.error = error
        finally:
            self.buffers.put(buffer)
            self.done = True


@dataclass(eq=False)
class ReadJob:
    """Read blocks from disk into a buffer that the owner lends until it has absorbed the job."""

    disk: DiskTier
    buffer: Buffer
    ids: Ids
    locations: NDArray[np.int64]
    error: BaseException | None = None
    done: bool = False

    def run(self) -> None:
        try:
            self.disk.read(self.ids, self.locations, self.buffer.rows(len(self.ids)))
        except BaseException as error:  # whatever it is, the owner has to hear of it
            self.error = error
        finally:
            self.done = True


class Job(Protocol):
    """What threads run. `done` turns true last, when `run` has nothing more to say."""

    done: bool

    def run(self) -> None: ...


class Crew:
    """A fixed number of threads, which start when there is something to do."""

    def __init__(self, name: str, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._futures: dict[Job, Future[None]] = {}

    def submit(self, job: Job) -> None:
        """Run a job on the next idle thread."""
        self._futures[job] = self._pool.submit(job.run)

    def wait(self, job: Job) -> None:
        """Block until this job is done."""
        self._futures[job].result()

    def forget(self, job: Job) -> None:
        """Drop a job that is done and absorbed."""
        self._futures.pop(job, None)

    def close(self) -> None:
        """Let what runs end, drop what has not begun."""
        self._pool.shutdown(wait=True, cancel_futures=True)

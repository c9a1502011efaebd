"""The one thread that builds an index's segments, in the order in which they were asked for.

Owns the thread. Never decides what is built or when it is used.
"""

from __future__ import annotations

import threading
import weakref
from queue import SimpleQueue

from kvstore.index.segment import Segment


class Builder:
    """Builds segments in the background, for an index and all its forks.

    The thread starts with the first segment and ends when the last holder has released it, when
    nobody refers to the builder any more, or when Python exits.
    """

    def __init__(self) -> None:
        self._holders = 1
        self._queue: SimpleQueue[weakref.ref[Segment] | None] = SimpleQueue()
        self._called_off = threading.Event()
        self._failed: list[Segment] = []
        self._end: weakref.finalize[..., Builder] | None = None

    def submit(self, segment: Segment) -> None:
        """Have a segment built; dropped unbuilt if nobody refers to it by then."""
        if self._end is None:
            thread = threading.Thread(
                target=_build_all,
                args=(self._queue, self._called_off, self._failed),
                name="kvstore-index",
                daemon=True,
            )
            thread.start()
            # Also at exit: a daemon thread that is inside C++ when Python goes away aborts.
            self._end = weakref.finalize(self, _end, self._queue, self._called_off, thread)
        self._queue.put(weakref.ref(segment))

    def raise_failure(self) -> None:
        """Raise KVStoreError, once, if a segment failed since the last call."""
        while self._failed:
            self._failed.pop().raise_error()

    def retain(self) -> Builder:
        """Count one more holder."""
        self._holders += 1
        return self

    def release(self) -> None:
        """Count one holder less; the last one ends the thread and waits for it."""
        self._holders -= 1
        if not self._holders and self._end is not None:
            self._end()


def _build_all(
    queue: SimpleQueue[weakref.ref[Segment] | None],
    called_off: threading.Event,
    failed: list[Segment],
) -> None:
    while (reference := queue.get()) is not None:
        segment = reference()
        if segment is None:
            continue
        segment.build(called_off)
        if segment.error is not None and not called_off.is_set():
            failed.append(segment)
        del segment


def _end(
    queue: SimpleQueue[weakref.ref[Segment] | None],
    called_off: threading.Event,
    thread: threading.Thread,
) -> None:
    called_off.set()
    queue.put(None)
    if thread is not threading.current_thread():
        thread.join()

"""The most anonymous memory a process took while something ran.

Anonymous, because LMDB maps its file: those pages count as resident although the kernel may drop
them at any moment, so the resident size would rise with the file and say nothing of the budgets.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

_STATUS = Path("/proc/self/status")


def anonymous_bytes() -> int:
    """Return the process's anonymous resident bytes: RssAnon on Linux, the unique set elsewhere."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    import psutil

    return int(psutil.Process().memory_full_info().uss)


class PeakMemory:
    """Samples the process's memory in a thread between enter and exit; peak_bytes is the most seen.

    What lives shorter than `seconds` may be missed.
    """

    def __init__(self, seconds: float = 0.05, measure: Callable[[], int] = anonymous_bytes) -> None:
        self.peak_bytes = 0
        self._seconds = seconds
        self._measure = measure
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    def sample(self) -> None:
        """Measure now."""
        self.peak_bytes = max(self.peak_bytes, self._measure())

    def __enter__(self) -> PeakMemory:
        self.sample()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.sample()

    def _watch(self) -> None:
        while not self._stop.wait(self._seconds):
            self.sample()

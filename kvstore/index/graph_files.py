"""Graphs kept in files beside a store, so that a context that is opened again need not build them.

Owns the files. They are a cache: named by what they were built from, verified before they are
loaded (a flipped bit in one can kill the process), built anew where that fails, and the least
recently used go where there are too many. Never knows what a graph is.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

import xxhash

MOST_BYTES = 2**30
_CHUNK = 2**22

# Two contexts may build the same graph, each on a thread of its own; of processes only one writes.
_changing = threading.Lock()


class GraphFiles:
    """The files in one directory, made when there is something to keep.

    writable: whether new ones are kept. Used by any thread; failures of the disk are as if a file
    were not there.
    """

    def __init__(self, directory: Path, *, writable: bool = True, most: int = MOST_BYTES) -> None:
        self._directory = directory
        self._writable = writable
        self._most = most

    def find(self, key: str) -> Path | None:
        """Return the file of this key if there is one, and it is what was written."""
        path = self._directory / f"{key}.hnsw"
        with contextlib.suppress(OSError):
            if path.with_suffix(".sum").read_bytes() == _digest(path):
                if self._writable:
                    os.utime(path)
                return path
        return None

    def damaged(self) -> list[Path]:
        """Return the files that are not what was written."""
        with _changing:
            found = sorted(self._directory.glob("*.hnsw"))
            # One that has gone meanwhile had to make room for another process's.
            return [path for path in found if self.find(path.stem) is None and path.exists()]

    def remove(self, path: Path) -> None:
        """Remove a file; what it held is built anew when it is needed."""
        path.unlink(missing_ok=True)
        path.with_suffix(".sum").unlink(missing_ok=True)

    def keep(self, key: str, save: Callable[[str], None]) -> None:
        """Keep a graph. save: writes it to a path."""
        if not self._writable:
            return
        path = self._directory / f"{key}.hnsw"
        partial, total = path.with_suffix(".partial"), path.with_suffix(".total")
        with _changing:
            try:
                self._directory.mkdir(mode=0o700, exist_ok=True)
                for each in (partial, total):
                    os.close(os.open(each, os.O_WRONLY | os.O_CREAT, 0o600))
                save(str(partial))
                total.write_bytes(_digest(partial))
                # First: a graph without its sum would be taken for a damaged one.
                total.replace(path.with_suffix(".sum"))
                partial.replace(path)
                self._make_room()
            except (OSError, RuntimeError):
                with contextlib.suppress(OSError):
                    partial.unlink(missing_ok=True)
                    total.unlink(missing_ok=True)

    def _make_room(self) -> None:
        for path in self._directory.iterdir():
            if path.suffix not in (".hnsw", ".sum"):
                path.unlink()  # left by a process that was killed
        found = [(path.stat(), path) for path in self._directory.glob("*.hnsw")]
        found.sort(key=lambda each: each[0].st_mtime_ns)
        total = sum(each.st_size for each, _ in found)
        for each, path in found[:-1]:
            if total <= self._most:
                return
            self.remove(path)
            total -= each.st_size


def _digest(path: Path) -> bytes:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest().encode()

"""The record of a store's accesses in a file: writing it and reading it back.

Owns the trace format, which docs/trace.md describes. Never decides what is an access, and never
changes what a store does.
"""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvstore.errors import KVStoreError, WriteFailedError

MAGIC = b"KVTRACE1"
CHUNK_MAGIC = b"KVTC"
# The start of the file: magic, bytes of the header. The start of a chunk: magic, bytes an id,
# and how many events, ids, tiers and weights it holds. A checksum ends both.
_FILE_START = struct.Struct("<8sI")
_CHUNK_START = struct.Struct("<4sIIIII")
_CHECKSUM = struct.Struct("<Q")
_EVENT = np.dtype([("time_ns", "<u8"), ("count", "<u4"), ("kind", "u1"), ("tier", "u1")])
_CHUNK_IDS = 65536
_CHUNK_EVENTS = 4096


class Kind(IntEnum):
    """What an event says. The numbers are the file's."""

    PUT = 0
    FETCH = 1
    PREFETCH = 2
    WEIGH = 3
    EVICT = 4
    DELETE = 5


class Tier(IntEnum):
    """Where a block lay. The numbers are the file's."""

    HOT = 0
    WARM = 1
    COLD = 2
    ABSENT = 3


@dataclass(frozen=True)
class Event:
    """One batch of accesses.

    time_ns: nanoseconds since the trace began; never less than the event's before.
    ids: int64 [n], the blocks in the order of the batch.
    tiers: uint8 [n], FETCH only: the Tier where each block lay when it was asked for.
    weights: float32 [n], WEIGH only: the share of attention that each block received.
    tier: EVICT only: the Tier that the blocks left.
    """

    time_ns: int
    kind: Kind
    ids: NDArray[np.int64]
    tiers: NDArray[np.uint8] | None = None
    weights: NDArray[np.float32] | None = None
    tier: Tier | None = None


def _is_trace(path: Path) -> bool:
    """Whether a file is a trace, or empty."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) in (b"", MAGIC)


class TraceWriter:
    """Writes a trace. For one thread.

    path: an existing trace is replaced. ValueError where it cannot be written, and where there is a
    file that is no trace.
    header: what a reader wants to know of the store, for example its tiers' slots; JSON values.

    Events are kept in memory and written in chunks; what was recorded since the last chunk is lost
    when the process dies. A chunk that cannot be written raises WriteFailedError, and after that
    nothing more is recorded.
    """

    def __init__(self, path: str | os.PathLike[str], header: Mapping[str, object]) -> None:
        text = json.dumps({"started": time.time(), **header}).encode()
        try:
            if Path(path).is_file() and not _is_trace(Path(path)):
                raise ValueError(f"{path} is there already and is no trace: give another name")
            self._file = Path(path).open("wb", buffering=0)  # noqa: SIM115 - open as long as this
        except OSError as error:
            raise ValueError(f"the trace {path} cannot be written: {error.strerror}") from error
        self._path = path
        self._started = time.monotonic_ns()
        self._pending = 0
        self._events: list[tuple[int, int, int, int]] = []
        self._ids: list[NDArray[np.int64]] = []
        self._tiers: list[NDArray[np.uint8]] = []
        self._weights: list[NDArray[np.float32]] = []
        self._write(_checked(_FILE_START.pack(MAGIC, len(text)) + text))

    def put(self, ids: NDArray[np.int64]) -> None:
        """Record that blocks were stored. ids: int64 [n], like all ids below."""
        self._record(Kind.PUT, ids)

    def fetch(self, ids: NDArray[np.int64], tiers: NDArray[np.uint8]) -> None:
        """Record lookups. tiers: uint8 [n], the Tier where each block lay."""
        if self._record(Kind.FETCH, ids):
            self._tiers.append(np.array(tiers, np.uint8))

    def prefetch(self, ids: NDArray[np.int64]) -> None:
        """Record that blocks were asked for early."""
        self._record(Kind.PREFETCH, ids)

    def weigh(self, ids: NDArray[np.int64], weights: NDArray[np.float32]) -> None:
        """Record gate weights. weights: float32 [n], each block's share of attention."""
        if self._record(Kind.WEIGH, ids):
            self._weights.append(np.array(weights, np.float32))

    def evict(self, ids: NDArray[np.int64], tier: Tier) -> None:
        """Record that blocks left a tier to make room, in this order."""
        self._record(Kind.EVICT, ids, tier)

    def delete(self, ids: NDArray[np.int64]) -> None:
        """Record that blocks were deleted from the store."""
        self._record(Kind.DELETE, ids)

    def flush(self) -> None:
        """Write what was recorded so far as a chunk."""
        if not self._events:
            return
        ids = np.concatenate(self._ids)
        narrow = np.min_scalar_type(int(ids.max(initial=0))).newbyteorder("<")
        tiers = np.concatenate(self._tiers) if self._tiers else np.empty(0, np.uint8)
        weights = np.concatenate(self._weights) if self._weights else np.empty(0, np.float32)
        counts = (len(self._events), len(ids), len(tiers), len(weights))
        chunk = (
            _CHUNK_START.pack(CHUNK_MAGIC, narrow.itemsize, *counts)
            + np.array(self._events, _EVENT).tobytes()
            + ids.astype(narrow).tobytes()
            + tiers.tobytes()
            + weights.astype("<f4").tobytes()
        )
        for recorded in (self._events, self._ids, self._tiers, self._weights):
            recorded.clear()
        self._pending = 0
        self._write(_checked(chunk))

    def close(self) -> None:
        """Write what is left and close the file. Closing again does nothing."""
        try:
            self.flush()
        finally:
            self._file.close()

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _record(self, kind: Kind, ids: NDArray[np.int64], tier: int = 0) -> bool:
        """Note an event; False where the file is closed and nothing is recorded any more."""
        if self._file.closed:
            return False
        if self._pending >= _CHUNK_IDS or len(self._events) >= _CHUNK_EVENTS:
            self.flush()
        # The ids are copied as they are and narrowed when a chunk is written: whoever is in the
        # middle of a fetch pays for one small copy.
        self._ids.append(np.array(ids, np.int64))
        self._events.append((time.monotonic_ns() - self._started, len(ids), kind, tier))
        self._pending += len(ids)
        return True

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            self._file.close()
            raise WriteFailedError(
                f"the trace {self._path} could not be written: {error.strerror}"
            ) from error


def read_trace_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what a trace says of its store, with `started`, the wall clock in seconds since 1970.

    ValueError where the file is not a trace.
    """
    with Path(path).open("rb") as file:
        return _read_header(file, path)


def read_trace(path: str | os.PathLike[str]) -> Iterator[Event]:
    """Read a trace's events in order.

    A file that ends within a chunk, because its writer was killed or still runs, is read up to its
    last whole chunk. ValueError where the file is not a trace; KVStoreError where a chunk is not
    what was written.
    """
    with Path(path).open("rb") as file:
        _read_header(file, path)
        while True:
            at = file.tell()
            start = file.read(_CHUNK_START.size)
            if len(start) < _CHUNK_START.size:
                return
            magic, id_size, *counts = _CHUNK_START.unpack(start)
            if magic != CHUNK_MAGIC or id_size not in (1, 2, 4, 8):
                raise _damaged(path, at)
            widths = (_EVENT.itemsize, id_size, 1, 4)
            sizes = [n * width for n, width in zip(counts, widths, strict=True)]
            # Sizes are believed only as far as the file reaches.
            if os.fstat(file.fileno()).st_size - file.tell() < sum(sizes) + _CHECKSUM.size:
                return
            body = file.read(sum(sizes))
            if _checked(start + body)[-_CHECKSUM.size :] != file.read(_CHECKSUM.size):
                raise _damaged(path, at)
            yield from _events_of(body, sizes, id_size)


def _checked(data: bytes) -> bytes:
    return data + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(data))


def _read_header(file: BinaryIO, path: str | os.PathLike[str]) -> dict[str, Any]:
    start = file.read(_FILE_START.size)
    magic, size = _FILE_START.unpack(start.ljust(_FILE_START.size, b"\0"))
    if magic != MAGIC:
        raise ValueError(f"{path} is not a trace of this version: it does not start as one")
    text = file.read(min(size, os.fstat(file.fileno()).st_size))
    if _checked(start + text)[-_CHECKSUM.size :] != file.read(_CHECKSUM.size):
        raise ValueError(f"{path} is not a whole trace: its header is cut off or damaged")
    header: dict[str, Any] = json.loads(text)
    return header


def _damaged(path: str | os.PathLike[str], at: int) -> KVStoreError:
    return KVStoreError(f"the trace {path} is damaged in the chunk at byte {at}")


def _events_of(body: bytes, sizes: list[int], id_size: int) -> Iterator[Event]:
    ends = np.cumsum(sizes)
    events = np.frombuffer(body[: ends[0]], _EVENT)
    ids = np.frombuffer(body[ends[0] : ends[1]], f"<u{id_size}").astype(np.int64)
    tiers = np.frombuffer(body[ends[1] : ends[2]], np.uint8)
    weights = np.frombuffer(body[ends[2] :], "<f4").astype(np.float32)
    at = at_tier = at_weight = 0
    for time_ns, count, code, tier in events.tolist():
        kind = Kind(code)
        event = Event(time_ns, kind, ids[at : at + count])
        at += count
        if kind is Kind.FETCH:
            event = replace(event, tiers=tiers[at_tier : at_tier + count])
            at_tier += count
        elif kind is Kind.WEIGH:
            event = replace(event, weights=weights[at_weight : at_weight + count])
            at_weight += count
        elif kind is Kind.EVICT:
            event = replace(event, tier=Tier(tier))
        yield event

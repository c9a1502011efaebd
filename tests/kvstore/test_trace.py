"""Traces: what is recorded is read back, damage is noticed, and the bytes are those documented."""

from __future__ import annotations

import errno
import io
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

import kvstore.trace
from kvstore.errors import KVStoreError, WriteFailedError
from kvstore.trace import Event, Kind, Tier, TraceWriter, read_trace, read_trace_header

Plain = tuple[Kind, list[int], list[int] | None, list[float] | None, Tier | None]

_ids = st.lists(
    st.one_of(st.integers(0, 300), st.integers(0, 2**33), st.integers(0, 2**63 - 1)), max_size=20
)


@st.composite
def _an_event(draw: st.DrawFn) -> Plain:
    kind = draw(st.sampled_from(Kind))
    ids = draw(_ids)
    tiers = weights = tier = None
    if kind is Kind.FETCH:
        tiers = [int(draw(st.sampled_from(Tier))) for _ in ids]
    if kind is Kind.WEIGH:
        weights = [draw(st.floats(allow_nan=False, width=32)) for _ in ids]
    if kind is Kind.EVICT:
        tier = draw(st.sampled_from(Tier))
    return kind, ids, tiers, weights, tier


def _record(trace: TraceWriter, event: Plain) -> None:
    kind, ids, tiers, weights, tier = event
    array = np.array(ids, np.int64)
    if tiers is not None:
        trace.fetch(array, np.array(tiers, np.uint8))
    elif weights is not None:
        trace.weigh(array, np.array(weights, np.float32))
    elif tier is not None:
        trace.evict(array, tier)
    else:
        {Kind.PUT: trace.put, Kind.PREFETCH: trace.prefetch, Kind.DELETE: trace.delete}[kind](array)
    array[:] = -1  # the trace has its own copy


def _plain(event: Event) -> Plain:
    assert event.ids.dtype == np.int64
    assert event.tiers is None or event.tiers.dtype == np.uint8
    assert event.weights is None or event.weights.dtype == np.float32
    return (
        event.kind,
        event.ids.tolist(),
        None if event.tiers is None else event.tiers.tolist(),
        None if event.weights is None else event.weights.tolist(),
        event.tier,
    )


@settings(deadline=None)
@given(events=st.lists(st.one_of(_an_event(), st.just("flush")), max_size=15))
def test_what_is_recorded_is_read(
    events: list[Plain | str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("traces") / "t"
    with TraceWriter(path, {}) as trace:
        for event in events:
            if isinstance(event, str):
                trace.flush()
            else:
                _record(trace, event)
    read = list(read_trace(path))
    assert [_plain(event) for event in read] == [e for e in events if not isinstance(e, str)]
    times = [event.time_ns for event in read]
    assert times == sorted(times)


def _mixed_events(count: int) -> list[Plain]:
    """Events of every kind in turn, each with other ids, tiers and weights."""
    events: list[Plain] = []
    for n in range(count):
        kind = list(Kind)[n % len(Kind)]
        ids = [n, n + 1, n + 2]
        tiers = [n // 6 % 4, n // 24 % 4, 3] if kind is Kind.FETCH else None
        weights = [n / 2, 0.25, -0.0] if kind is Kind.WEIGH else None
        events.append((kind, ids, tiers, weights, Tier(n % 4) if kind is Kind.EVICT else None))
    return events


@pytest.mark.parametrize(("limit", "value"), [("_CHUNK_IDS", 60), ("_CHUNK_EVENTS", 20)])
def test_chunks_are_written_along_the_way(
    limit: str, value: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvstore.trace, limit, value)
    events = _mixed_events(110)
    trace = TraceWriter(tmp_path / "t", {})
    for event in events:
        _record(trace, event)
    assert [_plain(event) for event in read_trace(tmp_path / "t")] == events[:100]
    trace.close()
    assert [_plain(event) for event in read_trace(tmp_path / "t")] == events
    assert (tmp_path / "t").read_bytes().count(b"KVTC") == 6


def test_clock_and_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvstore.trace.time, "time", lambda: 12.5)
    clock = iter([100, 103, 110])
    monkeypatch.setattr(kvstore.trace.time, "monotonic_ns", lambda: next(clock))
    with TraceWriter(tmp_path / "t", {"hot_slots": 7, "policy": "lru"}) as trace:
        trace.put(np.array([1]))
        trace.put(np.array([2]))
    assert read_trace_header(tmp_path / "t") == {"started": 12.5, "hot_slots": 7, "policy": "lru"}
    assert [event.time_ns for event in read_trace(tmp_path / "t")] == [3, 10]


def _a_trace(path: Path) -> tuple[bytes, list[Plain], list[int]]:
    """Three chunks of three events; returns the bytes, the events, where header and chunks end."""
    events: list[Plain] = []
    ends = []
    with TraceWriter(path, {"a": 1}) as trace:
        ends.append(path.stat().st_size)
        for n in range(3):
            batch: list[Plain] = [
                (Kind.FETCH, [n, 700], [1, 3], None, None),
                (Kind.WEIGH, [n], None, [0.5], None),
                (Kind.EVICT, [n, n + 1], None, None, Tier.WARM),
            ]
            for event in batch:
                _record(trace, event)
            events += batch
            trace.flush()
            ends.append(path.stat().st_size)
    return path.read_bytes(), events, ends


def test_the_bytes_are_the_documented_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvstore.trace.time, "time", lambda: 0)
    monkeypatch.setattr(kvstore.trace.time, "monotonic_ns", lambda: 9)
    data, _, ends = _a_trace(tmp_path / "t")
    text = json.dumps({"started": 0, "a": 1}).encode()
    header = b"KVTRACE1" + struct.pack("<I", len(text)) + text
    assert data[: ends[0]] == header + struct.pack("<Q", xxhash.xxh3_64_intdigest(header))
    chunk = (
        b"KVTC"
        + struct.pack("<5I", 2, 3, 5, 2, 1)
        + struct.pack("<QIBB", 0, 2, 1, 0)
        + struct.pack("<QIBB", 0, 1, 3, 0)
        + struct.pack("<QIBB", 0, 2, 4, 1)
        + struct.pack("<5H", 1, 700, 1, 1, 2)
        + bytes([1, 3])
        + struct.pack("<f", 0.5)
    )
    assert data[ends[1] : ends[2]] == chunk + struct.pack("<Q", xxhash.xxh3_64_intdigest(chunk))


def test_a_cut_trace_is_read_up_to_its_last_whole_chunk(tmp_path: Path) -> None:
    data, events, ends = _a_trace(tmp_path / "t")
    (tmp_path / "t").rename(tmp_path / "cut")
    for size in range(len(data) - 1, -1, -1):
        os.truncate(tmp_path / "cut", size)
        if size < ends[0]:
            with pytest.raises(ValueError, match=r"cut is not a"):
                list(read_trace(tmp_path / "cut"))
        else:
            whole = sum(size >= end for end in ends[1:])
            read = [_plain(event) for event in read_trace(tmp_path / "cut")]
            assert read == events[: 3 * whole]


def test_no_flipped_bit_is_read_as_an_event(tmp_path: Path) -> None:
    """A flip raises, or makes a chunk longer than the file, which then ends before it."""
    data, events, ends = _a_trace(tmp_path / "t")
    raised = 0
    for at, byte in enumerate(data):
        with (tmp_path / "t").open("r+b") as file:
            file.seek(at)
            file.write(bytes([byte ^ 1 << at % 8]))
        named = ValueError if at < ends[0] else KVStoreError
        read = []
        try:
            for event in read_trace(tmp_path / "t"):
                read.append(_plain(event))
        except named:
            raised += 1
        assert read == events[: 3 * sum(at >= end for end in ends[1:])]
        with (tmp_path / "t").open("r+b") as file:
            file.seek(at)
            file.write(data[at : at + 1])
    assert raised > 0.7 * len(data)


def test_a_damaged_chunk_is_named(tmp_path: Path) -> None:
    data, _, ends = _a_trace(tmp_path / "t")
    damaged = bytearray(data)
    damaged[ends[2] - 9] ^= 1
    (tmp_path / "t").write_bytes(damaged)
    with pytest.raises(KVStoreError, match=f"t is damaged in the chunk at byte {ends[1]}$"):
        list(read_trace(tmp_path / "t"))


@pytest.mark.parametrize(("magic", "id_size"), [(b"KVTX", 2), (b"KVTC", 3), (b"KVTC", 0)])
def test_a_chunk_of_another_format_is_damage(magic: bytes, id_size: int, tmp_path: Path) -> None:
    """Also where its checksum is right."""
    TraceWriter(tmp_path / "t", {}).close()
    chunk = magic + struct.pack("<5I", id_size, 0, 0, 0, 0)
    with (tmp_path / "t").open("ab") as file:
        file.write(chunk + struct.pack("<Q", xxhash.xxh3_64_intdigest(chunk)))
    with pytest.raises(KVStoreError, match="damaged in the chunk"):
        list(read_trace(tmp_path / "t"))


def test_other_files_are_no_traces(tmp_path: Path) -> None:
    for data in (b"", b"hello", b"KVTRACE2" + bytes(100)):
        (tmp_path / "t").write_bytes(data)
        with pytest.raises(ValueError, match="t is not a trace of this version"):
            read_trace_header(tmp_path / "t")
        with pytest.raises(ValueError, match="t is not a trace of this version"):
            list(read_trace(tmp_path / "t"))


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing" / "t"):
        with pytest.raises(ValueError, match=r"^the trace .* cannot be written: [^\n]+$"):
            TraceWriter(path, {})


def test_an_older_trace_is_replaced(tmp_path: Path) -> None:
    _a_trace(tmp_path / "t")
    TraceWriter(tmp_path / "t", {}).close()
    assert list(read_trace(tmp_path / "t")) == []


def test_after_close_nothing_is_recorded(tmp_path: Path) -> None:
    trace = TraceWriter(tmp_path / "t", {})
    trace.put(np.array([1]))
    trace.close()
    trace.put(np.array([2]))
    trace.fetch(np.array([2]), np.zeros(1, np.uint8))
    trace.weigh(np.array([2]), np.zeros(1, np.float32))
    trace.flush()
    trace.close()
    assert [event.ids.tolist() for event in read_trace(tmp_path / "t")] == [[1]]


class _FullDisk(io.RawIOBase):
    """Takes so many bytes, a few at a time, and is full then."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.taken = b""

    def write(self, data: memoryview) -> int:  # type: ignore[override]
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        part = bytes(data[: min(7, self.room)])
        self.room -= len(part)
        self.taken += part
        return len(part)


def test_a_full_disk_is_told_once_and_leaves_a_readable_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, events, ends = _a_trace(tmp_path / "t")
    for room in range(ends[1] - ends[0], ends[2] - ends[0], 5):
        trace = TraceWriter(tmp_path / "t", {})
        header = (tmp_path / "t").read_bytes()
        trace._file.close()
        disk = _FullDisk(room)
        monkeypatch.setattr(trace, "_file", disk)
        for event in events[:3]:
            _record(trace, event)
        trace.flush()
        for event in events[3:6]:
            _record(trace, event)
        with pytest.raises(WriteFailedError, match="could not be written: No space left"):
            trace.flush()
        for event in events:
            _record(trace, event)
        trace.close()
        (tmp_path / "t").write_bytes(header + disk.taken)
        assert [_plain(event) for event in read_trace(tmp_path / "t")] == events[:3]

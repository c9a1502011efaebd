"""What is compiled: see kvstore/native/."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Arrays are C-contiguous and of exactly these dtypes, else TypeError; a place that an array does
# not have is an IndexError.

Bools = NDArray[np.bool_]
Bytes = NDArray[np.uint8]
Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]

# rows.cpp

def copy_rows(
    source: Bytes,  # [any, bytes]
    source_rows: Int64s | None,  # [n]; None: all, in order
    target: Bytes,  # [any, bytes]
    target_rows: Int64s | None,
) -> None: ...

# policies.cpp: kvstore.policy.Policy without `weigh`

class LRU:
    def __init__(self, slots: int) -> None: ...
    def admit(self, slots: Int64s) -> None: ...
    def touch(self, slots: Int64s) -> None: ...
    def release(self, slots: Int64s) -> None: ...
    def victims(self, count: int, pinned: Bools) -> Int64s: ...
    def peek(self, count: int, pinned: Bools) -> Int64s: ...

class SIEVE:
    def __init__(self, slots: int) -> None: ...
    def admit(self, slots: Int64s) -> None: ...
    def touch(self, slots: Int64s) -> None: ...
    def release(self, slots: Int64s) -> None: ...
    def victims(self, count: int, pinned: Bools) -> Int64s: ...
    def peek(self, count: int, pinned: Bools) -> Int64s: ...

# tables.cpp

def pin(slots: Int64s, pins: Int32s, pinned: Bools, count: Int64s) -> None: ...
def unpin(slots: Int64s, pins: Int32s, pinned: Bools, count: Int64s) -> None: ...
def pin_present(
    ids: Int64s, table: Int32s, pins: Int32s, pinned: Bools, count: Int64s, place: Int64s
) -> tuple[Int64s, Int64s] | None: ...  # slots [ids], distinct slots
def find_tiers(
    ids: Int64s, hot: Int32s, warm: Int32s, cold: Int64s, place: Int32s
) -> tuple[Int64s, Bytes, tuple[int, int, int, int]]: ...  # distinct ids, tiers, how many in each
def split(ids: Int64s, table: Int32s) -> tuple[Int64s, Int64s, Int64s]: ...
def arrive(ids: Int64s, slots: Int64s, block: Int64s, table: Int32s) -> None: ...
def leave(
    slots: Int64s, block: Int64s, table: Int32s, spare: Bools, sole: Bools
) -> Int64s: ...  # ids
def mark(slots: Int64s, mask: Bools, value: bool) -> None: ...
def any_marked(slots: Int64s, mask: Bools) -> bool: ...
def mark_sole(ids: Int64s, slots: Int64s, cold: Int64s, sole: Bools) -> None: ...
def sum_by_slot(
    slots: Int64s, weights: NDArray[np.float32], place: Int64s
) -> tuple[Int64s, NDArray[np.float32]]: ...  # distinct slots, their sums
def find_ids(
    streams: list[int], blocks: Int64s, counts: Int64s, runs: list[tuple[Int64s, Int64s]]
) -> Int64s | None: ...
def sort_victims(
    slots: Int64s, block: Int64s, warm: Int32s, cold: Int64s
) -> tuple[Int64s, tuple[Int64s, Int64s], tuple[Int64s, Int64s]]: ...
def next_spare(spare: Bools, pinned: Bools, start: int, n: int) -> tuple[Int64s, int]: ...

# planes.cpp

def take_apart(
    planes: list[Bytes], rows: Int64s, firsts: list[list[int]], blocks: Bytes
) -> None: ...
def make_frames(
    ids: Int64s,
    common: bytes,
    blocks: Bytes,
    raw: int,
    tops: Any,
    skip: int,
    zstd_header: bytes,
    hash: Callable[[Any], int],
) -> list[bytes]: ...
def join_frames(frames: Sequence[bytes | memoryview], counts: list[int]) -> list[bytes]: ...
def decode(
    frames: list[bytes | memoryview],
    ids: Int64s,
    common: bytes,
    nbytes: int,
    hash: Callable[[Any], int],
    unpack: Callable[[memoryview], bytes],
    refusal: type[Exception],
    firsts: list[list[int]],
    planes: list[Bytes],
    rows: Int64s,
) -> int: ...
def cut_frames(
    packs: list[bytes | memoryview], which: list[int], locations: Int64s, bits: int
) -> list[memoryview] | None: ...

# search.cpp

class Codes:
    def __init__(
        self,
        landmarks: NDArray[np.float32],  # [streams, width, dim], kept alive
        bases: list[int],  # of each stream: the number of the landmark in row 0
    ) -> None: ...
    def refer(
        self,
        stream: int,
        reference: NDArray[np.float64],  # [dim]: what its landmarks have in common
        axes: NDArray[np.float64] | None,  # [dim, dim]: a column each, orthonormal; None: as given
        lead: int,  # along how many of the axes they differ most
    ) -> None: ...  # before any of them is encoded
    def follow(self, other: Codes) -> None: ...
    def encode(self, stream: int, first: int, last: int) -> None: ...
    @property
    def nbytes(self) -> int: ...

def top_k(
    pages: list[Codes],
    streams: Sequence[int],
    counts: list[int],  # of each stream
    queries: int,  # the address of float32 [streams, m, dim]
    m: int,
    dim: int,
    k: int,
    before: NDArray[np.int64] | int | None,  # [m]
    start: int,
    threads: int = 1,
    plain: bool = False,  # by the code that every processor runs
) -> tuple[NDArray[np.int64], NDArray[np.float32]]: ...  # numbers, scores [streams, m, k]
def candidates(
    pages: list[Codes],
    stream: int,
    counts: list[int],
    query: int,  # the address of float32 [dim]
    dim: int,
    k: int,
) -> int: ...  # how many landmarks top_k scores
def gather(
    pages: list[Codes],
    streams: Sequence[int],
    counts: list[int],
    blocks: int,  # the address of int64 of `shape`, [streams, ...]
    shape: Sequence[int],
    dim: int,
) -> NDArray[np.float32]: ...  # [*shape, dim]
def can_share() -> bool: ...  # whether top_k can use torch's threads
def finite(numbers: int, count: int) -> bool: ...  # the address of float32

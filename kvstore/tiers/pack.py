"""Frames that are written together, as one value of LMDB (docs/format.md).

Owns the table in front of them, the directory that says whose they are, and the form of a location.
Pure: reads and writes nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore import _native
from kvstore.errors import CorruptBlockError
from kvstore.tiers.sealed import seal, unseal

Locations = npt.NDArray[np.int64]

INDEX_BITS = 16
"""Of a location, for the place in the pack; the others are the pack's number."""

DEAD, GONE = -1, -2
"""In a pack's directory: a block that was deleted, and one whose bytes are gone too."""

_bounds = struct.Struct("<II").unpack_from


@dataclass(frozen=True)
class Packs:
    """Frames in a row, joined into values.

    counts: how many frames each value has.
    """

    values: list[bytes]
    counts: list[int]

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return sum(map(len, self.values))

    def cut(self, pack_bytes: int) -> Packs:
        """The same frames in packs of another size."""
        return pack_up(
            [
                frame_at(memoryview(value), 4 * place)
                for value, count in zip(self.values, self.counts, strict=True)
                for place in range(count)
            ],
            pack_bytes,
        )


def chain_packs(packs: Sequence[Packs]) -> Packs:
    """All these packs in a row."""
    return Packs(
        [value for some in packs for value in some.values],
        [count for some in packs for count in some.counts],
    )


def pack_up(frames: Sequence[bytes | memoryview], pack_bytes: int) -> Packs:
    """Join frames into packs of at least `pack_bytes`, as far as they go."""
    counts = cut_packs(np.array([len(frame) for frame in frames], np.int64), pack_bytes)
    return Packs(_native.join_frames(frames, counts), counts)


def cut_packs(sizes: npt.NDArray[np.int64], pack_bytes: int) -> list[int]:
    """Divide frames into packs of at least `pack_bytes`, as far as they go: the number in each."""
    ends = np.cumsum(sizes)
    counts = []
    first = written = 0
    while first < len(sizes):
        last = int(np.searchsorted(ends, written + pack_bytes)) + 1
        if last >= len(sizes) or ends[-1] - ends[last - 1] < pack_bytes:
            last = len(sizes)
        counts.append(last - first)
        first, written = last, int(ends[last - 1])
    return counts


def by_pack(locations: Locations) -> list[tuple[int, npt.NDArray[np.int64]]]:
    """Divide sorted locations: the number of each pack and the places in it."""
    numbers, starts = np.unique(locations >> INDEX_BITS, return_index=True)
    places = np.split(locations & ((1 << INDEX_BITS) - 1), starts[1:])
    return list(zip(numbers.tolist(), places, strict=False))


def key_of(number: int) -> bytes:
    """Return the key of a pack, and of its directory."""
    return number.to_bytes(8, "big")


def sealed_members(key: bytes, members: npt.NDArray[np.int64]) -> bytes:
    """Return a pack's directory: the id of each of its frames, DEAD or GONE, int64 [n]."""
    return seal(key, members.astype("<i8").tobytes())


def members_of(key: bytes, value: bytes) -> npt.NDArray[np.int64]:
    """Read a pack's directory back, int64 [n]; CorruptBlockError where it is damaged."""
    name = f"the directory of pack {int.from_bytes(key, 'big')}"
    payload = unseal(key, value, name)
    if len(payload) % 8:
        raise CorruptBlockError(f"{name} is damaged: it has {len(payload)} B")
    return np.frombuffer(payload, "<i8").astype(np.int64)


def frame_at(pack: memoryview, place: int) -> memoryview:
    """Return the frame whose entry in the table is at byte `place`."""
    try:
        first, last = _bounds(pack, place)
    except struct.error:
        raise CorruptBlockError(f"a pack of {len(pack)} B has no entry at {place}") from None
    return pack[first:last]

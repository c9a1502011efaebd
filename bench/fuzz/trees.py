"""Pages of an LMDB file, looked at without LMDB, then opened: owns changes to pages."""

from __future__ import annotations

import contextlib
import mmap
import random
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench.fuzz.basis import COLD, SMALL, Basis, tree_rows
from bench.fuzz.checks import check, refusing
from bench.fuzz.mutations import EXTREMES, mangled
from kvstore.errors import CorruptBlockError, StoreFullError, WriteFailedError
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.tree import fault_of, readable

PAGE = 4096


class Trees:
    """Pages of an LMDB file: looked at without LMDB, then opened."""

    def __init__(self, basis: Basis, place: Path) -> None:
        # A copy, since other children open theirs meanwhile.
        shutil.copytree(basis.tree, place)
        self._place = place
        self._data = (place / "data.mdb").read_bytes()
        with contextlib.closing(DiskTier(place, SMALL, COLD)) as tier:
            self._ids = set(tier.scan()[0].tolist()) | set(range(60))
            self._records = {key: tier.get_meta(key) for key in tier.meta_keys()}
        self._pointers = list(_pointers(self._data))

    def run(self, rng: random.Random) -> str:
        path = self._place / "data.mdb"
        data = self._mutated(rng) or b"\0"
        path.unlink(missing_ok=True)  # it may have become huge
        path.write_bytes(data)
        fault = fault_of(path)
        check(fault is None or isinstance(fault, str), f"it says {fault!r}")
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        ):
            tables, lost = readable(mapped)
        check(tables or lost, "nothing is there, and nothing lost")
        for entries in tables.values():
            for _, at, size in entries:
                check(0 <= at <= len(data), "a value from nowhere")
                check(at + size <= len(data) or lost or fault, "a value goes beyond the file")
        check(not (data == self._data and (fault or lost)), f"a whole file is refused: {fault}")
        if fault is None or rng.random() < 0.3:
            opened = self._open(rng, data)
            # Opening gives a file that was cut short its length again.
            short = fault is not None and "pages of" in fault
            check(fault is None or short or not opened, f"a file is opened although {fault}")
            return "passed" if opened else "refused"
        return "refused"

    def _mutated(self, rng: random.Random) -> bytes:
        data = bytearray(self._data)
        pages = len(data) // PAGE
        if rng.random() < 0.01:
            return _overlapping(rng)
        if rng.random() < 0.05:
            return mangled(rng, self._data, self._data, head=300)
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            # The two first say where all else is.
            page = rng.choice([0, 1, rng.randrange(pages), rng.randrange(pages)])
            start = page * PAGE
            kind = rng.randrange(13)
            if kind == 12:  # two values in one place
                one, two = rng.sample(self._pointers, 2)
                data[one : one + 8] = data[two : two + 8]
            elif kind < 4:
                head = 152 if page < 2 else rng.choice([16, 60, PAGE])
                data[start + rng.randrange(head)] ^= 1 << rng.randrange(8)
            elif kind < 8:
                width = rng.choice([2, 2, 4, 8])
                head = 152 if page < 2 else rng.choice([16, 60, PAGE])
                at = start + rng.randrange(0, head, 2)
                near = int.from_bytes(data[at : at + width], "little") + rng.choice([-1, 1, 2, -2])
                extreme = rng.choice([*EXTREMES, near, near, rng.randrange(pages)])
                data[at : at + width] = (extreme & (1 << 8 * width) - 1).to_bytes(width, "little")
            elif kind == 8:
                other = rng.randrange(pages) * PAGE
                data[start : start + PAGE] = data[other : other + PAGE]
            elif kind == 9:
                data[start : start + PAGE] = rng.choice([bytes(PAGE), rng.randbytes(PAGE)])
            elif kind == 10:
                del data[rng.choice([start, rng.randrange(len(data))]) :]
                pages = len(data) // PAGE
                if len(data) < len(self._data):
                    break  # or else a change might lie behind its end
            else:
                data += rng.choice([bytes(PAGE), rng.randbytes(100), bytes(8 * PAGE)])
        return bytes(data)

    def _open(self, rng: random.Random, data: bytes) -> bool:
        path = self._place / "data.mdb"
        (self._place / "lock.mdb").unlink(missing_ok=True)
        with contextlib.ExitStack() as stack:
            with refusing(CorruptBlockError, ValueError) as raised:
                tier = stack.enter_context(contextlib.closing(DiskTier(self._place, SMALL, COLD)))
            size = path.stat().st_size
            check(size <= max(COLD, len(data)), f"the file has {size} B now, more than it may")
            if raised:
                check(data != self._data, f"a whole file is refused: {raised[0]}")
                return False
            errors, good = self._read_all(tier)
            check(data != self._data or not errors, f"a whole file has {errors[:1]}")
            gone = {b"record 9", rng.choice([key for key in self._records if b"large" in key])}
            added = np.arange(1000, 1006)
            with refusing(CorruptBlockError, StoreFullError, WriteFailedError):
                tier.put_meta(dict.fromkeys(gone))
                locations = tier.write(added, tree_rows(added))
                tier.put_meta({b"new": b"x" * 25000})
                tier.delete(locations[:2])
            _, left = self._read_all(tier)
            lost = good - gone - left
            check(not lost, f"a write has destroyed what was whole: {sorted(map(str, lost))[:3]}")
        return True

    def _read_all(self, tier: DiskTier) -> tuple[list[Exception], set[Any]]:
        """Read all that is there, which is right or refused; return the errors, and what is right.

        Of blocks the ids, of records the keys.
        """
        errors: list[Exception] = []
        good: set[Any] = set()
        with refusing(CorruptBlockError) as raised:
            ids, locations = tier.scan()
            known = self._ids | set(range(1000, 1006))
            check(known.issuperset(ids.tolist()), "there are blocks that nobody wrote")
            # Together, and one by one where that is refused.
            parts = [(ids, locations)]
            while parts:
                some, lie = parts.pop()
                out = [np.zeros((len(some), plane.nbytes), np.uint8) for plane in SMALL.planes]
                with refusing(CorruptBlockError) as damaged:
                    tier.read(some, lie, out)
                    same = all((a == b).all() for a, b in zip(out, tree_rows(some), strict=True))
                    check(same, "another block was read")
                    good |= set(some.tolist())
                if damaged and len(some) > 1:
                    parts = [(ids[i : i + 1], locations[i : i + 1]) for i in range(len(ids))]
                else:
                    errors += damaged
        errors += raised
        with refusing(CorruptBlockError) as raised:
            for key in tier.meta_keys():
                with refusing(CorruptBlockError) as damaged:
                    value = tier.get_meta(key)
                    old = self._old_record(key)
                    check(value in (self._records.get(key), old), f"another record {key!r}")
                    good.add(key)
                errors += damaged
        return errors + raised, good

    @staticmethod
    def _old_record(key: bytes) -> bytes | None:
        """What a record had that is deleted, or is new: the commit before may be read."""
        if key == b"new":
            return b"x" * 25000
        if key == b"large 30":
            return random.Random(30).randbytes(700 * 30)
        return b"value 7 " * 30 if key == b"record 7" else None


def _pointers(data: bytes) -> Iterator[int]:
    """Where in a whole file leaves say at which page a large value begins."""
    for start in range(2 * PAGE, len(data), PAGE):
        number, _, flags, lower, _ = struct.unpack_from("<QHHHH", data, start)
        if number == start // PAGE and flags == 2:
            for place in struct.unpack_from(f"<{(lower - 16) // 2}H", data, start + 16):
                *_, kind, key_size = struct.unpack_from("<HHHH", data, start + place)
                if kind == 1:
                    yield start + place + 8 + key_size


def _overlapping(rng: random.Random) -> bytes:
    """A file of three pages of 64 KiB, whose leaf's entries all lie upon one another."""
    size = rng.choice([512, 4096, 65536])
    meta = bytearray(size)
    struct.pack_into("<QHHHH", meta, 0, 0, 0, 8, 0, 0)
    struct.pack_into("<IIQQ", meta, 16, 0xBEEFC0DE, 1, 0, 1 << 20)
    none = (0, 0, 0, 0, 0, 0, 2**64 - 1)
    struct.pack_into("<IHHQQQQQ", meta, 40, size, *none)
    struct.pack_into("<IHHQQQQQ", meta, 88, 0, 0, 1, 0, 1, 0, 5, 2)
    struct.pack_into("<QQ", meta, 136, 2, 9)
    leaf = bytearray(rng.choice([b"\0", b"\1", b"\x40"]) * size)
    count = (size - 16) // 4
    upper = 16 + 2 * count
    struct.pack_into("<QHHHH", leaf, 0, 2, 0, 2, upper, upper)
    place = min(upper, size - 8)
    struct.pack_into(f"<{count}H", leaf, 16, *[place] * count)
    struct.pack_into("<HHHH", leaf, place, 0, 0, 0, max(0, size - place - 8))
    return bytes(meta) + bytes(meta) + bytes(leaf)

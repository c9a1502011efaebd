"""The cold tier: frames in packs, and records, in an LMDB file of bounded size.

Owns what lies in the file (docs/format.md). It never decides what is stored or dropped, and keeps
no table from block to place: its owner does.
"""

from __future__ import annotations

import json
import mmap
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import numpy.typing as npt

from kvstore import _native
from kvstore.block import BlockSpec
from kvstore.codec import Bytes2D, Ids
from kvstore.errors import CorruptBlockError, OtherBlocksError, StoreFullError, brief
from kvstore.mixed_codec import MixedCodec
from kvstore.tiers.commits import COUNTERS_KEY, counted, sealed_counters
from kvstore.tiers.lmdb_file import Change, LmdbFile, NoRoom, Room, damaged, held
from kvstore.tiers.pack import (
    DEAD,
    INDEX_BITS,
    Locations,
    Packs,
    by_pack,
    frame_at,
    key_of,
    members_of,
    pack_up,
    sealed_members,
)
from kvstore.tiers.reclaim import Reclaimer
from kvstore.tiers.sealed import seal, unseal
from kvstore.tiers.tree import Entries

FORMAT_VERSION = 2

# A value of LMDB fills whole pages: a 5 KiB frame alone would take 8 KiB. Frames written together
# share a value of at least this size, and lose half a page in sixteen.
_PACK_BYTES = 1 << 16

FORMAT_KEY = b"format"
_TABLES = (b"packs", b"directory", b"records")
_LONGEST_KEY = 500  # LMDB's own limit is 511 B
_MOST_PACKS, _LEAST_PACKS = 1024, 8  # deleted in one transaction

# How large the packs are when a change is tried again that found too few free pages side by side,
# and no more can be gathered.
_RETRIED_PACK_BYTES = (_PACK_BYTES, _PACK_BYTES, _PACK_BYTES // 4, 1)
_PATIENCE_SECONDS = 2.0  # with those who read, for one change
_ADOPTED = 64  # values, in one transaction


class DiskTier:
    """Blocks of one specification on disk, compressed and checked, within `capacity_bytes`.

    `read` may be called on any thread at any time. `write`, `delete` and `put_meta` may too, and
    wait for each other. A location is an int64: the number of a pack << 16 | the place in it;
    numbers of packs are never used again.
    """

    def __init__(
        self,
        directory: Path | str,
        spec: BlockSpec,
        capacity_bytes: int,
        *,
        durability: str = "none",
        precision: str = "exact",
        read_only: bool = False,
    ) -> None:
        """Open the tier in `directory`, made if it is not there.

        capacity_bytes: what its files may take together, at every moment. durability: what a loss
        of power may take. "sync": nothing, each change is on the disk when it returns. "async": the
        last change, never more and never a part. "none": the whole file, until it is closed.
        precision: how blocks are written, see `kvstore.promises`; those that are there are read
        whatever theirs. read_only: as it is now, beside another process that may go on writing; the
        pages that this sees stay in use until it is closed, and the capacity is the writer's.

        Raises ValueError where the directory cannot be used, belongs to another process, or holds
        another format or specification, or where `capacity_bytes` is too small; CorruptBlockError
        where the file is damaged.
        """
        self._codec = MixedCodec(spec, precision)
        self.directory = Path(directory)
        self.capacity_bytes = int(capacity_bytes)
        self._read_only = read_only
        self._changing = threading.Lock()
        self._room = Room(self.capacity_bytes)
        self._check_capacity()
        self._file = LmdbFile(
            self.directory,
            self._room,
            _TABLES,
            self._check_format,
            durability=durability,
            read_only=read_only,
        )
        self._packs, self._directory, self._records = self._file.tables
        self._reclaimer = Reclaimer(self._file, self._packs, self._directory, self._commit)

    # Blocks

    def write(self, ids: Ids, planes: Sequence[Bytes2D]) -> Locations:
        """Compress and store blocks, all or none, and return where they are, int64 [n].

        ids: int64 [n]. planes: one uint8 [n, plane.nbytes] a plane, rows contiguous. Raises
        StoreFullError, with nothing stored, where the capacity or the disk does not suffice.
        """
        return self.write_packs(ids, self.encode(ids, planes))

    def encode(
        self,
        ids: Ids,
        planes: Sequence[Bytes2D],
        rows: npt.NDArray[np.int64] | None = None,
    ) -> Packs:
        """Compress blocks to what `write_packs` takes.

        ids, planes: as of `write`, or with `rows`, int64 [n], planes of any number of rows, of
        which these are the blocks.
        """
        with self._file.operation():
            return pack_up(self._codec.encode(ids, planes, rows), _PACK_BYTES)

    def write_packs(self, ids: Ids, packs: Packs) -> Locations:
        """Store blocks that are compressed already; returns and raises as `write` does."""
        with self._file.operation():
            if not len(ids):
                return np.empty(0, np.int64)
            with self._changing:
                return self._commit_packs(ids, packs)

    def read(
        self,
        ids: Ids,
        locations: Locations,
        out: Sequence[Bytes2D],
        rows: npt.NDArray[np.int64] | None = None,
    ) -> None:
        """Read, verify and decompress blocks into `out`.

        ids, locations: int64 [n]. out: one uint8 [n, plane.nbytes] a plane, or with `rows`, int64
        [n], uint8 [m, plane.nbytes] of which those rows are written. Raises CorruptBlockError
        naming the first block that is not what was written.
        """
        with self._file.snapshot(buffers=True) as transaction:
            self._codec.decode(ids, self._frames(transaction, ids, locations), out, rows)

    def _frames(
        self, transaction: lmdb.Transaction, ids: Ids, locations: Locations
    ) -> list[memoryview]:
        """Find blocks' frames, unverified, readable as long as the transaction is.

        CorruptBlockError where there is none.
        """
        known: dict[int, int] = {}
        packs: list[bytes | memoryview] = []
        which: list[int] = []
        try:
            for location in locations.tolist():
                number = location >> INDEX_BITS
                place = known.setdefault(number, len(packs))
                if place == len(packs):
                    packs.append(transaction.get(key_of(number), b"", db=self._packs))
                which.append(place)
        except lmdb.Error as error:
            block = ids[len(which)]
            raise CorruptBlockError(
                f"block {block} is damaged on disk: {error}", int(block)
            ) from None
        frames = _native.cut_frames(packs, which, np.ascontiguousarray(locations), INDEX_BITS)
        if frames is None:
            raise self._missing(ids, locations, [len(packs[place]) for place in which])
        return frames

    def delete(self, locations: Locations, *, missing_ok: bool = False) -> None:
        """Drop blocks; a location where none is raises KeyError, unless that is told to be right.

        Many packs go in several transactions: an error leaves some blocks deleted, each wholly.
        """
        with self._file.operation(), self._changing:
            ordered = np.unique(locations)
            if len(ordered) < len(locations):
                raise KeyError("a block is to be deleted twice")
            doomed = by_pack(ordered)
            chunks = [
                doomed[first : first + _MOST_PACKS] for first in range(0, len(doomed), _MOST_PACKS)
            ]
            while chunks:
                chunk = chunks.pop()
                try:
                    self._delete_members(chunk, missing_ok)
                except StoreFullError:
                    if len(chunk) <= _LEAST_PACKS:
                        raise
                    # A short transaction copies fewer pages before it frees some.
                    half = len(chunk) // 2
                    chunks += [chunk[half:], chunk[:half]]

    def scan(self) -> tuple[Ids, Locations]:
        """Return the ids and locations of all blocks, int64 [n] each, oldest first.

        CorruptStoreError where it cannot be said which there are.
        """
        with self._file.snapshot() as transaction:
            ids, locations = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
            for key, value in transaction.cursor(db=self._directory):
                try:
                    members = members_of(bytes(key), bytes(value))
                except CorruptBlockError as error:
                    raise damaged(self.directory, error) from None
                live = np.flatnonzero(members >= 0)
                ids.append(members[live])
                locations.append(int.from_bytes(key, "big") << INDEX_BITS | live)
            return np.concatenate(ids), np.concatenate(locations)

    def frame_bytes(self, locations: Locations) -> int:
        """Return the bytes of blocks' frames. locations: int64 [n]."""
        nbytes = 0
        with self._file.snapshot(buffers=True) as transaction:
            for number, places in by_pack(np.unique(locations)):
                pack = self._pack(transaction, number)
                nbytes += sum(len(frame_at(pack, 4 * place)) for place in places.tolist())
        return nbytes

    def damaged(self, ids: Ids, locations: Locations) -> dict[int, str]:
        """Read and verify blocks; return those that are not what was written, and why.

        ids, locations: int64 [n]. Takes memory for 64 of them at most.
        """
        found: dict[int, str] = {}
        parts = [(ids[i : i + 64], locations[i : i + 64]) for i in range(0, len(ids), 64)]
        while parts:
            some, places = parts.pop()
            try:
                with self._file.snapshot(buffers=True) as transaction:
                    self._codec.verify(some, self._frames(transaction, some, places))
            except CorruptBlockError as error:
                if len(some) == 1:
                    found[int(some[0])] = str(error)
                else:
                    half = len(some) // 2
                    parts += [(some[:half], places[:half]), (some[half:], places[half:])]
        return found

    def frames(self) -> Iterator[tuple[int, bytes]]:
        """Yield the id and the frame of every block, unverified: for checks and measurements."""
        ids, locations = self.scan()
        for block, location in zip(ids.tolist(), locations.tolist(), strict=True):
            with self._file.snapshot(buffers=True) as transaction:
                pack = memoryview(
                    transaction.get(key_of(location >> INDEX_BITS), b"", db=self._packs)
                )
                frame = bytes(frame_at(pack, 4 * (location & ((1 << INDEX_BITS) - 1))))
            yield block, frame

    def adopt(self, tables: Mapping[bytes, Entries], data: mmap.mmap) -> list[str]:
        """Take in, while empty, what was read of another file; return what was not taken, in words.

        tables: entries by the name of their table, sorted; data: of the file. Packs are taken with
        their directories; whether their frames and the records are whole says who reads them.
        """
        told: list[str] = []
        packs = {key: (at, size) for key, at, size in tables.get(b"packs", [])}
        taken: list[tuple[bytes, bytes]] = []
        for key, at, size in tables.get(b"directory", []):
            value = data[at : at + size]
            try:
                members = members_of(key, value)
            except CorruptBlockError as error:
                told.append(str(error))
                continue
            if key in packs and len(key) == 8:
                taken.append((key, value))
                self._blocks += int((members >= 0).sum())
                self._next_pack = int.from_bytes(key, "big") + 1
        if lost := len(packs) - len(taken):
            told.append(f"{lost} packs of blocks have no directory any more")
        puts = [(self._records, key, at, size) for key, at, size in tables.get(b"records", [])]
        puts += [(self._packs, key, *packs[key]) for key, _ in taken]
        with self._file.operation(), self._changing:
            for start in range(0, len(puts), _ADOPTED):
                some = puts[start : start + _ADOPTED]

                def change(transaction: lmdb.Transaction, some: Any = some) -> None:
                    for table, key, at, size in some:
                        transaction.put(key, data[at : at + size], db=table)

                self._change(lambda _: change, 0, "what was read")

            def name_them(transaction: lmdb.Transaction) -> None:
                for key, value in taken:
                    transaction.put(key, value, db=self._directory)

            self._change(lambda _: name_them, 0, "what was read")
        return told

    # Small records

    def put_meta(self, entries: dict[bytes, bytes | None]) -> None:
        """Store records, all or none; None deletes one. Keys have 1 to 500 bytes."""
        for key in entries:
            if not 1 <= len(key) <= _LONGEST_KEY:
                raise ValueError(f"a record's key has {len(key)} B: 1 to {_LONGEST_KEY} are needed")
        sealed = {
            key: None if value is None else seal(key, value) for key, value in entries.items()
        }
        added = sum(self._room.pages_of(len(value)) + 1 for value in sealed.values() if value)

        def change(transaction: lmdb.Transaction) -> None:
            if added:
                self._file.require(transaction, added)
            for key, value in sealed.items():
                if value is None:
                    transaction.delete(key, db=self._records)
                else:
                    transaction.put(key, value, db=self._records)

        with self._file.operation(), self._changing:
            self._change(lambda _: change, added, f"{len(entries)} records")

    def get_meta(self, key: bytes) -> bytes | None:
        """Return a record, or None. A damaged one raises CorruptBlockError naming its key."""
        with self._file.snapshot(buffers=True) as transaction:
            value = transaction.get(key, db=self._records)
            return None if value is None else unseal(key, value, f"record {key!r}")

    def meta_keys(self, prefix: bytes = b"") -> list[bytes]:
        """Return the keys that begin with `prefix`, sorted."""
        keys = []
        with self._file.snapshot() as transaction:
            cursor = transaction.cursor(db=self._records)
            found = cursor.set_range(prefix) if prefix else cursor.first()
            while found and bytes(cursor.key()).startswith(prefix):
                keys.append(bytes(cursor.key()))
                found = cursor.next()
        return keys

    # Sizes

    @property
    def block_count(self) -> int:
        """Blocks stored and not deleted."""
        return self._blocks

    @property
    def used_bytes(self) -> int:
        """Bytes of the pages in use. Pages that deletion freed stay in the file, to be reused."""
        with self._file.snapshot() as transaction:
            return self._file.pages_in_use(transaction) * self._room.page

    @property
    def file_bytes(self) -> int:
        """Bytes of the files as they are."""
        return self._file.nbytes

    def abandon(self) -> None:
        """Forget what this thread has been interrupted in; see LmdbFile."""
        self._file.abandon()

    def close(self) -> None:
        """Let running reads and writes end, write out what is left and close the file."""
        self._file.close()

    # Opening

    def _check_capacity(self) -> None:
        """Refuse what could not hold one block beside the pages kept for deleting."""
        nbytes = self._codec.spec.nbytes
        pages = self._room.pages_of(self._codec.exact.header_nbytes + nbytes + 1024) + 16
        if self._room.writable < pages:
            raise ValueError(
                f"a cold tier of {self.capacity_bytes} B cannot hold one block of {nbytes} B: "
                f"give it at least {self._room.least_for(pages)} B"
            )

    def _check_format(self, transaction: lmdb.Transaction) -> bool:
        """Compare the file's format with this one, or record it in a new file; say if it is new."""
        wanted = {"format": FORMAT_VERSION, "planes": self._codec.exact.description}
        value = held(transaction, FORMAT_KEY)
        if not value:
            if transaction.stat()["entries"] or self._read_only:
                raise ValueError(f"{self.directory} holds an LMDB file that is no store")
            transaction.put(FORMAT_KEY, seal(FORMAT_KEY, json.dumps(wanted).encode()))
            self._next_pack = self._blocks = 0
            transaction.put(COUNTERS_KEY, self._counters(transaction))
            return True
        try:
            found = json.loads(unseal(FORMAT_KEY, value, "its format"))
            if not isinstance(found, dict):
                raise ValueError("its format is no object")
        except (CorruptBlockError, ValueError, RecursionError) as error:
            raise damaged(self.directory, error) from None
        if found.get("format") != FORMAT_VERSION:
            raise ValueError(
                f"{self.directory} holds a store of format {brief(found.get('format'))}, this "
                f"program reads {FORMAT_VERSION}: use another directory"
            )
        if found != wanted:
            raise OtherBlocksError(
                f"{self.directory} holds blocks of {brief(found.get('planes'))}, not of "
                f"{wanted['planes']}: use another directory"
            )
        try:
            self._next_pack, self._blocks, _ = counted(held(transaction, COUNTERS_KEY))
        except CorruptBlockError as error:
            raise damaged(self.directory, error) from None
        return False

    # Changing

    def _commit_packs(self, ids: Ids, packs: Packs) -> Locations:
        locations = np.empty(len(ids), np.int64)

        def plan(pack_bytes: int) -> Change:
            some = packs if pack_bytes == _PACK_BYTES else packs.cut(pack_bytes)
            entries = []
            first = 0
            for number, (value, count) in enumerate(
                zip(some.values, some.counts, strict=True), self._next_pack
            ):
                key, last = key_of(number), first + count
                entries.append((key, value, sealed_members(key, ids[first:last])))
                locations[first:last] = number << INDEX_BITS | np.arange(count)
                first = last
            added = sum(
                self._room.pages_of(len(value)) + len(members) // 2048 + 1
                for _, value, members in entries
            )

            def change(transaction: lmdb.Transaction) -> None:
                self._file.require(transaction, added, early=True)
                self._next_pack += len(entries)
                self._blocks += len(ids)
                for key, value, members in entries:
                    transaction.put(key, value, db=self._packs, append=True)
                    transaction.put(key, members, db=self._directory, append=True)

            return change

        what = f"{len(ids)} blocks, {packs.nbytes} B compressed,"
        self._change(plan, self._room.pages_of(packs.nbytes), what)
        return locations

    def _delete_members(
        self, doomed: list[tuple[int, npt.NDArray[np.int64]]], missing_ok: bool
    ) -> None:
        left: dict[int, int] = {}

        def change(transaction: lmdb.Transaction) -> None:
            for number, places in doomed:
                key = key_of(number)
                value = held(transaction, key, self._directory)
                members = members_of(key, value) if value else np.empty(0, np.int64)
                lost = (places >= len(members)).any() or (members[places] < 0).any()
                if lost and missing_ok:
                    places = places[places < len(members)]
                    places = places[members[places] >= 0]
                    if not len(places):
                        continue
                elif lost:
                    raise KeyError(f"no block is stored in pack {number} at {places.tolist()}")
                members[places] = DEAD
                self._blocks -= len(places)
                left[number] = int((members >= 0).sum())
                if left[number]:
                    transaction.put(key, sealed_members(key, members), db=self._directory)
                else:
                    transaction.delete(key, db=self._packs)
                    transaction.delete(key, db=self._directory)

        self._change(lambda _: change, 0, f"the deletion of {len(doomed)} packs")
        self._reclaimer.note(left)

    def _change(self, plan: Callable[[int], Change], pages: int, what: str) -> None:
        """Run a change in a transaction of its own, all or nothing, making room if it must.

        plan: returns the change, given how large its packs should be. pages: what it needs.
        """
        if self._read_only:
            raise ValueError(f"the store in {self.directory} was opened to be read only")
        pack_bytes = _PACK_BYTES
        retries = iter(_RETRIED_PACK_BYTES)
        until = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                self._commit(plan(pack_bytes))
                return
            except NoRoom:
                if not self._reclaimer.gain(pages, until):
                    break
            except lmdb.MapFullError:
                # Enough pages are free, but not side by side.
                if self._reclaimer.gain(pages, until):
                    continue
                pack_bytes = next(retries, 0)
                if not pack_bytes:
                    break
                self._reclaimer.release_pages(until)
            except lmdb.Error as error:
                raise self._file.write_error(error, what, pages) from None
        raise StoreFullError(
            f"the cold tier is full: no room for {what} in its {self.capacity_bytes} B"
        )

    def _commit(self, change: Change) -> None:
        """Run a change in a transaction, and count it."""
        counters = self._next_pack, self._blocks

        def whole(transaction: lmdb.Transaction) -> None:
            self._next_pack, self._blocks = counters  # also where it is run again
            change(transaction)
            transaction.put(COUNTERS_KEY, self._counters(transaction))

        try:
            self._file.commit(whole)
        except BaseException:
            self._next_pack, self._blocks = counters
            raise

    def _counters(self, transaction: lmdb.Transaction) -> bytes:
        return sealed_counters(self._next_pack, self._blocks, transaction.id())

    # Looking

    def _pack(self, transaction: lmdb.Transaction, number: int) -> memoryview:
        """Return a pack; of no bytes where there is none."""
        return memoryview(transaction.get(key_of(number), b"", db=self._packs))

    def _missing(self, ids: Ids, locations: Locations, sizes: list[int]) -> CorruptBlockError:
        """Find the first block whose place is not there. sizes: of the blocks' packs."""
        for block, location, size in zip(ids.tolist(), locations.tolist(), sizes, strict=True):
            number, place = location >> INDEX_BITS, location & ((1 << INDEX_BITS) - 1)
            if size < 4 * place + 8:
                return CorruptBlockError(
                    f"block {block} is not on disk where it was written, in pack {number}", block
                )
        raise AssertionError("every block has a place")


def planes_of(value: bytes) -> str:
    """Return what a file's format record says of its blocks; CorruptBlockError if it is damaged."""
    try:
        return str(json.loads(unseal(FORMAT_KEY, value, "its format"))["planes"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptBlockError(f"its format makes no sense: {brief(error)}") from None

"""The cold tier: frames in an LMDB file of bounded size.

Owns the file, its packs and records (docs/format.md), and is the only file that imports lmdb. It
never decides what is stored or dropped, and keeps no table from block to place: its owner does.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import shutil
import stat
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import numpy.typing as npt
import xxhash

from kvstore import _native
from kvstore.block import BlockSpec
from kvstore.codec import Bytes2D, Ids
from kvstore.errors import (
    CorruptBlockError,
    CorruptStoreError,
    OtherBlocksError,
    StoreClosedError,
    StoreFullError,
    WriteFailedError,
)
from kvstore.mixed_codec import MixedCodec
from kvstore.tiers import lock
from kvstore.tiers.pack import (
    INDEX_BITS,
    Locations,
    Packs,
    by_pack,
    frame_at,
    pack_up,
)
from kvstore.tiers.tree import Entries, commits, fault_of

FORMAT_VERSION = 2

# A value of LMDB fills whole pages: a 5 KiB frame alone would take 8 KiB. Frames written together
# share a value of at least this size, and lose half a page in sixteen.
_PACK_BYTES = 1 << 16

FORMAT_KEY = b"format"
_COUNTERS_KEY = b"counters"
_TABLES = (b"packs", b"directory", b"records")
_LONGEST_KEY = 500  # LMDB's own limit is 511 B

# In a pack's directory: a block that was deleted, and one whose bytes are gone too.
_DEAD = -1
_GONE = -2

# Pages that writes leave alone, so that a full tier can still delete and reclaim: both copy pages
# before they free any. One page in 256 more, for LMDB's own list of free pages at its longest.
_RESERVED_PAGES = 64
# A new file's map: it doubles whenever it is full. A map as large as the capacity would do, but not
# every system gives out address space for nothing.
_FIRST_MAP_PAGES = 256
_LOST_PAGES = 32  # free ones that are no use: those of the commit before, holes
_MOST_PACKS, _LEAST_PACKS = 1024, 8  # deleted in one transaction
_RECLAIMED_PAGES = 16  # copied in one transaction
_RECLAIM_RETRIES = 4

# How large the packs are when a change is tried again that found too few free pages side by side,
# and no more can be gathered.
_RETRIED_PACK_BYTES = (_PACK_BYTES, _PACK_BYTES, _PACK_BYTES // 4, 1)
_READ_PATIENCE_SECONDS = 2.0
_ADOPTED = 64  # values, in one transaction
_MOST_READERS = 126  # who have the file open; 64 bytes each in lock.mdb, which is two pages then
_TRIES = 100  # to look at a tree between two commits of another process

_DAMAGES = (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.InvalidError, lmdb.PanicError)
_Change = Callable[[lmdb.Transaction], None]


class _NoRoom(Exception):
    """A change would use pages that are kept for deleting."""


class _MapTooSmall(Exception):
    """A change needs more pages than the map has, and has put nothing yet."""


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
        self._page = os.sysconf("SC_PAGE_SIZE")
        self._pid = os.getpid()
        self._changing = threading.Lock()
        self._idle = threading.Condition()
        self._operations: Counter[int] = Counter()  # of each thread, by its ident
        self._growing = False
        self._reads: dict[object, int] = {}  # a token each, and whose it is
        self._view: lmdb.Transaction | None = None
        self._viewing = threading.RLock()
        self._closed = False
        # Packs with deleted blocks in them -> how many others they have; None until it is needed.
        self._loose: dict[int, int] | None = None
        self._check_capacity()
        self._read_only = read_only
        self._hold = None if read_only else lock.hold(self.directory)
        try:
            self._open(durability)
        except BaseException:
            if self._hold is not None:
                lock.let_go(self._hold)
            raise

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
        with self._operation():
            return pack_up(self._codec.encode(ids, planes, rows), _PACK_BYTES)

    def write_packs(self, ids: Ids, packs: Packs) -> Locations:
        """Store blocks that are compressed already; returns and raises as `write` does."""
        with self._operation():
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
        with self._snapshot(buffers=True) as transaction:
            self._codec.decode(ids, self._frames(transaction, ids, locations), out, rows)

    def _frames(
        self, transaction: lmdb.Transaction, ids: Ids, locations: Locations
    ) -> list[memoryview]:
        """Find blocks' frames, unverified, readable as long as the transaction is.

        CorruptBlockError where there is none.
        """
        numbers = (locations >> INDEX_BITS).tolist()
        places = locations & ((1 << INDEX_BITS) - 1)
        known: dict[int, int] = {}
        packs: list[bytes | memoryview] = []
        which: list[int] = []
        try:
            for number in numbers:
                place = known.setdefault(number, len(packs))
                if place == len(packs):
                    packs.append(transaction.get(_key(number), b"", db=self._packs))
                which.append(place)
        except lmdb.Error as error:
            block = ids[len(which)]
            raise CorruptBlockError(
                f"block {block} is damaged on disk: {error}", int(block)
            ) from None
        frames = _native.cut_frames(packs, which, places)
        if frames is None:
            raise self._missing(ids, numbers, places, [len(packs[place]) for place in which])
        return frames

    def delete(self, locations: Locations, *, missing_ok: bool = False) -> None:
        """Drop blocks; a location where none is raises KeyError, unless that is told to be right.

        Many packs go in several transactions: an error leaves some blocks deleted, each wholly.
        """
        with self._operation(), self._changing:
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
        with self._snapshot() as transaction:
            ids, locations = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
            for key, value in transaction.cursor(db=self._directory):
                try:
                    members = self._members(bytes(key), bytes(value))
                except CorruptBlockError as error:
                    raise self._damaged(error) from None
                live = np.flatnonzero(members >= 0)
                ids.append(members[live])
                locations.append(int.from_bytes(key, "big") << INDEX_BITS | live)
            return np.concatenate(ids), np.concatenate(locations)

    def frame_bytes(self, locations: Locations) -> int:
        """Return the bytes of blocks' frames. locations: int64 [n]."""
        nbytes = 0
        with self._snapshot(buffers=True) as transaction:
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
                with self._snapshot(buffers=True) as transaction:
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
            with self._snapshot(buffers=True) as transaction:
                pack = memoryview(
                    transaction.get(_key(location >> INDEX_BITS), b"", db=self._packs)
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
                members = self._members(key, value)
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
        with self._operation(), self._changing:
            for start in range(0, len(puts), _ADOPTED):
                some = puts[start : start + _ADOPTED]

                def change(transaction: lmdb.Transaction, some: Any = some) -> None:
                    for table, key, at, size in some:
                        transaction.put(key, data[at : at + size], db=table)

                pages = sum(self._pages_of(size) for *_, size in some)
                self._change(lambda _: change, pages, "what was read")

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
            key: None if value is None else _seal(key, value) for key, value in entries.items()
        }
        added = sum(self._pages_of(len(value)) + 1 for value in sealed.values() if value)

        def change(transaction: lmdb.Transaction) -> None:
            if added:
                self._require(transaction, added)
            for key, value in sealed.items():
                if value is None:
                    transaction.delete(key, db=self._records)
                else:
                    transaction.put(key, value, db=self._records)

        with self._operation(), self._changing:
            self._change(lambda _: change, added, f"{len(entries)} records")

    def get_meta(self, key: bytes) -> bytes | None:
        """Return a record, or None. A damaged one raises CorruptBlockError naming its key."""
        with self._snapshot(buffers=True) as transaction:
            value = transaction.get(key, db=self._records)
            return None if value is None else _unseal(key, value, f"record {key!r}")

    def meta_keys(self, prefix: bytes = b"") -> list[bytes]:
        """Return the keys that begin with `prefix`, sorted."""
        keys = []
        with self._snapshot() as transaction:
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
        with self._snapshot() as transaction:
            return self._pages_in_use(transaction) * self._page

    @property
    def file_bytes(self) -> int:
        """Bytes of the files as they are."""
        return sum((self.directory / name).stat().st_size for name in ("data.mdb", "lock.mdb"))

    def abandon(self) -> None:
        """Forget what this thread has been interrupted in; it is in none of it any more.

        Ctrl-C may strike after the body of a `with`, before its context manager hears of the end.
        Nobody may then wait for that end, which comes when the traceback is dropped, or never.
        """
        with self._idle:
            mine = threading.get_ident()
            self._operations.pop(mine, None)
            for token in [token for token, thread in self._reads.items() if thread == mine]:
                del self._reads[token]
            self._idle.notify_all()

    def close(self) -> None:
        """Let running reads and writes end, write out what is left and close the file."""
        self.abandon()
        with self._idle:
            if self._closed or os.getpid() != self._pid:
                return
            self._closed = True
            self._idle.wait_for(lambda: not self._operations)
        try:
            if self._view is not None:
                self._view.abort()
            else:
                self._env.sync(True)
        finally:
            self._env.close()
            if self._hold is not None:
                lock.let_go(self._hold)

    # Opening

    def _check_capacity(self) -> None:
        """Refuse what could not hold one block beside the pages kept for deleting."""
        lock_bytes = 2 * self._page
        self._most_pages = (self.capacity_bytes - lock_bytes) // self._page
        self._writable_pages = self._most_pages - _RESERVED_PAGES - self._most_pages // 256
        block = (
            self._pages_of(self._codec.exact.header_nbytes + self._codec.spec.nbytes + 1024) + 16
        )
        if self._writable_pages < block:
            least = (block + _RESERVED_PAGES + 2) * 257 // 256 * self._page + lock_bytes
            raise ValueError(
                f"a cold tier of {self.capacity_bytes} B cannot hold one block of "
                f"{self._codec.spec.nbytes} B: give it at least {least} B"
            )

    def _open(self, durability: str) -> None:
        path = self.directory / "data.mdb"
        held = path.stat().st_size if path.exists() else 0
        if held > self._most_pages * self._page and not self._read_only:
            raise ValueError(
                f"{self.directory} holds {held} B already: its capacity cannot be "
                f"{self.capacity_bytes} B"
            )
        # Before LMDB goes by what it says. An empty one was left by who was killed as he made it.
        if held and (fault := fault_of(path, deep=not self._read_only)):
            raise self._damaged(f"its tree: {fault}")
        self._map_pages = max(_FIRST_MAP_PAGES, held // self._page)
        if not self._read_only:
            self._map_pages = min(self._map_pages, self._most_pages)
        try:
            self._env = lmdb.open(
                str(self.directory),
                map_size=self._map_pages * self._page,
                max_dbs=len(_TABLES),
                max_readers=_MOST_READERS,
                mode=stat.S_IRUSR | stat.S_IWUSR,
                # Without metasync the page that says where the tree begins is on the disk before
                # the next change ends, not before this one returns.
                sync=durability != "none",
                metasync=durability == "sync",
                readonly=self._read_only,
                create=not self._read_only,
            )
        except (lmdb.InvalidError, lmdb.CorruptedError, lmdb.VersionMismatchError) as error:
            raise self._damaged(error) from None
        except lmdb.ReadersFullError:
            raise ValueError(
                f"the store in {self.directory} has as many readers as it takes ({_MOST_READERS:,})"
            ) from None
        except (lmdb.Error, OSError) as error:
            raise ValueError(f"cannot open a store in {self.directory}: {error}") from None
        try:
            # Those of killed processes go. Everybody sees to it, so that they never fill the table.
            self._env.reader_check()
            if not self._read_only:
                self._fill_short_file(path)
            if self._read_only:
                self._view = self._whole_view(path)
                self._open_tables(self._view)
                self._check_format(self._view)
            else:
                with self._env.begin(write=True) as transaction:
                    is_new = self._check_format(transaction)
                    self._open_tables(transaction, create=is_new)
            if held:
                self._check_commits(path)
        except lmdb.Error as error:
            self._env.close()
            raise self._damaged(error) from None
        except BaseException:
            self._env.close()
            raise

    def _check_commits(self, path: Path) -> None:
        """Refuse a file that does not say which of its commits is the last one."""
        fault: str | None = None
        # Where another process writes, what is read may be of several moments.
        for _ in range(_TRIES if self._read_only else 1):
            fault = _fault_of_commits(path)
            if not fault:
                return
        raise self._damaged(f"its tree: {fault}")

    def _open_tables(self, transaction: lmdb.Transaction, create: bool = False) -> None:
        self._packs, self._directory, self._records = (
            self._env.open_db(name, txn=transaction, create=create) for name in _TABLES
        )

    def _whole_view(self, path: Path) -> lmdb.Transaction:
        """Return a view of the file as it is, which makes sense, and stays whatever is written."""
        fault: str | None = "it changes too often to be looked at"
        for _ in range(_TRIES):
            try:
                view = self._env.begin(buffers=True)
            except lmdb.MapResizedError:  # the writer's map has grown since this one was made
                self._env.set_mapsize(0)
                continue
            number = view.id()
            fault = fault_of(path, number)
            if not fault:
                return view
            view.abort()
            if self._env.info()["last_txnid"] == number:
                break
            # A writer has gone on meanwhile: where the tree begins may be overwritten.
        raise self._damaged(f"its tree: {fault}")

    def _fill_short_file(self, path: Path) -> None:
        """Give a file its last pages if they are not there: LMDB does not write those it frees.

        Reading a mapped page that is not there would kill the process; one of zeros is refused.
        """
        needed = (self._env.info()["last_pgno"] + 1) * self._page
        if path.stat().st_size < needed:
            os.truncate(path, needed)

    def _check_format(self, transaction: lmdb.Transaction) -> bool:
        """Compare the file's format with this one, or record it in a new file; say if it is new."""
        wanted = {"format": FORMAT_VERSION, "planes": self._codec.exact.description}
        value = _held(transaction, FORMAT_KEY)
        if not value:
            if transaction.stat()["entries"] or self._read_only:
                raise ValueError(f"{self.directory} holds an LMDB file that is no store")
            transaction.put(FORMAT_KEY, _seal(FORMAT_KEY, json.dumps(wanted).encode()))
            self._next_pack = self._blocks = 0
            transaction.put(_COUNTERS_KEY, self._counters(transaction))
            return True
        try:
            found = json.loads(_unseal(FORMAT_KEY, value, "its format"))
            if not isinstance(found, dict):
                raise ValueError("its format is no object")
        except (CorruptBlockError, ValueError, RecursionError) as error:
            raise self._damaged(error) from None
        if found.get("format") != FORMAT_VERSION:
            raise ValueError(
                f"{self.directory} holds a store of format {found.get('format')}, this program "
                f"reads {FORMAT_VERSION}: use another directory"
            )
        if found != wanted:
            raise OtherBlocksError(
                f"{self.directory} holds blocks of {found.get('planes')}, not of "
                f"{wanted['planes']}: use another directory"
            )
        try:
            self._next_pack, self._blocks, _ = _counted(_held(transaction, _COUNTERS_KEY))
        except CorruptBlockError as error:
            raise self._damaged(error) from None
        return False

    # Changing

    def _commit_packs(self, ids: Ids, packs: Packs) -> Locations:
        locations = np.empty(len(ids), np.int64)

        def plan(pack_bytes: int) -> _Change:
            some = packs if pack_bytes == _PACK_BYTES else packs.cut(pack_bytes)
            entries = []
            first = 0
            for number, (value, count) in enumerate(
                zip(some.values, some.counts, strict=True), self._next_pack
            ):
                key, last = _key(number), first + count
                entries.append((key, value, _seal(key, _int64(ids[first:last]))))
                locations[first:last] = number << INDEX_BITS | np.arange(count)
                first = last
            added = sum(
                self._pages_of(len(value)) + len(members) // 2048 + 1
                for _, value, members in entries
            )

            def change(transaction: lmdb.Transaction) -> None:
                needed = self._require(transaction, added) + _LOST_PAGES
                if self._map_pages < min(needed, self._most_pages):
                    raise _MapTooSmall  # otherwise what is put until it is full is put again
                self._next_pack += len(entries)
                self._blocks += len(ids)
                for key, value, members in entries:
                    transaction.put(key, value, db=self._packs, append=True)
                    transaction.put(key, members, db=self._directory, append=True)

            return change

        what = f"{len(ids)} blocks, {packs.nbytes} B compressed,"
        self._change(plan, self._pages_of(packs.nbytes), what)
        return locations

    def _delete_members(
        self, doomed: list[tuple[int, npt.NDArray[np.int64]]], missing_ok: bool
    ) -> None:
        left: dict[int, int] = {}

        def change(transaction: lmdb.Transaction) -> None:
            for number, places in doomed:
                key = _key(number)
                value = _held(transaction, key, self._directory)
                members = self._members(key, value) if value else np.empty(0, np.int64)
                lost = (places >= len(members)).any() or (members[places] < 0).any()
                if lost and missing_ok:
                    places = places[places < len(members)]
                    places = places[members[places] >= 0]
                    if not len(places):
                        continue
                elif lost:
                    raise KeyError(f"no block is stored in pack {number} at {places.tolist()}")
                members[places] = _DEAD
                self._blocks -= len(places)
                left[number] = int((members >= 0).sum())
                if left[number]:
                    transaction.put(key, _seal(key, _int64(members)), db=self._directory)
                else:
                    transaction.delete(key, db=self._packs)
                    transaction.delete(key, db=self._directory)

        self._change(lambda _: change, 0, f"the deletion of {len(doomed)} packs")
        if self._loose is not None:
            self._loose = {n: live for n, live in (self._loose | left).items() if live}

    def _change(self, plan: Callable[[int], _Change], pages: int, what: str) -> None:
        """Run a change in a transaction of its own, all or nothing, making room if it must.

        plan: returns the change, given how large its packs should be. pages: what it needs.
        """
        if self._read_only:
            raise ValueError(f"the store in {self.directory} was opened to be read only")
        pack_bytes = _PACK_BYTES
        retries = iter(_RETRIED_PACK_BYTES)
        while True:
            try:
                self._commit(plan(pack_bytes))
                return
            except _NoRoom:
                if not self._reclaim(pages):
                    break
            except lmdb.MapFullError:
                # Enough pages are free, but not side by side.
                if self._reclaim(pages):
                    continue
                pack_bytes = next(retries, 0)
                if not pack_bytes:
                    break
                self._release_pages()
            except lmdb.Error as error:
                raise self._write_error(error, what, pages) from None
        raise StoreFullError(
            f"the cold tier is full: no room for {what} in its {self.capacity_bytes} B"
        )

    def _release_pages(self) -> None:
        """Make freed pages usable that a running read or the last transaction may still need."""
        with self._idle:
            running = set(self._reads)
            self._idle.wait_for(lambda: running.isdisjoint(self._reads), _READ_PATIENCE_SECONDS)
        with contextlib.suppress(lmdb.Error):
            self._commit(lambda _: None)

    def _commit(self, change: _Change) -> None:
        """Run a change in a transaction, again in a larger map if it finds no room."""
        counters = self._next_pack, self._blocks
        while True:
            try:
                with self._env.begin(write=True) as transaction:
                    change(transaction)
                    transaction.put(_COUNTERS_KEY, self._counters(transaction))
                return
            except BaseException as error:
                self._next_pack, self._blocks = counters
                if not isinstance(error, (lmdb.MapFullError, _MapTooSmall)) or not self._grow():
                    raise

    def _grow(self) -> bool:
        """Double the map, up to the capacity; False where it is as large as that already."""
        if self._map_pages == self._most_pages:
            return False
        with self._idle:
            # It moves to another address, so nobody may be reading in it. Other processes have maps
            # of their own.
            self._growing = True
            try:
                self._idle.wait_for(lambda: not self._reads)
                pages = min(2 * self._map_pages, self._most_pages)
                self._env.set_mapsize(pages * self._page)
                self._map_pages = pages
            finally:
                self._growing = False
                self._idle.notify_all()
        return True

    def _require(self, transaction: lmdb.Transaction, pages: int) -> int:
        """Refuse to use the reserve; returns how many pages will be in use, at most."""
        needed = self._pages_in_use(transaction) + pages
        if needed > self._writable_pages:
            raise _NoRoom
        return needed

    def _reclaim(self, pages: int) -> bool:
        """Copy packs without their deleted blocks until `pages` are gained; say whether any were.

        Done only when there is no room, because most packs are deleted whole before that.
        """
        if self._loose is None:
            with self._env.begin(db=self._directory) as transaction:
                found = {
                    int.from_bytes(key, "big"): self._members(key, value)
                    for key, value in transaction.cursor()
                }
            self._loose = {
                number: int((members >= 0).sum())
                for number, members in found.items()
                if (members == _DEAD).any()
            }
        gained = 0
        copied_pages = _RECLAIMED_PAGES
        retries = _RECLAIM_RETRIES
        while self._loose and gained < pages and retries:
            shrunk: dict[int, int] = {}
            # In the order of the file, nearly, so that what they leave behind lies side by side; or
            # else the smallest first, which find a place most easily.
            smallest_first = (_RECLAIM_RETRIES - retries) % 2
            key = self._loose.__getitem__ if smallest_first else None
            numbers = sorted(self._loose, key=key)
            try:
                self._commit(partial(self._shrink_some, numbers, copied_pages, shrunk))
            except lmdb.MapFullError:
                copied_pages = 1
                retries -= 1
                self._release_pages()
                continue
            except lmdb.Error as error:
                raise self._write_error(error, "what is left of packs", pages) from None
            for number in shrunk:
                del self._loose[number]
            gained += sum(shrunk.values())
        return gained > 0

    def _shrink_some(
        self,
        numbers: list[int],
        copied_pages: int,
        shrunk: dict[int, int],
        transaction: lmdb.Transaction,
    ) -> None:
        """Shrink packs until so many pages are copied; notes how many pages each gave."""
        for number in numbers:
            before, after = self._shrink(transaction, _key(number))
            shrunk[number] = before - after
            copied_pages -= after
            if copied_pages <= 0:
                return

    def _shrink(self, transaction: lmdb.Transaction, key: bytes) -> tuple[int, int]:
        """Copy a pack without its deleted blocks; returns its pages before and after."""
        members = self._members(key, _held(transaction, key, self._directory))
        pack = memoryview(_held(transaction, key, self._packs))
        frames = [
            bytes(frame_at(pack, 4 * place)) if alive else b""
            for place, alive in enumerate((members >= 0).tolist())
        ]
        (smaller,) = _native.join_frames(frames, [len(frames)])
        members[members == _DEAD] = _GONE
        transaction.put(key, smaller, db=self._packs)
        transaction.put(key, _seal(key, _int64(members)), db=self._directory)
        return self._pages_of(len(pack)), self._pages_of(len(smaller))

    def _counters(self, transaction: lmdb.Transaction) -> bytes:
        counters = self._next_pack, self._blocks, transaction.id()
        return _seal(_COUNTERS_KEY, struct.pack("<QQQ", *counters))

    # Pages

    def _pages_of(self, nbytes: int) -> int:
        return -(-(nbytes + 16) // self._page)

    def _pages_in_use(self, transaction: lmdb.Transaction) -> int:
        pages = 2
        for table in (None, self._packs, self._directory, self._records):
            found = transaction.stat(table) if table else transaction.stat()
            pages += found["branch_pages"] + found["leaf_pages"] + found["overflow_pages"]
        return pages

    # Errors

    @contextlib.contextmanager
    def _operation(self) -> Iterator[None]:
        """Keep the file open until the operation ends."""
        with self._idle:
            if self._closed:
                raise StoreClosedError(f"the cold tier in {self.directory} is closed")
            if os.getpid() != self._pid:
                raise StoreClosedError(
                    f"the cold tier in {self.directory} was opened by another process: a child "
                    "has to open its own"
                )
            caller = threading.get_ident()
            self._operations[caller] += 1
        try:
            yield
        finally:
            with self._idle:
                self._operations[caller] -= 1
                if self._operations[caller] <= 0:  # less where `abandon` has forgotten it
                    del self._operations[caller]
                self._idle.notify_all()

    @contextlib.contextmanager
    def _snapshot(self, buffers: Any = False) -> Iterator[Any]:
        """Read the file as it is now, or was when it was opened to be read only."""
        with self._operation():
            if self._view is not None:
                with self._viewing, self._reading():  # one thread at a time may use a transaction
                    yield self._view
                return
            token = object()
            with self._idle:
                self._idle.wait_for(lambda: not self._growing)
                self._reads[token] = threading.get_ident()
            try:
                with self._reading(), self._env.begin(buffers=buffers) as transaction:
                    yield transaction
            finally:
                self._reads.pop(token, None)
                # `_operation` tells those who wait for it.

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """What LMDB cannot follow is damage that has come since the file was opened."""
        try:
            yield
        except _DAMAGES as error:
            raise self._damaged(error) from None

    def _pack(self, transaction: lmdb.Transaction, number: int) -> memoryview:
        """Return a pack; of no bytes where there is none."""
        return memoryview(transaction.get(_key(number), b"", db=self._packs))

    def _members(self, key: bytes, value: bytes) -> npt.NDArray[np.int64]:
        name = f"the directory of pack {int.from_bytes(key, 'big')}"
        payload = _unseal(key, value, name)
        if len(payload) % 8:
            raise CorruptBlockError(f"{name} is damaged: it has {len(payload)} B")
        return np.frombuffer(payload, "<i8").astype(np.int64)

    def _missing(
        self, ids: Ids, numbers: list[int], places: Locations, sizes: list[int]
    ) -> CorruptBlockError:
        """Find the first block whose place is not there. sizes: of the blocks' packs."""
        for block, number, place, size in zip(ids.tolist(), numbers, places, sizes, strict=True):
            if size < 4 * place + 8:
                return CorruptBlockError(
                    f"block {block} is not on disk where it was written, in pack {number}", block
                )
        raise AssertionError("every block has a place")

    def _damaged(self, error: Exception | str) -> CorruptStoreError:
        return CorruptStoreError(f"the store in {self.directory} is damaged: {error}")

    def _write_error(self, error: lmdb.Error, what: str, pages: int) -> Exception:
        # A write that a full disk cut short is an input/output error to LMDB.
        free = shutil.disk_usage(self.directory).free
        if isinstance(error, lmdb.DiskError) or free < (pages + _RESERVED_PAGES) * self._page:
            return StoreFullError(f"the disk under {self.directory} is full: no room for {what}")
        return WriteFailedError(f"{what} could not be written to {self.directory}: {error}")


def _int64(ids: Ids) -> bytes:
    return ids.astype("<i8").tobytes()


def newest_first(data: mmap.mmap) -> list[int]:
    """Return the numbers that the commits of a file bear, the one first that was made last.

    Damage may have changed the numbers: the counters of a commit have the one it was made with.
    """
    made: dict[int, int] = {}
    for commit in filter(None, commits(data, _COUNTERS_KEY)):
        try:
            made[commit.number] = _counted(commit.value or b"")[2]
        except CorruptBlockError:
            made[commit.number] = -1
    return sorted(made, key=made.__getitem__, reverse=True)


def _fault_of_commits(path: Path) -> str | None:
    """Return what is wrong with the numbers of a file's last two commits; None if nothing is.

    They say which is the last. LMDB takes the larger number, and has no checksum on either.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found = commits(data, _COUNTERS_KEY)
    last = max((commit.number for commit in found if commit), default=0)
    for place, commit in enumerate(found):
        if commit is None:
            continue
        try:
            made = _counted(commit.value or b"")[2]
        except CorruptBlockError as error:
            if commit.number == last:
                return str(error)
            continue  # what was before may be overwritten in part
        if commit.number == last and (made != last or last % 2 != place):
            return f"its last commit has the number {last}, and was made as {made}"
        # After a loss of power there may be a page of a later commit yet, but not of the next one.
        if commit.number < last and made == last + 1:
            return f"commit {made} has the number {commit.number}"
    return None


def _counted(value: bytes) -> tuple[int, int, int]:
    """Return the next number of a pack, the blocks, and the number of the commit."""
    payload = _unseal(_COUNTERS_KEY, value, "the record of its counters")
    if len(payload) != 24:
        raise CorruptBlockError(f"the record of its counters is damaged: it has {len(payload)} B")
    next_pack, blocks, commit = struct.unpack("<QQQ", payload)
    return next_pack, blocks, commit


def planes_of(value: bytes) -> str:
    """Return what a file's format record says of its blocks; CorruptBlockError if it is damaged."""
    planes: str = json.loads(_unseal(FORMAT_KEY, value, "its format"))["planes"]
    return planes


def _key(number: int) -> bytes:
    return number.to_bytes(8, "big")


def _held(transaction: lmdb.Transaction, key: bytes, table: Any = None) -> bytes:
    """Return a value, or b"" where there is none: every value of ours has a checksum at least."""
    return bytes(transaction.get(key, b"", db=table))


def _seal(key: bytes, payload: bytes) -> bytes:
    """Put a checksum over key and payload in front."""
    return _checksum(key, payload) + payload


def _unseal(key: bytes, value: bytes | memoryview, name: str) -> bytes:
    payload = memoryview(value)[8:]
    if _checksum(key, payload) != value[:8]:
        raise CorruptBlockError(f"{name} is damaged: its checksum does not match")
    return bytes(payload)


def _checksum(key: bytes, payload: bytes | memoryview) -> bytes:
    checksum = xxhash.xxh3_64(key)
    checksum.update(payload)
    return checksum.digest()

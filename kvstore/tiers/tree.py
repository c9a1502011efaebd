"""Whether the pages of an LMDB file make sense, and what can be read of them, without LMDB.

LMDB trusts its pages: a damaged one can kill whoever reads it, or have the next write destroy what
is whole. So a store's file is looked at before LMDB follows it: every branch and leaf, the heads of
the large values, the list of free pages. Never writes, and never looks into a value.

The format is that of LMDB 0.9 (mdb.c: MDB_page, MDB_meta, MDB_db, MDB_node).
"""

from __future__ import annotations

import contextlib
import mmap
import struct
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

MOST_UNWRITTEN = 1024
"""Pages at the end that a file may lack: free ones."""

_MAGIC, _VERSION = 0xBEEFC0DE, 1
_BRANCH, _LEAF, _OVERFLOW, _META = 0x01, 0x02, 0x04, 0x08
_BIG, _TABLE = 0x01, 0x02
_NUMBERS = 0x08  # of a table: its keys are numbers
_HEAD = 16
_LONGEST_KEY = 511
_NOTHING = 2**64 - 1

_head = struct.Struct("<QHHHH").unpack_from  # number, -, flags, lower, upper
_overflow = struct.Struct("<QHHI").unpack_from  # number, -, flags, pages
_meta = struct.Struct("<IIQQ").unpack_from  # magic, version, address, map size
_table = struct.Struct(
    "<IHHQQQQQ"
)  # page size, flags, depth, branches, leaves, overflow, entries, root
_node = struct.Struct("<HHHH").unpack_from  # size or page: low, high; flags or page: top; key size
_number = struct.Struct("<Q").unpack_from
_END_OF_META = _HEAD + 24 + 2 * _table.size + 16


Entries = list[tuple[bytes, int, int]]
"""Of a table: each key, where its value begins in the file, and its size."""


class Commit(NamedTuple):
    """One of the last two commits of a file."""

    number: int
    value: bytes | None
    """Of a key in the table without a name, as it was then; None where it cannot be read."""


class _Damage(Exception):
    """What does not make sense."""


class _Table(NamedTuple):
    page_size: int
    flags: int
    depth: int
    branches: int
    leaves: int
    overflow: int
    entries: int
    root: int


class _Meta(NamedTuple):
    page_size: int
    free: _Table
    main: _Table
    last: int
    transaction: int


def fault_of(path: Path, transaction: int | None = None, *, deep: bool = True) -> str | None:
    """Return what is wrong with the tree of a data.mdb; None if nothing is.

    transaction: which of the last two commits to look at, kept in place by a reader; None: the
    last, while nobody writes. deep: False looks at where the tree begins only, whoever writes.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            tree = _Tree(data, transaction)
            if deep:
                tree.check()
        except _Damage as damage:
            return str(damage)
    return None


def commits(data: mmap.mmap, key: bytes) -> list[Commit | None]:
    """Return the commits that the first two pages of a file name, in this order; see `Commit`.

    A page that names none, or the one of an empty file, is None.
    """
    found: list[Commit | None] = []
    for meta in _metas(data):
        if meta is None or meta.main.root == _NOTHING:
            found.append(None)
            continue
        entries: Entries = []
        with contextlib.suppress(_Damage):
            tree = _Tree(data, meta.transaction, [])
            tree.walk(meta.main, entries=entries, tables=[])
        values = [data[at : at + size] for name, at, size in entries if name == key]
        found.append(Commit(meta.transaction, values[0] if values else None))
    return found


def readable(
    data: mmap.mmap, numbers: Sequence[int] = ()
) -> tuple[dict[bytes, Entries], list[str]]:
    """Return what can be read of a damaged file: the entries of its tables, and what cannot, why.

    data: of the file, while nobody writes. numbers: of the commits to try, the last one first, by
    default as the file says. The table without a name has the name b"". An entry is one of the
    first of these commits whose tables can be found, but nothing says that its value is whole.
    """
    lost: list[str] = []
    metas = sorted((meta.transaction for meta in _metas(data) if meta), reverse=True)
    for transaction in numbers or metas:
        try:
            tree = _Tree(data, transaction, lost)
        except _Damage as damage:
            lost.append(str(damage))
            continue
        main: Entries = []
        tables: list[tuple[bytes, int, int]] = []
        tree.walk(tree.meta.main, entries=main, tables=tables)
        if not tables:
            continue
        found = {b"": sorted(main)}
        for name, at, _ in tables:
            entries: Entries = []
            tree.walk(_Table(*_table.unpack_from(data, at)), entries=entries)
            found[name] = sorted(entries)
        return found, lost
    return {}, lost or ["no page says where its tree begins"]


def _metas(data: mmap.mmap) -> list[_Meta | None]:
    """Return what the first two pages say; None of one that is not what it should be."""
    first = _meta_at(data, 0)
    return [first, _meta_at(data, first.page_size if first else 4096)]


def _meta_at(data: mmap.mmap, start: int) -> _Meta | None:
    if len(data) < start + _END_OF_META:
        return None
    if not _head(data, start)[2] & _META or _meta(data, start + _HEAD)[:2] != (_MAGIC, _VERSION):
        return None
    at = start + _HEAD + 24
    free, main = (_Table(*_table.unpack_from(data, at + i * _table.size)) for i in range(2))
    last, transaction = struct.unpack_from("<QQ", data, at + 2 * _table.size)
    size = free.page_size
    if size < 512 or size & (size - 1) or size > 65536:
        return None
    return _Meta(size, free, main, last, transaction)


class _Tree:
    """The pages of a file, of which each is seen at most once.

    lost: takes what makes no sense, which is then left out; None: it raises _Damage.
    """

    def __init__(
        self, data: mmap.mmap, transaction: int | None, lost: list[str] | None = None
    ) -> None:
        self._data = data
        self._lost = lost
        metas = [meta for meta in _metas(data) if meta]
        found = [meta for meta in metas if transaction in (None, meta.transaction)]
        if not found:
            raise _Damage("no page says where its tree begins")
        self.meta = max(found, key=lambda meta: meta.transaction)
        self._size = self.meta.page_size
        there = len(data) // self._size
        pages = min(self.meta.last + 1, there)
        # LMDB does not write pages that it has freed at once, so the last ones may not be there.
        self._missing = self.meta.last + 1 - pages
        if self._missing > MOST_UNWRITTEN:
            self._complain(f"it has {there} pages of {self.meta.last + 1}")
        self._seen = bytearray(pages)
        self._seen[:2] = b"\1\1"

    def _complain(self, damage: _Damage | str) -> None:
        if self._lost is None:
            raise damage if isinstance(damage, _Damage) else _Damage(damage)
        self._lost.append(str(damage))

    def check(self) -> None:
        """Raise _Damage at the first page that makes no sense."""
        tables: Entries = []
        self.walk(self.meta.main, tables=tables)
        for _, at, _ in tables:
            self.walk(_Table(*_table.unpack_from(self._data, at)))
        free: Entries = []
        self.walk(self.meta.free, entries=free, numbers=True)
        missing: set[int] = set()
        for _, at, size in free:
            missing |= self._free_pages(at, size)
        if len(missing) < self._missing:
            raise _Damage(f"it has {len(self._seen)} pages of {self.meta.last + 1}")

    def _free_pages(self, at: int, size: int) -> set[int]:
        """A list of free pages: their count, then their numbers, none of which is in use.

        Returns those that the file does not have.
        """
        missing = set()
        count = _number(self._data, at)[0] if size >= 8 else -1
        if size < 8 * (count + 1) or count < 0:
            raise _Damage("a list of free pages has another length")
        numbers = struct.unpack_from(f"<{count}Q", self._data, at + 8)
        # LMDB takes those between two of a list for theirs, too, if the two are as far apart.
        if any(a <= b for a, b in pairwise(numbers)):
            raise _Damage("a list of free pages is out of order")
        for page in numbers:
            # Those at the end of the file may never have been written.
            if page > self.meta.last:
                raise _Damage(f"page {page} is free and behind the last one")
            if page < 2 or (page < len(self._seen) and self._seen[page]):
                raise _Damage(f"page {page} is in use and free")
            if page < len(self._seen):
                self._seen[page] = 1
            else:
                missing.add(page)
        return missing

    def walk(
        self,
        table: _Table,
        entries: Entries | None = None,
        tables: Entries | None = None,
        numbers: bool = False,
    ) -> None:
        """Look at one table. entries: takes what it has; tables: takes where the records of others
        lie; numbers: of free pages, whose keys are numbers."""
        # Of another kind of table LMDB expects other pages, and dies where there are none.
        if table.flags != (_NUMBERS if numbers else 0):
            self._complain("a table is of another kind")
        counts = [0, 0, 0, 0]  # branches, leaves, overflow pages, entries
        todo: list[tuple[int, int, bytes | None, bytes | None]] = []
        if table.root != _NOTHING:
            todo.append((table.root, 1, None, None))
        while todo:
            page, depth, low, high = todo.pop()
            try:
                flags, nodes = self._page(page, depth, table.depth, low, high, numbers)
            except _Damage as damage:
                self._complain(damage)
                continue
            if flags == _BRANCH:
                counts[0] += 1
                keys = [low, *(key for key, *_ in nodes[1:]), high]
                for i, (_, _, below, _) in enumerate(nodes):
                    todo.append((below, depth + 1, keys[i], keys[i + 1]))
                continue
            counts[1] += 1
            for key, at, size, kind in nodes:
                try:
                    at, pages = self._entry(page, at, size, kind, tables is not None)
                except _Damage as damage:
                    self._complain(damage)
                    continue
                counts[2] += pages
                counts[3] += 1
                if kind == _TABLE:
                    assert tables is not None
                    tables.append((key, at, size))
                elif entries is not None:
                    entries.append((key, at, size))
        if counts != [table.branches, table.leaves, table.overflow, table.entries]:
            self._complain(
                f"a table has {counts[3]} entries in {sum(counts[:3])} pages, and says "
                f"{table.entries} in {table.branches + table.leaves + table.overflow}"
            )

    def _page(
        self,
        page: int,
        depth: int,
        depths: int,
        low: bytes | None,
        high: bytes | None,
        numbers: bool,
    ) -> tuple[int, list[tuple[bytes, int, int, int]]]:
        """Return a page's kind and entries, which belong between two keys."""
        flags, nodes = self._nodes(page)
        if flags == _BRANCH and (len(nodes) < 2 or depth >= depths):
            raise _Damage(f"page {page} is a branch out of place")
        if flags == _LEAF and depth != depths:
            raise _Damage(f"page {page} is a leaf out of place")
        self._check_order(page, flags, [key for key, *_ in nodes], low, high, numbers)
        return flags, nodes

    def _entry(self, page: int, at: int, size: int, kind: int, tables: bool) -> tuple[int, int]:
        """Return where an entry's value begins, and how many pages of its own it has."""
        if kind & _TABLE:
            if not tables or kind != _TABLE:
                raise _Damage(f"page {page} has a table within a table")
            if size != _table.size:
                raise _Damage("a table's record has another size")
            return at, 0
        if kind == _BIG:
            return self._large(page, at, size)
        if kind:
            raise _Damage(f"page {page} has an entry of an unknown kind")
        return at, 0

    def _check_order(
        self,
        page: int,
        flags: int,
        keys: list[bytes],
        low: bytes | None,
        high: bytes | None,
        numbers: bool,
    ) -> None:
        def ordered(key: bytes) -> bytes:
            return key[::-1] if numbers else key  # little-endian numbers

        found = [ordered(key) for key in keys[1 if flags == _BRANCH else 0 :]]
        if low is not None:
            low = ordered(low)
            if found and (found[0] <= low if flags == _BRANCH else found[0] < low):
                raise _Damage(f"page {page} has keys that belong before it")
        if high is not None and found and found[-1] >= ordered(high):
            raise _Damage(f"page {page} has keys that belong behind it")
        if any(a >= b for a, b in pairwise(found)):
            raise _Damage(f"page {page} has keys out of order")

    def _take(self, page: int, pages: int = 1) -> int:
        """Note that pages are in use; return where the first begins."""
        if page < 2 or page + pages > len(self._seen):
            raise _Damage(f"page {page} is not in the file")
        if any(self._seen[page : page + pages]):
            raise _Damage(f"page {page} is in use twice")
        self._seen[page : page + pages] = b"\1" * pages
        return page * self._size

    def _nodes(self, page: int) -> tuple[int, list[tuple[bytes, int, int, int]]]:
        """Return a page's kind and entries: key, where its value begins, its size or the page below
        it, and its flags."""
        data, size = self._data, self._size
        start = self._take(page)
        number, _, flags, lower, upper = _head(data, start)
        if number != page or flags not in (_BRANCH, _LEAF):
            raise _Damage(f"page {page} is not what it should be")
        if not _HEAD < lower <= upper <= size or lower % 2:
            raise _Damage(f"page {page} has a head that makes no sense")
        count = (lower - _HEAD) // 2
        nodes = []
        extents = []
        for place in struct.unpack_from(f"<{count}H", data, start + _HEAD):
            if not upper <= place <= size - 8:
                raise _Damage(f"page {page} has an entry that is not in it")
            low, high, kind, key_size = _node(data, start + place)
            if key_size > _LONGEST_KEY:
                raise _Damage(f"page {page} has a key of {key_size} B")
            at = place + 8 + key_size
            if flags == _BRANCH:
                below, kind, end = low | high << 16 | kind << 32, 0, at
            else:
                below = low | high << 16
                end = at + (8 if kind & _BIG else below)
            if end > size:
                raise _Damage(f"page {page} has an entry that does not end in it")
            extents.append((place, end + end % 2))
            key = data[start + place + 8 : start + at]
            nodes.append((key, start + at, below, kind))
        # Side by side from `upper` to the end: whoever deletes one moves what lies before it.
        extents.sort()
        if [upper, *(end for _, end in extents)] != [*(place for place, _ in extents), size]:
            raise _Damage(f"page {page} has entries that overlap")
        return flags, nodes

    def _large(self, page: int, at: int, size: int) -> tuple[int, int]:
        """Look at the head of a value in pages of its own; return where it begins, and how many."""
        (number,) = _number(self._data, at)
        if not 2 <= number < len(self._seen):
            raise _Damage(f"page {page} names page {number}, which is not in the file")
        found, _, flags, pages = _overflow(self._data, number * self._size)
        if found != number or flags != _OVERFLOW or pages * self._size < _HEAD + size:
            raise _Damage(f"page {number} is not the value that page {page} says")
        return self._take(number, pages) + _HEAD, pages

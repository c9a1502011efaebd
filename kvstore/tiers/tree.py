"""Whether the pages of an LMDB file make sense, read without LMDB.

LMDB trusts its pages: a damaged one can kill whoever reads it, or have the next write destroy what
is whole. So a store's file is looked at before LMDB follows it: every branch and leaf, the heads of
the large values, the list of free pages. Never writes, and never looks into a value.

The format is that of LMDB 0.9 (mdb.c: MDB_page, MDB_meta, MDB_db, MDB_node).
"""

from __future__ import annotations

import mmap
import struct
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

_MAGIC, _VERSION = 0xBEEFC0DE, 1
_BRANCH, _LEAF, _OVERFLOW, _META = 0x01, 0x02, 0x04, 0x08
_BIG, _TABLE = 0x01, 0x02
_HEAD = 16
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


def fault_of(path: Path, transaction: int | None = None) -> str | None:
    """Return what is wrong with the tree of a data.mdb; None if nothing is.

    transaction: which of the last two commits to look at, kept in place by a reader; None: the
    last, while nobody writes.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            _Tree(data, transaction).check()
        except _Damage as damage:
            return str(damage)
    return None


class _Tree:
    """The pages of a file, of which each is seen at most once."""

    def __init__(self, data: mmap.mmap, transaction: int | None) -> None:
        self._data = data
        first = self._meta(0)
        size = first.page_size if first else 4096
        metas = [meta for meta in (first, self._meta(size)) if meta]
        if transaction is not None:
            metas = [meta for meta in metas if meta.transaction == transaction]
        if not metas:
            raise _Damage("no page says where its tree begins")
        self._meta_page = max(metas, key=lambda meta: meta.transaction)
        self._size = self._meta_page.page_size
        pages = min(self._meta_page.last + 1, len(data) // self._size)
        if self._meta_page.last >= pages:
            raise _Damage(f"it has {pages} pages of {self._meta_page.last + 1}")
        self._seen = bytearray(pages)
        self._seen[:2] = b"\1\1"
        self._values: list[tuple[bytes, int, int]] = []

    def _meta(self, start: int) -> _Meta | None:
        data = self._data
        if len(data) < start + _END_OF_META:
            return None
        if not _head(data, start)[2] & _META or _meta(data, start + _HEAD)[:2] != (
            _MAGIC,
            _VERSION,
        ):
            return None
        at = start + _HEAD + 24
        free, main = (_Table(*_table.unpack_from(data, at + i * _table.size)) for i in range(2))
        last, transaction = struct.unpack_from("<QQ", data, at + 2 * _table.size)
        size = free.page_size
        if size < 512 or size & (size - 1) or size > 65536:
            return None
        return _Meta(size, free, main, last, transaction)

    def check(self) -> None:
        """Raise _Damage at the first page that makes no sense."""
        for at, size in self._tables(self._meta_page.main):
            if size != _table.size:
                raise _Damage("a table's record has another size")
            self._walk(_Table(*_table.unpack_from(self._data, at)))
        self._walk(self._meta_page.free, numbers=True)
        for _, at, size in self._values:
            self._free_pages(at, size)

    def _tables(self, main: _Table) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        self._walk(main, tables=found)
        return found

    def _free_pages(self, at: int, size: int) -> None:
        """A list of free pages: their count, then their numbers, none of which is in use."""
        count = _number(self._data, at)[0] if size >= 8 else -1
        if size < 8 * (count + 1) or count < 0:
            raise _Damage("a list of free pages has another length")
        for page in struct.unpack_from(f"<{count}Q", self._data, at + 8):
            # Those behind the last page were never written.
            if page < 2 or (page < len(self._seen) and self._seen[page]):
                raise _Damage(f"page {page} is in use and free")
            if page < len(self._seen):
                self._seen[page] = 1

    def _walk(
        self,
        table: _Table,
        tables: list[tuple[int, int]] | None = None,
        numbers: bool = False,
    ) -> None:
        """Look at one table. tables: takes where the records of others lie; numbers: of free pages,
        whose keys are numbers."""
        counts = [0, 0, 0, 0]  # branches, leaves, overflow pages, entries
        todo: list[tuple[int, int, bytes | None, bytes | None]] = []
        if table.root != _NOTHING:
            todo.append((table.root, 1, None, None))
        while todo:
            page, depth, low, high = todo.pop()
            flags, nodes = self._nodes(page)
            keys = [key for key, *_ in nodes]
            if flags == _BRANCH:
                counts[0] += 1
                keys[0] = low if low is not None else b""
                if len(nodes) < 2 or depth >= table.depth:
                    raise _Damage(f"page {page} is a branch out of place")
            else:
                counts[1] += 1
                counts[3] += len(nodes)
                if depth != table.depth:
                    raise _Damage(f"page {page} is a leaf out of place")
            self._check_order(page, flags, keys, low, high, numbers)
            for i, (_, at, size, kind) in enumerate(nodes):
                if flags == _BRANCH:
                    above = keys[i + 1] if i + 1 < len(keys) else high
                    todo.append((size, depth + 1, keys[i] if i else low, above))
                    continue
                if kind & _TABLE:
                    if tables is None or kind != _TABLE:
                        raise _Damage(f"page {page} has a table within a table")
                    tables.append((at, size))
                elif kind == _BIG:
                    at, pages = self._large(page, at, size)
                    counts[2] += pages
                elif kind:
                    raise _Damage(f"page {page} has an entry of an unknown kind")
                if numbers:
                    self._values.append((keys[i], at, size))
        if counts != [table.branches, table.leaves, table.overflow, table.entries]:
            raise _Damage(
                f"a table has {counts[3]} entries in {sum(counts[:3])} pages, and says "
                f"{table.entries} in {table.branches + table.leaves + table.overflow}"
            )

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
        for place in struct.unpack_from(f"<{count}H", data, start + _HEAD):
            if not upper <= place <= size - 8:
                raise _Damage(f"page {page} has an entry that is not in it")
            low, high, kind, key_size = _node(data, start + place)
            at = place + 8 + key_size
            if flags == _BRANCH:
                below, kind, end = low | high << 16 | kind << 32, 0, at
            else:
                below = low | high << 16
                end = at + (8 if kind & _BIG else below)
            if end > size:
                raise _Damage(f"page {page} has an entry that does not end in it")
            key = data[start + place + 8 : start + at]
            nodes.append((key, start + at, below, kind))
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

"""The LMDB file of a store: of bounded size, and opened only where its pages make sense.

Owns the file and its map, and who is at it: threads that read, one that changes it, a map that must
not grow under them. Knows its tables by name, and nothing of what is in them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lmdb

from kvstore.errors import CorruptStoreError, StoreClosedError, StoreFullError, WriteFailedError
from kvstore.tiers import lock
from kvstore.tiers.commits import fault_of_commits
from kvstore.tiers.tree import fault_of

Change = Callable[[lmdb.Transaction], None]

# Pages that writes leave alone, so that a full file can still delete and reclaim: both copy pages
# before they free any. One page in 256 more, for LMDB's own list of free pages at its longest.
_RESERVED_PAGES = 64
# A new file's map: it doubles whenever it is full. A map as large as the capacity would do, but not
# every system gives out address space for nothing.
_FIRST_MAP_PAGES = 256
_LOST_PAGES = 32  # free ones that are no use: those of the commit before, holes
_POLL_SECONDS = 0.002
_MOST_READERS = 126  # who have the file open; 64 bytes each in lock.mdb, which is two pages then
_TRIES = 100  # to look at a tree between two commits of another process

_DAMAGES = (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.InvalidError, lmdb.PanicError)


class NoRoom(Exception):
    """A change would use pages that are kept for deleting."""


class MapTooSmall(Exception):
    """A change needs more pages than the map has, and has put nothing yet."""


class Room:
    """What `capacity_bytes` are in pages.

    page: bytes of one. most: pages of the file, at most. writable: those that writes may use.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.page = os.sysconf("SC_PAGE_SIZE")
        self.most = (capacity_bytes - self._lock_bytes) // self.page
        self.writable = self.most - _RESERVED_PAGES - self.most // 256

    def pages_of(self, nbytes: int) -> int:
        """Pages of a value of so many bytes."""
        return -(-(nbytes + 16) // self.page)

    def least_for(self, pages: int) -> int:
        """The capacity in bytes with which so many pages are writable."""
        return (pages + _RESERVED_PAGES + 2) * 257 // 256 * self.page + self._lock_bytes

    @property
    def _lock_bytes(self) -> int:
        return 2 * self.page


class LmdbFile:
    """Tables in a file in a directory, read and changed in transactions.

    tables: LMDB's handle of each, in the order of their names. Any thread may read at any time;
    changes are made one at a time.
    """

    def __init__(
        self,
        directory: Path,
        room: Room,
        names: Sequence[bytes],
        recognize: Callable[[lmdb.Transaction], bool],
        *,
        durability: str,
        read_only: bool,
    ) -> None:
        """Open it, made if it is not there, and lock the directory if it is to be changed.

        names: of its tables. recognize: looks into the table without a name, raises if it is not
        what is expected, and says whether there is nothing yet. Raises what `DiskTier` does.
        """
        self.directory = directory
        self.room = room
        self._read_only = read_only
        self._pid = os.getpid()
        self._idle = threading.Condition()
        self._operations: Counter[int] = Counter()  # of each thread, by its ident
        self._growing = False
        self._reads: dict[object, int] = {}  # a token each, and whose it is
        self._view: lmdb.Transaction | None = None
        self._viewing = threading.RLock()
        self._closed = False
        self._map_pages = 0
        self._env: lmdb.Environment
        self.tables: list[Any] = []
        self._hold = None if read_only else lock.hold(directory)
        try:
            self._open(names, recognize, durability)
        except BaseException:
            if self._hold is not None:
                lock.let_go(self._hold)
            raise

    # Reading and changing

    @contextlib.contextmanager
    def operation(self) -> Iterator[None]:
        """Keep the file open until the operation ends."""
        with self._idle:
            caller = self._begin()
        try:
            yield
        finally:
            with self._idle:
                self._end(caller)

    @contextlib.contextmanager
    def snapshot(self, buffers: Any = False) -> Iterator[Any]:
        """Read the file as it is now, or was when it was opened to be read only.

        An operation, too. CorruptStoreError where LMDB cannot follow it: damage that has come since
        it was opened.
        """
        # All in one: few blocks are read in little more time than managers within managers take.
        token = object()
        with self._idle:
            while self._growing:
                self._require_open()
                self._idle.wait()
            caller = self._begin()
            if self._view is None:
                self._reads[token] = caller
        try:
            if self._view is not None:
                with self._viewing:  # one thread at a time may use a transaction
                    yield self._view
            else:
                with self._env.begin(buffers=buffers) as transaction:
                    yield transaction
        except _DAMAGES as error:
            raise damaged(self.directory, error) from None
        finally:
            with self._idle:
                self._reads.pop(token, None)
                self._end(caller)

    def _begin(self) -> int:
        """Count an operation; the caller holds `_idle` and sees to it that `_end` is called."""
        self._require_open()
        caller = threading.get_ident()
        self._operations[caller] += 1
        return caller

    def _require_open(self) -> None:
        if self._closed:
            raise StoreClosedError(f"the cold tier in {self.directory} is closed")
        if os.getpid() != self._pid:
            raise StoreClosedError(
                f"the cold tier in {self.directory} was opened by another process: a child "
                "has to open its own"
            )

    def _end(self, caller: int) -> None:
        self._operations[caller] -= 1
        if self._operations[caller] <= 0:  # less where `abandon` has forgotten it
            del self._operations[caller]
        self._idle.notify_all()

    def commit(self, change: Change) -> None:
        """Run a change in a transaction, again in a larger map if it finds no room.

        The caller keeps others from it meanwhile. lmdb.MapFullError where the map is as large as it
        may be; nothing has changed then, whatever is raised.
        """
        while True:
            try:
                with self._env.begin(write=True) as transaction:
                    change(transaction)
                return
            except (lmdb.MapFullError, MapTooSmall):
                if not self._grow():
                    raise

    def require(self, transaction: lmdb.Transaction, pages: int, *, early: bool = False) -> None:
        """Refuse to use the reserve for so many pages more: NoRoom.

        early: also where the map is too small, before anything is put: MapTooSmall. What is put
        until it is full would be put again.
        """
        needed = self.pages_in_use(transaction) + pages
        if needed > self.room.writable:
            raise NoRoom
        if early and self._map_pages < min(needed + _LOST_PAGES, self.room.most):
            raise MapTooSmall

    def await_readers(self, until: float) -> bool:
        """Wait until nobody reads what was before the last commit, here or in another process.

        Pages that were freed since are of no use while somebody does. until: of time.monotonic();
        returns False where somebody still does then.
        """
        while self._outdated():
            if time.monotonic() >= until:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def _outdated(self) -> bool:
        """Whether somebody reads what was before the last commit."""
        self._env.reader_check()  # those of killed processes go
        rows = [line.split() for line in self._env.readers().splitlines()]
        reading = [int(row[2]) for row in rows if len(row) == 3 and row[2].isdigit()]
        last: int = self._env.info()["last_txnid"]
        return min(reading, default=last) < last

    def _grow(self) -> bool:
        """Double the map, up to the capacity; False where it is as large as that already."""
        if self._map_pages == self.room.most:
            return False
        with self._idle:
            # It moves to another address, so nobody may be reading in it. Other processes have maps
            # of their own.
            self._growing = True
            try:
                self._idle.wait_for(lambda: not self._reads)
                pages = min(2 * self._map_pages, self.room.most)
                self._env.set_mapsize(pages * self.room.page)
                self._map_pages = pages
            finally:
                self._growing = False
                self._idle.notify_all()
        return True

    # Sizes

    @property
    def nbytes(self) -> int:
        """Bytes of the files as they are."""
        return sum((self.directory / name).stat().st_size for name in ("data.mdb", "lock.mdb"))

    def pages_in_use(self, transaction: lmdb.Transaction) -> int:
        """Pages that are not free."""
        pages = 2
        for table in (None, *self.tables):
            found = transaction.stat(table) if table else transaction.stat()
            pages += found["branch_pages"] + found["leaf_pages"] + found["overflow_pages"]
        return pages

    def write_error(self, error: lmdb.Error, what: str, pages: int) -> Exception:
        """Return what to raise where LMDB could not write `what`, which needs so many pages."""
        # A write that a full disk cut short is an input/output error to LMDB.
        free = shutil.disk_usage(self.directory).free
        if isinstance(error, lmdb.DiskError) or free < (pages + _RESERVED_PAGES) * self.room.page:
            return StoreFullError(f"the disk under {self.directory} is full: no room for {what}")
        return WriteFailedError(f"{what} could not be written to {self.directory}: {error}")

    # Closing

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
        """Let running operations end, write out what is left and close the file."""
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

    def _open(
        self,
        names: Sequence[bytes],
        recognize: Callable[[lmdb.Transaction], bool],
        durability: str,
    ) -> None:
        path, room = self.directory / "data.mdb", self.room
        held = path.stat().st_size if path.exists() else 0
        if held > room.most * room.page and not self._read_only:
            raise ValueError(
                f"{self.directory} holds {held} B already: its capacity cannot be "
                f"{room.capacity_bytes} B"
            )
        # Before LMDB goes by what it says. An empty one was left by who was killed as he made it.
        if held and (fault := fault_of(path, deep=not self._read_only)):
            raise damaged(self.directory, f"its tree: {fault}")
        self._map_pages = max(_FIRST_MAP_PAGES, held // room.page)
        if not self._read_only:
            self._map_pages = min(self._map_pages, room.most)
        try:
            self._env = lmdb.open(
                str(self.directory),
                map_size=self._map_pages * room.page,
                max_dbs=len(names),
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
            raise damaged(self.directory, error) from None
        except lmdb.ReadersFullError:
            raise ValueError(
                f"the store in {self.directory} has as many readers as it takes ({_MOST_READERS:,})"
            ) from None
        except (lmdb.Error, OSError) as error:
            raise ValueError(f"cannot open a store in {self.directory}: {error}") from None
        try:
            # Those of killed processes go. Everybody sees to it, so that they never fill the table.
            self._env.reader_check()
            if self._read_only:
                self._view = self._whole_view(path)
                self._open_tables(names, self._view)
                recognize(self._view)
            else:
                self._fill_short_file(path)
                with self._env.begin(write=True) as transaction:
                    self._open_tables(names, transaction, create=recognize(transaction))
            if held:
                self._check_commits(path)
        except lmdb.Error as error:
            self._env.close()
            raise damaged(self.directory, error) from None
        except BaseException:
            self._env.close()
            raise

    def _check_commits(self, path: Path) -> None:
        """Refuse a file that does not say which of its commits is the last one."""
        fault: str | None = None
        # Where another process writes, what is read may be of several moments.
        for _ in range(_TRIES if self._read_only else 1):
            fault = fault_of_commits(path)
            if not fault:
                return
        raise damaged(self.directory, f"its tree: {fault}")

    def _open_tables(
        self, names: Sequence[bytes], transaction: lmdb.Transaction, create: bool = False
    ) -> None:
        self.tables = [self._env.open_db(name, txn=transaction, create=create) for name in names]

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
        raise damaged(self.directory, f"its tree: {fault}")

    def _fill_short_file(self, path: Path) -> None:
        """Give a file its last pages if they are not there: LMDB does not write those it frees.

        Reading a mapped page that is not there would kill the process; one of zeros is refused.
        """
        needed = (self._env.info()["last_pgno"] + 1) * self.room.page
        if path.stat().st_size < needed:
            os.truncate(path, needed)


def damaged(directory: Path, error: Exception | str) -> CorruptStoreError:
    """Return what to raise where the structure of a file is damaged."""
    return CorruptStoreError(f"the store in {directory} is damaged: {error}")


def held(transaction: lmdb.Transaction, key: bytes, table: Any = None) -> bytes:
    """Return a value, or b"" where there is none: every value of ours has a checksum at least."""
    return bytes(transaction.get(key, b"", db=table))

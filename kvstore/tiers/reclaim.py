"""Room that deleted blocks leave in packs: when a file is full, packs are copied without them.

Owns which packs have deleted blocks. Never decides when: most packs are deleted whole before that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import lmdb

from kvstore import _native
from kvstore.tiers.lmdb_file import Change, LmdbFile, held
from kvstore.tiers.pack import DEAD, GONE, frame_at, key_of, members_of, sealed_members

_COPIED_PAGES = 16  # in one transaction
_RETRIES = 4


class Reclaimer:
    """Shrinks packs. Whoever calls it keeps others from changing the file meanwhile."""

    def __init__(
        self, file: LmdbFile, packs: Any, directory: Any, commit: Callable[[Change], None]
    ) -> None:
        """packs, directory: LMDB's handles of the tables."""
        self._file = file
        self._packs = packs
        self._directory = directory
        self._commit = commit
        # Packs with deleted blocks in them -> how many others they have; None until it is needed.
        self._loose: dict[int, int] | None = None

    def note(self, left: Mapping[int, int]) -> None:
        """Hear that blocks of packs were deleted, and how many others each has."""
        if self._loose is not None:
            self._loose = {n: live for n, live in (self._loose | dict(left)).items() if live}

    def gain(self, pages: int, until: float) -> bool:
        """Shrink packs until `pages` are gained; say whether any were.

        until: of time.monotonic(), to wait for those who may see the pages that are freed. Where
        they do not end, nothing would be gained, and what is kept for deletions used up.
        """
        if not pages:
            return False
        loose = self._find()
        gained = 0
        copied_pages = _COPIED_PAGES
        retries = _RETRIES
        while loose and gained < pages and retries and self._file.await_readers(until):
            shrunk: dict[int, int] = {}
            # In the order of the file, nearly, so that what they leave behind lies side by side; or
            # else the smallest first, which find a place most easily.
            smallest_first = (_RETRIES - retries) % 2
            numbers = sorted(loose, key=loose.__getitem__ if smallest_first else None)
            try:
                self._commit(partial(self._shrink_some, numbers, copied_pages, shrunk))
            except lmdb.MapFullError:
                copied_pages = 1
                retries -= 1
                self.release_pages(until)
                continue
            except lmdb.Error as error:
                raise self._file.write_error(error, "what is left of packs", pages) from None
            for number in shrunk:
                del loose[number]
            gained += sum(shrunk.values())
        return gained > 0

    def release_pages(self, until: float) -> None:
        """Make freed pages usable that a running read or the last transaction may still need."""
        self._file.await_readers(until)
        with contextlib.suppress(lmdb.Error):
            self._commit(lambda _: None)

    def _find(self) -> dict[int, int]:
        if self._loose is None:
            with self._file.snapshot() as transaction:
                found = {
                    int.from_bytes(key, "big"): members_of(key, value)
                    for key, value in transaction.cursor(db=self._directory)
                }
            self._loose = {
                number: int((members >= 0).sum())
                for number, members in found.items()
                if (members == DEAD).any()
            }
        return self._loose

    def _shrink_some(
        self,
        numbers: list[int],
        copied_pages: int,
        shrunk: dict[int, int],
        transaction: lmdb.Transaction,
    ) -> None:
        """Shrink packs until so many pages are copied; notes how many pages each gave."""
        for number in numbers:
            before, after = self._shrink(transaction, key_of(number))
            shrunk[number] = before - after
            copied_pages -= after
            if copied_pages <= 0:
                return

    def _shrink(self, transaction: lmdb.Transaction, key: bytes) -> tuple[int, int]:
        """Copy a pack without its deleted blocks; returns its pages before and after."""
        value = held(transaction, key, self._directory)
        if not value:  # it went, and Ctrl-C came before `note`
            return 0, 0
        members = members_of(key, value)
        pack = memoryview(held(transaction, key, self._packs))
        frames = [
            bytes(frame_at(pack, 4 * place)) if alive else b""
            for place, alive in enumerate((members >= 0).tolist())
        ]
        (smaller,) = _native.join_frames(frames, [len(frames)])
        members[members == DEAD] = GONE
        transaction.put(key, smaller, db=self._packs)
        transaction.put(key, sealed_members(key, members), db=self._directory)
        pages_of = self._file.room.pages_of
        return pages_of(len(pack)), pages_of(len(smaller))
